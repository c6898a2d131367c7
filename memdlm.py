"""
memdlm.py: the method. Corrupt, write the memory (inner loop), learn from what is left over (outer loop), step.

    python memdlm.py --tiny            trains and compares Standard MDLM and MemDLM on a laptop

Read down to `train_step`: that is the whole method. Below are the training loop, the `--tiny` experiment, the command line.

Reading list
  MemDLM   Pei et al. 2026, arXiv 2603.22241: Sec. 2.1 (masked diffusion), Sec. 3 (the two loops), Sec. 4.1 (settings)
  MDLM     Sahoo et al. 2024, arXiv 2406.07524: why the loss weight is 1/t
  LLaDA    Nie et al. 2025, arXiv 2502.09992: masked diffusion fine-tuned on (prompt, response) pairs
  MAML     Finn et al. 2017, arXiv 1703.03400, Sec. 5.2: the first-order approximation of a nested gradient

Glossary
  paper      | name here              | shape
  x_0        | batch.x0               | (B, T) clean token ids
  t          | anchor.t               | (B,) sampled noise level
  M_t        | anchor.masked          | (B, T) bool, True where x_t is [MASK]
  x_t        | corrupt(x0, masked)    | (B, T) the *anchor*: drawn once, used by stage 2 and by the outer loss
  x_tpre     | corrupt(x0, pre)       | (B, T) the *pre-anchor*: the anchor, masked further
  s          | memory.start_scale     | float, t_pre = min(1, s * t)
  theta      | model.parameters()     | what the outer loop trains
  phi        | fast                   | model.Fast: the Parametric Memory
  eta        | memory.lr              | float, the inner loop's step size
  K          | len(states)            | 2: pre-anchor, anchor
  w(t)       | 1 / (t + 1e-6)         | (B,) loss weight
  N          | sets                   | number of sets of fast weights: B (scope "sample") or 1 (scope "batch")
  -          | states                 | per stage: its mask, and the prefix's output h (B, T, D) on that input
  -          | cut, prefix            | the layers before `cut` do not depend on phi; M masked positions, V vocabulary, D hidden

Who is updated by what
  weights           | updated by            | loss                         | when reset                 | saved
  backbone          | nobody, or AdamW      | -, or MDLM loss with phi_2   | never                      | base, mdlm, memdlm
  outer LoRA theta  | AdamW, outer loop     | MDLM loss with phi_2 in place| never                      | with the backbone
  fast weights phi  | plain SGD, inner loop | inner loss of stages 1 and 2 | before every batch, prompt | never
(The tiny model trains its whole backbone as theta; `--lora-rank` freezes it and trains an outer LoRA, as the paper does.)
"""

import argparse
import copy
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from data import Batch, Parser, guarded, pick_device, real, whole
from model import (
    Config,
    Fast,
    Transformer,
    UserError,
    add_outer_lora,
    check_writable,
    init_weights,
    kaiming_uniform,
    load_checkpoint,
    load_model,
    read_json,
    restore,
    save_checkpoint,
    training_state,
    write_json,
    write_text,
)

# ---- masked diffusion (Sec. 2.1) ----------------------------------------------------------------------------------------


class Anchor(NamedTuple):
    """One draw of the forward process: t (B,) and which tokens it masks (B, T)."""

    t: Tensor
    masked: Tensor


def draw_anchor(maskable: Tensor, generator: torch.Generator, eps: float = 1e-3) -> Anchor:
    """Eq. 1: each maskable token is masked with probability t, one t ~ U(eps, 1) per row."""
    t = eps + (1 - eps) * torch.rand(len(maskable), generator=generator)
    masked = torch.rand(maskable.shape, generator=generator) < t[:, None]
    return Anchor(t.to(maskable.device), masked.to(maskable.device) & maskable)


def corrupt(x0: Tensor, masked: Tensor) -> Tensor:
    """x_t: the clean tokens x0 (B, T) with [MASK] wherever masked (B, T) says so."""
    return torch.where(masked, data.MASK, x0)


