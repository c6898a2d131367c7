"""
training.py: the training loop. For each step: set the rate, make the losses of its micro-batches,
take a step (`memdlm.train_step`); now and then measure, and save. That is `train`.

Around it stand losses on fixed noise, which can be compared between methods and steps (Fig. 4), and
what `--tiny` trains: a base for each seed, and from it, for each draw of a fine-tuning set, both
methods on identical batches under identical masks.
"""

import argparse
import copy
import math
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import memdlm
from data import Batch, Example
from lab import tools
from lab.variants import memory_of
from memdlm import Anchor, Memory, memory_method, standard_method
from model import Config, Transformer, UserError, init_weights


def pretraining_method(model, batch: Batch, memory: Memory, generator) -> Tensor:
    """The mean NLL over masked tokens: Eq. 2 without its weight, for a calmer start."""
    masked = memdlm.draw_anchor(batch.maskable, generator).masked
    h = memdlm.embed(model, batch.x0, masked)
    h = model.run(h, 0, None, batch.attention_mask, at=masked)  # (M, D)
    return memdlm.token_nll(model, h, batch.x0[masked]).sum() / masked.sum().clamp(min=1)


METHODS = {"base": pretraining_method, "mdlm": standard_method, "memdlm": memory_method}


class Phase(NamedTuple):
    """One training run."""

    name: str  # of its checkpoint: base, mdlm, memdlm
    steps: int
    rate_at: Callable[[int], float]  # step -> learning rate
    losses_at: Callable[[int], Iterable[Tensor]]  # step -> the losses of its micro-batches
    clip: float
    identity: dict  # everything that decides the result: a checkpoint must match it
    log_at: Callable[[int], list[dict]] | None = None  # step -> measurements to keep
    betas: tuple[float, float] = (0.9, 0.98)
    theta_only: bool = False  # leave the frozen backbone out of the checkpoint


def plateau_rate(peak: float, steps: int, warmup: float, decay: float) -> Callable:
    """step -> rate: linear warm-up over a share of the steps, a plateau if any are left for it, a
    cosine to zero over a share. Step k of w has (k + 1) / w * peak; the published trainer has
    k / w."""
    rising, falling = max(1, int(steps * warmup)), max(1, int(steps * decay))

    def rate_at(step: int) -> float:
        if step < rising:
            return peak * (step + 1) / rising
        into_decay = max(0, step - (steps - falling))
        return peak * 0.5 * (1 + math.cos(math.pi * into_decay / falling))

    return rate_at


def warn_of_overshoot(record: dict) -> None:
    """Says that the inner loop is unstable, where a log shows it: more than a tenth of the memories
    end with a step that raises the loss which it descends (assets/results.md shows such a step)."""
    if record["method"] == "memdlm" and record["overshoot"] > 0.1:
        found = f"{record['overshoot']:.0%} of the memories overshoot"
        tqdm.write(f"warning: memdlm, step {record['step']}: {found}; lower --memory-lr")


def train(model, phase: Phase, folder: Path, save_every: int, chief: bool = True) -> dict:
    """Trains `model` in place, from where folder/<name>.safetensors stopped if that is there.
    Returns its meta: step, seconds, skipped (updates), log. chief: this process, one of several,
    shows its progress and writes."""
    path = folder / f"{phase.name}.safetensors"
    meta = {"step": 0, "done": False, "skipped": 0, "seconds": 0.0, "log": []}
    meta |= {"identity": phase.identity, "config": asdict(model.config)}
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(theta, betas=phase.betas, weight_decay=0.0, fused=True)
    if path.exists():
        meta = tools.load_state(path, model, optimizer, phase.identity)
    clock, start = time.monotonic() - meta["seconds"], meta["step"]

    def log(step: int) -> None:
        for record in phase.log_at(step) if phase.log_at else []:
            meta["log"].append(record)
            warn_of_overshoot(record)

    def save(done: bool = False) -> None:
        meta.update(done=done, seconds=time.monotonic() - clock)
        if done:
            optimizer.state.clear()  # only a run that goes on needs it
        if chief:
            tools.save_state(path, model, optimizer, meta, phase.theta_only)

    bar = tqdm(total=phase.steps, desc=phase.name, initial=start, disable=not chief, delay=2)
    for step in range(start, phase.steps):
        log(step)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = phase.rate_at(step)
        taken, loss = memdlm.train_step(model, optimizer, phase.losses_at(step), phase.clip)
        meta["skipped"] += not taken
        meta["step"] = step + 1
        bar.set_postfix(loss=f"{loss:.3f}", skipped=meta["skipped"], refresh=False)
        bar.update()
        if (step + 1) % save_every == 0:
            save()
    bar.close()
    if not meta["done"]:
        log(phase.steps)
        save(done=True)
    return meta


# ---- losses on fixed noise (Fig. 4) --------------------------------------------------------------
LOSSES = ("train_with_memory", "train_without_memory", "eval_without_memory")
T_BINS = 5


