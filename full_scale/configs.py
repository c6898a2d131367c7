"""
configs.py: the sizes of a published model, from its config.json or from architectures.json.

Three architectures are known here: LLaDA-8B (dense), LLaDA-MoE, and LLaDA2.0 / LLaDA2.1. Each calls
its sizes and its tensors by names of its own. architectures.json, beside this file, says how:

  architectures.X.fixed     fields of BackboneConfig that are the same in all models of this kind
  architectures.X.sizes     our field -> the setting of config.json that it is read from
  architectures.X.switches  setting of config.json -> the values it may have, if it is there at all
  architectures.X.read      settings that are read below, each in a way of its own
  architectures.X.modules   our module -> the published one; {i}: number of the layer, {x}: expert
  ignored                   why -> settings that do not change what a forward pass gives
  backbones.X               a published model: where it is on the hub, and its config.json in short

`read_llada_config` translates a config.json into a BackboneConfig. It trusts nothing: a size is
checked before anything is computed from it, because a damaged file may ask for a billion layers,
and a switch that is set to something this code would do in another way is refused. So is a setting
that is not known here, unless it is off: it might change the model.

Reading list
  LLaDA-8B    Nie et al. 2025, arXiv 2502.09992
  LLaDA-MoE   Zhu et al. 2025, arXiv 2509.24389
  LLaDA2.0    Bie et al. 2025, arXiv 2512.15745
"""

import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from lab.tools import read_json
from model import Config, UserError


@dataclass
class BackboneConfig(Config):
    """Sizes and switches of a published model: those of every transformer, and the experts'."""

    canon: int = 0  # no published model has this convolution
    rotary_fraction: float = 1.0
    architecture: str = "llada"  # a key of ARCHITECTURES
    moe_layers: tuple[int, ...] = ()  # the layers whose feed-forward network is a mixture
    experts: int = 0  # X
    experts_per_token: int = 0  # k
    expert_ffn: int = 0  # inner size of each expert
    shared_ffn: int = 0  # inner size of a network beside the experts, for every token; 0 = none
    adapt_shared: bool = False  # does the memory adapt that network too? LLaDA2: yes, as published
    router: str = "softmax"  # a key of experts.ROUTERS
    router_bias: bool = False  # has the router a bias for each expert, added to the probabilities?
    router_groups: int = 1  # experts are chosen from the best groups of them only (LLaDA2) ...
    router_groups_kept: int = 1  # ... and this many groups are kept
    routed_scale: float = 1.0  # what a token's weights add up to (LLaDA2)


FILE = Path(__file__).with_name("architectures.json")
KNOWN = read_json(FILE)
ARCHITECTURES = KNOWN["architectures"]
IGNORED = {key for keys in KNOWN["ignored"].values() for key in keys}
OFF = (None, False, [], {}, "")  # 0 is False here

# Fields that config.json may leave out: kv_heads and head_dim are computed then, others keep their
# default.
OPTIONAL = ("mask_id", "kv_heads", "head_dim", "rotary_fraction", "shared_ffn", "router_bias")
MAY_BE_ZERO = ("mask_id", "shared_ffn")
LARGEST = {"layers": 1_000, "heads": 1_000, "kv_heads": 1_000, "experts": 10_000}
LARGEST_OTHER = 10_000_000
# Objects that hold the settings of RoPE, if they do not stand by themselves.
ROPE = ("rope_parameters", "rope_scaling")