def masked_nll(model: Transformer, h: Tensor, x0: Tensor, masked: Tensor) -> Tensor:
    """-log p(x0_i | x_t) at the M masked positions, (M,), in row order. The head runs on these rows of h (B, T, D) only."""
    logits = model.head(h[masked])  # (M, V)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), x0[masked], reduction="none")


def denoising_loss(
    model: Transformer, batch: Batch, anchor: Anchor, h: Tensor, fast: Fast | None = None, start: float = 0
) -> Tensor:
    """Eq. 2, and with `fast` Eq. 9: sum of w(t) * nll over masked tokens / number of maskable tokens.

    h (B, T, D) is the stack's state at `start`, counted in layers.
    """
    h = model.run(h, start, model.config.layers, batch.attention_mask, fast)
    nll = masked_nll(model, h, batch.x0, anchor.masked)  # (M,)
    row = anchor.masked.nonzero()[:, 0]  # (M,) which example each masked token belongs to
    weight = 1 / (anchor.t + 1e-6)
    return (weight[row] * nll).sum() / batch.maskable.sum().clamp(min=1)


def mdlm_loss(model: Transformer, batch: Batch, anchor: Anchor) -> Tensor:
    """Standard MDLM, the baseline: the denoising loss of the plain model."""
    return denoising_loss(model, batch, anchor, model.embedding(corrupt(batch.x0, anchor.masked)))


# ---- the inner loop: write a memory (Sec. 3, Eqs. 6-8) --------------------------------------------------------------------


@dataclass
class Memory:
    """Settings of the Parametric Memory. Defaults: the paper's, Sec. 4.1."""

    rank: int = 32
    alpha: float = 64.0
    lr: float = 0.1
    clip: float = 1.0  # each tensor's gradient alone; <= 0 switches it off
    fraction: float = 0.1  # the last 10% of layers carry fast weights, in their feed-forward network
    start_scale: float = 1.5
    scope: str = "batch"  # a key of SCOPES: who shares a set of fast weights


# How many sets a batch of rows gets. One for all, as published: the batch size then changes the method. One per sample.
SCOPES = {"batch": lambda rows: 1, "sample": lambda rows: rows}


def first_adapted_layer(layers: int, fraction: float) -> int:
    """Layers int(n * (1 - fraction)) .. n - 1 are adapted."""
    first = max(0, int(layers * (1 - min(1.0, fraction))))
    if first == layers:
        raise UserError(f"a memory fraction of {fraction} adapts none of {layers} layers: raise --memory-fraction.")
    return first


def memory_start(model: Transformer, memory: Memory) -> float:
    """Where phi begins to matter: behind the first adapted layer's attention, hence the half. Before it lies the *prefix*."""
    return first_adapted_layer(model.config.layers, memory.fraction) + 0.5


def init_fast(model: Transformer, memory: Memory, sets: int, generator: torch.Generator) -> Fast:
    """phi_0: N = `sets` times A Kaiming-uniform, B = 0, so that the product is zero and the model unchanged."""
    weights = {}
    for i in range(first_adapted_layer(model.config.layers, memory.fraction), model.config.layers):
        for name in ("gate", "up", "down"):
            matrix = getattr(model.layers[i].mlp, name).weight  # (out, in)
            A = kaiming_uniform(torch.empty(sets, memory.rank, matrix.shape[1], dtype=matrix.dtype), generator)
            B = torch.zeros(sets, matrix.shape[0], memory.rank, dtype=matrix.dtype)
            weights[f"layers.{i}.mlp.{name}"] = (A.to(matrix.device), B.to(matrix.device))
    return Fast(weights, memory.alpha / memory.rank)


def pre_anchor_count(masked: int, maskable: int, start_scale: float) -> int:
    """How many tokens x_tpre masks: int(n * min(1, max(s r, r))), r = masked / maskable, in the published code's float32."""
    ratio = np.float32(masked) / np.float32(max(1, maskable))
    start = min(np.float32(1), max(ratio * np.float32(start_scale), ratio))
    return min(maskable, max(masked, int(maskable * float(start))))


