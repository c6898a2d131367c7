"""
memdlm.py: the method. Corrupt, write a memory (inner loop), learn what the memory does not hold
(outer loop), step.

    python memdlm.py --tiny                                      both methods on a laptop
    python memdlm.py --backbone llada-moe --data F --out DIR     a real checkpoint: full_scale/

"The method" below is the whole of it, on one stretch, in the paper's order. Where Sec. 4 compares a
choice of the method with others, a field of `Memory` can hold another function (lab/variants.py has
them); where the field is None, the paper's own choice stands in the line that calls it.

The training loop is not here but in lab/training.py: `train`, which calls `train_step` below and is
short enough to be read next. What `--tiny` does with it begins in lab/tiny.py.

Reading list: MemDLM, Pei et al. 2026, arXiv 2603.22241 (sections and equations are cited from it);
why the loss is weighted by 1/t: MDLM, 2406.07524; fine-tuning on pairs: LLaDA, 2502.09992; the
first-order approximation: MAML, 1703.03400, Sec. 5.2.

Glossary
  paper   | name here              | shape
  x_0     | batch.x0               | (B, T) clean token ids
  t       | anchor.t               | (B,) noise level that was drawn
  M_t     | anchor.masked          | (B, T) bool, where x_t is [MASK]
  x_t     | embed(x0, masked)      | (B, T, D) the *anchor*, drawn once for stage 2 and outer loss
  x_tpre  | embed(x0, pre_masked)  | (B, T, D) the *pre-anchor*: the anchor, masked further
  s       | memory.start_scale     | float, t_pre = min(1, s q), q = the share really masked
  theta   | model.parameters()     | what the outer loop trains
  phi     | fast                   | model.Fast, the Parametric Memory: N sets of small matrices
  eta     | memory.lr              | float, step size of the inner loop
  K       | len(stages)            | 2: the pre-anchor, then the anchor
  w(t)    | 1 / (t + 1e-6)         | (B,) outer loss: t as drawn; inner: the share really masked
  -       | prefix                 | the layers before the first adapted one
B rows, T positions, D hidden size, V vocabulary, M masked positions, r rank of phi.

Who is updated by what
  weights           | updated by            | loss                         | when reset  | saved
  backbone          | nobody: it is frozen  | -                            | never       | as given
  outer LoRA theta  | AdamW, outer loop     | MDLM loss with phi_2         | never       | adapter
  fast weights phi  | plain SGD, inner loop | inner loss, stages 1 and 2   | every batch | never
With `--tiny` there is no backbone and no outer LoRA: all weights are theta.

What a step costs in forwards, where a is the share of layers that is adapted. (A backward costs
two, for activations and for theta. An inner one costs a: it ends at phi, without theta's gradient.)
  stage 1      1 + a    all layers read x_tpre; the prefix keeps no graph
  stage 2      a + a    the prefix has read x_t already, for the outer loss: that saves 1 - a
  outer loss   1 + 2    what a step of Standard MDLM costs
So 4 + 3a, where three whole training steps would cost 9.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from model import Fast, Linear, Transformer, UserError, fresh_lora


@dataclass
class Memory:
    """Settings of the Parametric Memory. The defaults are the paper's (Sec. 4.1)."""

    rank: int = 32
    alpha: float = 64.0
    lr: float = 0.1  # eta
    clip: float = 1.0  # largest norm of each tensor's gradient; 0 switches clipping off
    fraction: float = 0.1  # the last share of layers that has fast weights
    start_scale: float = 1.5  # s
    epochs: int = 1  # how often the stages are gone through
    scope: str = "batch"  # who shares a set of phi: the "batch", or nobody ("sample")
    # Choices that Sec. 4 compares; the alternatives are in lab/variants.py. None: the paper's own.
    stages: Callable | None = None  # through which states: two_stages (Figs. 9-11)
    loss: Callable | None = None  # what is learnt from them: cross-entropy (Fig. 6)
    norms: Callable | None = None  # whose norm is clipped: each_norm (Sec. 4.6)
    places: tuple[str, ...] = ("mlp",)  # which networks of a layer are adapted (Fig. 7)
    fresh: Callable | None = None  # makes a matrix's A and B: fresh_lora (Fig. 7)
    kind: type[Fast] = Fast  # says which of them the inner loop moves: both

    def sets(self, rows: int) -> int:
        """N, the number of sets of fast weights for a batch of so many rows."""
        return 1 if self.scope == "batch" else rows

    def first_layer(self, layers: int) -> int:
        """Of so many layers, int(layers * (1 - fraction)) and all later ones have fast weights."""
        first = max(0, int(layers * (1 - min(1.0, self.fraction))))
        if first == layers:
            raise UserError(f"--memory-fraction {self.fraction} adapts none of {layers} layers.")
        return first


