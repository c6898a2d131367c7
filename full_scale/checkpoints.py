"""
checkpoints.py: the published models, LLaDA-8B, LLaDA-MoE and LLaDA2.1-mini, as a `Transformer`.

A checkpoint is a folder with config.json and safetensors files. `load_llada` reads the sizes from
the one, builds the model without memory for its weights, and copies each tensor to its place. It is
strict: a tensor without a place, a place without a tensor or a wrong shape is an error, because
weights that silently stay random are the worst fault that a loader can have. The published
modelling code is never run.

Glossary
  name here   | meaning
  published   | as the checkpoint names a tensor: model.layers.1.mlp.experts.5.up_proj.weight
  our name    | as our model names it: layers.1.mlp.experts.up.weight, of which that is number 5
  place       | (our name, expert): where a published tensor belongs; expert is None without a stack
"""

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from full_scale.configs import (
    ARCHITECTURES,
    BACKBONES,
    BackboneConfig,
    llada_config,
    read_llada_config,
)
from full_scale.experts import ExactRouter, ExpertLinear4bit, Linear4bit, make_mlp
from lab.tools import read_json
from model import Linear, Transformer, UserError

# ---- names -----------------------------------------------------------------------------------


def published_name(config: BackboneConfig, name: str) -> str:
    """Our module's (or buffer's) name -> the published one, with {x} left in it for the expert."""
    layer, part = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)", name).groups()
    return ARCHITECTURES[config.architecture]["modules"][part].replace("{i}", str(layer))


def published_tensors(model: Transformer) -> dict[str, tuple[str, int | None]]:
    """Every tensor that a checkpoint must have: published name -> its place, (our name, expert)."""
    places = {}
    for ours, tensor in model.state_dict().items():
        theirs = published_name(model.config, ours.removesuffix(".weight"))
        if ours.endswith(".weight"):
            theirs += ".weight"
        if "{x}" in theirs:
            for x in range(len(tensor)):
                places[theirs.replace("{x}", str(x))] = (ours, x)
        else:
            places[theirs] = (ours, None)
    return places