def draw_pre_anchor(masked: Tensor, maskable: Tensor, start_scale: float, generator: torch.Generator) -> Tensor:
    """x_tpre's mask (B, T): the anchor's masked tokens and as many further maskable ones as `pre_anchor_count` says."""
    chance = torch.rand(masked.shape, generator=generator).to(masked.device)
    # Three bands: 2 to 3 is masked already, 0 to 1 is maskable, -2 to -1 is never masked.
    order = (chance + 2.0 * masked - 2.0 * ~maskable).argsort(dim=1, descending=True)
    pairs = zip(masked.sum(1).tolist(), maskable.sum(1).tolist())
    count = torch.tensor([pre_anchor_count(k, n, start_scale) for k, n in pairs], device=masked.device)
    first = torch.arange(masked.shape[1], device=masked.device) < count[:, None]
    return torch.zeros_like(masked).scatter(1, order, first)


def stage_loss(
    model: Transformer, batch: Batch, masked: Tensor, h: Tensor, fast: Fast, memory: Memory, weighted: bool
) -> Tensor:
    """Cross-entropy of *all* clean tokens under the mask ("broader supervision", Sec. 4.6), per set of fast weights: (N,).

    sum(w * nll) / number of loss positions, w = 1/t with t the fraction of maskable tokens that this state really masks.
    """
    h = model.run(h, memory_start(model, memory), model.config.layers, batch.attention_mask, fast)
    nll = masked_nll(model, h, batch.x0, masked)  # (M,)
    count = masked.sum(1)  # (B,)
    t = count / batch.maskable.sum(1).clamp(min=1)
    weight = 1 / (t + 1e-6) if weighted else torch.ones_like(t)
    row = masked.nonzero()[:, 0]
    total = torch.zeros_like(t, dtype=nll.dtype).index_add(0, row, weight[row].to(nll.dtype) * nll)  # (B,)
    sets = len(next(iter(fast.weights.values()))[0])
    return total.view(sets, -1).sum(1) / count.view(sets, -1).sum(1).clamp(min=1)  # (N,)


def sgd(parameter: Tensor, grad: Tensor, loss: Tensor, memory: Memory) -> Tensor:
    """parameter - lr * clipped grad for one A or B (N, ., .); loss (N,). Each tensor of each set is clipped alone.

    A set whose loss is not finite keeps what it has; so does a tensor whose gradient is not.
    """
    norm = grad.flatten(1).norm(dim=1)  # (N,)
    scale = (memory.clip / (norm + 1e-12)).clamp(max=1.0) if memory.clip > 0 else torch.ones_like(norm)
    usable = loss.isfinite() & norm.isfinite()
    return torch.where(usable[:, None, None], parameter - memory.lr * scale[:, None, None] * grad, parameter).detach()


def inner_loop(
    model: Transformer, batch: Batch, states: list[tuple[Tensor, Tensor]], fast: Fast, memory: Memory, weighted: bool = True
) -> tuple[Fast, Tensor]:
    """phi_0 -> phi_K, one SGD step per state (Eqs. 6-8).

    states: per stage the mask (B, T) and the prefix's output h (B, T, D) on that corrupted input.
    weighted: w = 1/t in training, 1 when a prompt is written (Sec. 4.5).
    Returns phi_K, detached, and the losses (K, N) before each step.
    """
    losses = []
    for masked, h in states:
        leaves = [p.detach().requires_grad_() for pair in fast.weights.values() for p in pair]
        fast = Fast(dict(zip(fast.weights, zip(leaves[::2], leaves[1::2]))), fast.scale)
        with torch.enable_grad():
            loss = stage_loss(model, batch, masked, h, fast, memory, weighted)  # (N,): sets are independent, so one sum does
            grads = torch.autograd.grad(loss.sum(), leaves)
        leaves = [sgd(p, g, loss.detach(), memory) for p, g in zip(leaves, grads)]
        fast = Fast(dict(zip(fast.weights, zip(leaves[::2], leaves[1::2]))), fast.scale)
        losses.append(loss.detach())
    return fast, torch.stack(losses)


# ---- the outer loop: learn what the memory does not hold (Eqs. 9-10) ------------------------------------------------------


