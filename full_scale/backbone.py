"""
backbone.py: flags, tokenizer, weights and adapter of `--backbone`, which three programs share.

An adapter that is fine-tuned here has a file training.json beside it, with the settings of its
training. Writing a prompt into the weights needs them (Sec. 4.5): it must use the memory that the
adapter was trained for.
"""

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

import data
from full_scale.adapters import fitting_places, load_adapter
from full_scale.checkpoints import (
    count,
    find_checkpoint,
    linear_layers,
    load_llada,
    on_meta,
    random_llada,
    tensor_files,
)
from full_scale.configs import BACKBONES, BackboneConfig, Settings, llada_config
from full_scale.experts import Linear4bit
from full_scale.tokenizer import Tokenizer, load_tokenizer
from lab.tools import Parser, read_json, whole, write_json
from lab.variants import MOST_PASSES, loop_flags, paper_settings
from model import Linear, Transformer, UserError
from sample import Write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LARGE = 1 << 28  # bytes: of a file with more, a share is compared

# The paper's inner loop (Sec. 4.1) as a run's settings have it: memory_rank, ..., and start_scale.
PAPER = paper_settings()


def backbone_flags(flag: Callable) -> None:
    """What names a backbone, and how its weights are held."""
    names = ", ".join(BACKBONES)
    flag("--backbone", required=True, help=f"a folder, OWNER/NAME on the hub, or {names}")
    flag("--random-weights", action="store_true", help="real sizes alone: to try memory and speed")
    flag("--load-4bit", action="store_true", help="weights in NF4 (bitsandbytes) [on, Sec. 4.1]")
    flag("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU")


def dtype_name(args: argparse.Namespace, device: str) -> str:
    """The key of DTYPES that --dtype means on this device."""
    automatic = "bfloat16" if device.startswith("cuda") else "float32"
    return automatic if args.dtype == "auto" else args.dtype


def config_of(args: argparse.Namespace) -> BackboneConfig:
    """The backbone's sizes, known before the weights are loaded."""
    name = args.backbone if args.random_weights else str(find_checkpoint(args.backbone))
    return llada_config(name)


def architecture_of(args: argparse.Namespace) -> str:
    """ "llada", "llada-moe" or "llada2"."""
    return config_of(args).architecture


def check_out(out: Path, own: str) -> None:
    """Refuses a folder that holds the results of another program. own: a file of this one's."""
    others = ("config.json", "results.json", "table.md", "bench.json", "predictions.jsonl")
    if not (out / own).exists() and any((out / name).exists() for name in others):
        raise UserError(f"--out {out} holds other results, or a checkpoint: name another folder.")


def files_of(args: argparse.Namespace) -> dict[str, str]:
    """Digests that tell a backbone from another under its name."""
    folder = Path(args.backbone) if args.random_weights else find_checkpoint(args.backbone)
    small = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    found = {name: digest(folder / name) for name in small if (folder / name).exists()}
    if not args.random_weights:
        for path in sorted(set(tensor_files(folder).values())):
            found[path.name] = weights_digest(path)
    return found


