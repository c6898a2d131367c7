"""
solution.py: the course's seven steps, written from the text of exercises/README.md alone, without
a look at memdlm.py.

    python -m pytest --student=tests/exercises/solution.py

Shapes: B rows, T positions, D hidden size, V vocabulary, M masked positions, N sets of phi, r rank.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

import memdlm
from data import Batch
from memdlm import Anchor, Memory, Stage
from model import Fast, Transformer

# ---- step 1: corrupt (Sec. 2.1, Eq. 1) -------------------------------------------------------


def draw_anchor(maskable: Tensor, generator: torch.Generator, eps: float = 1e-3) -> Anchor:
    """maskable (B, T) bool -> Anchor(t (B,), masked (B, T) bool)."""
    u = torch.rand(len(maskable), generator=generator).to(maskable.device)
    t = eps + (1 - eps) * u
    chance = torch.rand(maskable.shape, generator=generator).to(maskable.device)
    return Anchor(t, (chance < t[:, None]) & maskable)


def corrupt(x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x0 (B, T) ids, masked (B, T) bool -> x_t (B, T) ids."""
    return x0.masked_fill(masked, mask_id)


# ---- step 2: the masked loss (Sec. 2.1, Eq. 2) -----------------------------------------------


def denoising_loss(
    model: Transformer,
    batch: Batch,
    anchor: Anchor,
    h: Tensor,
    start: int = 0,
    fast: Fast | None = None,
) -> Tensor:
    """h (B, T, D), what layer `start` reads on x_t -> the loss of Eq. 2, a scalar."""
    h = model.run(h, start, None, batch.attention_mask, fast)
    row, place = anchor.masked.nonzero(as_tuple=True)
    nll = memdlm.token_nll(model, h[row, place], batch.x0[row, place])
    weight = 1 / (anchor.t + 1e-6)
    return (weight[row] * nll).sum() / batch.maskable.sum()


# ---- step 3: LoRA (Secs. 3 and 4.1) ----------------------------------------------------------


def fresh_lora(shape: tuple, rank: int, dtype: torch.dtype, generator=None) -> tuple:
    """shape (..., out, in) -> A (..., r, in) and B (..., out, r)."""
    *sets, wide_out, wide_in = shape
    bound = wide_in**-0.5
    A = torch.empty(*sets, rank, wide_in, dtype=dtype)
    A.uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(*sets, wide_out, rank, dtype=dtype)


def apply_lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (B, T, out), x (B, T, in), A (N, r, in), B (N, out, r) -> (B, T, out)."""
    sets = x.reshape(len(A), -1, x.shape[-1])  # (N, B / N * T, in): rows of a set lie together
    return y + scale * (sets @ A.mT @ B.mT).reshape(y.shape)


# ---- step 4: anchor and pre-anchor (Sec. 3, Eq. 6) -------------------------------------------


def draw_pre_anchor(masked: Tensor, maskable: Tensor, start_scale: float, generator) -> Tensor:
    """The anchor's mask (B, T) bool -> the pre-anchor's (B, T) bool."""
    count = memdlm.pre_anchor_count(masked.sum(1), maskable.sum(1), start_scale)
    order = torch.rand(masked.shape, generator=generator).to(masked.device)
    order = order.masked_fill(masked, 2).masked_fill(~maskable, -1)  # anchor first, prompt last
    rank = order.argsort(1, descending=True).argsort(1)
    return masked | (rank < count[:, None])


def two_stages(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The two states that the inner loop learns from, in their order."""
    pre_anchor = draw_pre_anchor(anchor.masked, maskable, memory.start_scale, generator)
    stages = []
    for masked, following in [(pre_anchor, anchor.masked), (anchor.masked, None)]:
        share = masked.sum(1) / maskable.sum(1).clamp(min=1)
        stages.append(Stage(masked, masked, 1 / (share + 1e-6), following))
    return stages