def memdlm_loss(
    model: Transformer, batch: Batch, anchor: Anchor, pre_masked: Tensor, fast: Fast, memory: Memory
) -> tuple[Tensor, Tensor]:
    """The MDLM loss on x_t with phi_2 in place, and the inner losses (2, N). First order: phi_2 is a constant.

    Three forwards and three backwards would be the naive way. Fast weights live in the last layers only, so the prefix's
    activations on x_t serve both stage 2 and this loss, x_tpre's prefix needs no graph, and the inner backwards end
    where the prefix does: about 4 + 3s units of work instead of 9, where plain MDLM costs 3 and s is the adapted share.
    """
    cut = memory_start(model, memory)
    h = model.run(model.embedding(corrupt(batch.x0, anchor.masked)), 0, cut, batch.attention_mask)
    with torch.no_grad():
        h_pre = model.run(model.embedding(corrupt(batch.x0, pre_masked)), 0, cut, batch.attention_mask)
    fast, inner = inner_loop(model, batch, [(pre_masked, h_pre), (anchor.masked, h.detach())], fast, memory)
    return denoising_loss(model, batch, anchor, h, fast, cut), inner


def standard_method(model: Transformer, batch: Batch, memory: Memory, generator: torch.Generator) -> Tensor:
    """Draws an anchor and returns the loss of Standard MDLM on it."""
    return mdlm_loss(model, batch, draw_anchor(batch.maskable, generator))


def memory_method(model: Transformer, batch: Batch, memory: Memory, generator: torch.Generator) -> Tensor:
    """The same anchor as `standard_method` from the same generator, so that comparisons are paired; then MemDLM's loss."""
    anchor = draw_anchor(batch.maskable, generator)
    pre_masked = draw_pre_anchor(anchor.masked, batch.maskable, memory.start_scale, generator)
    fast = init_fast(model, memory, SCOPES[memory.scope](len(batch.x0)), generator)
    return memdlm_loss(model, batch, anchor, pre_masked, fast, memory)[0]


def pretraining_method(model: Transformer, batch: Batch, memory: Memory, generator: torch.Generator) -> Tensor:
    """Mean NLL over masked tokens: Eq. 2 without the weight, less noisy, hence a denser signal from scratch."""
    masked = draw_anchor(batch.maskable, generator).masked
    h = model.run(model.embedding(corrupt(batch.x0, masked)), 0, model.config.layers, batch.attention_mask)
    return masked_nll(model, h, batch.x0, masked).sum() / masked.sum().clamp(min=1)


METHODS = {"base": pretraining_method, "mdlm": standard_method, "memdlm": memory_method}


def train_step(model: Transformer, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> bool:
    """One AdamW step on theta, whose gradient alone is clipped (globally). False: not finite, nothing was changed."""
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theta, clip if clip > 0 else math.inf)
    finite = bool(loss.isfinite() & norm.isfinite())
    if finite:
        optimizer.step()
    return finite


# ---- training: a loop, its checkpoints, its log ---------------------------------------------------------------------------


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. (seed, "anchor", step). Draws depend on the key alone, so that a resumed run
    needs no generator state, and two methods with the same key see the same noise on any device."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


