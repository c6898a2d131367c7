"""
training.py: the training loop, `train`: for each step set the rate, make the losses of its
micro-batches, take a step; now and then measure, and save. Around it stand losses on fixed noise,
which can be compared between methods and steps (Fig. 4), and what `--tiny` trains: from the base of
each seed both methods, on identical batches under identical masks; and the bases, if asked for.
"""

import math
import multiprocessing
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
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
    """step -> rate: linear warm-up over a share of the steps, a plateau if any are left, a cosine
    to zero over a share. Step k of w has (k + 1) / w * peak; the published trainer has k / w."""
    rising, falling = max(1, int(steps * warmup)), max(1, int(steps * decay))

    def rate_at(step: int) -> float:
        if step < rising:
            return peak * (step + 1) / rising
        into_decay = max(0, step - (steps - falling))
        return peak * 0.5 * (1 + math.cos(math.pi * into_decay / falling))

    return rate_at


def save_state(path: Path, model: Transformer, optimizer, meta: dict, theta_only: bool) -> None:
    """A checkpoint from which training goes on: model.<parameter>, of theta alone where the rest is
    frozen and lies elsewhere, and adam.<parameter>/<key> of AdamW's state."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters():
        if theta_only and not p.requires_grad:
            del tensors[f"model.{name}"]
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            tensors[f"adam.{name}/{key}"] = value
    tools.save_checkpoint(path, tensors, meta)


def load_state(path: Path, model: Transformer, optimizer, identity: dict) -> dict:
    """Weights and AdamW's state back in place, bit for bit. Returns the checkpoint's meta."""
    tensors, meta = tools.load_checkpoint(path)
    tools.check_identity(path, meta, identity)
    frozen = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tools.load_weights(model, frozen | tensors, path)
    parameters = dict(model.named_parameters())
    for place, tensor in tensors.items():
        if place.startswith("adam."):
            name, key = place.removeprefix("adam.").split("/")
            # A copy: else it stays mapped from the file, which Windows then would not replace.
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device, copy=True)
    return meta


def train(model, phase: Phase, folder: Path, save_every: int, chief=True, quiet=False) -> dict:
    """Trains `model` in place, from where folder/<name>.safetensors stopped if that is there.
    Returns its meta: step, seconds, skipped (updates), log. chief: it writes, and shows a bar."""
    path = folder / f"{phase.name}.safetensors"
    meta = {"step": 0, "done": False, "skipped": 0, "seconds": 0.0, "log": []}
    meta |= {"identity": phase.identity, "config": asdict(model.config)}
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(theta, betas=phase.betas, weight_decay=0.0, fused=True)
    if path.exists():
        meta = load_state(path, model, optimizer, phase.identity)
    clock, start = time.monotonic() - meta["seconds"], meta["step"]

    def log(step: int) -> None:
        for record in phase.log_at(step) if phase.log_at else []:
            meta["log"].append(record)
            if record["method"] == "memdlm" and record["overshoot"] > 0.1:  # assets/results.md
                found = f"step {step}: {record['overshoot']:.0%} of the memories overshoot"
                tqdm.write(f"warning: memdlm, {found}; lower --memory-lr", file=sys.stderr)

    def save(done: bool = False) -> None:
        meta.update(done=done, seconds=time.monotonic() - clock)
        if done:
            optimizer.state.clear()  # only a run that goes on needs it
        if chief:
            save_state(path, model, optimizer, meta, phase.theta_only)

    bar = tqdm(None, phase.name, phase.steps, initial=start, disable=quiet or not chief, delay=2)
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


def even_anchors(batches: list[Batch], seed: int) -> list[Anchor]:
    """An anchor for each batch, the same at every call; their t cover (0, 1) evenly."""
    generator, rows = memdlm.generator_for(seed, "measure"), [len(batch.x0) for batch in batches]
    levels = (torch.randperm(sum(rows), generator=generator) + 0.5) / sum(rows)
    anchors = []
    for batch, t in zip(batches, levels.split(rows)):
        masked = (torch.rand(batch.x0.shape, generator=generator) < t[:, None]).to(batch.x0.device)
        anchors.append(Anchor(t.to(masked.device), masked & batch.maskable))
    return anchors


def mean_loss(model, batches: list[Batch], seed: int) -> float:
    """The MDLM loss without a memory, under the noise of `even_anchors`."""
    pairs = zip(batches, even_anchors(batches, seed))
    losses = [memdlm.mdlm_loss(model, *pair).item() for pair in pairs]
    return float(np.average(losses, weights=[int(batch.maskable.sum()) for batch in batches]))


@torch.no_grad()
def measure_losses(model, train_set, held_out, memory: Memory, seed: int, repeats: int = 1) -> dict:
    """LOSSES (Fig. 4). The one *with* memory leaks: the inner loop has learnt from the very tokens
    that are scored next. It is measured to show it, beside the honest one, which is the mean over
    `repeats` noises. "overshoot" is the share of the memories whose last step has raised the loss
    that it descends."""
    model.eval()
    generator = memdlm.generator_for(seed, "measure memory")
    with_memory, overshoot = [], []
    for batch, anchor in zip(train_set, even_anchors(train_set, seed)):
        stages = memdlm.make_stages(anchor, batch.maskable, memory, generator)
        fast = memdlm.init_fast(model, memory, memory.sets(len(batch.x0)), generator)
        fast, inner = memdlm.inner_loop(model, batch, stages, fast, memory)
        last = stages[-1]._replace(h=memdlm.prefix(model, batch, stages[-1].masked, memory))
        after = memdlm.stage_loss(model, batch, last, fast, memory)
        overshoot += (~(after <= inner[-1])).tolist()  # of what is no number, too
        h = memdlm.prefix(model, batch, anchor.masked, memory)
        start = memory.first_layer(len(model.layers))
        with_memory.append(memdlm.denoising_loss(model, batch, anchor, h, start, fast).item())
    means = [np.average(with_memory, weights=[int(batch.maskable.sum()) for batch in train_set])]
    means += [mean_loss(model, train_set * repeats, seed), mean_loss(model, held_out, seed)]
    losses = {key: tools.finite(float(mean)) for key, mean in zip(LOSSES, means)}
    return losses | {"overshoot": float(np.mean(overshoot))}


# ---- what --tiny trains --------------------------------------------------------------------------
SHIPPED = Path(__file__).parents[1] / "assets" / "bases"  # seed<S>/base.safetensors, as in a run
# What decides nothing about any one model: a checkpoint's identity leaves it out.
SEVERAL = ("seeds", "control_lr", "pretrain")


def arms(config: dict) -> dict[str, tuple[str, float]]:
    """Name -> (method, peak rate): both methods at --lr, Standard MDLM at lower rates, too."""
    found = {"mdlm": ("mdlm", config["lr"])}
    found |= {f"mdlm-{rate:g}": ("mdlm", rate) for rate in config["control_lr"]}
    return found | {"memdlm": ("memdlm", config["lr"])}


def tiny_pairs(config: dict, seed: int, split: str = "train", noise: float = 0.0) -> list[Example]:
    """A fine-tuning set, with noise 0 of true answers; "held out": eight other pairs a task."""
    n = 8 if split == "held out" else config["examples"] // len(data.TASKS)
    asked = n, config["length"] * config["stretch"], data.split_seed(seed, split), noise
    return [p for task in data.TASKS for p in data.make_examples(task, *asked, config["wording"])]


def identity_of(config: dict, seed: int, name: str) -> dict:
    """What decides a model of a run: its checkpoint must match it."""
    if name == "base":
        keys = ("length", "pretrain_steps", "pretrain_batch", "pretrain_lr")
        sizes = asdict(Config(data.VOCAB_SIZE, data.MASK))
        return {key: config[key] for key in keys} | {"seed": seed, "model": sizes}
    method, rate = arms(config)[name]
    pairs = zlib.crc32(repr(tiny_pairs(config, seed, noise=config["noise"])).encode())
    own = {"seed": seed, "method": method, "lr": rate, "pairs": pairs}
    return {key: value for key, value in config.items() if key not in SEVERAL} | own


def find_base(config: dict, bases: Path, seed: int) -> tuple[dict, dict]:
    """The tensors and the meta of a base in a folder of bases."""
    path, advice = checkpoint_path(bases, seed, "base"), "add --pretrain to make it here"
    if not path.exists():
        raise UserError(f"there is no base of seed {seed} in {bases}: {advice}.")
    tensors, meta = tools.load_checkpoint(path)
    tools.check_identity(path, meta, identity_of(config, seed, "base"), advice)
    if not meta.get("done"):
        raise UserError(f"{path} is not finished: {advice}.")
    return tensors, meta


def pretrain(config: dict, seed: int, folder: Path, device: str, saving: int) -> Transformer:
    """The base: `pretraining_method` on fresh documents with true answers, short ones first."""
    sizes, generator = Config(data.VOCAB_SIZE, data.MASK), torch.Generator().manual_seed(seed)
    model = init_weights(Transformer(sizes), generator).to(device)
    steps, rows, full = config["pretrain_steps"], config["pretrain_batch"], config["length"]

    def losses_at(step: int) -> list[Tensor]:
        length = full // 2 if step < steps * 0.35 else full
        questions = 2 if step < steps * 0.6 else 1
        batch = data.pretraining_batch(seed, step, rows, length, questions, 0.15, device)
        return [memdlm.keyed_loss(METHODS["base"], model, batch, Memory(), seed, "pretrain", step)]

    rate_at = plateau_rate(config["pretrain_lr"], steps, warmup=0.03, decay=0.3)
    phase = Phase("base", steps, rate_at, losses_at, 1.0, identity_of(config, seed, "base"))
    train(model, phase, folder, saving, quiet=True)
    return model


def fine_tune(config: dict, model, name: str, seed: int, folder: Path, device, saving: int) -> None:
    """Trains the model as the arm `name` says, on the batches and masks of all arms of its base."""
    (method, rate), memory, steps = arms(config)[name], memory_of(config), config["steps"]
    pairs = tiny_pairs(config, seed, noise=config["noise"])
    size, collate = min(config["batch"], len(pairs)), partial(data.collate, device=device)
    together = size if memory.scope == "batch" else len(pairs)  # as many as share it in training
    parts = [pairs[start : start + together] for start in range(0, len(pairs), together)]
    measured = [collate(part) for part in parts], [collate(tiny_pairs(config, seed, "held out"))]

    def losses_at(step: int) -> list[Tensor]:
        rng = np.random.default_rng([seed, step])
        batch = collate([pairs[i] for i in rng.choice(len(pairs), size, replace=False)])
        key = (seed, "fine-tune", step)
        return [memdlm.keyed_loss(METHODS[method], model, batch, memory, *key)]

    def log_at(step: int) -> list[dict]:
        if step % max(1, steps // 2) and step != steps:
            return []
        losses = measure_losses(model, *measured, memory, seed, repeats=4)
        return [{"method": name, "lr": rate, "step": step, **losses, "seed": seed}]

    rate_at = plateau_rate(rate, steps, config["warmup"], decay=1 - config["warmup"])
    base = b"".join(weight.cpu().numpy().tobytes() for weight in model.state_dict().values())
    identity = identity_of(config, seed, name) | {"base": zlib.crc32(base)}
    phase = Phase(name, steps, rate_at, losses_at, config["clip"], identity, log_at)
    train(model, phase, folder, saving, quiet=True)


def checkpoint_path(out: Path, seed: int, name: str) -> Path:
    """Where a model lies in the folder of a run or of bases. name: "base", or one of `arms`."""
    return out / f"seed{seed}" / f"{name}.safetensors"


def open_run(out: Path, seed: int, name: str, device: str) -> tuple[Transformer, dict]:
    """A model of a --tiny run, in eval mode, and its meta, if it is what the settings there say."""
    config, path = tools.read_config(out), checkpoint_path(out, seed, name)
    if name not in ("base", *arms(config)):
        raise UserError(f"--model {name}: {out} has base, {', '.join(arms(config))}.")
    wanted = {"seed": seed} | ({} if name == "base" else {"lr": arms(config)[name][1]})
    model, meta = tools.load_model(path, device)
    known = {key: config[key] for key in meta["identity"] if key in config}
    tools.check_identity(path, meta, known | wanted)
    return model, meta


def train_job(out: Path, config: dict, device: str, saving: int, job: tuple[int, str]) -> None:
    """Trains a model of a run, (seed, name): a base from nothing, an arm from the base there."""
    seed, name = job
    folder = checkpoint_path(out, seed, name).parent
    if name == "base":
        pretrain(config, seed, folder, device, saving)
    else:
        model, _ = open_run(out, seed, "base", device)
        fine_tune(config, model, name, seed, folder, device, saving)


def begin_worker(prepare: Callable | None) -> None:
    """What a process does before its first job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ended by the one that has started it
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and outlives a killed one
    if prepare is not None:
        prepare()


@contextmanager
def workers(device: str, prepare: Callable | None = None) -> Iterator[Callable]:
    """Yields each(do, jobs), the results of do(job) as they come: on a CPU of as many processes as
    torch would use threads, with one each, so that no result depends on how many there are."""
    processes = torch.get_num_threads() if device == "cpu" else 1
    if processes == 1:
        yield map
        return
    options = {"mp_context": multiprocessing.get_context("spawn"), "initializer": begin_worker}
    with ProcessPoolExecutor(processes, **options, initargs=(prepare,)) as pool:
        try:
            yield lambda do, xs: map(Future.result, as_completed([pool.submit(do, x) for x in xs]))
        except BaseException:  # nothing of what still runs is waited for
            for child in multiprocessing.active_children():
                child.terminate()
            raise
