"""
cache.py: `--cache`: answers to long prompts for the cost of a block a pass, not of the context.

A bidirectional model has no exact cache: a token that is committed changes the keys and values of
all positions from the second layer on, the prompt's included. Fast-dLLM found that they change
little while one block is decoded. So the first pass of each block is the exact one, over the whole
canvas, and keeps the keys and values of every layer; the later passes of that block compute a
*window* of the canvas alone, whose queries read the kept keys and values of all the rest.

  variant  | the window                          | stale within a block
  prefix   | the block and all that is behind it | prompt and earlier blocks
  dual     | the block alone                     | the masked places behind it, too

Under LLaDA2's block-causal attention a block never sees what is behind it: the keys and values of
a block that is finished stay as they are, both variants are one, and the answers are exact.

Reading list: Fast-dLLM, Wu et al. 2025, arXiv 2505.22618. E channels of a head, as in model.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Fast, Transformer, UserError, attention_bias, rotary_angles

VARIANTS = ("dual", "prefix")
UNCACHED = "is not for --cfg-scale: its two passes differ everywhere."


class CachedLogits:
    """`generate`'s predict=, made anew for each answer: the logits (M, V) of `guided_logits`, of
    which all but the first call of a block are approximate.

    grid: the block size of a block-causal model, whose finished blocks are computed once for all;
    None where attention is full, so that each block begins with a pass over everything.
    """

    def __init__(self, variant: str = "dual", grid: int | None = None):
        self.variant, self.grid = variant, grid
        self.start = self.stop = 0  # the block in work: its places in the canvas
        self.kept: dict[str, Tensor] = {}  # keys and values (B, kv_heads, T, E) by layer

    def __call__(self, model, canvas, given, fast, cfg_scale, attention_mask, at) -> Tensor:
        if cfg_scale:
            raise UserError(f"--cache {UNCACHED}")
        start, stop = self.window(at)
        h = self.run(model, canvas, start, stop, attention_mask, fast)
        return model.head(h[at[:, start:stop]]).float()

    def window(self, at: Tensor) -> tuple[int, int]:
        """The positions to compute: start, ..., stop - 1. at (B, T) bool: what is asked for, which
        lies in one block. Where that is a new one: everything, or on a grid the last two blocks."""
        length, asked = at.shape[1], at.any(0).nonzero()[:, 0]
        first, last = int(asked[0]), int(asked[-1])
        if self.start <= first and last < self.stop:
            return self.start, length if self.variant == "prefix" else self.stop
        start = 0
        if self.grid:  # the block before has had a commit since its last pass: it is done again,
            start, first = self.start, length - self.grid  # and the new one may begin in the prompt
        self.start, self.stop = first, last + 1
        return start, length

    def run(
        self, model: Transformer, canvas, start: int, stop: int, attention_mask, fast
    ) -> Tensor:
        """All layers on the window, h (B, stop - start, D), with keys and values from the cache."""
        config, h = model.config, model.embedding(canvas[:, start:stop])
        turned = int(config.head_dim * config.rotary_fraction)
        angles = rotary_angles(canvas.shape[1], turned, config.rope_base, h)
        rotary = [part[start:stop] for part in angles]
        bias, seen = attention_bias(attention_mask, h.dtype), None  # seen: 0 where padding is
        if attention_mask is not None and attention_mask.dim() == 2:
            seen = attention_mask[:, start:stop, None].to(h.dtype)
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, start:stop]
        for i, layer in enumerate(model.layers):
            h = self.layer(layer, h, start, rotary, bias, seen, fast, f"layers.{i}")
        return h

    def layer(self, layer, h: Tensor, start: int, rotary, bias, seen, fast: Fast | None, name: str):
        """`Layer.forward` on a window: h (B, W, D) -> (B, W, D)."""
        if layer.canon is not None:  # a `--tiny` model: neighbours beyond the window are kept, too
            n = layer.canon.norm(h) if seen is None else layer.canon.norm(h) * seen
            n = self.keep(f"{name}.canon", n, start).transpose(1, 2)
            mixed = F.conv1d(n, layer.canon.taps, padding="same", groups=n.shape[1])
            h = h + mixed.transpose(1, 2)[:, start : start + h.shape[1]]
        attention, place = layer.attention, f"{name}.attention"
        q, k, v = attention.project(layer.attention_norm(h), rotary, fast, place)
        k, v = self.keep(f"{name}.k", k, start), self.keep(f"{name}.v", v, start)
        h = h + attention.attend(q, k, v, bias, fast, place)
        return h + layer.mlp(layer.mlp_norm(h), fast, f"{name}.mlp")

    def keep(self, name: str, new: Tensor, start: int) -> Tensor:
        """Puts what the window has computed (..., W, E) to the rest; returns all of it."""
        kept, stop = self.kept.get(name), start + new.shape[-2]
        if kept is None:
            kept = new.contiguous()
        elif stop > kept.shape[-2]:  # LLaDA2's canvas grows by a block
            kept = torch.cat([kept[..., :start, :], new], dim=-2)
        else:
            kept[..., start:stop, :] = new
        self.kept[name] = kept
        return kept


def cached(sampler: Callable, variant: str, grid: int | None = None) -> Callable[..., Tensor]:
    """The sampler with a cache of its own for each answer."""

    def answer(model: Transformer, prompts: Tensor, **options) -> Tensor:
        return sampler(model, prompts, predict=CachedLogits(variant, grid), **options)

    return answer