class Phase(NamedTuple):
    """One training run: everything that decides its result."""

    method: str  # a key of METHODS, and the checkpoint's file name
    seed: int
    steps: int
    lr: float
    warmup: float  # share of the steps, Sec. 4.1: 10%
    decay: float  # share of the steps at the end over which the rate falls, Sec. 4.1: all but the warm-up
    clip: float
    memory: Memory
    draws: str  # key of the random draws: two phases with the same key see the same noise
    batch_at: Callable[[int], Batch]
    log_at: Callable[[Transformer, int], list[dict]] | None
    identity: dict  # what a checkpoint must match to be continued or reused


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up, a plateau if there is room for one, then a cosine to zero."""
    warmup, decay = max(1, int(phase.steps * phase.warmup)), max(1, int(phase.steps * phase.decay))
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    return phase.lr * 0.5 * (1 + math.cos(math.pi * max(0, step - (phase.steps - decay)) / decay))


def train(
    model: Transformer, phase: Phase, folder: Path, resume: bool, save_every: int, device: str, lora: dict | None = None
) -> dict:
    """Trains `model` in place, or takes it up where folder/<name>.safetensors stopped. Returns the checkpoint's metadata."""
    path = folder / f"{phase.method}.safetensors"
    meta = {"step": 0, "steps": phase.steps, "skipped": 0, "seconds": 0.0, "log": [], "lora": lora}
    meta |= {"identity": phase.identity, "config": asdict(model.config)}
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(theta, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    if path.exists() and (resume or phase.method == "base"):
        tensors, saved = load_checkpoint(path)
        if saved.get("identity") == meta["identity"]:
            meta = saved
            restore(model, optimizer, tensors, device, path)
            print(f"{phase.method}: taken up from {path} at step {meta['step']} of {phase.steps}")
        elif resume and (saved.get("identity") or {}) | {"data": None} == meta["identity"] | {"data": None}:
            raise UserError(f"--resume: the data has changed since {path} was saved. Leave --resume out to start again.")
    bar = tqdm(range(meta["step"], phase.steps), phase.method, initial=meta["step"], total=phase.steps, mininterval=1, delay=2)
    clock = time.monotonic()
    for step in bar:
        if phase.log_at:
            meta["log"] += phase.log_at(model, step)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        generator = generator_for(phase.seed, phase.draws, step)
        torch.manual_seed(generator.initial_seed())  # for LoRA's dropout alone: all other draws use `generator`
        loss = METHODS[phase.method](model, phase.batch_at(step), phase.memory, generator)
        meta["skipped"] += not train_step(model, optimizer, loss, phase.clip)
        meta["step"] = step + 1
        bar.set_postfix(loss=f"{loss.item():.3f}", skipped=meta["skipped"], refresh=False)
        if (step + 1) % save_every == 0 and step + 1 < phase.steps:
            meta["seconds"], clock = meta["seconds"] + time.monotonic() - clock, time.monotonic()
            save_checkpoint(path, training_state(model, optimizer), meta)
    if meta["step"] == phase.steps and not meta.get("done"):
        meta["log"] += phase.log_at(model, phase.steps) if phase.log_at else []
        meta["seconds"], meta["done"] = meta["seconds"] + time.monotonic() - clock, True
        save_checkpoint(path, training_state(model, None), meta)
    return meta


# ---- the --tiny experiment -------------------------------------------------------------------------------------------------


def memory_settings(config: dict) -> Memory:
    """The inner loop's settings out of a run's config."""
    chosen = {key.removeprefix("memory_"): value for key, value in config.items() if key.startswith("memory_")}
    return Memory(**chosen, start_scale=config["start_scale"])


def fine_tuning_data(args: argparse.Namespace, seed: int) -> tuple[list[data.Example], list[data.Example]]:
    """Training and held-out pairs: --data's own, split 95 / 5 (seed 42, Sec. 4.1), or the tasks', noisy in training."""
    if args.data:
        pairs = data.read_jsonl(args.data, args.max_length)
        order = np.random.default_rng(42).permutation(len(pairs))
        held = max(1, len(pairs) // 20)
        return [pairs[i] for i in order[held:]] or pairs, [pairs[i] for i in order[:held]]

    def draw(split: str, n: int, noise: float) -> list[data.Example]:
        key = data.split_seed(seed, split)
        return [pair for task in data.TASKS for pair in data.make_examples(task, n, args.length, key, noise)]

    return draw("train", args.examples // len(data.TASKS), args.noise), draw("held out", 16, 0.0)


def pretrain(args: argparse.Namespace, seed: int, folder: Path, device: str) -> tuple[Transformer, dict]:
    """The base: Standard MDLM on fresh documents, short ones first, without memory and without noise."""
    model = init_weights(Transformer(Config(data.VOCAB_SIZE)), torch.Generator().manual_seed(seed)).to(device)

    def batch_at(step: int) -> Batch:
        early, many = step < args.pretrain_steps // 2, step < args.pretrain_steps * 0.6
        length, questions = (args.length * 2 // 3 if early else args.length), (3 if many else 1)
        return data.pretraining_batch(seed, step, args.pretrain_batch, length, questions, 0.3, device)

    identity = {key: getattr(args, key) for key in ("length", "pretrain_steps", "pretrain_batch", "pretrain_lr")}
    identity |= {"seed": seed, "model": asdict(model.config), "data": data.fingerprint()}
    steps, lr = args.pretrain_steps, args.pretrain_lr  # then 3% warm-up, 30% decay, clip 1.0
    phase = Phase("base", seed, steps, lr, 0.03, 0.3, 1.0, Memory(), "pretrain", batch_at, None, identity)
    if args.bases:
        copy_base(Path(args.bases) / folder.name / "base.safetensors", folder / "base.safetensors", identity)
    return model, train(model, phase, folder, args.resume, args.save_every, device)


def copy_base(source: Path, target: Path, identity: dict) -> None:
    """Takes over a base that another run has pretrained, if it is finished and just what this run would make itself."""
    tensors, meta = load_checkpoint(source)
    different = [key for key, value in identity.items() if meta.get("identity", {}).get(key) != value]
    if different or not meta.get("done"):
        reason = f"differs in {', '.join(different)}" if different else "is not finished"
        raise UserError(f"--bases: {source} {reason}. Leave --bases out to pretrain a base for this run.")
    save_checkpoint(target, tensors, meta)


def fine_tune(
    args: argparse.Namespace, base: Transformer, method: str, seed: int, folder: Path, device: str
) -> tuple[Transformer, dict]:
    """Standard MDLM or MemDLM from the same base on identical batches with identical anchors."""
    import eval_niah

    train_set, held_out = fine_tuning_data(args, seed)
    model, memory, lora = copy.deepcopy(base), memory_settings(settings(args)), None
    if args.lora_rank:
        lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
        add_outer_lora(model, **lora, generator=generator_for(seed, "lora"))

    def batch_at(step: int) -> Batch:
        rows = np.random.default_rng([seed, step]).choice(len(train_set), min(args.batch, len(train_set)), replace=False)
        return data.collate([train_set[i] for i in rows], device, args.pads)

    measured = [data.collate(part[:: -(-len(part) // 64)], device, args.pads) for part in (train_set, held_out)]

    def log_at(model: Transformer, step: int) -> list[dict]:
        if step % max(1, args.steps // 10) and step != args.steps:
            return []
        return [{"method": method, "step": step, **eval_niah.measure_losses(model, *measured, memory, seed), "seed": seed}]

    identity = {**settings(args), "seed": seed, "method": method, "data": zlib.crc32(repr(train_set).encode())}
    steps, draws = (args.steps, args.lr, args.warmup, 1 - args.warmup, args.clip), "fine-tune"
    phase = Phase(method, seed, *steps, memory, draws, batch_at, log_at, identity)
    return model, train(model, phase, folder, args.resume, args.save_every, device, lora)


def run_seed(args: argparse.Namespace, seed: int, device: str) -> dict:
    """Base, two fine-tunings, four rows of scores and the exposure bias of one seed; kept in seed<S>/results.json."""
    import eval_niah
    import sample

    folder = Path(args.out) / f"seed{seed}"
    path = folder / "results.json"
    if args.resume and path.exists() and (saved := read_json(path)).get("config") == settings(args):
        return saved
    models, metas = {}, {}
    models["base"], metas["base"] = pretrain(args, seed, folder, device)
    for method in ("mdlm", "memdlm"):
        models[method], metas[method] = fine_tune(args, models["base"], method, seed, folder, device)
    for model in models.values():
        model.eval()
    clock, write = time.monotonic(), sample.write_settings(settings(args))
    result = {"config": settings(args)}
    result["niah"] = eval_niah.score_cells(models, args.tasks, args.lengths, args.samples, seed, write)
    result["exposure_bias"] = eval_niah.exposure_bias(models, args.tasks, args.length, args.samples, seed, write)
    result["loss"] = [record for method in ("mdlm", "memdlm") for record in metas[method]["log"]]
    result["seconds"] = {name: meta["seconds"] for name, meta in metas.items()} | {"evaluation": time.monotonic() - clock}
    result["skipped_updates"] = {name: meta["skipped"] for name, meta in metas.items()}
    write_json(path, result)
    return result


def run_tiny(args: argparse.Namespace, device: str) -> None:
    """All seeds, then results.json, the pictures, the table and one denoised example."""
    import eval_niah
    import sample

    out = Path(args.out)
    fine_tuning_data(args, args.seed)  # a fault in --data shows now, before any work
    start_run(args, out)
    runs = [run_seed(args, seed, device) for seed in range(args.seed, args.seed + args.seeds)]
    results = {"config": settings(args), "machine": eval_niah.machine(device)}
    results["seconds"] = {phase: sum(run["seconds"][phase] for run in runs) for phase in runs[0]["seconds"]}
    results["peak_memory_gib"] = eval_niah.peak_memory(device)
    results |= {key: [record for run in runs for record in run[key]] for key in ("niah", "exposure_bias", "loss")}
    write_json(out / "results.json", results)
    eval_niah.draw_pictures(results, out)
    base, _ = load_model(out / f"seed{args.seed}" / "base.safetensors", device)
    example = data.make_examples(args.tasks[0], args.samples, args.length, data.split_seed(args.seed, "test"))[0]
    view = sample.denoising_view(base, example)
    write_text(out / "denoising.txt", view)
    skipped = {name: sum(run["skipped_updates"][name] for run in runs) for name in runs[0]["skipped_updates"]}
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items())
    print(eval_niah.report(results), "\nThe base model denoises test example 0:\n", view, sep="\n")
    print(f"\nTime: {seconds}. Peak memory {results['peak_memory_gib']:.2f} GiB.")
    print(f"Outer updates skipped as not finite: {skipped}. Written to {out}/.")


def read_config(out: Path) -> dict:
    """A run's settings, from its config.json."""
    if not (out / "config.json").exists():
        raise UserError(f"there is no run in {out}: it has no config.json. Train one with python memdlm.py --tiny --out {out}.")
    config = read_json(out / "config.json")
    if not isinstance(config, dict) or not settings(build_parser().parse_args([])).keys() <= config.keys():
        raise UserError(f"{out}/config.json was not written by this program; name a folder of a run.")
    return config


def start_run(args: argparse.Namespace, out: Path) -> None:
    """Checks that the folder can be written, and that --resume continues the run that is there."""
    if args.resume:
        saved = read_config(out)
        for name, value in settings(args).items():
            if saved.get(name) != value:
                flag = name.replace("_", "-")
                raise UserError(f"--resume: the run in {out} was started with --{flag} {saved.get(name)}, not {value}.")
    check_writable(out)
    write_json(out / "config.json", settings(args))


def settings(args: argparse.Namespace) -> dict:
    """Every flag that decides the numbers. Where the run lies and how often it saves do not."""
    where = ("out", "resume", "bases", "save_every", "device")
    return {name: value for name, value in sorted(vars(args).items()) if name not in where}


# ---- command line -------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    import sample

    parser = Parser("Trains Standard MDLM and MemDLM and compares them. Paper values in brackets.")
    flag = parser.add_argument
    flag("--tiny", action="store_true", help="the laptop experiment: pretrain a base, fine-tune it twice, compare")
    flag("--out", default="runs/tiny", help="folder for everything that is written")
    flag("--bases", help="folder of another run whose pretrained bases are used (default: --out)")
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    flag("--seed", type=whole(0, 2**32 - 1), default=0, help="first seed: base, data and noise")
    flag("--seeds", type=whole(1), default=1, help="how many seeds to run, one after the other")
    # data
    flag("--data", help='JSONL of {"prompt", "response"} that replaces the fine-tuning set')
    flag("--max-length", type=whole(2), default=4096, help="longest pair accepted in --data, in tokens [4096, Sec. 4.1]")
    flag("--examples", type=whole(4, multiple=4), default=64, help="size of the fine-tuning set")
    flag("--noise", type=real(0, 1), default=0.5, help="share of answer words replaced at random in the fine-tuning set")
    flag("--length", type=whole(64, 1024), default=96, help="training length in tokens: 1x")
    flag("--pads", choices=list(data.PADS), default="learn", help="EOS padding: a target like any token, or hidden [learn]")
    # outer loop
    flag("--pretrain-steps", type=whole(1), default=2400, help="steps of the base's pretraining")
    flag("--pretrain-batch", type=whole(4, multiple=4), default=64, help="sequences per pretraining step")
    flag("--pretrain-lr", type=real(0), default=4e-3, help="peak learning rate of the pretraining")
    flag("--steps", type=whole(1), default=300, help="fine-tuning steps [5 epochs, Sec. 4.1]")
    flag("--batch", type=whole(1), default=16, help="pairs per fine-tuning step [2, Sec. 4.1]")
    flag("--lr", type=real(0), default=1e-3, help="peak learning rate of the fine-tuning [2e-5, Sec. 4.1]")
    flag("--warmup", type=real(0, 1), default=0.1, help="share of the fine-tuning steps with rising rate [0.1, Sec. 4.1]")
    flag("--clip", type=real(0), default=1.0, help="clips the global norm of theta's gradient, 0 = off [1.0, Sec. 4.1]")
    flag("--lora-rank", type=whole(0), default=0, help="0 trains all weights; else an outer LoRA of this rank [32, Sec. 4.1]")
    flag("--lora-alpha", type=real(0), default=64.0, help="alpha of the outer LoRA [64, Sec. 4.1]")
    flag("--lora-dropout", type=real(0, 0.99), default=0.05, help="dropout of the outer LoRA [0.05, Sec. 4.1]")
    # inner loop
    flag("--memory-rank", type=whole(1), default=8, help="rank of the fast weights [32, Sec. 4.1]")
    flag("--memory-alpha", type=real(0), default=16.0, help="alpha of the fast weights [64, Sec. 4.1]")
    flag("--memory-lr", type=real(0), default=1.0, help="step size of the inner loop [0.1, Sec. 4.1]")
    flag("--memory-clip", type=real(-math.inf), default=1.0, help="clips each fast tensor's gradient, 0: off [1.0, Sec. 4.1]")
    flag("--memory-fraction", type=real(0.01, 1), default=0.5, help="last share of layers with fast weights [0.1, Sec. 4.1]")
    flag("--memory-scope", choices=list(SCOPES), default="sample", help="one set of fast weights per sample or batch [batch]")
    flag("--start-scale", type=real(1), default=1.5, help="s: how much further the pre-anchor is masked [1.5, Sec. 4.1]")
    # memory at inference
    flag("--write", choices=list(sample.WRITE_RULES), default="surprise", help="how a prompt is written [paper, Sec. 4.5]")
    flag("--write-lr", type=real(0), default=0.5, help="step size of that [0.1, Sec. 4.5]")
    flag("--write-rank", type=whole(1), default=32, help="rank of its fast weights [32, Sec. 4.1]")
    flag("--write-passes", type=whole(1), default=8, help="how often its stages are gone through [1, Sec. 4.5]")
    flag("--anchor-ratio", type=real(0.01, 1), default=0.2, help="share of the prompt masked by 'paper' [0.2, Sec. 4.5]")
    # evaluation
    flag("--tasks", nargs="+", choices=list(data.TASKS), default=list(data.TASKS), help="tasks to evaluate")
    flag("--lengths", nargs="+", type=whole(64, 8192), help="lengths to evaluate (default: 1x, 2x and 4x --length)")
    flag("--samples", type=whole(1), default=64, help="test examples per task and length")
    return parser


def main(arguments: list[str] | None = None) -> None:
    def run() -> None:
        args = build_parser().parse_args(arguments)
        if not args.tiny:
            raise UserError("say what to run: python memdlm.py --tiny.")
        args.tasks = list(dict.fromkeys(args.tasks))
        args.lengths = args.lengths or [args.length, 2 * args.length, 4 * args.length]
        run_tiny(args, pick_device(args.device))

    guarded(run)


if __name__ == "__main__":
    from memdlm import main

    main()
