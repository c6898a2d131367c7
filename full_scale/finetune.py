"""
finetune.py: `memdlm.py --backbone`, a real backbone fine-tuned as in Sec. 4.1: frozen weights, an
outer LoRA on every linear layer, and the fast weights of memdlm.py inside of each step.

    python memdlm.py --backbone llada-moe --data Yukang/LongAlpaca-12k --load-4bit --out runs/moe
    torchrun --nproc_per_node 8 memdlm.py --backbone ...                a process for each GPU

A run leaves in its folder:
    config.json          its settings
    memdlm.safetensors   the outer LoRA, and AdamW's state until it is done, for --resume
    adapter/             the outer LoRA in PEFT's format, for `sample.py --adapter`
    results.json         losses, time, memory

Glossary
  name here    | meaning
  micro-batch  | --batch pairs that one process computes at once; a step has accumulate * processes
  chief        | the first process, which alone prints and writes (processes.py)
"""

import argparse
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data import Batch
from full_scale import backbone
from full_scale.adapters import save_adapter
from full_scale.checkpoints import add_outer_lora
from full_scale.configs import BACKBONES
from full_scale.pairs import PADS, collate, find_data, length_grouped, read_data, split_pairs
from full_scale.processes import launched, processes, spread, together
from lab import tools
from lab.tools import Parser, real, whole
from lab.training import LOSSES, METHODS, Phase, measure_losses, train
from lab.variants import loop_flags, memory_of
from memdlm import generator_for, keyed_loss
from model import Transformer, UserError

# ---- the loss, in one of several processes ----------------------------------------------------


class Objective(nn.Module):
    """A method's loss as a module, as DistributedDataParallel wants it. Fast weights are made and
    dropped inside of its forward pass: they stay local to their process."""

    def __init__(self, model: Transformer, args: argparse.Namespace):
        super().__init__()
        self.model, self.method = model, METHODS[args.method]
        self.memory = memory_of(vars(args))

    def forward(self, batch: Batch, key: tuple) -> Tensor:
        """The loss, with all its random draws made from `key`."""
        return keyed_loss(self.method, self.model, batch, self.memory, *key)


def micro_losses(
    objective: nn.Module, batch_at: Callable[[int], Batch], seed: int, step: int, accumulate: int
) -> Iterator[Tensor]:
    """This process's losses in one step, one after the other, each divided by their number.

    batch_at: number of a micro-batch, counted over the whole run -> Batch. Random draws depend on
    seed, step and place in the step: N processes with a micro-batch each do what one does with N.
    """
    rank, world = processes()
    for i in range(accumulate):
        place = i * world + rank
        key = (seed, "fine-tune", step, place) if place else (seed, "fine-tune", step)
        # Processes exchange their gradients in the last backward pass of the step alone.
        waits = isinstance(objective, DistributedDataParallel) and i + 1 < accumulate
        with objective.no_sync() if waits else nullcontext():  # open during the caller's backward
            loss = objective(batch_at(step * accumulate * world + place), key) / accumulate
            # Where a loss is not finite, neither shall its gradient be: that is what the processes
            # share, so that all of them leave out the step.
            yield loss * torch.where(loss.isfinite(), 1.0, math.nan)


# ---- one run ---------------------------------------------------------------------------------


def cosine_rate(peak: float, steps: int, warmup: float) -> Callable[[int], float]:
    """The published trainer's schedule: step k of w = ceil(steps * warmup) warm-up steps has the
    rate k / w * peak, so that step 0 changes nothing; then a cosine to zero."""
    rising = math.ceil(steps * warmup)

    def rate_at(step: int) -> float:
        if step < rising:
            return peak * step / rising
        progress = (step - rising) / max(1, steps - rising)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))

    return rate_at


