"""
memdlm.py: the method. Corrupt, write a memory (inner loop), learn what the memory does not hold
(outer loop), step.

    python memdlm.py --tiny                                      both methods on a laptop
    python memdlm.py --backbone llada-moe --data F --out DIR     a real checkpoint: full_scale/

"The method" below is the whole of it, on one stretch, in the paper's order and with its defaults.
What the paper varies in its analyses comes after it, then the training loop, then `--tiny`.

Reading list: MemDLM, Pei et al. 2026, arXiv 2603.22241 (sections and equations are cited from it);
why the loss is weighted by 1/t: MDLM, 2406.07524; fine-tuning on pairs: LLaDA, 2502.09992; the
first-order approximation: MAML, 1703.03400, Sec. 5.2; distillation (Fig. 6): 1503.02531.

Glossary
  paper   | name here              | shape
  x_0     | batch.x0               | (B, T) clean token ids
  t       | anchor.t               | (B,) noise level that was drawn
  M_t     | anchor.masked          | (B, T) bool, where x_t is [MASK]
  x_t     | embed(x0, masked)      | (B, T, D) the *anchor*, drawn once for stage 2 and outer loss
  x_tpre  | embed(x0, pre_masked)  | (B, T, D) the *pre-anchor*: the anchor, masked further
  s       | memory.start_scale     | float, t_pre = min(1, s * t)
  theta   | model.parameters()     | what the outer loop trains
  phi     | fast                   | model.Fast, the Parametric Memory: N sets of small matrices
  eta     | memory.lr              | float, step size of the inner loop
  K       | memory.steps           | 2 stages: pre-anchor, anchor
  w(t)    | 1 / (t + 1e-6)         | (B,) weight of the loss
  -       | prefix                 | the layers before the first adapted one
B rows, T positions, D hidden size, V vocabulary, M masked positions, r rank of phi.

Who is updated by what
  weights           | updated by            | loss                         | when reset  | saved
  backbone          | nobody, or AdamW      | -, or MDLM loss with phi_2   | never       | as given
  outer LoRA theta  | AdamW, outer loop     | MDLM loss with phi_2         | never       | adapter
  fast weights phi  | plain SGD, inner loop | inner loss, stages 1 and 2   | every batch | never
The paper freezes the backbone, and theta is an outer LoRA. With `--tiny` all weights are theta.

What a step costs in forwards, where a is the share of layers that is adapted. (A backward costs
two, for activations and for theta. An inner one costs a: it ends at phi, without theta's gradient.)
  stage 1      1 + a    all layers read x_tpre; the prefix keeps no graph
  stage 2      a + a    the prefix has read x_t already, for the outer loss: that saves 1 - a
  outer loss   1 + 2    what a step of Standard MDLM costs
So 4 + 3a, where three whole training steps would cost 9.
"""

import argparse
import copy
import importlib.util
import math
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from data import Batch, Example, Parser, pick_device, real, whole
from model import (
    Config,
    Fast,
    Linear,
    Transformer,
    UserError,
    fresh_lora,
    init_weights,
    load_checkpoint,
    load_model,
    load_weights,
    read_json,
    save_checkpoint,
    write_json,
)


@dataclass
class Memory:
    """Settings of the Parametric Memory. The defaults are the paper's (Sec. 4.1)."""

    rank: int = 32
    alpha: float = 64.0
    lr: float = 0.1
    clip: float = 1.0  # largest norm of each tensor's gradient; 0 switches clipping off
    fraction: float = 0.1  # the last share of layers that has fast weights
    start_scale: float = 1.5
    # The other fields choose a variant; the variants stand below the method.
    scope: str = "batch"  # one of SCOPES: who shares a set of fast weights
    steps: int = 2
    epochs: int = 1  # how often the stages are gone through
    strategy: str = "consistent"  # a key of STRATEGIES: through which states (Figs. 9-11)
    loss: str = "ce"  # a key of INNER_LOSSES: what is learnt from them (Fig. 6)
    targets: str = "all"  # one of TARGETS: at which positions (Sec. 4.6)
    places: str = "ffn"  # a key of PLACES: which matrices are adapted (Fig. 7)
    form: str = "lora"  # a key of FORMS: by two thin matrices or a full one (Fig. 7)
    clip_by: str = "tensor"  # a key of CLIPS: whose norm is clipped (Sec. 4.6)

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
    weight: Tensor  # (B,) w = 1 / t with the share t that is really masked
    following: Tensor | None = None  # (B, T) what the next state masks; None: there is none
    h: Tensor | None = None  # (B, T, D) the prefix's output on this state, once it is computed


def chain(masks: list[Tensor], maskable: Tensor) -> list[Stage]:
    """One stage for each mask (B, T), in order, scored at all of its masked tokens."""
    stages = []
    for masked, following in zip(masks, [*masks[1:], None]):
        t = masked.sum(1) / maskable.sum(1).clamp(min=1)
        stages.append(Stage(masked, masked, 1 / (t + 1e-6), following))
    return stages


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