def linear_layers(model: Transformer) -> dict[str, Linear]:
    """Name -> module for what PEFT calls `all-linear`: every linear layer but the head."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    del layers["output"]
    return layers


def add_outer_lora(model, rank: int, alpha: float, dropout: float, generator) -> None:
    """Freezes the backbone and puts a trainable LoRA on every linear layer but the head."""
    model.requires_grad_(False)
    for layer in linear_layers(model).values():
        layer.add_lora(rank, alpha, dropout, generator)


def count(layers: Iterable[Linear]) -> int:
    """How many matrices these are: a stack of experts counts each of them."""
    return sum(math.prod(layer.shape[:-2]) for layer in layers)


# ---- files: here, or on the hub --------------------------------------------------------------

WANTED = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "chat_template.jinja",
)


def find_checkpoint(path_or_repo: str | Path) -> Path:
    """The folder of a checkpoint: a local one, or one that is downloaded from the hub.

    path_or_repo: a folder, a key of BACKBONES, or OWNER/NAME on the hub.
    """
    name = str(path_or_repo)
    if os.path.isdir(name):
        if not (Path(name) / "config.json").exists():
            raise UserError(f"{name} is no checkpoint: it has no config.json.")
        return Path(name)
    repo = BACKBONES[name].repo if name in BACKBONES else name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        known = f"{', '.join(BACKBONES)} nor a repository OWNER/NAME"
        raise UserError(f"there is no folder {name[:200]}, and it is neither {known}.")
    return fetch(repo, WANTED)


def fetch(repo: str, files: Iterable[str], kind: str = "model") -> Path:
    """Downloads from the Hugging Face hub into its cache (below HF_HOME), and returns the folder.

    A download that was broken off is resumed. files: names or patterns; at least one of them is
    there afterwards. kind: "model" or "dataset". UserError says what else to do if it fails.
    """
    files = list(files)
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    by_hand = f"fetch {', '.join(files)} from {page} into a folder yourself, and name that"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        advice = f"needs huggingface_hub (pip install huggingface_hub); or {by_hand}"
        raise UserError(f"downloading {repo} {advice}.") from None
    try:
        folder = Path(snapshot_download(repo, allow_patterns=files, repo_type=kind))
    except errors.GatedRepoError:
        advice = f"accept its terms on its page and log in (hf auth login), or {by_hand}"
        raise UserError(f"{repo} is gated: {advice}.") from None
    except errors.RepositoryNotFoundError:
        advice = f"check the name, or {by_hand}"
        raise UserError(f"the hub has no {kind} {repo} that you may read; {advice}.") from None
    except Exception as error:  # no network, no space: the client raises many libraries' errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"cannot download {repo} ({reason}); {by_hand}.") from None
    if not any(path for pattern in files for path in folder.glob(pattern)):
        raise UserError(f"{repo} on the hub has no {', '.join(files)}.")
    return folder


@contextmanager
def opened(path: Path, advice: str = "download it again") -> Iterator[safe_open]:
    """A safetensors file to read from. One that may not be read, or not be mapped into memory as
    on some mounts, is neither missing nor damaged."""
    try:
        with open(path, "rb"), safe_open(path, "pt") as file:  # whose errors call any file missing
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {advice}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read here: {error}.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off ({error}): {advice}.") from None


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file, which must be whole."""
    with opened(path) as file:
        return list(file.keys())


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> the file in which it should be."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError(f"{index} has no weight_map, which names a file for each tensor.")
    for file in listed.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}", file):
            raise UserError(f"{index}: {reprlib.repr(file)} is no name of a file in its folder.")
    return {name: index.parent / file for name, file in listed.items()}


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. All files must be whole, and agree with the index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        return dict.fromkeys(tensor_names(path), path)
    listed, found = read_index(index), {}
    for path in sorted(set(listed.values())):
        for name in tensor_names(path):
            if name in found:
                raise UserError(f"{path}: {name!r} is in {found[name].name} already.")
            found[name] = path
    wrong = dict(listed.items() ^ found.items())
    if wrong:
        text = f"{len(wrong)} tensors, for example {min(wrong)!r}"
        raise UserError(f"{index} and the files disagree about {text}.")
    return found


# ---- loading ---------------------------------------------------------------------------------

FLOATS = ("F64", "F32", "F16", "BF16")


def load_llada(
    path_or_repo, device="cpu", dtype=torch.float32, load_4bit=False, spread: Callable | None = None
) -> Transformer:
    """A published checkpoint in eval mode: model(ids, attention_mask=None) -> logits (B, T, V).

    path_or_repo: a folder, a key of BACKBONES, or OWNER/NAME on the hub. load_4bit: every linear
    layer but the head in NF4. spread(layer): is called for each layer as soon as its weights are
    there, and may leave a share of them in this process. Each file is mapped into memory and each
    tensor copied once, straight to its place: at the peak there are the weights and one file.
    UserError unless every tensor is used exactly once and every parameter set, each in its shape.
    """
    folder = find_checkpoint(path_or_repo)
    files = tensor_files(folder)
    config = read_llada_config(read_json(folder / "config.json"), files, folder / "config.json")
    check_numbers(config, files, folder)
    model = on_meta(config)
    places = published_tensors(model)
    check_tensors(model, places, files, folder)
    for name, tensor in read_in_place(model, places, files, dtype, device):
        put(model, name, tensor, load_4bit, spread)
    return model.eval()