def digest(path: Path) -> str:
    """Tells a file from another of its name, by all of its bytes."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    return found.hexdigest()[:16]


def weights_digest(path: Path) -> str:
    """The same for a file of weights, which may have gigabytes: of a large one the header is read
    and 64 KB from the middle of each tensor. A tensor that has changed as a whole shows."""
    if path.stat().st_size < LARGE:
        return digest(path)
    found, part = hashlib.sha256(), 1 << 16
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        found.update(header)
        start, tensors = file.tell(), json.loads(header)
        for name in sorted(tensors.keys() - {"__metadata__"}):
            first, last = tensors[name]["data_offsets"]
            file.seek(start + max(first, (first + last - part) // 2))
            found.update(file.read(min(part, last - first)))
    return found.hexdigest()[:16]


def backbone_tokenizer(args: argparse.Namespace, plain: bool = False) -> Tokenizer:
    """The backbone's tokenizer. plain: without its chat template. Random weights may come without
    one: they get the tiny tokenizer, because any text will do to try memory and speed."""
    if args.random_weights and not (Path(args.backbone) / "tokenizer.json").exists():
        tiny, known = data.TINY, llada_config(args.backbone).mask_id
        mask = tiny.mask if known is None else known
        return Tokenizer(tiny.encoding, list(range(tiny.eos)), tiny.specials, tiny.eos, mask)
    return load_tokenizer(find_checkpoint(args.backbone), plain)


def check_fit(args, tokenizer: Tokenizer, adapter: str | Path | None = None) -> None:
    """Refuses, before weights are read, what does not go together: the backbone must agree with the
    tokenizer about [MASK], and the adapter must fit."""
    if args.load_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-4bit needs bitsandbytes: pip install bitsandbytes.")
    config = config_of(args)
    rows, known = config.vocab_size, config.mask_id
    if tokenizer.vocab_size > rows:
        text = f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {rows} rows"
        raise UserError(f"{args.backbone}: {text}.")
    if known not in (None, tokenizer.mask):
        text = f"[MASK] is {tokenizer.mask} in the tokenizer, {known} in config.json"
        raise UserError(f"{args.backbone}: {text}.")
    if adapter:
        trained_with(adapter)  # refuses one that does not belong where it lies
        fitting_places(on_meta(config), Path(adapter))


def load_backbone(args, tokenizer: Tokenizer, device: str, spread=None) -> Transformer:
    """The backbone, frozen and in eval mode."""
    check_fit(args, tokenizer)
    load = random_llada if args.random_weights else load_llada
    model = load(args.backbone, device, DTYPES[dtype_name(args, device)], args.load_4bit, spread)
    model.requires_grad_(False)
    model.config.mask_id = tokenizer.mask
    if args.load_4bit:
        print("NF4", covered(model, lambda layer: isinstance(layer, Linear4bit)))
    return model


def covered(model: Transformer, has: Callable[[Linear], bool]) -> str:
    """ "on N of M linear layers". A layer that was left out is a fault that must not pass."""
    layers = linear_layers(model)
    for name, layer in layers.items():
        if not has(layer):
            raise UserError(f"{name} was left out. This is a fault of the program.")
    total = count(layers.values())
    return f"on {total} of {total} linear layers"


def add_adapter(model: Transformer, adapter: str | None) -> Transformer:
    """The model with the outer LoRA in that folder, if one is named."""
    if adapter:
        layers = linear_layers(model)
        adapted = count(layers[name] for name in load_adapter(model, Path(adapter)))
        print(f"LoRA on {adapted} of {count(layers.values())} linear layers, from {adapter}")
    return model.eval()


def write_settings(
    write: Write, config: dict, rule="paper", passes=1, ratio=0.2, window=96
) -> dict:
    """How a prompt is written, by names and numbers: the memory of `config`, a training's settings,
    and what of it `write` has changed. The names are those of predictions.jsonl from the start."""
    found = {name.removeprefix("memory_"): config[name] for name in PAPER}
    found |= {name: getattr(write.memory, name) for name in ("rank", "alpha", "lr")}
    found |= {"rule": rule, "passes": passes, "anchor_ratio": ratio, "window": window}
    found |= {"share": 0.3}  # of our rule, which no flag changes, nor its most passes
    most = f"{MOST_PASSES} a window, 1 over a single one"
    return found | ({"most passes": most} if rule == "surprise" else {})


def note_training(adapter: Path, settings: dict) -> None:
    """Writes training.json. It comes first: a crash must not leave an adapter without it."""
    write_json(adapter / "training.json", settings)


def trained_with(adapter: str | None) -> dict:
    """The settings of the fine-tuning that made an adapter, and the paper's inner loop for what
    they do not say. In the folder of a run there must be no adapter but the one that it made: its
    config.json and results.json would describe another."""
    if not adapter or not (Path(adapter) / "training.json").exists():
        return PAPER
    folder = Path(adapter).resolve()  # "." has a parent then
    settings, config = read_json(folder / "training.json"), folder.parent / "config.json"
    run = read_json(config) if config.exists() else {}
    differing = [name for name in run | settings if run.get(name) != settings.get(name)]
    if run.get("dial") == "backbone" and differing:
        name = differing[0]
        known = f"{name} {settings.get(name)}, but {config} says {run.get(name)}"
        advice = "move the adapter elsewhere, or train again"
        raise UserError(f"--adapter {adapter} was trained with {known}: {advice}.")
    check_memory(settings, folder / "training.json")
    return PAPER | settings


def check_memory(settings: dict, path: Path) -> None:
    """Refuses settings of the memory, in a file that may come from others, that no flag takes."""
    parser = Parser("")
    loop_flags(parser.add_argument)
    parser.add_argument("--max-length", type=whole(2))  # the window of our rule of writing
    for name in (*PAPER, "max_length"):
        if name in settings:
            flag, value = f"--{name.replace('_', '-')}", settings[name]
            try:
                fine = getattr(parser.parse_args([f"{flag}={value}"]), name) == value
            except UserError:
                fine = False
            if not fine or isinstance(value, bool):
                wanted = f"a value that {flag} takes (memdlm.py --backbone NAME --help)"
                raise Settings(settings, path).refuse(name, wanted)