def denoising_loss(model, batch, anchor, h, start=0, fast=None, norm="token") -> Tensor:
    """Eq. 2, and with `fast` Eq. 9: the sum of w(t) * nll over masked tokens, divided by the number
    of maskable ones. h (B, T, D) is what the layer `start` reads."""
    h = model.run(h, start, None, batch.attention_mask, fast)[anchor.masked]
    nll = token_nll(model, h, batch.x0[anchor.masked])  # (M,)
    row = anchor.masked.nonzero()[:, 0]  # (M,) whose token each one is
    weight = 1 / (anchor.t + 1e-6)
    return mean_loss(weight[row] * nll, row, batch.maskable.sum(1), norm)


def mdlm_loss(model: Transformer, batch: Batch, anchor: Anchor, norm: str = "token") -> Tensor:
    """Standard MDLM, the baseline: Eq. 2 for the model without a memory."""
    return denoising_loss(model, batch, anchor, embed(model, batch.x0, anchor.masked), norm=norm)


def adapted_matrices(model: Transformer, memory: Memory) -> dict[str, Linear]:
    """Name -> matrix that phi adapts: gate, up and down of the last layers' networks (Sec. 4.1)."""
    found = {}
    for i in range(memory.first_layer(len(model.layers)), len(model.layers)):
        for place in PLACES[memory.places]:
            for name, matrix in getattr(model.layers[i], place).adaptable().items():
                found[f"layers.{i}.{place}.{name}"] = matrix
    return found


def init_fast(model: Transformer, memory: Memory, sets: int, generator: torch.Generator) -> Fast:
    """phi_0 (Sec. 3): A is Kaiming-uniform and B = 0, so that B A = 0. The gradient of A has the
    factor B, so it is zero in stage 1, which therefore moves B alone."""
    weights, like = {}, model.embedding.weight
    for name, matrix in adapted_matrices(model, memory).items():
        shape = (sets, *matrix.shape)  # (N, out, in); of experts (N, X, out, in)
        pair = FORMS[memory.form](shape, memory.rank, precise(like.dtype), generator)
        weights[name] = tuple(part.to(like.device) for part in pair)
    return Fast(weights, memory.alpha / memory.rank, fixed=memory.form == "full")


def pre_anchor_count(masked: Tensor, maskable: Tensor, start_scale: float) -> Tensor:
    """Of n = maskable tokens (B,), x_tpre masks int(n * min(1, s q)) with q = masked / n, (B,).
    s q is float32 and its product with n double, as published: the rounding depends on it."""
    ratio = masked.float() / maskable.float().clamp(min=1)
    t_pre = torch.maximum(ratio * start_scale, ratio).clamp(max=1)
    count = (maskable.double() * t_pre.double()).long()
    return torch.minimum(torch.maximum(count, masked), maskable)


def draw_pre_anchor(masked, maskable, start_scale: float, generator) -> Tensor:
    """Eq. 6: x_tpre's mask (B, T) has all that the anchor masks, and further maskable tokens. Their
    number goes by the scale s (Sec. 4.6)."""
    chance = torch.rand(masked.shape, generator=generator).to(masked.device)
    # Sorted downwards: masked already (2 to 3), then maskable (0 to 1), then the rest (below 0).
    order = (chance + 2.0 * masked - 2.0 * ~maskable).argsort(dim=1, descending=True)
    counts = pre_anchor_count(masked.sum(1).cpu(), maskable.sum(1).cpu(), start_scale)
    first = torch.arange(masked.shape[1]) < counts[:, None]  # (B, T)
    return torch.zeros_like(masked).scatter(1, order, first.to(masked.device))


