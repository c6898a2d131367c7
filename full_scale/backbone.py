"""
backbone.py: flags, tokenizer, weights and adapter of `--backbone`, which three programs share.

An adapter that is fine-tuned here has a file training.json beside it, with the settings of its
training. Writing a prompt into the weights needs them (Sec. 4.5): it must use the memory that the
adapter was trained for.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

import data
from full_scale.adapters import load_adapter
from full_scale.checkpoints import count, find_checkpoint, linear_layers, load_llada, random_llada
from full_scale.configs import BACKBONES, llada_config
from full_scale.experts import Linear4bit
from full_scale.tokenizer import Tokenizer, load_tokenizer
from lab.tools import read_json, write_json
from lab.variants import MOST_PASSES, paper_settings
from model import Linear, Transformer, UserError
from sample import Write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

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


def architecture_of(args: argparse.Namespace) -> str:
    """ "llada", "llada-moe" or "llada2", known before the weights are loaded."""
    name = args.backbone if args.random_weights else str(find_checkpoint(args.backbone))
    return llada_config(name).architecture


def backbone_tokenizer(args: argparse.Namespace, plain: bool = False) -> Tokenizer:
    """The backbone's tokenizer. plain: without its chat template. Random weights may come without
    one: they get the tiny tokenizer, because any text will do to try memory and speed."""
    if args.random_weights and not (Path(args.backbone) / "tokenizer.json").exists():
        tiny, known = data.TINY, llada_config(args.backbone).mask_id
        mask = tiny.mask if known is None else known
        return Tokenizer(tiny.encoding, list(range(tiny.eos)), tiny.specials, tiny.eos, mask)
    return load_tokenizer(find_checkpoint(args.backbone), plain)


def load_backbone(args, tokenizer: Tokenizer, device: str, spread=None) -> Transformer:
    """The backbone, frozen and in eval mode. It must agree with the tokenizer about [MASK]."""
    if args.load_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-4bit needs bitsandbytes: pip install bitsandbytes.")
    load = random_llada if args.random_weights else load_llada
    model = load(args.backbone, device, DTYPES[dtype_name(args, device)], args.load_4bit, spread)
    model.requires_grad_(False)
    rows, known = model.config.vocab_size, model.config.mask_id
    if tokenizer.vocab_size > rows:
        text = f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {rows} rows"
        raise UserError(f"{args.backbone}: {text}.")
    if known not in (None, tokenizer.mask):
        text = f"[MASK] is {tokenizer.mask} in the tokenizer, {known} in config.json"
        raise UserError(f"{args.backbone}: {text}.")
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
        trained_with(adapter)  # refuses one that does not belong where it lies
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
    return PAPER | settings
