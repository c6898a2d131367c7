"""
student.py: MemDLM, written by you. exercises/README.md says what each function is to do.

    python -m pytest --student exercises/student.py -k step1
    python memdlm.py --tiny --student exercises/student.py

Fill a function in, and it takes the place of the project's own in all of the program; as long as it
ends in `raise NotImplementedError`, the project's own stays. Write more functions if you
like, import what you like, and do not peek into memdlm.py.

Shapes: B rows, T positions, D hidden size, V vocabulary, M masked positions, N sets of phi, r rank.
"""

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
    raise NotImplementedError


def corrupt(x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x0 (B, T) ids, masked (B, T) bool -> x_t (B, T) ids."""
    raise NotImplementedError


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
    raise NotImplementedError


# ---- step 3: LoRA (Secs. 3 and 4.1) ----------------------------------------------------------


def fresh_lora(shape: tuple, rank: int, dtype: torch.dtype, generator=None) -> tuple:
    """shape (..., out, in) -> A (..., r, in), drawn, and B (..., out, r), zero."""
    raise NotImplementedError


def apply_lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (B, T, out), x (B, T, in), A (N, r, in), B (N, out, r) -> (B, T, out)."""
    raise NotImplementedError


# ---- step 4: anchor and pre-anchor (Sec. 3, Eq. 6) -------------------------------------------


def draw_pre_anchor(masked: Tensor, maskable: Tensor, start_scale: float, generator) -> Tensor:
    """The anchor's mask (B, T) bool -> the pre-anchor's (B, T) bool."""
    raise NotImplementedError


def two_stages(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The two states that the inner loop learns from, in their order."""
    raise NotImplementedError


# ---- step 5: one inner step (Sec. 3, Eqs. 6-8) -----------------------------------------------


def stage_loss(model, batch: Batch, stage: Stage, fast: Fast, memory: Memory) -> Tensor:
    """stage, with stage.h (B, T, D) -> the loss of each set of phi, (N,)."""
    raise NotImplementedError


def inner_step(
    model, batch: Batch, stage: Stage, fast: Fast, memory: Memory
) -> tuple[Fast, Tensor]:
    """phi_k-1 -> phi_k and the loss (N,) before the step, both detached."""
    raise NotImplementedError


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
    raise NotImplementedError


def train_step(model, optimizer, losses: Iterable[Tensor], clip: float) -> tuple[bool, float]:
    """Clears the old gradients, sends each loss back, clips, and steps where all is finite ->
    whether it stepped, and the sum of the losses."""
    raise NotImplementedError


# ---- step 7: commit by confidence (Sec. 2.1) -------------------------------------------------


def commit_schedule(tokens: int, steps: int) -> list[int]:
    """How many tokens to commit at each step."""
    raise NotImplementedError


def select(confidence: Tensor, quota: int, threshold: float | None = None) -> Tensor:
    """confidence (B, T), -1 where nothing may be committed -> which places to commit, bool."""
    raise NotImplementedError