class Anchor(NamedTuple):
    """One draw of the forward process."""

    t: Tensor  # (B,) noise levels
    masked: Tensor  # (B, T) the tokens that are masked


class Stage(NamedTuple):
    """One state that the inner loop learns from: x_0 masked by `masked`."""

    masked: Tensor  # (B, T)
    scored: Tensor  # (B, T) where its loss is taken: at every masked token (Sec. 4.6)
    weight: Tensor  # (B,) w = 1 / (share of the maskable tokens really masked + 1e-6)
    following: Tensor | None = None  # (B, T) what the next state masks, for lab/variants.py
    h: Tensor | None = None  # (B, T, D) the prefix's output on this state, once it is computed


def stage_of(masked: Tensor, maskable: Tensor, following: Tensor | None = None) -> Stage:
    """The state with these masks (B, T), scored at all of its masked tokens."""
    t = masked.sum(1) / maskable.sum(1).clamp(min=1)
    return Stage(masked, masked, 1 / (t + 1e-6), following)


def precise(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: for losses, and for sums of small steps."""
    return torch.promote_types(dtype, torch.float32)


# ==== the method ==================================================================================


def draw_anchor(maskable: Tensor, generator: torch.Generator, eps: float = 1e-3) -> Anchor:
    """Eq. 1: one t ~ U(eps, 1) for each row, and each maskable token is masked with chance t."""
    t = eps + (1 - eps) * torch.rand(len(maskable), generator=generator)
    masked = torch.rand(maskable.shape, generator=generator) < t[:, None]
    return Anchor(t.to(maskable.device), masked.to(maskable.device) & maskable)


def corrupt(x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x_t (B, T): the clean tokens, with [MASK] in the places `masked` (B, T)."""
    return torch.where(masked, mask_id, x0)


def embed(model: Transformer, x0: Tensor, masked: Tensor) -> Tensor:
    """x_t as the layers read it, (B, T, D)."""
    return model.embedding(corrupt(x0, masked, model.config.mask_id))


def token_nll(model: Transformer, h: Tensor, target: Tensor) -> Tensor:
    """-log p(target), (M,), from the last layer's output h (M, D)."""
    logits = model.head(h)  # (M, V)
    return F.cross_entropy(logits.to(precise(logits.dtype)), target, reduction="none")


def denoising_loss(model, batch: Batch, anchor: Anchor, h: Tensor, start=0, fast=None) -> Tensor:
    """Eq. 2, and with `fast` Eq. 9: the sum of w(t) * nll over masked tokens, divided by the number
    of maskable ones. h (B, T, D) is what the layer `start` reads."""
    h = model.run(h, start, None, batch.attention_mask, fast, at=anchor.masked)  # (M, D)
    nll = token_nll(model, h, batch.x0[anchor.masked])  # (M,)
    row = anchor.masked.nonzero()[:, 0]  # (M,) whose token each one is
    weight = 1 / (anchor.t + 1e-6)  # (B,)
    return (weight[row] * nll).sum() / batch.maskable.sum().clamp(min=1)


def mdlm_loss(model: Transformer, batch: Batch, anchor: Anchor) -> Tensor:
    """Standard MDLM, the baseline: Eq. 2 for the model without a memory."""
    return denoising_loss(model, batch, anchor, embed(model, batch.x0, anchor.masked))


def adapted_matrices(model: Transformer, memory: Memory) -> dict[str, Linear]:
    """Name -> matrix that phi adapts: gate, up and down of the last layers' networks (Sec. 4.1)."""
    found = {}
    for i in range(memory.first_layer(len(model.layers)), len(model.layers)):
        for place in memory.places:
            for name, matrix in getattr(model.layers[i], place).adaptable().items():
                found[f"layers.{i}.{place}.{name}"] = matrix
    return found


def init_fast(model: Transformer, memory: Memory, sets: int, generator: torch.Generator) -> Fast:
    """phi_0 (Sec. 3): A is Kaiming-uniform and B = 0, so that B A = 0. The gradient of A has the
    factor B, so it is zero in stage 1, which therefore moves B alone."""
    weights, like = {}, model.embedding.weight
    for name, matrix in adapted_matrices(model, memory).items():
        shape = (sets, *matrix.shape)  # (N, out, in); of experts (N, X, out, in)
        pair = (memory.fresh or fresh_lora)(shape, memory.rank, precise(like.dtype), generator)
        weights[name] = tuple(part.to(like.device) for part in pair)
    return memory.kind(weights, memory.alpha / memory.rank)


def pre_anchor_count(masked: Tensor, maskable: Tensor, start_scale: float) -> Tensor:
    """Of n = maskable tokens (B,), x_tpre masks int(n * min(1, s q)) with q = masked / n, (B,).
    s q is float32, its product with n double, as published: k = 6, n = 14 gives 8, not 9."""
    ratio = masked.float() / maskable.float().clamp(min=1)
    t_pre = torch.maximum(ratio * start_scale, ratio).clamp(max=1)
    count = (maskable.double() * t_pre.double()).long()
    return torch.minimum(torch.maximum(count, masked), maskable)


def draw_pre_anchor(masked: Tensor, maskable: Tensor, start_scale: float, generator) -> Tensor:
    """Eq. 6: x_tpre masks (B, T) what the anchor masks, and further tokens by s (Sec. 4.6)."""
    chance = torch.rand(masked.shape, generator=generator).to(masked.device)
    # Sorted downwards: masked already (2 to 3), then maskable (0 to 1), then the rest (below 0).
    order = (chance + 2.0 * masked - 2.0 * ~maskable).argsort(dim=1, descending=True)
    counts = pre_anchor_count(masked.sum(1).cpu(), maskable.sum(1).cpu(), start_scale)
    first = torch.arange(masked.shape[1]) < counts[:, None]  # (B, T)
    return torch.zeros_like(masked).scatter(1, order, first.to(masked.device))


def two_stages(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The trajectory, K = 2: pre-anchor alignment (Eqs. 6, 7), then anchor to target (Eq. 8)."""
    pre_masked = draw_pre_anchor(anchor.masked, maskable, memory.start_scale, generator)
    return [stage_of(pre_masked, maskable, anchor.masked), stage_of(anchor.masked, maskable)]


def make_stages(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The states that the inner loop goes through: the paper's two, unless others are handed in."""
    return (memory.stages or two_stages)(anchor, maskable, memory, generator)


def cross_entropy(model, batch: Batch, stage: Stage, h: Tensor, fast: Fast) -> Tensor:
    """What is learnt from a state: -log p of the clean token at each scored place, (M,)."""
    return token_nll(model, h, batch.x0[stage.scored])


def stage_loss(model, batch: Batch, stage: Stage, fast: Fast, memory: Memory) -> Tensor:
    """Eqs. 7 and 8: one stage's loss for each set of phi, (N,): the sum of w * -log p of the clean
    tokens at the scored places, divided by their number."""
    start = memory.first_layer(len(model.layers))
    h = model.run(stage.h, start, None, batch.attention_mask, fast, at=stage.scored)  # (M, D)
    loss = (memory.loss or cross_entropy)(model, batch, stage, h, fast)  # (M,)
    row, by_row = stage.scored.nonzero()[:, 0], torch.zeros_like(stage.weight, dtype=loss.dtype)
    by_row = by_row.index_add(0, row, stage.weight[row].to(loss.dtype) * loss)  # (B,)
    count = stage.scored.sum(1).view(fast.sets(), -1).sum(1)
    return by_row.view(fast.sets(), -1).sum(1) / count.clamp(min=1)


def each_norm(grads: Iterable[Tensor]) -> list[Tensor]:
    """Sec. 4.6: the norm of each tensor's gradient, for each set alone: (N, ., .) -> (N, 1, 1)."""
    return [grad.flatten(-2).norm(dim=-1)[..., None, None] for grad in grads]


def inner_step(model, batch: Batch, stage: Stage, fast: Fast, memory: Memory) -> tuple:
    """phi_k-1 -> phi_k (Eqs. 7, 8): parameter - eta * gradient, plain SGD on every A and B. Returns
    phi_k and the loss (N,) before the step, both detached."""
    leaves, moved = [part.detach().requires_grad_() for part in fast.tensors()], []
    with torch.enable_grad():
        loss = stage_loss(model, batch, stage, fast.with_tensors(leaves), memory)  # (N,)
        grads = torch.autograd.grad(loss.sum(), leaves)  # a row has one set: each its own
    for part, grad, norm in zip(leaves, grads, (memory.norms or each_norm)(grads)):
        scale = (memory.clip / (norm + 1e-12)).clamp(max=1.0) if memory.clip > 0 else 1.0
        # Where a set's loss or the gradient is not finite, the matrix stays as it was.
        usable = loss.isfinite().view(-1, *[1] * (grad.dim() - 1)) & norm.isfinite()
        moved.append(torch.where(usable, part - memory.lr * scale * grad, part).detach())
    return fast.with_tensors(moved), loss.detach()


def prefix(model: Transformer, batch: Batch, masked: Tensor, memory: Memory) -> Tensor:
    """What the first adapted layer reads, (B, T, D), on x_0 masked by `masked` (B, T)."""
    stop = memory.first_layer(len(model.layers))
    return model.run(embed(model, batch.x0, masked), 0, stop, batch.attention_mask)


def inner_loop(model, batch: Batch, stages: list[Stage], fast: Fast, memory: Memory) -> tuple:
    """phi_0 -> phi_K (Eqs. 6-8), a step a stage; and the losses (K * epochs, N) before each."""
    with torch.no_grad():  # the layers before phi read each state once
        hs = [prefix(model, batch, s.masked, memory) if s.h is None else s.h for s in stages]
    losses, stages = [], [s._replace(h=h) for s, h in zip(stages, hs)]
    for stage in stages * memory.epochs:
        fast, loss = inner_step(model, batch, stage, fast, memory)
        losses.append(loss)
    return fast, torch.stack(losses)


def memdlm_loss(model, batch, anchor: Anchor, stages: list[Stage], fast: Fast, memory) -> tuple:
    """Eq. 9: the MDLM loss on x_t with phi_K in place; and the inner losses (K * epochs, N). First
    order (Eq. 10): `inner_step` has detached phi_K, a constant. Gradients reach theta alone."""
    h = prefix(model, batch, anchor.masked, memory)  # stage 2 has this very mask: it reads h, too
    stages = [s._replace(h=h.detach()) if s.masked is anchor.masked else s for s in stages]
    fast, inner = inner_loop(model, batch, stages, fast, memory)
    start = memory.first_layer(len(model.layers))
    return denoising_loss(model, batch, anchor, h, start, fast), inner  # phi_K is not returned


def memory_method(model, batch: Batch, memory: Memory, generator: torch.Generator) -> Tensor:
    """MemDLM's loss of a batch, from the draws on: anchor, pre-anchor, phi_0; then both loops."""
    anchor = draw_anchor(batch.maskable, generator)
    stages = make_stages(anchor, batch.maskable, memory, generator)
    fast = init_fast(model, memory, memory.sets(len(batch.x0)), generator)
    return memdlm_loss(model, batch, anchor, stages, fast, memory)[0]


def train_step(model, optimizer, losses: Iterable[Tensor], clip: float) -> tuple[bool, float]:
    """Eq. 10: one AdamW step on theta, whose gradient is clipped by its global norm. losses: one
    for each micro-batch, divided by their number, in turn, so that one graph exists at a time.
    Returns whether the step was taken (not where the gradient is not finite), and their sum."""
    theta, total = [p for p in model.parameters() if p.requires_grad], 0.0
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(theta, clip if clip > 0 else math.inf)
    taken = math.isfinite(total) and bool(norm.isfinite())
    if taken:
        optimizer.step()
    return taken, total


# ==== end of the method; what a memory takes up; the same noise for the same key ==================


@torch.no_grad()
def nll_by_stage(model, batch, anchor: Anchor, stages, fast: Fast, memory: Memory) -> list[Tensor]:
    """-log p of the clean tokens that the anchor masks, (M,): with phi_0, phi_1, ..., phi_K."""
    found, h = [], embed(model, batch.x0, anchor.masked)
    for stage in (None, *stages * memory.epochs):
        if stage is not None:
            stage = stage._replace(h=prefix(model, batch, stage.masked, memory))
            fast, _ = inner_step(model, batch, stage, fast, memory)
        read = model.run(h, 0, None, batch.attention_mask, fast, at=anchor.masked)
        found.append(token_nll(model, read, batch.x0[anchor.masked]))
    return found


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose draws depend on the key alone, such as (seed, "fine-tune", step): so a
    resumed run needs no generator's state, and two methods see the same noise."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def standard_method(model, batch: Batch, memory: Memory, generator: torch.Generator) -> Tensor:
    """Standard MDLM's loss of a batch. A generator of the same seed gives both methods the same
    anchor; `memory` is there so that both are called alike."""
    return mdlm_loss(model, batch, draw_anchor(batch.maskable, generator))


def keyed_loss(method: Callable, model, batch: Batch, memory: Memory, *key: int | str) -> Tensor:
    """A method's loss with all its random draws made from `key`."""
    generator = generator_for(*key)
    torch.manual_seed(generator.initial_seed())  # for the outer LoRA's dropout alone
    return method(model, batch, memory, generator)


if __name__ == "__main__":  # --tiny: lab/tiny.py; --backbone: full_scale/finetune.py
    from lab.tools import start

    start("memdlm")
