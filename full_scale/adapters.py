"""
adapters.py: an outer LoRA in the format of PEFT, out and in.

PEFT (github.com/huggingface/peft) is how LoRA adapters are published, those of MemDLM too. A folder
holds adapter_config.json and adapter_model.safetensors, with two small matrices for every adapted
matrix of the backbone, under its published name:

  base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_A.weight   (rank, in)
  base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_B.weight   (out, rank)

Here the experts' pairs are slices of one stack, lora_A (X, rank, in) and lora_B (X, out, rank).
"""

import reprlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from full_scale.checkpoints import check_header, linear_layers, opened, published_name
from full_scale.configs import Settings
from lab.tools import read_json, read_tensors, save_tensors, write_json
from model import Linear, Transformer, UserError

# What adapter_config.json may say of a plain LoRA, W x + (alpha / r) B A x. These settings are read
# below, or tell how it was made ...
ANY_VALUE = (
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern "
    "base_model_name_or_path revision task_type auto_mapping peft_version inference_mode "
    "megatron_config megatron_core eva_config qalora_group_size ensure_weight_tying"
).split()
# ... and these must have one of the values listed. All others must be off. The starts listed leave
# W as it is; PiSSA, LoftQ and others start from another W, which the adapter does not hold.
ONE_OF = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}
OFF = (None, False, [], {})


class Place(NamedTuple):
    """Where a tensor of PEFT's belongs: A or B of one layer."""

    layer: Linear
    letter: str
    expert: int | None  # its number, where the layer is a stack

    def tensor(self) -> Tensor:
        """That part of our outer LoRA: a view, to be read or written."""
        whole = getattr(self.layer, f"lora_{self.letter}").detach()
        return whole if self.expert is None else whole[self.expert]


def peft_places(model: Transformer) -> dict[str, Place]:
    """PEFT's name -> its place, for all tensors that an adapter of this model may have."""
    places = {}
    for name, layer in linear_layers(model).items():
        published = published_name(model.config, name)
        for expert in range(layer.shape[0]) if "{x}" in published else [None]:
            matrix = f"base_model.model.{published.replace('{x}', str(expert))}"
            for letter in "AB":
                places[f"{matrix}.lora_{letter}.weight"] = Place(layer, letter, expert)
    return places


def save_adapter(model, folder: Path, rank: int, alpha: float, dropout: float, base: str) -> None:
    """Writes the model's outer LoRA. base: the backbone's name or path, as PEFT notes it down."""
    places = peft_places(model)
    tensors = {name: place.tensor().contiguous() for name, place in places.items()}
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    # LLaDA-8B calls its head what it calls a matrix of each block: PEFT must leave the head out.
    left_out = ["transformer.ff_out"] if model.config.architecture == "llada" else None
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(modules),
        "exclude_modules": left_out,
    }
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def read_settings(path: Path) -> tuple[int, float, float]:
    """rank, alpha and dropout of an adapter_config.json that means a plain LoRA."""
    settings = Settings(read_json(path), path)
    for key, value in settings.values.items():
        if key not in ANY_VALUE and value not in OFF and value not in ONE_OF.get(key, ()):
            raise UserError(f"{path}: {key} = {reprlib.repr(value)} is not supported.")
    dropout = settings.values.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise settings.refuse("lora_dropout", "a number from 0 to 1")
    return settings.whole("r"), settings.real("lora_alpha"), dropout


def fitting_places(model: Transformer, folder: Path) -> dict[str, Place]:
    """The places of an adapter's tensors, each of which must have one, in its shape. Its header
    alone is read, and of the model no weights: UserError says early what does not fit."""
    rank, _, _ = read_settings(folder / "adapter_config.json")
    path, every = folder / "adapter_model.safetensors", peft_places(model)
    misfit = f"{path} does not fit this backbone"
    with opened(path, "train or download it again") as file:
        names = {*file.keys()}
        matrices = {name.split(".lora_")[0] for name in names}
        places = {name: every[name] for name in every if name.split(".lora_")[0] in matrices}
        wrong = sorted(names ^ places.keys())
        if wrong:
            raise UserError(f"{misfit}: one of them has no {wrong[0][:200]}.")
        if not names:
            raise UserError(f"{misfit}: it is empty.")
        for name, place in places.items():
            *_, outputs, inputs = place.layer.shape
            wanted = [rank, inputs] if place.letter == "A" else [outputs, rank]
            check_header(file.get_slice(name), wanted, f"{misfit}: {name}")
    return places


def load_adapter(model: Transformer, folder: Path) -> list[str]:
    """An adapter, ours or one of PEFT's, as the model's outer LoRA. Returns the adapted layers.

    A layer, or an expert of a stack, that the adapter leaves out keeps its weights: B = 0 there.
    """
    places = fitting_places(model, folder)
    rank, alpha, dropout = read_settings(folder / "adapter_config.json")
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    for layer in {place.layer for place in places.values()}:
        layer.add_lora(rank, alpha, dropout)
    for name, place in places.items():
        place.tensor().copy_(tensors[name])
    return [name for name, layer in linear_layers(model).items() if layer.lora_A is not None]
