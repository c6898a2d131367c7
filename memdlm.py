"""
memdlm.py: the method. Corrupt, write the memory (inner loop), learn from what is left over (outer loop), step.

    python memdlm.py --tiny                                        compares Standard MDLM and MemDLM on a laptop
    python memdlm.py --backbone llada-moe --data FILE --out DIR    fine-tunes a real LLaDA backbone through an outer LoRA

Read down to `train_step`: that is the whole method. Below are the training loop, the fine-tuning of a backbone, the `--tiny`
experiment, the command line.

Reading list
  MemDLM   Pei et al. 2026, arXiv 2603.22241: Sec. 2.1 (masked diffusion), Sec. 3 (the two loops), Sec. 4.1 (settings)
  MDLM     Sahoo et al. 2024, arXiv 2406.07524: why the loss weight is 1/t
  LLaDA    Nie et al. 2025, arXiv 2502.09992: masked diffusion fine-tuned on (prompt, response) pairs
  Distillation  Hinton et al. 2015, arXiv 1503.02531: the Kullback-Leibler variants of the inner loss (Fig. 6)
  MAML     Finn et al. 2017, arXiv 1703.03400, Sec. 5.2: the first-order approximation of a nested gradient

Glossary
  paper      | name here              | shape
  x_0        | batch.x0               | (B, T) clean token ids
  t          | anchor.t               | (B,) sampled noise level
  M_t        | anchor.masked          | (B, T) bool, True where x_t is [MASK]
  x_t        | embed(x0, masked)      | (B, T, D) the *anchor*, embedded: drawn once, used by stage 2 and by the outer loss
  x_tpre     | embed(x0, pre)         | (B, T, D) the *pre-anchor*: the anchor, masked further
  s          | memory.start_scale     | float, t_pre = min(1, s * t)
  theta      | model.parameters()     | what the outer loop trains
  phi        | fast                   | model.Fast: the Parametric Memory
  eta        | memory.lr              | float, the inner loop's step size
  K          | memory.steps           | 2: pre-anchor, anchor
  w(t)       | 1 / (t + 1e-6)         | (B,) loss weight
  N          | sets                   | number of sets of fast weights: B (scope "sample") or 1 (scope "batch")
  -          | stage                  | Stage, drawn: what one step of the inner loop masks, and what the next one masks
  -          | state                  | State, computed: a stage with the prefix's output h (B, T, D) on it
  -          | cut, prefix            | the layers before `cut` do not depend on phi; M masked positions, V vocabulary, D hidden

Who is updated by what
  weights           | updated by            | loss                         | when reset                 | saved
  backbone          | nobody, or AdamW      | -, or MDLM loss with phi_2   | never                      | base, mdlm, memdlm
  outer LoRA theta  | AdamW, outer loop     | MDLM loss with phi_2 in place| never                      | adapter/, as PEFT does
  fast weights phi  | plain SGD, inner loop | inner loss of stages 1 and 2 | before every batch, prompt | never
(The tiny model trains its whole backbone as theta; `--lora-rank` freezes it and trains an outer LoRA, as the paper does.)
"""