def checkpoint_activations(model: Transformer) -> None:
    """Makes each layer keep its input alone, and compute its activations again in the backward
    pass: less memory, more time. Dropout draws the same numbers the second time."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def make_phase(args, model, train_set: list, held_out: list, collate, settings: dict) -> Phase:
    """The training run that the flags describe, for `training.train`. collate: pairs -> Batch.
    settings: what a checkpoint must have been trained with."""
    rank, world = processes()
    per_epoch = math.ceil(len(train_set) / args.batch)
    steps = args.steps or math.ceil(args.epochs * per_epoch / (args.accumulate * world))
    objective, measured = Objective(model, args), []
    if world > 1:
        objective = DistributedDataParallel(objective, init_sync=False)
    for part in (train_set, held_out):  # at most --eval-examples of each, evenly picked
        picked = part[:: math.ceil(len(part) / args.eval_examples)]
        starts = range(0, len(picked), args.batch)
        measured.append([collate(picked[start : start + args.batch]) for start in starts])

    def batch_at(number: int) -> Batch:
        epoch, place = divmod(number, per_epoch)
        return collate(length_grouped(train_set, args.batch, args.seed, epoch)[place])

    def losses_at(step: int) -> Iterator[Tensor]:
        return micro_losses(objective, batch_at, args.seed, step, args.accumulate)

    def log_at(step: int) -> list[dict]:
        if (step % args.eval_every and step != steps) or (rank > 0 and not args.shard):
            return []  # where weights are spread, nobody can measure alone
        losses = measure_losses(model, *measured, memory_of(vars(args)), args.seed)
        return [{"method": args.method, "step": step, **losses, "seed": args.seed}]

    pairs = zlib.crc32(repr(train_set).encode())
    return Phase(
        name=args.method,
        steps=steps,
        rate_at=cosine_rate(args.lr, steps, args.warmup),
        losses_at=losses_at,
        clip=args.clip,
        identity={**settings, "processes": world, "pairs": pairs},
        log_at=log_at,
        betas=(0.9, 0.999),
        theta_only=True,
    )


def check_files(out: Path, files: dict[str, str], args: argparse.Namespace) -> None:
    """Refuses to go on with a run where the backbone's files are others than it was begun with."""
    run = tools.read_config(out, "backbone") if args.resume else {}
    known = run.get("files", {}) if run.get("backbone") == args.backbone else files
    for name in {**known, **files}:
        if known.get(name) != files.get(name):
            run = f"the one that the run in {out} was started with: name another folder"
            raise UserError(f"--resume: {name} of {args.backbone} is not {run}.")


def fine_tune(args: argparse.Namespace, device: str) -> None:
    """Everything from the data to results.json. Faults of the data show before weights are read."""
    out, (rank, world) = Path(args.out), processes()
    if not find_data(args.data).exists():  # said before a backbone is looked for
        raise UserError(f"cannot read --data {args.data}: there is no such file.")
    tokenizer = backbone.backbone_tokenizer(args, args.plain)
    pairs, dropped = read_data(args.data, tokenizer, args.max_length)
    train_set, held_out = split_pairs(pairs)
    counts = f"{len(train_set)} pairs to train on, {len(held_out)} held out"
    print(f"{counts}, {dropped} longer than {args.max_length} tokens left out")
    settings = tools.settings(args) | {"files": backbone.files_of(args)}
    if rank == 0:
        check_files(out, settings["files"], args)
        tools.start_run(out, settings, args.resume)
    model = backbone.load_backbone(args, tokenizer, device, spread if args.shard else None)
    lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
    add_outer_lora(model, **lora, generator=generator_for(args.seed, "lora"))
    print("LoRA", backbone.covered(model, lambda layer: layer.lora_A is not None))
    if args.checkpoint_activations:
        checkpoint_activations(model)
    to_batch = partial(collate, device=device, eos=tokenizer.eos, pads=args.pads)
    phase = make_phase(args, model, train_set, held_out, to_batch, settings)
    if args.lr and not any(map(phase.rate_at, range(phase.steps))):
        print("warning: the only step has the warm-up's rate 0 and trains nothing: add --warmup 0")
    meta = train(model, phase, out, args.save_every, chief=rank == 0)
    if rank > 0:
        return
    backbone.note_training(out / "adapter", settings)
    base = BACKBONES[args.backbone].repo if args.backbone in BACKBONES else args.backbone
    save_adapter(model, out / "adapter", **lora, base=base)
    results = {
        "config": settings,
        "machine": tools.machine(device, backbone.dtype_name(args, device)),
        "processes": world,
        "pairs": {"train": len(train_set), "held_out": len(held_out)},
        "steps": phase.steps,
        "seconds": meta["seconds"],
        "peak_memory_gib": tools.peak_memory(device),
        "skipped_updates": meta["skipped"],
        "loss": meta["log"],
    }
    tools.write_json(out / "results.json", results)
    report(results, out)