def even_anchors(batches: list[Batch], seed: int) -> list[Anchor]:
    """An anchor for each batch, the same at every call; their t cover (0, 1) evenly."""
    generator, rows = memdlm.generator_for(seed, "measure"), [len(batch.x0) for batch in batches]
    levels = (torch.randperm(sum(rows), generator=generator) + 0.5) / sum(rows)
    anchors = []
    for batch, t in zip(batches, levels.split(rows)):
        masked = (torch.rand(batch.x0.shape, generator=generator) < t[:, None]).to(batch.x0.device)
        anchors.append(Anchor(t.to(masked.device), masked & batch.maskable))
    return anchors


@torch.no_grad()
def measure_losses(model, train_set, held_out, memory: Memory, seed: int, repeats: int = 1) -> dict:
    """LOSSES (Fig. 4), and the held-out NLL per masked token by noise level ("eval_by_t"). The one
    *with* memory leaks: the inner loop has learnt from the very tokens that are scored next. It is
    measured to show it, beside the honest one, which is the mean over `repeats` draws of noise.
    "overshoot" is the share of the memories whose last step has raised the loss that it descends.
    """
    model.eval()
    generator = memdlm.generator_for(seed, "measure memory")
    with_memory, overshoot, without, held, nll, levels = [], [], [], [], [], []
    for batch, anchor in zip(train_set, even_anchors(train_set, seed)):
        stages = memdlm.make_stages(anchor, batch.maskable, memory, generator)
        fast = memdlm.init_fast(model, memory, memory.sets(len(batch.x0)), generator)
        fast, inner = memdlm.inner_loop(model, batch, stages, fast, memory)
        last = stages[-1]._replace(h=memdlm.prefix(model, batch, stages[-1].masked, memory))
        overshoot += (memdlm.stage_loss(model, batch, last, fast, memory) > inner[-1]).tolist()
        h = memdlm.prefix(model, batch, anchor.masked, memory)
        start = memory.first_layer(len(model.layers))
        with_memory.append(memdlm.denoising_loss(model, batch, anchor, h, start, fast).item())
    for batch, anchor in zip(train_set * repeats, even_anchors(train_set * repeats, seed)):
        without.append(memdlm.mdlm_loss(model, batch, anchor).item())
    for batch, anchor in zip(held_out, even_anchors(held_out, seed)):
        h = model.run(memdlm.embed(model, batch.x0, anchor.masked), 0, None, batch.attention_mask)
        held.append(memdlm.denoising_loss(model, batch, anchor, h, len(model.layers)).item())
        nll.append(memdlm.token_nll(model, h[anchor.masked], batch.x0[anchor.masked]))
        levels.append(anchor.t[anchor.masked.nonzero()[:, 0]])
    trained, kept = ([int(b.maskable.sum()) for b in part] for part in (train_set, held_out))
    means = [np.average(with_memory, weights=trained)]
    means.append(np.average(without, weights=trained * repeats))
    means.append(np.average(held, weights=kept))
    nll, bins = torch.cat(nll), (torch.cat(levels) * T_BINS).long()
    by_t = [tools.finite(nll[bins == i].mean().item()) for i in range(T_BINS)]
    losses = {key: tools.finite(float(mean)) for key, mean in zip(LOSSES, means)}
    return losses | {"overshoot": float(np.mean(overshoot)), "eval_by_t": by_t}


# ---- what --tiny trains --------------------------------------------------------------------------
# How many models a run has. It decides nothing about any one: its identity leaves it out.
SEVERAL = ("seeds", "draws", "control_lr")


def arms(config: dict) -> dict[str, tuple[str, float]]:
    """The fine-tunings of each draw, name -> (method, peak rate): both methods at --lr, and
    Standard MDLM at the lower rates of its control."""
    both = {"mdlm": ("mdlm", config["lr"]), "memdlm": ("memdlm", config["lr"])}
    return both | {f"mdlm-{rate:g}": ("mdlm", rate) for rate in config["control_lr"]}


def tiny_pairs(config: dict, seed: int, draw: int | None, noise: float = 0.0) -> list[Example]:
    """A draw's fine-tuning set; with noise 0, the same pairs with their true answers. Without a
    draw, eight pairs of each task that are held out."""
    split, n = f"train {draw}", config["examples"] // len(data.TASKS)
    if draw is None:
        split, n = "held out", 8
    asked = n, config["length"] * config["stretch"], data.split_seed(seed, split), noise
    return [p for task in data.TASKS for p in data.make_examples(task, *asked, config["wording"])]