import argparse
import copy
import importlib.util
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import Batch, Parser, guarded, pick_device, real, whole
from model import (
    BACKBONES,
    Config,
    Fast,
    Linear,
    Transformer,
    UserError,
    add_outer_lora,
    check_writable,
    count,
    find_checkpoint,
    init_weights,
    kaiming_uniform,
    linear_layers,
    llada_config,
    load_checkpoint,
    load_llada,
    load_model,
    random_llada,
    read_json,
    restore,
    save_adapter,
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


def corrupt(x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x_t: the clean tokens x0 (B, T) with [MASK] wherever masked (B, T) says so."""
    return torch.where(masked, mask_id, x0)


def embed(model: Transformer, x0: Tensor, masked: Tensor) -> Tensor:
    """x_t as the stack wants it, (B, T, D)."""
    return model.embedding(corrupt(x0, masked, model.config.mask_id))


def token_nll(model: Transformer, h: Tensor, target: Tensor) -> Tensor:
    """-log p(target) (M,) from the last layer's output h (M, D)."""
    logits = model.head(h)  # (M, V)
    return F.cross_entropy(logits.to(precise(logits.dtype)), target, reduction="none")


# Over which count the weighted token losses (M,) are averaged; row (M,) says whose they are, n (B,) are the maskable counts.
NORMS = {
    "token": lambda loss, row, n: loss.sum() / n.sum().clamp(min=1),
    "sequence": lambda loss, row, n: (loss / n[row]).sum() / len(n),
    "batch": lambda loss, row, n: loss.sum() / len(n),
}


def denoising_loss(
    model: Transformer,
    batch: Batch,
    anchor: Anchor,
    h: Tensor,
    fast: Fast | None = None,
    start: float = 0,
    norm: str = "token",
) -> Tensor:
    """Eq. 2, and with `fast` Eq. 9: sum of w(t) * nll over masked tokens / number of maskable tokens.

    h (B, T, D) is the stack's state at `start`, counted in layers. norm: a key of NORMS.
    """
    h = model.read(h, start, anchor.masked, batch.attention_mask, fast)  # (M, D)
    nll = token_nll(model, h, batch.x0[anchor.masked])  # (M,)
    row = anchor.masked.nonzero()[:, 0]  # (M,) which example each masked token belongs to
    weight = 1 / (anchor.t + 1e-6)
    return NORMS[norm](weight[row] * nll, row, batch.maskable.sum(1))


def mdlm_loss(model: Transformer, batch: Batch, anchor: Anchor, norm: str = "token") -> Tensor:
    """Standard MDLM, the baseline: the denoising loss of the plain model."""
    return denoising_loss(model, batch, anchor, embed(model, batch.x0, anchor.masked), norm=norm)


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
    steps: int = 2  # K
    epochs: int = 1  # how often the stages are gone through
    strategy: str = "consistent"  # a key of STRATEGIES: which states the inner loop goes through (Figs. 9-11)
    loss: str = "ce"  # a key of INNER_LOSSES: what it learns from them (Fig. 6)
    targets: str = "all"  # a key of TARGETS: at which positions (Sec. 4.6)


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


def adapted_layers(model: Transformer, memory: Memory) -> dict[str, Linear]:
    """Name -> module of what phi adapts: gate, up and down of the last layers, every expert; never router or attention.

    LLaDA2's shared expert is among them, LLaDA-MoE's is not: the published target names match the one and miss the other.
    """
    first, found = first_adapted_layer(model.config.layers, memory.fraction), {}
    for i in range(first, model.config.layers):
        for name, module in model.layers[i].mlp.named_modules():
            skipped = name.startswith("shared") and model.config.architecture == "llada-moe"
            if name.endswith(("gate", "up", "down")) and not skipped:
                found[f"layers.{i}.mlp.{name}"] = module
    return found


def init_fast(model: Transformer, memory: Memory, sets: int, generator: torch.Generator) -> Fast:
    """phi_0: N = `sets` times A Kaiming-uniform, B = 0, so that the product is zero and the model unchanged.

    Like the outer LoRA, phi is kept in float32 at least: clipped steps of 0.1 are small beside bfloat16's spacing.
    """
    weights, device = {}, model.embedding.weight.device
    dtype = precise(model.embedding.weight.dtype)
    for name, layer in adapted_layers(model, memory).items():
        A = torch.empty(sets, *layer.stack, memory.rank, layer.in_features, dtype=dtype)
        B = torch.zeros(sets, *layer.stack, layer.out_features, memory.rank, dtype=dtype, device=device)
        weights[name] = (kaiming_uniform(A, generator).to(device), B)
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
    counts = torch.tensor([pre_anchor_count(k, n, start_scale) for k, n in pairs], device=masked.device)
    first = torch.arange(masked.shape[1], device=masked.device) < counts[:, None]
    return torch.zeros_like(masked).scatter(1, order, first)


class Stage(NamedTuple):
    """One state of the inner loop: what it masks (B, T), what the next state masks (None: there is none), its t (B,)."""

    masked: Tensor
    following: Tensor | None
    t: Tensor


def masked_fraction(masked: Tensor, maskable: Tensor) -> Tensor:
    """The share (B,) of maskable tokens that a state really masks: the inner loop's t."""
    return masked.sum(1) / maskable.sum(1).clamp(min=1)


def chain(masks: list[Tensor], maskable: Tensor, last: Tensor | None = None) -> list[Stage]:
    """Stages that follow each other; after the last one comes `last`."""
    return [Stage(mask, after, masked_fraction(mask, maskable)) for mask, after in zip(masks, [*masks[1:], last])]


def reveal_evenly(masked: Tensor, kept: Tensor, steps: int, generator: torch.Generator) -> list[Tensor]:
    """The nested states (B, T) between `masked` and `kept` on the way in `steps` steps, each of which reveals an even share
    of what is left to reveal, rounded up."""
    extra = masked & ~kept
    chance = torch.rand(masked.shape, generator=generator).to(masked.device).masked_fill(~extra, 2.0)
    rank, left, states = chance.argsort(dim=1).argsort(dim=1), extra.sum(1, keepdim=True), []
    for more in range(steps - 1, 0, -1):  # steps after this one
        left = left * more // (more + 1)
        states.append(kept | (extra & (rank < left)))
    return states


def consistent(anchor: Anchor, maskable: Tensor, memory: Memory, generator: torch.Generator) -> list[Stage]:
    """The paper's trajectory (published name: pmc): pre-anchor, for K > 2 evenly revealed states, anchor. K = 1: pre-anchor."""
    pre_masked = draw_pre_anchor(anchor.masked, maskable, memory.start_scale, generator)
    between = reveal_evenly(pre_masked, anchor.masked, memory.steps - 1, generator) if memory.steps > 2 else []
    return chain([pre_masked, *between, anchor.masked][: memory.steps], maskable)


def pre_anchor_only(anchor: Anchor, maskable: Tensor, memory: Memory, generator: torch.Generator) -> list[Stage]:
    """Fig. 10 (published name: pre_only): stage 1 alone; its next state is the anchor."""
    pre_masked = draw_pre_anchor(anchor.masked, maskable, memory.start_scale, generator)
    return chain([pre_masked], maskable, last=anchor.masked)


def anchor_only(anchor: Anchor, maskable: Tensor, memory: Memory, generator: torch.Generator) -> list[Stage]:
    """Fig. 10 (published name: no_progressive): stage 2 alone, weighted by the *sampled* t."""
    return [Stage(anchor.masked, None, anchor.t)]


def inconsistent(anchor: Anchor, maskable: Tensor, memory: Memory, generator: torch.Generator) -> list[Stage]:
    """Fig. 9 (published name: progressive_memory): masks of its own, unrelated to the anchor, from 80% down to 20%.

    The first of several is a Bernoulli draw, the others mask int(n * ratio) of its tokens; t is the nominal ratio.
    """
    # In just this order of operations: the last one is a little below 0.2, which decides how 0.2 * 15 is rounded.
    ratios = [0.8 + (0.2 - 0.8) * (k / (memory.steps - 1)) for k in range(memory.steps)] if memory.steps > 1 else [0.2]
    chance = torch.rand(maskable.shape, generator=generator).to(maskable.device).masked_fill(~maskable, 2.0)
    rank, n = chance.argsort(dim=1).argsort(dim=1), maskable.sum(1, keepdim=True)
    first = chance < 0.8 if memory.steps > 1 else maskable
    masks = [first & (rank < (n.double() * ratio).long()) for ratio in ratios]
    stages = chain([first, *masks[1:]] if memory.steps > 1 else masks, maskable)
    return [stage._replace(t=torch.full_like(stage.t, ratio)) for stage, ratio in zip(stages, ratios)]


STRATEGIES = {
    "consistent": consistent,
    "pre_anchor_only": pre_anchor_only,
    "anchor_only": anchor_only,
    "inconsistent": inconsistent,
}
# The positions of a stage's loss. "all" is the broader supervision of Sec. 4.6; "newly_revealed" is Eq. 7 read literally.
TARGETS = {
    "all": lambda stage: stage.masked,
    "newly_revealed": lambda stage: stage.masked if stage.following is None else stage.masked & ~stage.following,
}


def divergence(model: Transformer, of: Tensor, against: Tensor) -> Tensor:
    """KL(against || of) per position, (M,), both given as the last layer's output (M, D)."""
    log_of, log_against = (F.log_softmax(model.head(h), dim=-1, dtype=precise(h.dtype)) for h in (of, against))
    return F.kl_div(log_of, log_against, reduction="none", log_target=True).sum(-1)


INNER_LOSSES = {
    "ce": lambda model, student, teacher, target: token_nll(model, student, target),
    "kl": lambda model, student, teacher, target: divergence(model, student, teacher),  # KL(teacher || student)
    "reverse_kl": lambda model, student, teacher, target: divergence(model, teacher, student),
    "hidden_mse": lambda model, student, teacher, target: (model.norm(student) - model.norm(teacher)).square().mean(-1),
    "hidden_cosine": lambda model, student, teacher, target: (
        1 - F.cosine_similarity(model.norm(student), model.norm(teacher), dim=-1)
    ),
}


class State(NamedTuple):
    """A stage, made ready for the part of the stack that phi changes: the prefix's outputs (B, T, D) on what student and
    teacher see. The teacher (distillation only) sees the next state, or where there is none the clean tokens."""

    stage: Stage
    h: Tensor
    teacher_h: Tensor | None = None


def prefix(model: Transformer, batch: Batch, masked: Tensor, memory: Memory) -> Tensor:
    """The stack's output (B, T, D) at the place where phi begins to matter, on x0 masked by `masked`."""
    return model.run(embed(model, batch.x0, masked), 0, memory_start(model, memory), batch.attention_mask)


@torch.no_grad()
def make_states(
    model: Transformer, batch: Batch, stages: list[Stage], memory: Memory, anchor: tuple[Tensor, Tensor] | None = None
) -> list[State]:
    """Each mask's prefix once. anchor: a mask and its prefix's output that are there already.

    Masks are told apart by identity: those of one trajectory share their tensors, and `stages` keeps them alive.
    """
    known = {id(mask): h for mask, h in ([anchor] if anchor else [])}
    clean = torch.zeros_like(batch.maskable)

    def of(mask: Tensor) -> Tensor:
        if id(mask) not in known:
            known[id(mask)] = prefix(model, batch, mask, memory)
        return known[id(mask)]

    def teacher(stage: Stage) -> Tensor | None:
        return None if memory.loss == "ce" else of(clean if stage.following is None else stage.following)

    return [State(stage, of(stage.masked), teacher(stage)) for stage in stages]


def stage_loss(model: Transformer, batch: Batch, state: State, fast: Fast, memory: Memory, weighted: bool) -> Tensor:
    """The inner loss of one state per set of fast weights, (N,): sum(w * loss) / number of loss positions, w = 1/t.

    The published default is the cross-entropy of *all* clean tokens under the mask ("broader supervision", Sec. 4.6).
    """
    start, where = memory_start(model, memory), TARGETS[memory.targets](state.stage)  # where (B, T)
    student = model.read(state.h, start, where, batch.attention_mask, fast)  # (M, D)
    teacher = None
    if state.teacher_h is not None:
        with torch.no_grad():
            teacher = model.read(state.teacher_h, start, where, batch.attention_mask, fast)
    loss = INNER_LOSSES[memory.loss](model, student, teacher, batch.x0[where])  # (M,)
    weight = 1 / (state.stage.t + 1e-6) if weighted else torch.ones_like(state.stage.t)  # (B,)
    row, count = where.nonzero()[:, 0], where.sum(1)
    total = torch.zeros_like(weight, dtype=loss.dtype).index_add(0, row, weight[row].to(loss.dtype) * loss)  # (B,)
    return total.view(fast.sets(), -1).sum(1) / count.view(fast.sets(), -1).sum(1).clamp(min=1)  # (N,)


def sgd(parameter: Tensor, grad: Tensor, loss: Tensor, memory: Memory) -> Tensor:
    """parameter - lr * clipped grad for one A or B (N, ., .), or (N, X, ., .) of experts; loss (N,).

    Each matrix of each set, and of each expert, is clipped alone. A set whose loss is not finite keeps what it has; so
    does a matrix whose gradient is not.
    """
    norm = grad.flatten(-2).norm(dim=-1)[..., None, None]  # (N, 1, 1) or (N, X, 1, 1)
    scale = (memory.clip / (norm + 1e-12)).clamp(max=1.0) if memory.clip > 0 else torch.ones_like(norm)
    usable = loss.isfinite().view(-1, *[1] * (grad.dim() - 1)) & norm.isfinite()
    return torch.where(usable, parameter - memory.lr * scale * grad, parameter).detach()


def inner_loop(
    model: Transformer, batch: Batch, states: list[State], fast: Fast, memory: Memory, weighted: bool = True
) -> tuple[Fast, Tensor]:
    """phi_0 -> phi_K, one SGD step per state (Eqs. 6-8), `memory.epochs` times over.

    weighted: w = 1/t in training, 1 when a prompt is written (Sec. 4.5).
    Returns phi_K, detached, and the losses (K * epochs, N) before each step.
    """
    losses = []
    for state in states * memory.epochs:
        leaves = [p.detach().requires_grad_() for pair in fast.weights.values() for p in pair]
        fast = Fast(dict(zip(fast.weights, zip(leaves[::2], leaves[1::2]))), fast.scale)
        with torch.enable_grad():
            loss = stage_loss(model, batch, state, fast, memory, weighted)  # (N,): sets are independent, so one sum does
            grads = torch.autograd.grad(loss.sum(), leaves)
        leaves = [sgd(p, g, loss.detach(), memory) for p, g in zip(leaves, grads)]
        fast = Fast(dict(zip(fast.weights, zip(leaves[::2], leaves[1::2]))), fast.scale)
        losses.append(loss.detach())
    return fast, torch.stack(losses)


# ---- the outer loop: learn what the memory does not hold (Eqs. 9-10) ------------------------------------------------------


def memdlm_loss(
    model: Transformer,
    batch: Batch,
    anchor: Anchor,
    stages: list[Stage],
    fast: Fast,
    memory: Memory,
    norm: str = "token",
) -> tuple[Tensor, Tensor]:
    """The MDLM loss on x_t with phi_K in place, and the inner losses (K * epochs, N). First order: phi_K is a constant.

    Three forwards and three backwards would be the naive way. Fast weights live in the last layers only, so the prefix's
    activations on x_t serve both stage 2 and this loss, x_tpre's prefix needs no graph, and the inner backwards end
    where the prefix does: about 4 + 3s units of work instead of 9, where plain MDLM costs 3 and s is the adapted share.
    Sharing the prefix means that stage 2 and the outer step see one mask of the outer LoRA's dropout in it, where the
    published code draws two.
    """
    h = prefix(model, batch, anchor.masked, memory)
    states = make_states(model, batch, stages, memory, anchor=(anchor.masked, h.detach()))
    fast, inner = inner_loop(model, batch, states, fast, memory)
    return denoising_loss(model, batch, anchor, h, fast, memory_start(model, memory), norm), inner


def standard_method(
    model: Transformer, batch: Batch, memory: Memory, generator: torch.Generator, norm: str = "token"
) -> Tensor:
    """Draws an anchor and returns the loss of Standard MDLM on it."""
    return mdlm_loss(model, batch, draw_anchor(batch.maskable, generator), norm)


def memory_method(model: Transformer, batch: Batch, memory: Memory, generator: torch.Generator, norm: str = "token") -> Tensor:
    """The same anchor as `standard_method` from the same generator, so that comparisons are paired; then MemDLM's loss."""
    anchor = draw_anchor(batch.maskable, generator)
    stages = STRATEGIES[memory.strategy](anchor, batch.maskable, memory, generator)
    fast = init_fast(model, memory, SCOPES[memory.scope](len(batch.x0)), generator)
    return memdlm_loss(model, batch, anchor, stages, fast, memory, norm)[0]


def pretraining_method(
    model: Transformer, batch: Batch, memory: Memory, generator: torch.Generator, norm: str = "token"
) -> Tensor:
    """Mean NLL over masked tokens: Eq. 2 without the weight, less noisy, hence a denser signal from scratch."""
    masked = draw_anchor(batch.maskable, generator).masked
    h = model.read(embed(model, batch.x0, masked), 0, masked, batch.attention_mask)
    return token_nll(model, h, batch.x0[masked]).sum() / masked.sum().clamp(min=1)


METHODS = {"base": pretraining_method, "mdlm": standard_method, "memdlm": memory_method}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], clip: float) -> tuple[bool, float]:
    """One AdamW step on theta, whose gradient alone is clipped (globally). Returns whether it was taken, and the loss: a
    step that is not finite changes nothing.

    losses: one for each micro-batch, made one at a time, so that only one graph exists; their gradients add up.
    """
    theta, total = [p for p in model.parameters() if p.requires_grad], 0.0
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(theta, clip if clip > 0 else math.inf)
    total = all_mean(total)
    finite = bool(total.isfinite() & norm.isfinite())
    if finite:
        optimizer.step()
    return finite, total.item()