# ---- step 5: one inner step (Sec. 3, Eqs. 6-8) -----------------------------------------------


def stage_loss(model, batch: Batch, stage: Stage, fast: Fast, memory: Memory) -> Tensor:
    """stage, with stage.h (B, T, D) -> the loss of each set of phi, (N,)."""
    start = memory.first_layer(len(model.layers))
    h = model.run(stage.h, start, None, batch.attention_mask, fast)
    row, place = stage.scored.nonzero(as_tuple=True)
    nll = memdlm.token_nll(model, h[row, place], batch.x0[row, place])
    rows_per_set = len(batch.x0) // fast.sets()
    total = nll.new_zeros(fast.sets())
    total = total.index_add(0, row // rows_per_set, stage.weight[row] * nll)
    return total / stage.scored.reshape(fast.sets(), -1).sum(1).clamp(min=1)


def inner_step(
    model, batch: Batch, stage: Stage, fast: Fast, memory: Memory
) -> tuple[Fast, Tensor]:
    """phi_k-1 -> phi_k and the loss (N,) before the step, both detached."""
    before = [part.detach().requires_grad_() for part in fast.tensors()]
    with torch.enable_grad():
        loss = stage_loss(model, batch, stage, fast.with_tensors(before), memory)
        grads = torch.autograd.grad(loss.sum(), before)  # no row has two sets: each set's own
    loss = loss.detach()

    norms = [torch.linalg.matrix_norm(grad, keepdim=True) for grad in grads]  # each (N, 1, 1)
    after = []
    for part, grad, norm in zip(before, grads, norms, strict=True):
        if memory.clip > 0:
            grad = grad * (memory.clip / (norm + 1e-12)).clamp(max=1)
        good = norm.isfinite() & loss.isfinite()[:, None, None]
        after.append(torch.where(good, part - memory.lr * grad, part).detach())
    return fast.with_tensors(after), loss


# ---- step 6: the outer step (Sec. 3, Eqs. 9-10) ----------------------------------------------


def memdlm_loss(
    model: Transformer,
    batch: Batch,
    anchor: Anchor,
    stages: list[Stage],
    fast: Fast,
    memory: Memory,
) -> tuple[Tensor, Tensor]:
    """stages (without h) and phi_0 -> the outer loss, a scalar, and the inner losses (K, N)."""
    fast, inner = memdlm.inner_loop(model, batch, stages, fast, memory)
    start = memory.first_layer(len(model.layers))
    h = memdlm.prefix(model, batch, anchor.masked, memory)  # anew, with a graph: it trains too
    return denoising_loss(model, batch, anchor, h, start, fast), inner


def train_step(model, optimizer, losses: Iterable[Tensor], clip: float) -> tuple[bool, float]:
    """One step on theta -> whether it was taken, and the sum of the losses."""
    optimizer.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()  # frees the graph of this loss before the next is built
        total += loss.item()
    theta = [weight for weight in model.parameters() if weight.requires_grad]
    length = torch.nn.utils.clip_grad_norm_(theta, clip if clip > 0 else math.inf)
    taken = math.isfinite(total) and math.isfinite(length)
    if taken:
        optimizer.step()
    return taken, total


# ---- step 7: commit by confidence (Sec. 2.1) -------------------------------------------------


def commit_schedule(tokens: int, steps: int) -> list[int]:
    """How many tokens to commit at each step."""
    each, over = divmod(tokens, steps)
    return [each + 1] * over + [each] * (steps - over)


def select(confidence: Tensor, quota: int, threshold: float | None = None) -> Tensor:
    """confidence (B, T), -1 where nothing may be committed -> which places to commit, bool."""
    order = confidence.argsort(dim=1, descending=True, stable=True)  # of equal ones the left first
    chosen = order.argsort(dim=1) < quota  # the rank of each place
    if threshold is not None:
        chosen = chosen | (confidence > threshold)
    return chosen & (confidence > -1)