def pretrain(config: dict, seed: int, folder: Path, device, saving: int, bases=None) -> Transformer:
    """The base: `pretraining_method` on fresh documents with true answers, short ones first.
    saving: steps between checkpoints. bases: a run whose finished bases are taken over."""
    sizes, generator = Config(data.VOCAB_SIZE, data.MASK), torch.Generator().manual_seed(seed)
    model = init_weights(Transformer(sizes), generator).to(device)
    steps, rows = config["pretrain_steps"], config["pretrain_batch"]
    full, path = config["length"], folder / "base.safetensors"

    def losses_at(step: int) -> list[Tensor]:
        length = full * 2 // 3 if step < steps // 2 else full
        questions = 3 if step < steps * 0.6 else 1
        batch = data.pretraining_batch(seed, step, rows, length, questions, 0.3, device)
        return [memdlm.keyed_loss(METHODS["base"], model, batch, Memory(), seed, "pretrain", step)]

    names = ("length", "pretrain_steps", "pretrain_batch", "pretrain_lr")
    identity = {name: config[name] for name in names}
    identity |= {"seed": seed, "model": asdict(sizes)}
    if bases and not path.exists():
        source = Path(bases) / folder.name / path.name
        tensors, meta = tools.load_checkpoint(source)
        tools.check_identity(source, meta, identity)
        tools.save_checkpoint(path, tensors, meta)
    rate_at = plateau_rate(config["pretrain_lr"], steps, warmup=0.03, decay=0.3)
    train(model, Phase("base", steps, rate_at, losses_at, 1.0, identity), folder, saving)
    return model


def fine_tune(config: dict, model, name: str, seed: int, draw: int, folder, device, saving) -> None:
    """Trains the model as the arm `name` says. All arms of a draw see the same pairs, in the same
    batches, under the same noise."""
    (method, rate), memory, steps = arms(config)[name], memory_of(config), config["steps"]
    pairs = tiny_pairs(config, seed, draw, config["noise"])
    size, collate = min(config["batch"], len(pairs)), partial(data.collate, device=device)
    together = (
        size if memory.scope == "batch" else len(pairs)
    )  # as many share a memory as in training
    parts = [pairs[start : start + together] for start in range(0, len(pairs), together)]
    measured = [collate(part) for part in parts], [collate(tiny_pairs(config, seed, None))]

    def losses_at(step: int) -> list[Tensor]:
        rng = np.random.default_rng([seed, draw, step])
        batch = collate([pairs[i] for i in rng.choice(len(pairs), size, replace=False)])
        key = (seed, draw, "fine-tune", step)
        return [memdlm.keyed_loss(METHODS[method], model, batch, memory, *key)]

    def log_at(step: int) -> list[dict]:
        if step % max(1, steps // 2) and step != steps:
            return []
        losses = measure_losses(model, *measured, memory, seed, repeats=4)
        return [{"method": name, "lr": rate, "step": step, **losses, "seed": seed, "draw": draw}]

    identity = {key: value for key, value in config.items() if key not in SEVERAL}
    identity |= {"seed": seed, "draw": draw, "method": method, "lr": rate}
    identity["pairs"] = zlib.crc32(repr(pairs).encode())
    rate_at = plateau_rate(rate, steps, config["warmup"], decay=1 - config["warmup"])
    phase = Phase(name, steps, rate_at, losses_at, config["clip"], identity, log_at)
    train(model, phase, folder, saving)


def run_tiny(args: argparse.Namespace) -> None:
    """For each seed a base, and for each of its draws all arms, into OUT/seed<S>/draw<D>/."""
    out, config, device = Path(args.out), tools.settings(args), tools.pick_device(args.device)
    names = [f"{rate:g}" for rate in (*args.control_lr, args.lr)]
    if len(set(names)) < len(names) or not all(0 < rate < args.lr for rate in args.control_lr):
        raise UserError("--control-lr: give different rates above 0 and below --lr, or none.")
    tools.start_run(out, config, args.resume)
    for seed in range(args.seed, args.seed + args.seeds):
        folder = out / f"seed{seed}"
        base = pretrain(config, seed, folder, device, args.save_every, args.bases)
        for draw in range(args.draws):
            for name in arms(config):
                where = (folder / f"draw{draw}", device, args.save_every)
                fine_tune(config, copy.deepcopy(base), name, seed, draw, *where)


def checkpoint_path(out: Path, seed: int, draw: int, name: str) -> Path:
    """Where a model of a --tiny run lies: "base", which all draws share, or one of `arms`."""
    folder = out / f"seed{seed}"
    return (folder if name == "base" else folder / f"draw{draw}") / f"{name}.safetensors"


def open_run(out: Path, seed: int, draw: int, name: str, device: str) -> tuple[Transformer, dict]:
    """A model of a --tiny run, in eval mode, and its meta. Refuses one trained otherwise than the
    folder's settings say."""
    config, wanted = tools.read_config(out), {"seed": seed}
    if name not in ("base", *arms(config)):
        raise UserError(f"--model {name}: {out} has base, {', '.join(arms(config))}.")
    if name != "base":
        wanted |= {"draw": draw, "lr": arms(config)[name][1]}
    path = checkpoint_path(out, seed, draw, name)
    model, meta = tools.load_model(path, device)
    known = {key: config[key] for key in meta["identity"] if key in config}
    tools.check_identity(path, meta, known | wanted)
    return model, meta