# ---- training: a loop, its checkpoints, its log ---------------------------------------------------------------------------


def precise(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 if that is what we have: for losses, and for what small steps add up in."""
    return torch.promote_types(dtype, torch.float32)


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
    batch_at: Callable[[int, int], Batch]  # (step, number of the micro-batch in it)
    log_at: Callable[[Transformer, int], list[dict]] | None
    identity: dict  # what a checkpoint must match to be continued or reused
    norm: str = "token"
    accumulate: int = 1  # micro-batches per step and process
    betas: tuple[float, float] = (0.9, 0.98)
    theta_only: bool = False  # leave the frozen backbone out of the checkpoint


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up, a plateau if there is room for one, then a cosine to zero."""
    warmup, decay = max(1, int(phase.steps * phase.warmup)), max(1, int(phase.steps * phase.decay))
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    return phase.lr * 0.5 * (1 + math.cos(math.pi * max(0, step - (phase.steps - decay)) / decay))


class Objective(nn.Module):
    """A method's loss as a module, for DistributedDataParallel, which averages gradients around `forward`. The fast weights
    are made and dropped inside of it: they stay local to their process."""

    def __init__(self, model: Transformer, phase: Phase):
        super().__init__()
        self.model, self.phase = model, phase

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return METHODS[self.phase.method](self.model, batch, self.phase.memory, generator, self.phase.norm)


def processes() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_mean(value: Tensor) -> Tensor:
    """Mean over the processes, so that all of them take the same decision."""
    if dist.is_initialized():
        dist.all_reduce(value := value.clone())
        value = value / dist.get_world_size()
    return value


def micro_losses(objective: nn.Module, phase: Phase, step: int) -> Iterator[Tensor]:
    """This process's losses in one step, one after the other. All random draws depend on (seed, step, micro-batch) alone, so
    that N processes with one micro-batch each do what one process does with N."""
    rank, world = processes()
    for i in range(phase.accumulate):
        micro = i * world + rank
        generator = generator_for(phase.seed, phase.draws, step, *([micro] if micro else []))
        torch.manual_seed(generator.initial_seed())  # for LoRA's dropout alone: all other draws use `generator`
        wait = isinstance(objective, DistributedDataParallel) and i < phase.accumulate - 1
        with objective.no_sync() if wait else nullcontext():  # still open while the caller runs the backward
            yield objective(phase.batch_at(step, micro), generator) / phase.accumulate


def start_state(
    model: Transformer, optimizer: torch.optim.Optimizer, phase: Phase, path: Path, resume: bool, meta: dict
) -> dict:
    """`meta`, or that of the checkpoint at `path` if this run may go on from there, with weights and optimizer restored."""
    if not path.exists() or not (resume or phase.method == "base"):
        return meta
    tensors, saved = load_checkpoint(path)
    if saved.get("identity") == meta["identity"]:
        restore(model, optimizer, tensors, path)
        say(f"{phase.method}: taken up from {path} at step {saved['step']} of {phase.steps}")
        return saved
    saved = saved.get("identity") or {}
    different = [key for key, value in meta["identity"].items() if saved.get(key) != value]
    if resume and different and set(different) <= {"data", "processes"}:
        what = {"data": "the data has changed", "processes": f"it was saved by {saved.get('processes')} processes"}
        reasons = " and ".join(what[key] for key in different)
        raise UserError(f"--resume: {path}: {reasons}. Go on as it was, or leave --resume out to start again.")
    return meta  # the checkpoint of an earlier run in this folder


def say(text: str) -> None:
    """Prints once, however many processes there are."""
    if processes()[0] == 0:
        print(text)


def train(model: Transformer, phase: Phase, folder: Path, resume: bool, save_every: int, lora: dict | None = None) -> dict:
    """Trains `model` in place, or takes it up where folder/<name>.safetensors stopped. Returns the checkpoint's metadata.

    Under torchrun every process trains, and the first alone measures, shows progress and writes.
    """
    path, (rank, world) = folder / f"{phase.method}.safetensors", processes()
    meta = {"step": 0, "steps": phase.steps, "skipped": 0, "seconds": 0.0, "log": [], "lora": lora}
    meta |= {"identity": phase.identity, "config": asdict(model.config)}
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(theta, betas=phase.betas, weight_decay=0.0, fused=True)
    meta, objective = start_state(model, optimizer, phase, path, resume, meta), Objective(model, phase)
    if world > 1:
        objective = DistributedDataParallel(objective, init_sync=False)

    def save(**news) -> None:
        meta.update(news, seconds=meta["seconds"] + time.monotonic() - clock)
        if rank == 0:
            state = training_state(model, None if meta.get("done") else optimizer, phase.theta_only)
            save_checkpoint(path, state, meta)

    clock, shown = time.monotonic(), {"initial": meta["step"], "total": phase.steps, "mininterval": 1, "delay": 2}
    bar = tqdm(range(meta["step"], phase.steps), phase.method, disable=rank > 0, **shown)
    for step in bar:
        meta["log"] += phase.log_at(model, step) if phase.log_at and rank == 0 else []
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        taken, loss = train_step(model, optimizer, micro_losses(objective, phase, step), phase.clip)
        meta["skipped"], meta["step"] = meta["skipped"] + (not taken), step + 1
        bar.set_postfix(loss=f"{loss:.3f}", skipped=meta["skipped"], refresh=False)
        if (step + 1) % save_every == 0 and step + 1 < phase.steps:
            save()
            clock = time.monotonic()
    if meta["step"] == phase.steps and not meta.get("done"):
        meta["log"] += phase.log_at(model, phase.steps) if phase.log_at and rank == 0 else []
        save(done=True)
    return meta


# ---- fine-tuning on pairs, tiny or real ------------------------------------------------------------------------------------


def memory_settings(config: dict) -> Memory:
    """The inner loop's settings out of a run's config."""
    chosen = {key.removeprefix("memory_"): value for key, value in config.items() if key.startswith("memory_")}
    return Memory(**chosen, start_scale=config["start_scale"])


def split_pairs(pairs: list[data.Example]) -> tuple[list[data.Example], list[data.Example]]:
    """95% to train on, 5% held out, split by seed 42 (Sec. 4.1)."""
    order, held = np.random.default_rng(42).permutation(len(pairs)), max(1, len(pairs) // 20)
    if len(pairs) == 1:
        say("a single pair: it is trained on and held out, so the held-out loss says nothing new")
    return [pairs[i] for i in order[held:]] or pairs, [pairs[i] for i in order[:held]]


class Pairs(NamedTuple):
    """What a fine-tuning reads: examples, which of them make up a micro-batch, and how they become a batch."""

    train: list[data.Example]
    held_out: list[data.Example]
    indices_at: Callable[[int, int], Iterable[int]]  # (step, micro-batch)
    collate: Callable[[list[data.Example]], Batch]

    def batch_at(self, step: int, micro: int) -> Batch:
        return self.collate([self.train[i] for i in self.indices_at(step, micro)])

    def measured(self, most: int, size: int) -> list[list[Batch]]:
        """At most `most` training and as many held-out examples, evenly picked, in batches of `size`."""
        picked = [part[:: -(-len(part) // most)] for part in (self.train, self.held_out)]
        return [[self.collate(part[i : i + size]) for i in range(0, len(part), size)] for part in picked]


def fine_tune(
    args: argparse.Namespace, model: Transformer, pairs: Pairs, method: str, seed: int, folder: Path, eval_every: int, **more
) -> dict:
    """Trains theta, the model's parameters or its outer LoRA, by one of METHODS. Returns the checkpoint's metadata.

    The losses are measured every `eval_every` steps: with memory, which leaks, and without. more: further fields of Phase.
    """
    import eval_niah

    memory, size = memory_settings(settings(args)), 64 if args.dial == "tiny" else args.batch
    train_set, held_out = pairs.measured(64 if args.dial == "tiny" else args.eval_examples, size)

    def log_at(model: Transformer, step: int) -> list[dict]:
        if step % eval_every and step != more["steps"]:
            return []
        losses = eval_niah.measure_losses(model, train_set, held_out, memory, seed)
        return [{"method": method, "step": step, **losses, "seed": seed}]

    identity = {**settings(args), "seed": seed, "method": method, "data": zlib.crc32(repr(pairs.train).encode())}
    identity |= {"processes": processes()[1]}
    draws = {"draws": "fine-tune", "batch_at": pairs.batch_at, "log_at": log_at, "norm": args.loss_norm}
    rate = {"lr": args.lr, "warmup": args.warmup, "decay": 1 - args.warmup, "clip": args.clip}
    phase = Phase(method=method, seed=seed, memory=memory, identity=identity, **draws, **rate, **more)
    lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout} if args.lora_rank else None
    if lora:
        add_outer_lora(model, **lora, generator=generator_for(seed, "lora"))
        say("LoRA " + covered(model, lambda layer: layer.lora_A is not None))
    return train(model, phase, folder, args.resume, args.save_every, lora)


# ---- a real backbone -------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def backbone_tokenizer(args: argparse.Namespace) -> data.Tokenizer:
    """The checkpoint's. Random weights without one take the tiny tokenizer: any text will do for memory and speed."""
    if args.random_weights and not (Path(args.backbone) / "tokenizer.json").exists():
        known = llada_config(args.backbone).mask_id
        return data.TINY if known is None else replace(data.TINY, mask=known)
    return data.load_tokenizer(find_checkpoint(args.backbone), args.plain)


def dtype_name(args: argparse.Namespace, device: str) -> str:
    """--dtype: "auto" is bfloat16 on a GPU."""
    return args.dtype if args.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"


def load_backbone(args: argparse.Namespace, tokenizer: data.Tokenizer, device: str) -> Transformer:
    """The model that --backbone and its companions name, frozen and in eval mode; it agrees with `tokenizer` on [MASK]."""
    if args.load_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-4bit needs bitsandbytes: pip install bitsandbytes.")
    load = random_llada if args.random_weights else load_llada
    model = load(args.backbone, device, DTYPES[dtype_name(args, device)], args.load_4bit).requires_grad_(False)
    if tokenizer.vocab_size > model.config.vocab_size:
        rows = model.config.vocab_size
        raise UserError(f"{args.backbone}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {rows} rows.")
    if model.config.mask_id not in (None, tokenizer.mask):
        raise UserError(f"{args.backbone}: [MASK] is {tokenizer.mask} in the tokenizer, {model.config.mask_id} in config.json.")
    model.config.mask_id = tokenizer.mask
    if args.load_4bit:
        say("NF4 " + covered(model, lambda layer: layer.quantized is not None))
    return model


def covered(model: Transformer, has: Callable[[Linear], bool]) -> str:
    """ "on N of M linear layers"; stops if one was left out."""
    layers = linear_layers(model)
    text = f"on {count(layer for layer in layers.values() if has(layer))} of {count(layers.values())} linear layers"
    if left := [name for name, layer in layers.items() if not has(layer)]:
        raise UserError(f"{text}: {left[0]} was left out. This is a fault of the program.")
    return text


def read_backbone_pairs(args: argparse.Namespace, tokenizer: data.Tokenizer, device: str) -> Pairs:
    """--data in length-grouped batches; pairs longer than --max-length are left out, and counted."""
    examples, dropped = data.read_pairs(args.data, tokenizer, args.max_length)
    train_set, held_out = split_pairs(examples)
    say(
        f"{len(train_set)} pairs to train on, {len(held_out)} held out, {dropped} longer than {args.max_length} tokens left out"
    )
    lengths = [len(pair.prompt) + len(pair.response) for pair in train_set]
    per_step, per_epoch = args.accumulate * processes()[1], -(-len(train_set) // args.batch)

    @lru_cache(maxsize=2)
    def batches(epoch: int) -> list[list[int]]:
        return data.length_grouped(lengths, args.batch, args.seed, epoch)

    def indices_at(step: int, micro: int) -> list[int]:
        epoch, place = divmod(step * per_step + micro, per_epoch)
        return batches(epoch)[place]

    return Pairs(train_set, held_out, indices_at, lambda part: data.collate(part, device, args.pads, tokenizer.eos))


def run_backbone(args: argparse.Namespace, device: str) -> None:
    """Fine-tunes a real backbone and writes DIR/adapter/ and DIR/results.json."""
    import eval_niah

    out, (rank, world) = Path(args.out), processes()
    if not args.data:
        raise UserError('--backbone needs --data: a JSONL of {"prompt", "response"}, or LongAlpaca (Yukang/LongAlpaca-12k).')
    start_run(args, out)
    tokenizer = backbone_tokenizer(args)
    pairs = read_backbone_pairs(args, tokenizer, device)  # a fault in the data shows before the weights are loaded
    model = load_backbone(args, tokenizer, device)
    model.checkpointing = args.checkpoint_activations
    steps = args.steps or math.ceil(args.epochs * math.ceil(len(pairs.train) / args.batch) / (args.accumulate * world))
    more = {"steps": steps, "accumulate": args.accumulate, "betas": (0.9, 0.999), "theta_only": True}
    meta = fine_tune(args, model, pairs, args.method, args.seed, out, args.eval_every, **more)
    if rank > 0:
        return
    base = BACKBONES.get(args.backbone, (args.backbone,))[0]
    save_adapter(model, out / "adapter", args.lora_rank, args.lora_alpha, args.lora_dropout, base)
    results = {"config": settings(args), "machine": eval_niah.machine(device, str(model.embedding.weight.dtype)[6:])}
    results |= {"processes": world, "pairs": {"train": len(pairs.train), "held_out": len(pairs.held_out)}, "steps": steps}
    results |= {"seconds": meta["seconds"], "peak_memory_gib": eval_niah.peak_memory(device)}
    results |= {"skipped_updates": meta["skipped"], "loss": meta["log"]}
    write_json(out / "results.json", results)
    for record in meta["log"][:: max(1, len(meta["log"]) - 1)]:
        losses = (f"{key} {math.nan if record[key] is None else record[key]:.4f}" for key in eval_niah.LOSSES)
        print(f"step {record['step']}:", ", ".join(losses))
    print(f"Outer updates skipped as not finite: {meta['skipped']} of {steps}. Written to {out}/: adapter/, results.json.")


# ---- the --tiny experiment -------------------------------------------------------------------------------------------------


def tiny_pairs(args: argparse.Namespace, seed: int, device: str) -> Pairs:
    """--data's own pairs, or the tasks', noisy in training; micro-batches drawn without replacement."""
    if args.data:
        train_set, held_out = split_pairs(data.read_jsonl(args.data, args.max_length))
    else:

        def draw(split: str, n: int, noise: float) -> list[data.Example]:
            key = data.split_seed(seed, split)
            return [pair for task in data.TASKS for pair in data.make_examples(task, n, args.length, key, noise)]

        train_set, held_out = draw("train", args.examples // len(data.TASKS), args.noise), draw("held out", 16, 0.0)

    def indices_at(step: int, micro: int) -> np.ndarray:
        return np.random.default_rng([seed, step]).choice(len(train_set), min(args.batch, len(train_set)), replace=False)

    return Pairs(train_set, held_out, indices_at, lambda part: data.collate(part, device, args.pads))


def pretrain(args: argparse.Namespace, seed: int, folder: Path, device: str) -> tuple[Transformer, dict]:
    """The base: Standard MDLM on fresh documents, short ones first, without memory and without noise."""
    config = Config(data.VOCAB_SIZE, data.MASK)
    model = init_weights(Transformer(config), torch.Generator().manual_seed(seed)).to(device)

    def batch_at(step: int, micro: int) -> Batch:
        early, many = step < args.pretrain_steps // 2, step < args.pretrain_steps * 0.6
        length, questions = (args.length * 2 // 3 if early else args.length), (3 if many else 1)
        return data.pretraining_batch(seed, step, args.pretrain_batch, length, questions, 0.3, device)

    identity = {key: getattr(args, key) for key in ("length", "pretrain_steps", "pretrain_batch", "pretrain_lr")}
    sizes = asdict(model.config) | {"moe_layers": list(model.config.moe_layers)}  # as JSON gives them back
    identity |= {"seed": seed, "model": sizes, "data": data.fingerprint()}
    steps, lr = args.pretrain_steps, args.pretrain_lr  # then 3% warm-up, 30% decay, clip 1.0
    phase = Phase("base", seed, steps, lr, 0.03, 0.3, 1.0, Memory(), "pretrain", batch_at, None, identity)
    if args.bases:
        copy_base(Path(args.bases) / folder.name / "base.safetensors", folder / "base.safetensors", identity)
    return model, train(model, phase, folder, args.resume, args.save_every)


def copy_base(source: Path, target: Path, identity: dict) -> None:
    """Takes over a base that another run has pretrained, if it is finished and just what this run would make itself."""
    tensors, meta = load_checkpoint(source)
    different = [key for key, value in identity.items() if meta.get("identity", {}).get(key) != value]
    if different or not meta.get("done"):
        reason = f"differs in {', '.join(different)}" if different else "is not finished"
        raise UserError(f"--bases: {source} {reason}. Leave --bases out to pretrain a base for this run.")
    save_checkpoint(target, tensors, meta)


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
    pairs = tiny_pairs(args, seed, device)
    for method in ("mdlm", "memdlm"):  # from the same base, on identical batches with identical anchors
        models[method], every = copy.deepcopy(models["base"]), max(1, args.steps // 10)
        metas[method] = fine_tune(args, models[method], pairs, method, seed, folder, every, steps=args.steps)
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
    tiny_pairs(args, args.seed, device)  # a fault in --data shows now, before any work
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


def read_config(out: Path, dial: str = "tiny") -> dict:
    """A run's settings, from its config.json."""
    if not (out / "config.json").exists():
        raise UserError(f"there is no run in {out}: it has no config.json. Train one with memdlm.py, without --resume.")
    config = read_json(out / "config.json")
    if config.get("dial", dial) != dial:
        how = {"tiny": f"--run {out}", "backbone": f"--backbone NAME_OR_DIR --adapter {out}/adapter"}[config["dial"]]
        raise UserError(f"{out} holds a run of --{config['dial']}, not of --{dial}; sample.py answers by it with {how}.")
    if not settings(build_parser(dial).parse_args([])).keys() <= config.keys():
        raise UserError(f"{out}/config.json was not written by this program; name a folder of a run.")
    return config


def start_run(args: argparse.Namespace, out: Path) -> None:
    """Checks that the folder can be written, and that --resume continues the run that is there."""
    if args.resume:
        saved = read_config(out, args.dial)
        for name, value in settings(args).items():
            if saved.get(name) != value:
                flag = name.replace("_", "-")
                raise UserError(f"--resume: the run in {out} was started with --{flag} {saved.get(name)}, not {value}.")
    elif (out / "config.json").exists():
        saved = read_json(out / "config.json")
        for name in ("dial", "method"):
            if saved.get(name, getattr(args, name, None)) != getattr(args, name, None):
                raise UserError(
                    f"--out {out} holds another run ({name} {saved[name]}), which would be lost: name another folder."
                )
    check_writable(out)
    if processes()[0] == 0:
        write_json(out / "config.json", settings(args))


def settings(args: argparse.Namespace) -> dict:
    """Every flag that decides the numbers. Where the run lies and how often it saves do not."""
    where = ("out", "resume", "bases", "save_every", "device")
    return {name: value for name, value in sorted(vars(args).items()) if name not in where}


# ---- command line -------------------------------------------------------------------------------------------------------


# The two dials set the rest: what --tiny changes for a small model on a small set, and the paper's own settings (Sec. 4.1).
PRESETS = {
    "tiny": {"out": "runs/tiny", "steps": 300, "batch": 16, "lr": 1e-3, "lora_rank": 0}
    | {"memory_rank": 8, "memory_alpha": 16.0, "memory_lr": 1.0, "memory_fraction": 0.5, "memory_scope": "sample"},
    "backbone": {"out": "runs/backbone", "steps": 0, "batch": 2, "lr": 2e-5, "lora_rank": 32}
    | {"memory_rank": 32, "memory_alpha": 64.0, "memory_lr": 0.1, "memory_fraction": 0.1, "memory_scope": "batch"},
}


def tiny_flags(flag: Callable) -> None:
    """Flags of --tiny alone."""
    import sample

    flag("--tiny", action="store_true", help="the laptop experiment: pretrain a base, fine-tune it twice, compare")
    flag("--bases", help="folder of another run whose pretrained bases are used (default: --out)")
    flag("--seeds", type=whole(1), default=1, help="how many seeds to run, one after the other")
    flag("--examples", type=whole(4, multiple=4), default=64, help="size of the fine-tuning set")
    flag("--noise", type=real(0, 1), default=0.5, help="share of answer words replaced at random in the fine-tuning set")
    flag("--length", type=whole(64, 1024), default=96, help="training length in tokens: 1x")
    flag("--pretrain-steps", type=whole(1), default=2400, help="steps of the base's pretraining")
    flag("--pretrain-batch", type=whole(4, multiple=4), default=64, help="sequences per pretraining step")
    flag("--pretrain-lr", type=real(0), default=4e-3, help="peak learning rate of the pretraining")
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


def backbone_flags(flag: Callable) -> None:
    """What names a real backbone, for training and for sampling."""
    flag("--backbone", help=f"a folder, OWNER/NAME on the hub, or {', '.join(BACKBONES)}")
    flag("--random-weights", action="store_true", help="real sizes, random weights: to try memory and speed")
    flag("--load-4bit", action="store_true", help="NF4 weights, double quantization (bitsandbytes) [on, Sec. 4.1]")
    flag("--dtype", choices=("auto", *DTYPES), default="auto", help="of weights and activations: bfloat16 on a GPU [bfloat16]")


def plain_flag(flag: Callable) -> None:
    """For training and sampling; eval_niah.py does without the template unless asked (--chat), as the published evaluation."""
    flag("--plain", action="store_true", help="prompts as they are, without the chat template")


def training_flags(flag: Callable) -> None:
    """Flags of --backbone alone, for training."""
    flag("--method", choices=("mdlm", "memdlm"), default="memdlm", help="Standard MDLM is the baseline")
    flag("--epochs", type=whole(1), default=5, help="passes through --data where --steps is 0 [5, Sec. 4.1]")
    flag("--accumulate", type=whole(1), default=1, help="micro-batches of --batch pairs per step and GPU [1]")
    flag("--checkpoint-activations", action="store_true", help="recompute activations in the backward: less memory, more time")
    flag("--eval-every", type=whole(1), default=100, help="steps between measurements of the losses")
    flag("--eval-examples", type=whole(1), default=16, help="how many training and held-out pairs are measured")


def build_parser(dial: str = "tiny") -> Parser:
    """The flags of one dial, with its defaults."""
    parser = Parser(
        "Trains Standard MDLM and MemDLM. Paper values in brackets. --backbone X --help shows a real backbone's flags."
    )
    flag, preset = parser.add_argument, PRESETS[dial]
    parser.set_defaults(dial=dial)
    flag("--out", default=preset["out"], help="folder for everything that is written")
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    flag("--seed", type=whole(0, 2**32 - 1), default=0, help="first seed: base, data and noise")
    if dial == "tiny":
        tiny_flags(flag)
    else:
        backbone_flags(flag)
        plain_flag(flag)
        training_flags(flag)
    # data
    flag("--data", help='JSONL of {"prompt", "response"} to fine-tune on; with --backbone also LongAlpaca [LongAlpaca-12k]')
    flag("--max-length", type=whole(2), default=4096, help="longest pair taken from --data, in tokens [4096, Sec. 4.1]")
    flag("--pads", choices=list(data.PADS), default="learn", help="EOS padding: a target like any token, or hidden [learn]")
    # outer loop
    flag("--steps", type=whole(int(dial == "tiny")), default=preset["steps"], help="fine-tuning steps [5 epochs, Sec. 4.1]")
    flag("--batch", type=whole(1), default=preset["batch"], help="pairs per fine-tuning step [2, Sec. 4.1]")
    flag("--lr", type=real(0), default=preset["lr"], help="peak learning rate of the fine-tuning [2e-5, Sec. 4.1]")
    flag("--warmup", type=real(0, 1), default=0.1, help="share of the fine-tuning steps with rising rate [0.1, Sec. 4.1]")
    flag("--clip", type=real(0), default=1.0, help="clips the global norm of theta's gradient, 0 = off [1.0, Sec. 4.1]")
    flag("--loss-norm", choices=list(NORMS), default="token", help="what the outer loss is averaged over [token]")
    flag(
        "--lora-rank",
        type=whole(int(dial != "tiny")),
        default=preset["lora_rank"],
        help="of the outer LoRA, 0 = none [32, Sec. 4.1]",
    )
    flag("--lora-alpha", type=real(0), default=64.0, help="alpha of the outer LoRA [64, Sec. 4.1]")
    flag("--lora-dropout", type=real(0, 0.99), default=0.05, help="dropout of the outer LoRA [0.05, Sec. 4.1]")
    # inner loop
    flag("--memory-rank", type=whole(1), default=preset["memory_rank"], help="rank of the fast weights [32, Sec. 4.1]")
    flag("--memory-alpha", type=real(0), default=preset["memory_alpha"], help="alpha of the fast weights [64, Sec. 4.1]")
    flag("--memory-lr", type=real(0), default=preset["memory_lr"], help="step size of the inner loop [0.1, Sec. 4.1]")
    flag("--memory-clip", type=real(-math.inf), default=1.0, help="clips each fast tensor's gradient, 0: off [1.0, Sec. 4.1]")
    flag("--memory-fraction", type=real(0.01, 1), default=preset["memory_fraction"], help="last share of layers adapted [0.1]")
    flag("--memory-scope", choices=list(SCOPES), default=preset["memory_scope"], help="who shares a set of phi [batch]")
    flag("--memory-steps", type=whole(1), default=2, help="K: stages of the inner loop [2, Sec. 3; Fig. 11]")
    flag("--memory-epochs", type=whole(1), default=1, help="how often they are gone through, also in each write [1]")
    flag("--memory-strategy", choices=list(STRATEGIES), default="consistent", help="its states [consistent, Figs. 9, 10]")
    flag("--memory-loss", choices=list(INNER_LOSSES), default="ce", help="what it learns from them [ce, Fig. 6]")
    flag("--memory-targets", choices=list(TARGETS), default="all", help="at which masked positions [all, Sec. 4.6]")
    flag("--start-scale", type=real(1), default=1.5, help="s: how much further the pre-anchor is masked [1.5, Sec. 4.1]")
    return parser


def start_processes(device: str) -> str:
    """Under torchrun: joins the other processes, each on a GPU of its own."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} GPUs: lower --nproc_per_node.")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # While the first process measures the losses, the others wait for it.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return device


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> None:
        dial = "backbone" if any(text.partition("=")[0] == "--backbone" for text in given) else "tiny"
        args = build_parser(dial).parse_args(given)
        if dial == "backbone":
            run_backbone(args, start_processes(pick_device(args.device)))
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        if not args.tiny:
            raise UserError("say what to run: python memdlm.py --tiny, or --backbone NAME_OR_DIR.")
        if "LOCAL_RANK" in os.environ:
            raise UserError("--tiny runs in one process: start it without torchrun.")
        args.tasks = list(dict.fromkeys(args.tasks))
        args.lengths = args.lengths or [args.length, 2 * args.length, 4 * args.length]
        run_tiny(args, pick_device(args.device))

    guarded(run)


if __name__ == "__main__":
    from memdlm import main

    main()