def read_in_place(model, places: dict, files: dict, dtype, device: str) -> Iterator[tuple]:
    """Yields (our name, tensor) as soon as a tensor of ours is complete. A stack of experts comes
    expert by expert, and perhaps from several files."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = Counter(ours for ours, _ in places.values())  # tensors still to come for each of ours
    begun: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        with opened(path) as file:
            for name in sorted(file.keys()):
                ours, expert = places[name]
                if ours not in begun:
                    exact = kept_dtype(model, ours, dtype)
                    begun[ours] = torch.empty(shapes[ours], dtype=exact, device=device)
                target = begun[ours] if expert is None else begun[ours][expert]
                target.copy_(file.get_tensor(name))
                missing[ours] -= 1
                if missing[ours] == 0:
                    yield ours, begun.pop(ours)


def check_numbers(config: BackboneConfig, files: Iterable[str], folder: Path) -> None:
    """Compares how many layers and experts config.json asks for with those that the files name,
    before anything of that size is built."""
    layers, experts = set(), set()
    for name in files:
        layers.update(re.findall(r"\.(?:layers|blocks)\.(\d+)\.", name))
        experts.update(re.findall(r"\.experts\.(\d+)\.", name))
    wanted = config.experts if config.moe_layers else 0
    if (config.layers, wanted) != (len(layers), len(experts)):
        asked = f"{config.layers} layers and {wanted} experts"
        named = f"{len(layers)} layers and {len(experts)} experts"
        raise UserError(f"{folder}: config.json asks for {asked}, the files name {named}.")


def check_tensors(model: Transformer, places: dict, files: dict[str, Path], folder: Path) -> None:
    """Compares names, shapes and types of all tensors with the model, before memory is taken."""
    missing, unused = sorted(places.keys() - files), sorted(files.keys() - places)
    if missing or unused:
        text = f"{len(missing)} tensors missing {missing[:3]}, {len(unused)} not used {unused[:3]}"
        raise UserError(f"{folder}: {text}.")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in sorted(set(files.values())):
        with opened(path) as file:
            for name in file.keys():
                ours, expert = places[name]
                wanted = shapes[ours] if expert is None else shapes[ours][1:]
                check_header(file.get_slice(name), wanted, f"{path}: {name}")


def check_header(header, wanted: list[int], what: str) -> None:
    """Refuses a tensor (`file.get_slice(name)`) that has another shape, or is not of floats."""
    shape, kind = header.get_shape(), header.get_dtype()
    if kind not in FLOATS:
        raise UserError(f"{what} is of the type {kind}, not of {', '.join(FLOATS)}.")
    if shape != wanted:
        raise UserError(f"{what} has the shape {shape}, but must have {wanted}.")


def on_meta(config: BackboneConfig) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config, make_mlp)


def kept_dtype(model: Transformer, name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`; but LLaDA2's router and any router's bias stay in float32 at least, as published."""
    module, _, leaf = name.rpartition(".")
    if leaf == "router_bias" or isinstance(model.get_submodule(module), ExactRouter):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def put(model: Transformer, name: str, tensor: Tensor, load_4bit: bool, spread=None) -> None:
    """One tensor into its place in the model. Where a layer is complete with it, it is spread."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf == "router_bias":
        module.router_bias = tensor
    elif load_4bit and isinstance(module, Linear) and module_name != "output":
        packed = Linear4bit if tensor.dim() == 2 else ExpertLinear4bit
        model.set_submodule(module_name, packed(tensor))
    else:
        module.weight = nn.Parameter(tensor)
    if spread is not None and name.startswith("layers."):
        layer = model.layers[int(name.split(".")[1])]
        if not any(part.is_meta for part in layer.state_dict().values()):
            spread(layer)


# ---- random weights --------------------------------------------------------------------------

MOST_WEIGHTS = 10**12  # more than any machine holds


def random_llada(
    name: str | BackboneConfig,
    device="cpu",
    dtype=torch.float32,
    load_4bit=False,
    spread=None,
    seed=0,
) -> Transformer:
    """A backbone at its real size with random weights, N(0, 0.02), made on the device: to try
    memory and speed without a download. name: a key of BACKBONES, a folder with a config.json, or
    the sizes themselves.
    """
    model = on_meta(name if isinstance(name, BackboneConfig) else llada_config(name))
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    if weights > MOST_WEIGHTS:
        raise UserError(f"{name}: {weights:.1e} weights are more than any machine holds.")
    generator = torch.Generator(device).manual_seed(seed)
    for ours, tensor in model.state_dict().items():
        made = torch.empty(tensor.shape, dtype=kept_dtype(model, ours, dtype), device=device)
        if ours.endswith("router_bias"):
            made.zero_()
        elif tensor.dim() == 1:  # a norm
            made.fill_(1)
        else:
            made.normal_(0, 0.02, generator=generator)
        put(model, ours, made, load_4bit, spread)
    return model.eval()