class Settings(NamedTuple):
    """A JSON file's settings, or an error that names the one that is missing or not usable."""

    values: dict
    where: Path

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> object:
        """The value as it is."""
        if key not in self.values:
            raise UserError(f"{self.where}: {key} is missing.")
        return self.values[key]

    def refuse(self, key: str, wanted: str) -> UserError:
        """The error for a value that is not `wanted`."""
        value = reprlib.repr(self.values[key])
        return UserError(f"{self.where}: {key} = {value} is not usable: it must be {wanted}.")

    def whole(self, key: str, least: int = 1, most: int = LARGEST_OTHER) -> int:
        """A whole number."""
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(key, f"a whole number from {least} to {most}")
        return value

    def real(self, key: str) -> float:
        """A positive, finite number."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e15:  # false for NaN, too
            raise self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.get(key)
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def marked(self, key: str, layers: int) -> tuple[int, ...]:
        """The layers for which a list of zeros and ones has a one."""
        marks = self.get(key)
        fine = isinstance(marks, list) and len(marks) >= layers
        if not fine or any(mark not in (0, 1) for mark in marks):
            raise self.refuse(key, f"a list of 0 and 1, one for each of the {layers} layers")
        return tuple(i for i in range(layers) if marks[i])


def read_sizes(settings: Settings, names: dict[str, str]) -> dict:
    """Field of BackboneConfig -> its value. names: the field -> its name in config.json."""
    types = {field.name: field.type for field in fields(BackboneConfig)}
    sizes = {}
    for field, key in names.items():
        if field in OPTIONAL and not settings.has(key):
            continue
        if types[field] is bool:
            sizes[field] = settings.flag(key)
        elif types[field] is float:
            sizes[field] = settings.real(key)
        else:
            least = 0 if field in MAY_BE_ZERO else 1
            sizes[field] = settings.whole(key, least, LARGEST.get(field, LARGEST_OTHER))
    sizes.setdefault("kv_heads", sizes["heads"])
    sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    return sizes


def find_architecture(settings: dict, tensor_names: Iterable[str], where: Path) -> str:
    """The key of ARCHITECTURES that a config.json belongs to.

    LLaDA-8B and LLaDA-MoE have the same model_type: experts among the settings or the names of the
    tensors tell them apart.
    """
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind.startswith("llada2"):
        return "llada2"
    if kind not in ("llada", "lladamoe", "llada_moe"):
        kind = reprlib.repr(kind)
        raise UserError(f"{where}: model_type {kind} is not a LLaDA model that this program knows.")
    experts = settings.get("num_experts") or any(".experts." in name for name in tensor_names)
    return "llada-moe" if experts else "llada"


def with_plain_rope(values: dict, where: Path) -> dict:
    """The settings with those of RoPE on their own level. transformers 5 saves them inside of
    rope_parameters, which it called rope_scaling before; both may be there if they agree. Only
    plain RoPE is known here: none whose angles are stretched for longer texts."""
    flat = {key: value for key, value in values.items() if key not in ROPE}
    for name in ROPE:
        inner = values.get(name) or {}
        if not isinstance(inner, dict):
            raise not_supported(where, name, inner, "an object or null")
        for key in ("rope_type", "type"):
            if inner.get(key) not in (None, "default"):
                raise not_supported(where, f"{name}: {key}", inner[key], "'default'")
        for key, value in inner.items():
            if key not in ("rope_theta", "partial_rotary_factor"):
                if value not in (*OFF, "default"):
                    raise not_supported(where, f"{name}: {key}", value, "null")
            elif flat.get(key) is None:
                flat[key] = value
            elif value not in (None, flat[key]):
                said = f"{flat[key]!r}, as it says elsewhere"
                raise not_supported(where, f"{name}: {key}", value, said)
    return flat


def check_known(known: dict, values: dict, where: Path) -> None:
    """Refuses a switch that is set otherwise than here, and any setting that is not known here."""
    read = {"model_type", "rotary_dim", *known["read"], *known["sizes"].values()}
    for key, value in values.items():
        if key in known["switches"]:
            if value not in known["switches"][key]:
                only = " or ".join(map(repr, known["switches"][key]))
                raise not_supported(where, key, value, only)
        elif key not in read | IGNORED and value not in OFF:
            said = f"{where}: {key[:200]} = {reprlib.repr(value)} is not known here"
            raise UserError(f"{said}, and may change the model: take it out if it does not.")


def not_supported(where: Path, key: str, value: object, only: str) -> UserError:
    """The error for a setting by which this code would be another model."""
    return UserError(f"{where}: {key} = {reprlib.repr(value)} is not supported (only {only}).")


def read_llada_config(values: dict, tensor_names: Iterable[str], where: Path) -> BackboneConfig:
    """config.json -> BackboneConfig. where: the file that an error names."""
    architecture = find_architecture(values, tensor_names, where)
    known, values = ARCHITECTURES[architecture], with_plain_rope(values, where)
    check_known(known, values, where)
    names, settings = known["sizes"], Settings(values, where)
    if architecture == "llada" and not settings.has("embedding_size"):
        names = names | {"vocab_size": "vocab_size"}  # the embedding may have rows to spare
    sizes = read_sizes(settings, names)
    if architecture == "llada-moe":
        sizes["moe_layers"] = settings.marked("moe_layer_freq", sizes["layers"])
    elif architecture == "llada2":
        first = settings.whole("first_k_dense_replace", least=0)
        sizes["moe_layers"] = tuple(range(first, sizes["layers"]))
        if settings.has("num_shared_experts"):
            shared = settings.whole("num_shared_experts", least=0, most=100)
            sizes["shared_ffn"] = sizes["expert_ffn"] * shared
    config = BackboneConfig(architecture=architecture, **known["fixed"], **sizes)
    check_together(config, settings)
    return config


def check_together(config: BackboneConfig, settings: Settings) -> None:
    """Refuses sizes of which each is possible, but not beside the others."""

    def need(fine: bool, problem: str) -> None:
        if not fine:
            raise UserError(f"{settings.where}: its sizes do not go together: {problem}.")

    need((config.mask_id or 0) < config.vocab_size, "the mask token is not in the vocabulary")
    need(config.heads % config.kv_heads == 0, "the heads do not share their keys evenly")
    turned = int(config.head_dim * config.rotary_fraction)
    need(0 < turned <= config.head_dim, "RoPE turns no channel of a head, or too many")
    need(turned % 2 == 0, "RoPE turns an odd number of channels")
    same = settings.values.get("rotary_dim") in (None, turned)
    need(same, "rotary_dim contradicts partial_rotary_factor")
    groups, kept = config.router_groups, config.router_groups_kept
    need(config.experts % groups == 0, "the groups of experts are not of one size")
    need(kept <= groups, "more groups of experts are kept than there are")
    open_to_a_token = config.experts // groups * kept
    need(config.experts_per_token <= open_to_a_token, "a token wants too many experts")


# ---- published models ------------------------------------------------------------------------


class Backbone(NamedTuple):
    """A published model: its repository on the hub, and its sizes for `--random-weights`."""

    repo: str
    config: BackboneConfig


def read_backbones() -> dict[str, Backbone]:
    """Name -> published model."""
    found = {}
    for name, known in KNOWN["backbones"].items():
        found[name] = Backbone(known["repo"], read_llada_config(known["config"], (), FILE))
    return found


# What `--backbone` may be called. Where there is a checkpoint, its own config.json decides. That of
# LLaDA2.1-mini has been taken to be that of LLaDA2.0-mini.
BACKBONES = read_backbones()


def llada_config(name: str) -> BackboneConfig:
    """The sizes of a key of BACKBONES, or of a folder with a config.json."""
    if name in BACKBONES:
        return replace(BACKBONES[name].config)  # a copy: the caller may change it
    if not os.path.isdir(name):
        known = f"{', '.join(BACKBONES)} nor a folder with a config.json"
        raise UserError(f"--random-weights: {name[:200]} is neither {known}.")
    path = Path(name) / "config.json"
    return read_llada_config(read_json(path), (), path)