def two_stages(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The trajectory of Sec. 3, K = 2: pre-anchor alignment (Eq. 6), then anchor to target."""
    pre_masked = draw_pre_anchor(anchor.masked, maskable, memory.start_scale, generator)
    return chain([pre_masked, anchor.masked], maskable)


def cross_entropy(model, batch: Batch, stage: Stage, h: Tensor, fast: Fast) -> Tensor:
    """Eqs. 7 and 8: -log p of the clean token at each scored place, (M,), from h (M, D)."""
    return token_nll(model, h, batch.x0[stage.scored])


def stage_loss(model, batch: Batch, stage: Stage, fast: Fast, memory: Memory) -> Tensor:
    """One stage's loss for each set of phi, (N,): (sum of w * loss) / (number of scored places)."""
    start = memory.first_layer(len(model.layers))
    h = model.run(stage.h, start, None, batch.attention_mask, fast)  # (B, T, D)
    loss = INNER_LOSSES[memory.loss](model, batch, stage, h[stage.scored], fast)  # (M,)
    row = stage.scored.nonzero()[:, 0]
    by_row = torch.zeros_like(stage.weight, dtype=loss.dtype)  # (B,)
    by_row = by_row.index_add(0, row, stage.weight[row].to(loss.dtype) * loss)
    count = stage.scored.sum(1).view(fast.sets(), -1).sum(1)
    return by_row.view(fast.sets(), -1).sum(1) / count.clamp(min=1)


def each_norm(grads: Iterable[Tensor]) -> list[Tensor]:
    """The norm of the gradient of each A and each B, of each set by itself: (N, ., .) -> (N, 1, 1);
    of experts (N, X, ., .) -> (N, X, 1, 1). So each is clipped alone."""
    return [grad.flatten(-2).norm(dim=-1)[..., None, None] for grad in grads]


def sgd(parameter: Tensor, grad: Tensor, norm: Tensor, loss: Tensor, memory: Memory) -> Tensor:
    """parameter - eta * grad for one A or B, where the gradient is no longer than the clip. Where
    loss (N,) or gradient are not finite, the matrix stays as it was."""
    scale = torch.ones_like(norm)
    if memory.clip > 0:
        scale = (memory.clip / (norm + 1e-12)).clamp(max=1.0)
    usable = loss.isfinite().view(-1, *[1] * (grad.dim() - 1)) & norm.isfinite()
    return torch.where(usable, parameter - memory.lr * scale * grad, parameter).detach()


def inner_step(model, batch: Batch, stage: Stage, fast: Fast, memory: Memory) -> tuple:
    """phi_k-1 -> phi_k (Eq. 6 to 8): one step of plain SGD on a stage, which carries its prefix's
    h. Returns phi_k, which is detached, and the loss (N,) before the step."""
    leaves = [part.detach().requires_grad_() for part in fast.tensors()]
    with torch.enable_grad():
        loss = stage_loss(model, batch, stage, fast.with_tensors(leaves), memory)  # (N,)
        grads = torch.autograd.grad(loss.sum(), leaves)  # no row uses two sets
    loss, norms = loss.detach(), CLIPS[memory.clip_by](grads)
    parts = [sgd(p, grad, norm, loss, memory) for p, grad, norm in zip(leaves, grads, norms)]
    return fast.with_tensors(parts), loss


def inner_loop(model, batch, stages: list[Stage], fast: Fast, memory: Memory) -> tuple:
    """Eqs. 6-8: phi_0 -> phi_K, a step for each stage. Returns phi_K and the losses
    (K * epochs, N) before the steps."""
    losses = []
    for stage in stages * memory.epochs:
        fast, loss = inner_step(model, batch, stage, fast, memory)
        losses.append(loss)
    return fast, torch.stack(losses)


def prefix(model: Transformer, batch: Batch, masked: Tensor, memory: Memory) -> Tensor:
    """What the first adapted layer reads, (B, T, D), on x_0 masked by `masked` (B, T)."""
    stop = memory.first_layer(len(model.layers))
    return model.run(embed(model, batch.x0, masked), 0, stop, batch.attention_mask)


@torch.no_grad()
def with_prefixes(model, batch: Batch, stages: list[Stage], memory: Memory) -> list[Stage]:
    """The stages, each with its prefix's output."""
    return [
        stage._replace(h=prefix(model, batch, stage.masked, memory)) if stage.h is None else stage
        for stage in stages
    ]


def memdlm_loss(model, batch, anchor, stages, fast, memory: Memory, norm: str = "token") -> tuple:
    """Eq. 9: the MDLM loss on x_t with phi_K in place; and the inner losses (K * epochs, N).

    First order (Eq. 10): phi_K is a constant, gradients reach theta alone. Stage 2 and this loss
    read one and the same prefix of the anchor, which saves a share 1 - a of a forward.
    """
    h = prefix(model, batch, anchor.masked, memory)  # with its graph, for the outer loss
    stages = [
        stage._replace(h=h.detach()) if stage.masked is anchor.masked else stage for stage in stages
    ]
    stages = with_prefixes(model, batch, stages, memory)
    fast, inner = inner_loop(model, batch, stages, fast, memory)
    start = memory.first_layer(len(model.layers))
    outer = denoising_loss(model, batch, anchor, h, start, fast, norm)
    return outer, inner  # phi_K is not returned: it is dropped here


def train_step(model, optimizer, losses: Iterable[Tensor], clip: float) -> tuple[bool, float]:
    """One AdamW step on theta (Eq. 10), whose gradient alone is clipped, by its global norm.

    losses: an iterator with one for each micro-batch, so that one graph exists at a time. Returns
    whether the step was taken (where the gradient is not finite, nothing changes), and their sum.
    """
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


# ==== end of the method; variants: what the paper's analyses change ===============================


# What the outer loss is divided by; and who shares a set of fast weights: as published the whole
# batch, so that the batch size changes the method.
NORMS = ("token", "sequence", "batch")
SCOPES = ("batch", "sample")


def mean_loss(loss: Tensor, row: Tensor, maskable: Tensor, norm: str) -> Tensor:
    """The mean of loss (M,) over all maskable tokens ("token"), the mean over rows of each row's
    own mean ("sequence"), or the sum over the number of rows ("batch"). row (M,) says whose token
    each loss is; maskable (B,) counts each row's maskable tokens."""
    if norm == "token":
        return loss.sum() / maskable.sum().clamp(min=1)
    if norm == "sequence":
        loss = loss / maskable[row]
    return loss.sum() / len(maskable)


def consistent(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The paper's trajectory (Fig. 9; published name: pmc). K = 2 is `two_stages`, K = 1 stage 1
    alone. K > 2 inserts nested states, each of which reveals an even share, rounded up, of what is
    left to reveal on the way to the anchor (Fig. 11)."""
    pre, last = two_stages(anchor, maskable, memory, generator)
    if memory.steps <= 2:
        return [pre, last] if memory.steps == 2 else [pre._replace(following=None)]
    extra, masks = pre.masked & ~last.masked, [pre.masked]
    chance = torch.rand(maskable.shape, generator=generator).to(maskable.device)
    rank = chance.masked_fill(~extra, 2.0).argsort(dim=1).argsort(dim=1)
    left = extra.sum(1, keepdim=True)
    for more in range(memory.steps - 2, 0, -1):  # steps after this one
        left = left * more // (more + 1)
        masks.append(last.masked | (extra & (rank < left)))
    return chain([*masks, last.masked], maskable)


def pre_anchor_only(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """Fig. 10 (published name: pre_only): stage 1 alone, whose next state still is the anchor."""
    return two_stages(anchor, maskable, memory, generator)[:1]


def anchor_only(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """Fig. 10 (published name: no_progressive): stage 2 alone, weighted by the t that was drawn."""
    return [Stage(anchor.masked, anchor.masked, 1 / (anchor.t + 1e-6))]


def inconsistent(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """Fig. 9 (published name: progressive_memory): masks unrelated to the anchor, from 80% to 20%.
    The first of several masks each token with chance 0.8, the others int(n * ratio) tokens of it;
    the weights are those of the nominal ratios."""
    chance = torch.rand(maskable.shape, generator=generator).to(maskable.device)
    chance = chance.masked_fill(~maskable, 2.0)
    rank, n = chance.argsort(dim=1).argsort(dim=1), maskable.sum(1, keepdim=True)
    masks, ratios = [], [0.2]
    if memory.steps > 1:
        # In just this order of operations: the last ratio comes out a little below 0.2.
        last = memory.steps - 1
        ratios = [0.8 + (0.2 - 0.8) * (k / last) for k in range(memory.steps)]
        masks.append(chance < 0.8)
    for ratio in ratios[len(masks) :]:
        fewest = rank < (n.double() * ratio).long()
        masks.append(fewest & masks[0] if masks else fewest & maskable)
    weights = [torch.full_like(anchor.t, 1 / (ratio + 1e-6)) for ratio in ratios]
    stages = chain(masks, maskable)
    return [stage._replace(weight=weight) for stage, weight in zip(stages, weights)]


STRATEGIES = {
    "consistent": consistent,
    "pre_anchor_only": pre_anchor_only,
    "anchor_only": anchor_only,
    "inconsistent": inconsistent,
}
# Where a stage's loss is: at all masked tokens (Sec. 4.6), or those the next state reveals (Eq. 7).
TARGETS = ("all", "newly_revealed")


def make_stages(anchor: Anchor, maskable: Tensor, memory: Memory, generator) -> list[Stage]:
    """The inner loop's states under any strategy and choice of targets."""
    stages = STRATEGIES[memory.strategy](anchor, maskable, memory, generator)
    for i, stage in enumerate(stages):
        if memory.targets == "newly_revealed" and stage.following is not None:
            stages[i] = stage._replace(scored=stage.masked & ~stage.following)
    return stages


def distillation(model, batch: Batch, stage: Stage, h: Tensor, fast: Fast, kind: str) -> Tensor:
    """Fig. 6: the student, h (M, D), follows a teacher, (M,): the same model with the same fast
    weights, which reads the next state, or the clean tokens after the last."""
    masked = torch.zeros_like(stage.masked) if stage.following is None else stage.following
    with torch.no_grad():
        seen = embed(model, batch.x0, masked)
        teacher = model.run(seen, 0, None, batch.attention_mask, fast)[stage.scored]
    if kind == "hidden_mse":  # both after the final norm
        return (model.norm(h) - model.norm(teacher)).square().mean(-1)
    if kind == "hidden_cosine":
        return 1 - F.cosine_similarity(model.norm(h), model.norm(teacher), dim=-1)
    pair = [model.head(x).log_softmax(-1, dtype=precise(x.dtype)) for x in (h, teacher)]  # (M, V)
    of, against = pair if kind == "kl" else reversed(pair)
    return F.kl_div(of, against, reduction="none", log_target=True).sum(-1)  # KL(against || of)


INNER_LOSSES = {  # Fig. 6
    "ce": cross_entropy,
    "kl": partial(distillation, kind="kl"),  # KL(teacher || student)
    "reverse_kl": partial(distillation, kind="reverse_kl"),  # KL(student || teacher)
    "hidden_mse": partial(distillation, kind="hidden_mse"),
    "hidden_cosine": partial(distillation, kind="hidden_cosine"),
}


# Fig. 7: which networks of an adapted layer have fast weights. (The published code silently leaves
# out the attention of mixtures of experts.)
PLACES = {"ffn": ("mlp",), "ffn+attention": ("mlp", "attention")}


def fresh_full(shape: tuple, rank: int, dtype: torch.dtype, generator) -> tuple:
    """Fig. 7's full-rank memory: B (..., out, in) is the change of the matrix itself, zero at
    first, and A the identity, which stays. It is added times alpha / rank, like the other."""
    *stack, _, inputs = shape
    return torch.eye(inputs, dtype=dtype).expand(*stack, -1, -1), torch.zeros(shape, dtype=dtype)


FORMS = {"lora": fresh_lora, "full": fresh_full}  # Fig. 7


def global_norm(grads: Iterable[Tensor]) -> list[Tensor]:
    """One norm for each set, over the gradients of all its matrices (Sec. 4.6)."""
    total = sum(grad.flatten(1).square().sum(1) for grad in grads).sqrt()  # (N,)
    return [total.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]


CLIPS = {"tensor": each_norm, "global": global_norm}  # Sec. 4.6


# ---- training: all random draws of a step, a loop, its checkpoints ---------------------------


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose draws depend on the key alone, such as (seed, "fine-tune", step): so a
    resumed run needs no generator's state, and two methods see the same noise."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def standard_method(model, batch: Batch, memory: Memory, generator, norm: str = "token") -> Tensor:
    """The loss of Standard MDLM on a fresh anchor."""
    return mdlm_loss(model, batch, draw_anchor(batch.maskable, generator), norm)


def memory_method(model, batch: Batch, memory: Memory, generator, norm: str = "token") -> Tensor:
    """MemDLM's loss, on the same anchor as that of `standard_method` with the same generator."""
    anchor = draw_anchor(batch.maskable, generator)
    stages = make_stages(anchor, batch.maskable, memory, generator)
    fast = init_fast(model, memory, memory.sets(len(batch.x0)), generator)
    return memdlm_loss(model, batch, anchor, stages, fast, memory, norm)[0]


def pretraining_method(model, batch: Batch, memory: Memory, generator, norm="token") -> Tensor:
    """The mean NLL over masked tokens: Eq. 2 without its weight, for a calmer start."""
    masked = draw_anchor(batch.maskable, generator).masked
    h = model.run(embed(model, batch.x0, masked), 0, None, batch.attention_mask)
    return token_nll(model, h[masked], batch.x0[masked]).sum() / masked.sum().clamp(min=1)


METHODS = {"base": pretraining_method, "mdlm": standard_method, "memdlm": memory_method}


def keyed_loss(model, method: str, batch: Batch, memory: Memory, norm: str, *key) -> Tensor:
    """A method's loss with all its random draws made from `key`."""
    generator = generator_for(*key)
    torch.manual_seed(generator.initial_seed())  # for the outer LoRA's dropout alone
    return METHODS[method](model, batch, memory, generator, norm)


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
    """step -> rate: linear warm-up over a share of the steps, a plateau, a cosine to zero over a
    share. Step k of w has (k + 1) / w * peak; the published trainer (--backbone) has k / w."""
    rising, falling = max(1, int(steps * warmup)), max(1, int(steps * decay))

    def rate_at(step: int) -> float:
        if step < rising:
            return peak * (step + 1) / rising
        into_decay = max(0, step - (steps - falling))
        return peak * 0.5 * (1 + math.cos(math.pi * into_decay / falling))

    return rate_at


def training_state(model, optimizer, theta_only: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors: model.<parameter>, and adam.<parameter>/<key> of AdamW's state."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters():
        if theta_only and not p.requires_grad:
            del tensors[f"model.{name}"]
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            tensors[f"adam.{name}/{key}"] = value
    return tensors


def check_identity(path: Path, meta: dict, wanted: dict) -> None:
    """Refuses a checkpoint that was trained under other settings."""
    for key, value in wanted.items():
        if meta["identity"].get(key) != value:
            known = f"{key} {meta['identity'].get(key)}, not {value}"
            raise UserError(f"{path} was trained with {known}: name another folder.")


def take_up(model, optimizer, path: Path, identity: dict) -> dict:
    """Weights and AdamW's state back in place, bit for bit. Returns the checkpoint's meta."""
    tensors, meta = load_checkpoint(path)
    check_identity(path, meta, identity)
    frozen = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    load_weights(model, frozen | tensors, path)
    parameters = dict(model.named_parameters())
    for place, tensor in tensors.items():
        if place.startswith("adam."):
            name, key = place.removeprefix("adam.").split("/")
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)
    return meta


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
        meta = take_up(model, optimizer, path, phase.identity)
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
            save_checkpoint(path, training_state(model, optimizer, phase.theta_only), meta)

    bar = tqdm(total=phase.steps, desc=phase.name, initial=start, disable=not chief, delay=2)
    for step in range(start, phase.steps):
        log(step)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = phase.rate_at(step)
        taken, loss = train_step(model, optimizer, phase.losses_at(step), phase.clip)
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


LOSSES = ("train_with_memory", "train_without_memory", "eval_without_memory")
T_BINS = 5


def finite(value: float) -> float | None:
    """None, JSON's null, for what is no number: the mean of nothing, an exploded loss."""
    return value if math.isfinite(value) else None


def even_anchors(batches: list[Batch], seed: int) -> list[Anchor]:
    """An anchor for each batch, the same at every call; their t cover (0, 1) evenly."""
    generator, rows = generator_for(seed, "measure"), [len(batch.x0) for batch in batches]
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
    generator = generator_for(seed, "measure memory")
    with_memory, overshoot, without, held, nll, levels = [], [], [], [], [], []
    for batch, anchor in zip(train_set, even_anchors(train_set, seed)):
        stages = make_stages(anchor, batch.maskable, memory, generator)
        stages = with_prefixes(model, batch, stages, memory)
        fast = init_fast(model, memory, memory.sets(len(batch.x0)), generator)
        fast, inner = inner_loop(model, batch, stages, fast, memory)
        overshoot += (stage_loss(model, batch, stages[-1], fast, memory) > inner[-1]).tolist()
        h = prefix(model, batch, anchor.masked, memory)
        start = memory.first_layer(len(model.layers))
        with_memory.append(denoising_loss(model, batch, anchor, h, start, fast).item())
    for batch, anchor in zip(train_set * repeats, even_anchors(train_set * repeats, seed)):
        without.append(mdlm_loss(model, batch, anchor).item())
    for batch, anchor in zip(held_out, even_anchors(held_out, seed)):
        h = model.run(embed(model, batch.x0, anchor.masked), 0, None, batch.attention_mask)
        held.append(denoising_loss(model, batch, anchor, h, len(model.layers)).item())
        nll.append(token_nll(model, h[anchor.masked], batch.x0[anchor.masked]))
        levels.append(anchor.t[anchor.masked.nonzero()[:, 0]])
    trained, kept = ([int(b.maskable.sum()) for b in part] for part in (train_set, held_out))
    means = [np.average(with_memory, weights=trained)]
    means.append(np.average(without, weights=trained * repeats))
    means.append(np.average(held, weights=kept))
    nll, bins = torch.cat(nll), (torch.cat(levels) * T_BINS).long()
    by_t = [finite(nll[bins == i].mean().item()) for i in range(T_BINS)]
    losses = {key: finite(float(mean)) for key, mean in zip(LOSSES, means)}
    return losses | {"overshoot": float(np.mean(overshoot)), "eval_by_t": by_t}


# ---- the --tiny experiment, and the folder of a run ------------------------------------------


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


def pretrain(args: argparse.Namespace, seed: int, folder: Path, device: str) -> Transformer:
    """The base: MDLM on fresh documents, short ones first, without a memory and without noise."""
    config, generator = Config(data.VOCAB_SIZE, data.MASK), torch.Generator().manual_seed(seed)
    model = init_weights(Transformer(config), generator).to(device)
    steps, rows, path = args.pretrain_steps, args.pretrain_batch, folder / "base.safetensors"

    def losses_at(step: int) -> list[Tensor]:
        length = args.length * 2 // 3 if step < steps // 2 else args.length
        questions = 3 if step < steps * 0.6 else 1
        batch = data.pretraining_batch(seed, step, rows, length, questions, 0.3, device)
        return [keyed_loss(model, "base", batch, Memory(), "token", seed, "pretrain", step)]

    names = ("length", "pretrain_steps", "pretrain_batch", "pretrain_lr")
    identity = {name: getattr(args, name) for name in names}
    identity |= {"seed": seed, "model": asdict(config)}
    if args.bases and not path.exists():
        source = Path(args.bases) / folder.name / path.name
        tensors, meta = load_checkpoint(source)
        check_identity(source, meta, identity)
        save_checkpoint(path, tensors, meta)
    rate_at = plateau_rate(args.pretrain_lr, steps, warmup=0.03, decay=0.3)
    train(model, Phase("base", steps, rate_at, losses_at, 1.0, identity), folder, args.save_every)
    return model


def fine_tune(args, model, name: str, seed: int, draw: int, folder: Path, device: str) -> None:
    """Trains the model as the arm `name` says. All arms of a draw see the same pairs, in the same
    batches, under the same noise."""
    (method, rate), memory = arms(vars(args))[name], memory_of(vars(args))
    pairs = tiny_pairs(vars(args), seed, draw, args.noise)
    size, collate = min(args.batch, len(pairs)), partial(data.collate, device=device)
    together = size if memory.scope == "batch" else len(pairs)  # then a batch shares a memory
    parts = [pairs[start : start + together] for start in range(0, len(pairs), together)]
    measured = [collate(part) for part in parts], [collate(tiny_pairs(vars(args), seed, None))]

    def losses_at(step: int) -> list[Tensor]:
        rng = np.random.default_rng([seed, draw, step])
        batch = collate([pairs[i] for i in rng.choice(len(pairs), size, replace=False)])
        key = (seed, draw, "fine-tune", step)
        return [keyed_loss(model, method, batch, memory, args.loss_norm, *key)]

    def log_at(step: int) -> list[dict]:
        if step % max(1, args.steps // 2) and step != args.steps:
            return []
        losses = measure_losses(model, *measured, memory, seed, repeats=4)
        return [{"method": name, "lr": rate, "step": step, **losses, "seed": seed, "draw": draw}]

    identity = {key: value for key, value in settings(args).items() if key not in SEVERAL}
    identity |= {"seed": seed, "draw": draw, "method": method, "lr": rate}
    identity["pairs"] = zlib.crc32(repr(pairs).encode())
    rate_at = plateau_rate(rate, args.steps, args.warmup, decay=1 - args.warmup)
    phase = Phase(name, args.steps, rate_at, losses_at, args.clip, identity, log_at)
    train(model, phase, folder, args.save_every)


def run_tiny(args: argparse.Namespace) -> None:
    """For each seed a base, and for each of its draws all arms, into OUT/seed<S>/draw<D>/."""
    out, device = Path(args.out), pick_device(args.device)
    names = [f"{rate:g}" for rate in (*args.control_lr, args.lr)]
    if len(set(names)) < len(names) or not all(0 < rate < args.lr for rate in args.control_lr):
        raise UserError("--control-lr: give different rates above 0 and below --lr, or none.")
    start_run(out, settings(args), args.resume)
    for seed in range(args.seed, args.seed + args.seeds):
        folder = out / f"seed{seed}"
        base = pretrain(args, seed, folder, device)
        for draw in range(args.draws):
            for name in arms(vars(args)):
                model = copy.deepcopy(base)
                fine_tune(args, model, name, seed, draw, folder / f"draw{draw}", device)


# What says how many models a run has. It decides nothing about any one of them, so a checkpoint's
# identity leaves it out.
SEVERAL = ("seeds", "draws", "control_lr")


def settings(args: argparse.Namespace) -> dict:
    """Every flag that decides the numbers. Where the run lies and how often it saves do not."""
    elsewhere = ("out", "resume", "bases", "save_every", "device")
    return {name: value for name, value in sorted(vars(args).items()) if name not in elsewhere}


def memory_of(config: dict) -> Memory:
    """The inner loop's settings out of a run's settings: memory_rank is Memory's rank."""
    flags = {field.name: f"memory_{field.name}" for field in fields(Memory)}
    flags["start_scale"] = "start_scale"
    # A run of an earlier version does not name the newest of them.
    return Memory(**{name: config[flag] for name, flag in flags.items() if flag in config})


def start_run(out: Path, wanted: dict, resume: bool) -> None:
    """Notes the run's settings in out/config.json. A folder with checkpoints is continued only by
    --resume and with the same settings, so that old weights never get new settings."""
    if not resume and any(out.rglob("*.safetensors")):
        raise UserError(f"--out {out} holds a run: add --resume, or name another folder.")
    known = read_config(out, wanted["dial"]) if resume else wanted
    for name, value in wanted.items():
        if known.get(name) != value:
            asked = f"--{name.replace('_', '-')} {known.get(name)}, not {value}"
            raise UserError(f"--resume: the run in {out} was started with {asked}.")
    write_json(out / "config.json", wanted)


def read_config(out: Path, dial: str = "tiny") -> dict:
    """A run's settings. dial: "tiny" or "backbone", what kind of run it must be."""
    if not (out / "config.json").exists():
        raise UserError(f"there is no run in {out} (no config.json): train one with memdlm.py.")
    config = read_json(out / "config.json")
    needed = {"seed", "start_scale"} | ({"control_lr", "wording"} if dial == "tiny" else set())
    if config.get("dial") != dial or not needed <= config.keys():
        raise UserError(f"{out}/config.json is not that of a run of --{dial}.")
    return config


def open_run(out: Path, seed: int, draw: int, name: str, device: str) -> tuple[Transformer, dict]:
    """A model of a --tiny run, in eval mode, and its meta. Refuses one trained otherwise than the
    folder's settings say. name: base, which all draws of a seed share, or one of `arms`."""
    config, wanted, folder = read_config(out), {"seed": seed}, out / f"seed{seed}"
    if name != "base":
        wanted |= {"draw": draw, "lr": arms(config)[name][1]}
        folder /= f"draw{draw}"
    path = folder / f"{name}.safetensors"
    model, meta = load_model(path, device)
    known = {key: config[key] for key in meta["identity"] if key in config}
    check_identity(path, meta, known | wanted)
    return model, meta


def machine(device: str, dtype: str = "float32") -> dict:
    """Where numbers come from, to be quoted beside them."""
    name, threads = device, torch.get_num_threads()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {"device": name, "dtype": dtype, "torch": torch.__version__, "threads": threads}


def peak_memory(device: str) -> float:
    """GiB: the process's largest resident size, or on a GPU the most that torch had allocated."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ---- command line ----------------------------------------------------------------------------

# What `--tiny` changes of the paper's settings, for a small model on a small set.
TINY_SETTINGS = {"steps": 150, "batch": 8, "lr": 5e-4, "memory_rank": 8, "memory_alpha": 16.0}
TINY_SETTINGS |= {"memory_lr": 0.7, "memory_fraction": 0.5, "memory_scope": "sample"}


def run_flags(flag: Callable) -> None:
    """How a run goes."""
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    flag("--device", choices=data.DEVICES, default="auto", help="where to compute")
    flag("--seed", type=whole(0, 2**32 - 1), default=0, help="of data, noise and new weights")


def loop_flags(flag: Callable) -> None:
    """Both loops. The paper's values (Sec. 4.1) are the defaults, and stand in brackets."""
    flag("--steps", type=whole(0), default=0, help="fine-tuning steps [5 epochs]")
    flag("--batch", type=whole(1), default=2, help="pairs computed at once [2]")
    flag("--lr", type=real(0), default=2e-5, help="peak learning rate [2e-5]")
    flag("--warmup", type=real(0, 1), default=0.1, help="share of warm-up steps [0.1]")
    flag("--clip", type=real(0), default=1.0, help="norm of theta's gradient, 0 = off [1.0]")
    flag("--loss-norm", choices=NORMS, default="token", help="what the loss is a mean over [token]")
    flag("--memory-rank", type=whole(1), default=32, help="rank of phi [32]")
    flag("--memory-alpha", type=real(0), default=64.0, help="alpha of phi [64]")
    flag("--memory-lr", type=real(0), default=0.1, help="eta, step size of the inner loop [0.1]")
    flag("--memory-clip", type=real(0), default=1.0, help="norm of each gradient, 0 = off [1.0]")
    flag("--memory-fraction", type=real(0.01, 1), default=0.1, help="last layers adapted [0.1]")
    flag("--memory-scope", choices=SCOPES, default="batch", help="who shares a set of phi [batch]")
    flag("--memory-steps", type=whole(1), default=2, help="K, its stages [2, Fig. 11]")
    flag("--memory-epochs", type=whole(1), default=1, help="passes through the stages [1]")
    flag("--memory-strategy", choices=STRATEGIES, default="consistent", help="[Figs. 9 and 10]")
    flag("--memory-loss", choices=INNER_LOSSES, default="ce", help="what is learnt [ce, Fig. 6]")
    flag("--memory-targets", choices=TARGETS, default="all", help="and where [all, Sec. 4.6]")
    flag("--memory-places", choices=PLACES, default="ffn", help="matrices adapted [ffn, Fig. 7]")
    flag("--memory-form", choices=FORMS, default="lora", help="thin or full [lora, Fig. 7]")
    flag("--memory-clip-by", choices=CLIPS, default="tensor", help="whose norm [tensor]")
    flag("--start-scale", type=real(1), default=1.5, help="s of the pre-anchor [1.5]")


def build_parser() -> Parser:
    """The flags of --tiny."""
    parser = Parser("Trains Standard MDLM and MemDLM. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    what = "pretrain a small base, fine-tune it by both methods, compare (or: --backbone NAME)"
    flag("--tiny", action="store_true", required=True, help=what)
    flag("--out", default="runs/tiny", help="folder for everything that is written")
    flag("--seeds", type=whole(1), default=1, help="how many seeds to run, from --seed on")
    flag("--draws", type=whole(1), default=3, help="fine-tuning sets for each of their bases")
    lower = "lower rates at which Standard MDLM is fine-tuned, too: its control"
    flag("--control-lr", type=real(0), nargs="*", default=[8e-5], help=lower)
    flag("--bases", help="folder of a run whose finished bases are used")
    flag("--examples", type=whole(4), default=32, help="size of the fine-tuning set, by 4 tasks")
    flag("--noise", type=real(0, 1), default=0.5, help="share of its answer words made random")
    new = "in the words of pretraining, or in new ones: a skill that must be learnt"
    flag("--wording", choices=data.WORDINGS, default="old", help=f"questions {new}")
    flag("--length", type=whole(64, 1024), default=96, help="tokens of a pretraining example, 1x")
    flag("--stretch", type=whole(1, 16), default=3, help="a fine-tuning example is so many x long")
    flag("--pretrain-steps", type=whole(1), default=2400, help="steps of the base")
    flag("--pretrain-batch", type=whole(4), default=64, help="sequences in each, 4 tasks")
    flag("--pretrain-lr", type=real(0), default=4e-3, help="peak learning rate of the base")
    flag("--student", help="a file whose functions replace the method's: exercises/README.md")
    run_flags(flag)
    loop_flags(flag)
    parser.set_defaults(dial="tiny", **TINY_SETTINGS)
    return parser


def run(arguments: list[str]) -> None:
    """Trains, then hands its folder to the evaluation."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.student:
        unread = ("memory_loss", "memory_clip_by", "loss_norm")
        parser.refuse(args, unread, "is a variant, which the course's functions do not know")
        if importlib.util.find_spec("exercises") is None:
            raise UserError("--student needs the folder exercises/, which is not here.")
        plug = importlib.import_module("exercises.plug")
        args.student = plug.plug_for_training(Path(args.student))  # what says whose code it was
    run_tiny(args)
    import eval_niah  # the one import that goes up

    eval_niah.run(["--run", args.out, "--device", args.device])


def main(arguments: list[str] | None = None) -> None:
    data.start(run, "finetune", arguments)


if __name__ == "__main__":
    main()