def report(results: dict, out: Path) -> None:
    """Prints the losses before and after, and where everything is."""
    for record in (results["loss"][0], results["loss"][-1]):
        losses = []
        for name in LOSSES:
            value = math.nan if record[name] is None else record[name]
            losses.append(f"{name} {value:.4f}")
        print(f"step {record['step']}: {', '.join(losses)}")
    skipped = f"{results['skipped_updates']} of {results['steps']}"
    print(f"Updates skipped as not finite: {skipped}. Written to {out}/: adapter/, results.json.")


# ---- command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """The flags of `memdlm.py --backbone`. Their defaults are the paper's."""
    parser = Parser("Fine-tunes a real backbone. The paper's values stand in brackets.")
    flag = parser.add_argument
    parser.set_defaults(dial="backbone")
    backbone.backbone_flags(flag)
    known = 'JSONL of {"prompt", "response"}, a LongAlpaca JSON file, or OWNER/NAME on the hub'
    flag("--data", required=True, help=f"{known} [Yukang/LongAlpaca-12k]")
    flag("--plain", action="store_true", help="prompts as they are, without the chat template")
    flag("--method", choices=("mdlm", "memdlm"), default="memdlm", help="mdlm is the baseline")
    flag("--out", default="runs/backbone", help="folder for everything that is written")
    tools.run_flags(flag)
    flag("--max-length", type=whole(2), default=4096, help="longest pair in tokens [4096]")
    flag("--pads", choices=PADS, default="learn", help="EOS pads: targets, or hidden [learn]")
    flag("--epochs", type=whole(1), default=5, help="passes through --data [5, Sec. 4.1]")
    flag("--accumulate", type=whole(1), default=1, help="micro-batches per step and process [1]")
    flag("--checkpoint-activations", action="store_true", help="less memory, more time")
    flag("--shard", action="store_true", help="under torchrun: spread frozen weights over the GPUs")
    flag("--eval-every", type=whole(1), default=100, help="steps between measured losses")
    flag("--eval-examples", type=whole(1), default=16, help="pairs measured, of each kind")
    flag("--lora-rank", type=whole(1), default=32, help="of the outer LoRA [32, Sec. 4.1]")
    flag("--lora-alpha", type=real(1e-6), default=64.0, help="its alpha [64, Sec. 4.1]")
    flag("--lora-dropout", type=real(0, 0.99), default=0.05, help="its dropout [0.05, Sec. 4.1]")
    loop_flags(flag)
    return parser


def run(arguments: list[str]) -> None:
    """Fine-tunes as the command line says."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.steps:
        parser.refuse(args, ["epochs"], "has no effect beside --steps, which counts by itself")
    if args.load_4bit:
        parser.refuse(args, ["shard"], "is for whole weights: those of --load-4bit are small")
    if not launched():
        parser.refuse(args, ["shard"], "spreads weights over processes: start it by torchrun")
    with together(tools.pick_device(args.device)) as device:
        fine_tune(args, device)
