"""
model.py: the denoiser p_theta(x0 | x_t), one bidirectional transformer, and the two kinds of LoRA that MemDLM puts on it.

A masked diffusion language model is a BERT-like network: it sees the whole sequence, masked in places, and predicts the
clean token at every masked place. There is no causal mask and no time input: the number of masks tells the noise level.
The same class is the `--tiny` model and, with other sizes and switches in `Config`, LLaDA-8B, LLaDA-MoE and LLaDA2.1: read
down to `Transformer`; below are the published checkpoints (`load_llada`), PEFT's adapters, and the files of a run.

Reading list
  MemDLM        Pei et al. 2026, arXiv 2603.22241 (sections and equations cited below are this paper's)
  LLaDA         Nie et al. 2025, arXiv 2502.09992: masked diffusion at 8B
  LoRA          Hu et al. 2021, arXiv 2106.09685
  RoPE          Su et al. 2021, arXiv 2104.09864
  RMSNorm, SwiGLU, GQA   arXiv 1910.07467, 2002.05202, 2305.13245
  Mixture of experts     Shazeer et al. 2017, arXiv 1701.06538; grouped sigmoid routing: DeepSeek-V3, arXiv 2412.19437
  NF4                    QLoRA, Dettmers et al. 2023, arXiv 2305.14314
  Canon layer   Allen-Zhu 2025: a short convolution beside attention, which small models need to find "the token after"

Glossary
  paper      | name here            | shape
  x_t        | ids                  | (B, T) token ids, some of them [MASK]
  theta      | model.parameters()   | all weights, or the outer LoRA alone on a frozen backbone
  phi        | fast                 | Fast: per adapted matrix A (N, r, in), B (N, out, r), N sets; experts (N, X, ., .)
  alpha / r  | scale, fast.scale    | float, factor of B A x
  -          | h                    | (B, T, D) hidden states; V vocabulary, D hidden, H heads, K key/value heads, E head_dim
  -          | attention_mask       | (B, T) 1 = real token, 0 = padding; or (B, 1, T, T), bool, or float to be added to scores
  -          | experts              | X feed-forward networks in one stack of weights (X, out, in); each token goes to k of them
  -          | routes               | Routes: which of the M = B T k rows (token, expert) lie where, sorted by expert
  -          | owner                | (B T,) which of the N sets of phi a token uses
  -          | dropped, inner       | what the outer LoRA reads instead of x (dropout), and its A x (..., r)

Who owns what: this file holds no training logic and no state between calls. The fast weights come in as an argument
(`fast=None` is the plain model) and never become parameters, so that forgetting them is letting go of a dictionary.
"""

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""


@dataclass
class Config:
    """Sizes and switches of the transformer. The defaults are the `--tiny` model's."""

    vocab_size: int
    mask_id: int | None = None  # the token that corruption writes; a checkpoint without it gets it from its tokenizer
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4  # fewer than heads: grouped-query attention
    head_dim: int = 16
    ffn: int = 128  # of the dense feed-forward networks
    rope_base: float = 10_000.0
    rotary_fraction: float = 0.5  # share of each head's channels that RoPE turns; LLaDA: 1.0
    qk_norm: bool = False  # RMSNorm per head on queries and keys (LLaDA-MoE)
    norm_eps: float = 1e-5
    canon: int = 7  # taps of the convolution before attention; 0 = none, as in the LLaDA backbones
    architecture: str = "tiny"  # or a key of ARCHITECTURES: how the published checkpoint names things
    fused_qkv: bool = False  # one matrix for queries, keys and values (LLaDA2)
    moe_layers: tuple[int, ...] = ()  # layers whose feed-forward network is a mixture of experts
    experts: int = 0  # X
    experts_per_token: int = 0  # k
    expert_ffn: int = 0
    shared_ffn: int = 0  # a feed-forward network beside the experts that every token takes; 0 = none
    router: str = "softmax"  # a key of ROUTERS
    router_bias: bool = False  # a bias per expert, added to the scores
    router_groups: int = 1
    router_groups_kept: int = 1
    routed_scale: float = 1.0  # factor of the routing weights


class Fast(NamedTuple):
    """phi, the Parametric Memory (Sec. 3): plain tensors, made for one batch or one prompt and then dropped.

    weights: name of the adapted matrix, e.g. "layers.2.mlp.gate" -> (A (N, r, in), B (N, out, r)); for a stack of experts,
             "layers.2.mlp.experts.gate" -> (A (N, X, r, in), B (N, X, out, r)).
    scale:   alpha / r. The adapted matrix computes W x + scale * B A x.

    There are N sets, and N divides the number of rows: row i of a batch of `rows` uses set i // (rows / N). N = 1 is one
    set for the whole batch, as published; N = rows one per sample; in between, several windows of a text share one.
    """

    weights: dict[str, tuple[Tensor, Tensor]]
    scale: float

    def sets(self) -> int:
        return len(next(iter(self.weights.values()))[0])


# ---- linear layers: plain, stacked per expert, with outer LoRA, with fast weights, in 4 bits ------------------------------


class Routes(NamedTuple):
    """Where the M = B T k rows of a mixture lie once they are sorted by expert, and within an expert by set of phi."""

    token: Tensor  # (M,) which of the B T tokens a row is
    place: Tensor  # (M,) where row (token, choice) has gone: undoes the sorting
    ends: Tensor  # (X,) int32: expert x owns the rows ends[x - 1] .. ends[x]
    set_ends: Tensor  # (X N,) int32: the same per expert and set


def loop_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Expert by expert, to be read: rows x (M, in) sorted by expert, weight (X, out, in) -> (M, out). Any device and dtype."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ matrix.mT for rows, matrix in zip(x.split(counts), weight.unbind(0))])


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same in one kernel."""
    return F.grouped_mm(x, weight.mT, offs=ends)


def pick_matmul(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel where torch has it for this dtype and device, and every row is a multiple of 16 bytes; else the loop."""
    dtypes = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    there = hasattr(F, "grouped_mm") and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0))
    return grouped_matmul if there and aligned and x.dtype in dtypes and len(x) else loop_matmul


def matmul(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out); or sorted rows x (M, in), weight (X, out, in) and `ends` -> (M, out)."""
    return F.linear(x, weight) if ends is None else pick_matmul(x, weight)(x, weight, ends)


class QuantizedMatmul(torch.autograd.Function):
    """`matmul` with a frozen NF4 matrix that is unpacked for the forward and again for the backward, never kept between."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "Linear", ends: Tensor | None) -> Tensor:
        ctx.layer, ctx.ends = layer, ends
        return matmul(x, layer.unpacked(x.dtype), ends)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return matmul(grad, ctx.layer.unpacked(grad.dtype).mT, ctx.ends), None, None


class Linear(nn.Module):
    """W x, plus the outer LoRA if there is one, plus the fast weights if they are passed in. No bias.

    With `experts`, a stack of X matrices: the rows of x come sorted by expert, as `routes` says.
    """

    def __init__(self, inputs: int, outputs: int, experts: int = 0):
        super().__init__()
        self.stack = (experts,) if experts else ()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(*self.stack, outputs, inputs))
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale, self.lora_dropout = 0.0, 0.0
        self.quantized = None  # bitsandbytes' (packed, state) in place of the weight

    def add_lora(self, rank: int, alpha: float, dropout: float, generator: torch.Generator | None = None) -> None:
        """Outer LoRA, trainable (Sec. 4.1: r = 32, alpha = 64, dropout 0.05). B = 0: the model is unchanged at first.

        Beside a bfloat16 or 4-bit weight it is kept in float32, in which a step of 2e-5 is not rounded away.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32) if self.weight.is_floating_point() else torch.float32
        A = kaiming_uniform(torch.empty(*self.stack, rank, self.in_features, dtype=dtype), generator)  # drawn on the CPU
        self.lora_A = nn.Parameter(A.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(*self.stack, self.out_features, rank, dtype=dtype, device=self.weight.device))
        self.lora_scale, self.lora_dropout = alpha / rank, dropout

    def quantize(self, weight: Tensor) -> None:
        """Keeps `weight` as NF4 with double quantization (QLoRA): 4.127 bits a number, frozen.

        As one row: on a CPU, bitsandbytes 0.50 unpacks rows wrongly whose length is no multiple of its blocks of 64.
        """
        from bitsandbytes.functional import quantize_4bit

        self.quantized = quantize_4bit(weight.flatten(), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(self.quantized[0], requires_grad=False)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight as numbers again."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*self.quantized).view(*self.stack, self.out_features, self.in_features).to(dtype)

    def forward(
        self,
        x: Tensor,
        fast: Fast | None = None,
        name: str = "",
        routes: Routes | None = None,
        inner: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, in), or with `routes` (M, in), -> (..., out). `name` is where to look in `fast`; inner (..., r): the outer
        LoRA's A x where `lora_inner` has made it already."""
        ends = routes.ends if routes and self.stack else None
        y = QuantizedMatmul.apply(x, self, ends) if self.quantized else matmul(x, self.weight, ends)
        if self.lora_A is not None:
            if inner is None:
                (inner,) = lora_inner([self], lora_input(x, self), ends)
            y += matmul(self.lora_scale * inner, self.lora_B.to(x.dtype), ends)
        if fast is None or name not in fast.weights:
            return y
        A, B = (part.to(x.dtype) for part in fast.weights[name])  # (N, r, in), (N, out, r)
        if routes is None:
            rows = x.reshape(len(A), -1, x.shape[-1])  # (N, rows / N * T, in): each set meets its own rows
            return torch.baddbmm(y.reshape(len(A), -1, y.shape[-1]), rows @ A.mT, B.mT, alpha=fast.scale).view_as(y)
        if self.stack:
            A, B = (part.transpose(0, 1).flatten(0, 1) for part in (A, B))  # (N, X, ., .) -> (X N, ., .), the rows' order
        return y + matmul(fast.scale * matmul(x, A, routes.set_ends), B, routes.set_ends)


def lora_input(x: Tensor, layer: Linear) -> Tensor:
    """What the outer LoRA reads instead of x: dropout while training.

    On a CPU from 16 random bits a number, p rounded to 1 / 65536: torch draws a float for each, which there takes as long
    as the LoRA's matrices do.
    """
    p, training = layer.lora_dropout, layer.training
    if p == 0 or not training or x.device.type != "cpu":
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view_as(x) >= round(p * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - p)


def lora_inner(layers: Sequence[Linear], dropped: Tensor, ends: Tensor | None = None) -> list[Tensor | None]:
    """The outer LoRA's A x (..., r) of several matrices that read the same x, in one product (None without a LoRA).

    They share one dropout, where PEFT draws for each: less to compute and to keep.
    """
    if any(layer.lora_A is None for layer in layers):
        return [None] * len(layers)
    stacked = torch.cat([layer.lora_A for layer in layers], dim=-2).to(dropped.dtype)
    return list(matmul(dropped, stacked, ends).split([layer.lora_A.shape[-2] for layer in layers], -1))


def kaiming_uniform(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming-uniform with a = sqrt(5): LoRA's start for A. In place, on (..., in)."""
    bound = 1 / math.sqrt(weight.shape[-1])
    return weight.uniform_(-bound, bound, generator=generator)


class RMSNorm(nn.Module):
    """x / rms(x) * g over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Canon(nn.Module):
    """h <- h + depthwise convolution of norm(h) over neighbouring positions: lets a token know the words around it.

    Attention finds "the number after the key" by matching a token that already carries its neighbours; with this layer
    a token does so from the first layer on.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.taps = nn.Parameter(torch.zeros(config.hidden, 1, config.canon))

    def forward(self, h: Tensor, attention_mask: Tensor | None) -> Tensor:
        n = self.norm(h)
        if attention_mask is not None and attention_mask.dim() == 2:
            n = n * attention_mask[..., None].to(n.dtype)  # padding must not leak through the convolution
        n = n.transpose(1, 2)  # (B, D, T), as conv1d wants it
        return h + F.conv1d(n, self.taps, padding="same", groups=n.shape[1]).transpose(1, 2)


def rotary_angles(length: int, channels: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2j / channels), each (T, channels / 2), at least in float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = base ** (-torch.arange(0, channels, 2, dtype=dtype, device=like.device) / channels)
    angles = torch.arange(length, dtype=dtype, device=like.device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (B, H, T, E): turns channel j together with channel j + half, the first 2 * half channels only."""
    cos, sin = rotary  # (T, half)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Bidirectional multi-head attention with RoPE, grouped key/value heads and optional per-head q/k norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.sizes = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        if config.fused_qkv:
            self.qkv = Linear(config.hidden, sum(self.sizes))
        else:
            self.q, self.k, self.v = (Linear(config.hidden, size) for size in self.sizes)
        self.o = Linear(config.heads * config.head_dim, config.hidden)
        norm = (lambda: RMSNorm(config.head_dim, config.norm_eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).split(self.sizes, -1)
        else:
            layers = (self.q, self.k, self.v)
            q, k, v = (layer(x, inner=part) for layer, part in zip(layers, lora_inner(layers, lora_input(x, self.q))))
        split = (batch, length, -1, self.head_dim)
        q = self.q_norm(q.view(split)).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(k.view(split)).transpose(1, 2)  # (B, K, T, E)
        v = v.view(split).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, attn_mask=bias, enable_gqa=grouped)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), the feed-forward network: the only place where the fast weights live (Sec. 4.1)."""

    def __init__(self, hidden: int, ffn: int, experts: int = 0):
        super().__init__()
        self.gate = Linear(hidden, ffn, experts)
        self.up = Linear(hidden, ffn, experts)
        self.down = Linear(ffn, hidden, experts)

    def forward(
        self, x: Tensor, fast: Fast | None, name: str, routes: Routes | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        dropped = lora_input(x, self.gate) if dropped is None else dropped
        inner = lora_inner((self.gate, self.up), dropped, routes.ends if routes and self.gate.stack else None)
        gate, up = self.gate(x, fast, f"{name}.gate", routes, inner[0]), self.up(x, fast, f"{name}.up", routes, inner[1])
        return self.down(F.silu(gate) * up, fast, f"{name}.down", routes)


def softmax_router(scores: Tensor, bias: Tensor | None, config: Config) -> tuple[Tensor, Tensor]:
    """LLaDA-MoE: scores (B T, X) -> weights and indices (B T, k) of the k most probable experts, not renormalised.

    The published code adds a bias, where there is one, to the probabilities, and mixes with the biased values.
    """
    probability = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return (probability if bias is None else probability + bias).topk(config.experts_per_token, sorted=False)


def sigmoid_router(scores: Tensor, bias: Tensor | None, config: Config) -> tuple[Tensor, Tensor]:
    """LLaDA2: the bias takes part in the choice only. A group of experts is as good as the sum of its two best; the k best
    experts of the groups kept are chosen; their weights add up to `routed_scale`."""
    probability = scores.sigmoid()  # (B T, X), float32 as its router is
    value = probability if bias is None else probability + bias
    groups = value.unflatten(-1, (config.router_groups, -1))  # (B T, groups, X / groups)
    worth = groups.topk(min(2, groups.shape[-1]), dim=-1)[0].sum(-1)  # (B T, groups)
    kept = worth.topk(config.router_groups_kept, dim=-1)[1]  # (B T, groups kept)
    closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
    chosen = groups.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(config.experts_per_token, sorted=False)[1]
    weights = probability.gather(1, chosen)
    return config.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


ROUTERS = {"softmax": softmax_router, "sigmoid": sigmoid_router}


class Mixture(nn.Module):
    """Mixture of experts: each token goes to the k experts its router chooses, and to the shared one if there is one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.router = Linear(config.hidden, config.experts)
        self.register_buffer("router_bias", torch.zeros(config.experts) if config.router_bias else None)
        self.experts = SwiGLU(config.hidden, config.expert_ffn, config.experts)
        self.shared = SwiGLU(config.hidden, config.shared_ffn) if config.shared_ffn else None

    def forward(self, h: Tensor, fast: Fast | None, name: str, owner: Tensor | None = None) -> Tensor:
        """h (B, T, D) -> (B, T, D). For a choice of tokens (1, B T, D), owner (B T,) says which set of phi each one uses."""
        x, sets, by_set = h.flatten(0, 1), fast.sets() if fast else 1, None  # (B T, D)
        if owner is None:
            owner = torch.arange(len(x), device=x.device) * sets // len(x)
        elif sets > 1:  # the shared expert's rows are no longer the same number for each set
            by_set = sort_by_expert(torch.zeros_like(owner)[:, None], 1, owner, sets)
        dropped = lora_input(x, self.experts.gate)  # shared by router and experts
        if self.config.router == "sigmoid":
            scores = self.router(x.to(self.router.weight.dtype))  # in float32, without LoRA
        else:
            scores = self.router(x, inner=lora_inner([self.router], dropped)[0])
        weights, chosen = ROUTERS[self.config.router](scores, self.router_bias, self.config)  # (B T, k) each
        routes = sort_by_expert(chosen, self.config.experts, owner, sets)
        rows = x.index_select(0, routes.token)  # (M, D)
        dropped = rows if dropped is x else dropped.index_select(0, routes.token)
        y = self.experts(rows, fast, f"{name}.experts", routes, dropped)  # (M, D)
        y = y.index_select(0, routes.place).view(*chosen.shape, x.shape[-1])  # (B T, k, D), back in the tokens' order
        y = torch.bmm(weights.to(y.dtype)[:, None], y).view_as(h)
        return y if self.shared is None else y + self.shared(x, fast, f"{name}.shared", by_set).view_as(h)


def sort_by_expert(chosen: Tensor, experts: int, owner: Tensor, sets: int) -> Routes:
    """chosen (B T, k) expert indices; owner (B T,): which of the N = `sets` sets of phi a token uses."""
    key = (chosen * sets + owner[:, None]).flatten()  # (M,)
    order = key.argsort(stable=True)
    set_ends = torch.bincount(key, minlength=experts * sets).cumsum(0).int()  # (X N,)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return Routes(order // chosen.shape[1], place, set_ends[sets - 1 :: sets].contiguous(), set_ends)


class Layer(nn.Module):
    """Two residual halves: `mix` moves information between positions, `feed` works on each position alone.

    h += canon(norm(h)), where the config has it; h += attention(norm(h)); then h += mlp(norm(h)).
    """

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.canon = Canon(config) if config.canon else None
        self.attention_norm, self.attention = RMSNorm(config.hidden, config.norm_eps), Attention(config)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = Mixture(config) if index in config.moe_layers else SwiGLU(config.hidden, config.ffn)

    def mix(self, h: Tensor, rotary: tuple[Tensor, Tensor], attention_mask: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.canon is not None:
            h = self.canon(h, attention_mask)
        return h + self.attention(self.attention_norm(h), rotary, bias)

    def feed(self, h: Tensor, fast: Fast | None, name: str, *owner: Tensor) -> Tensor:
        return h + self.mlp(self.mlp_norm(h), fast, f"{name}.mlp", *owner)


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V) for every position at once.

    `forward` is embed -> layers -> head. Training cuts it into these three, because the fast weights touch the last
    feed-forward networks only: the prefix h = run(embed(ids), 0, cut) of one x_t serves several suffixes
    read(h, cut, masked), which end in the masked rows alone, and the head is applied to these.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each half layer in the backward instead of keeping its activations
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.output = Linear(config.hidden, config.vocab_size)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, fast: Fast | None = None) -> Tensor:
        """ids (B, T), attention_mask (B, T) or (B, 1, T, T) or None -> logits (B, T, V)."""
        h = self.run(self.embedding(ids), 0, self.config.layers, attention_mask, fast)
        return self.head(h)

    def run(
        self, h: Tensor, start: float, stop: float, attention_mask: Tensor | None = None, fast: Fast | None = None
    ) -> Tensor:
        """The stack from `start` to `stop`, counted in layers, on h (B, T, D). 1.5 is behind the attention of
        layer 1 and before its feed-forward."""
        config = self.config
        rotary = rotary_angles(h.shape[1], int(config.head_dim * config.rotary_fraction), config.rope_base, h)
        bias = attention_bias(attention_mask, h.dtype)
        for i, layer in enumerate(self.layers):
            if start <= i < stop:
                h = self.half(layer.mix, h, rotary, attention_mask, bias)
            if start <= i + 0.5 < stop:
                h = self.half(layer.feed, h, fast, f"layers.{i}")
        return h

    def read(
        self, h: Tensor, start: float, where: Tensor, attention_mask: Tensor | None = None, fast: Fast | None = None
    ) -> Tensor:
        """`run` from `start` to the end, at the positions `where` (B, T) alone: (M, D).

        The last mixture of experts then works on these rows only: often a few percent of the tokens. (A dense network
        gets its sets of phi by position, so it works on all of them.)
        """
        last, sets = self.config.layers - 1, fast.sets() if fast else 1
        h = self.run(h, start, last + 0.5, attention_mask, fast)
        if not isinstance(self.layers[last].mlp, Mixture):
            return self.run(h, max(start, last + 0.5), last + 1, attention_mask, fast)[where]
        owner = where.nonzero()[:, 0] * sets // len(h)  # (M,)
        return self.half(self.layers[last].feed, h[where][None], fast, f"layers.{last}", owner)[0]

    def half(self, function: Callable[..., Tensor], h: Tensor, *rest: object) -> Tensor:
        """One half layer. With checkpointing only its input is kept; dropout draws the same numbers the second time."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, h, *rest, use_reentrant=False)
        return function(h, *rest)

    def head(self, h: Tensor) -> Tensor:
        """Final norm and output matrix: h (..., D) -> logits (..., V). Rows are independent: pass only those you need."""
        return self.output(self.norm(h))


def attention_bias(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What scaled_dot_product_attention adds to the scores, (B, 1, 1 or T, T), or None when everything is visible.

    A padding mask (B, T) hides the padded *keys* from every query. It uses the lowest finite number, not -inf, so that a
    row of nothing but padding still gives finite (unused) numbers instead of NaN.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask.to(dtype)
    hidden = attention_mask[:, None, None, :] == 0  # (B, 1, 1, T)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def block_causal_mask(length: int, block: int, device: torch.device) -> Tensor:
    """(1, 1, T, T) bool: a position sees its own block and the earlier ones (LLaDA2's sampling)."""
    number = torch.arange(length, device=device) // block
    return (number[:, None] >= number)[None, None]


@torch.no_grad()
def init_weights(model: Transformer, generator: torch.Generator) -> Transformer:
    """A start from which retrieval emerges in minutes.

    Embeddings N(0, 1), every output into the residual stream zero: with N(0, 0.02), as in large models, the first layers
    drown the token's identity. The head starts as a small copy of the embedding, so that what attention copies is already
    a prediction; keys start equal to queries, so that attention already looks for the same word.
    """
    for name, p in model.named_parameters():
        if name == "embedding.weight":
            p.normal_(generator=generator)
        elif name.endswith(("attention.o.weight", "mlp.down.weight", "canon.taps")):
            p.zero_()
        elif p.dim() == 2:
            p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    model.output.weight.copy_(0.1 * model.embedding.weight)
    for layer in model.layers:
        layer.attention.k.weight.copy_(layer.attention.q.weight[: layer.attention.k.weight.shape[0]])
    return model


def linear_layers(model: Transformer) -> dict[str, Linear]:
    """Name -> module for what PEFT's `all-linear` means: every linear layer but the head, and not LLaDA2's router, which is
    no linear module in the published code."""
    outside = ("output", "mlp.router") if model.config.router == "sigmoid" else ("output",)
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and not name.endswith(outside)}


def count(layers: Iterable[Linear]) -> int:
    """How many matrices: a stack of experts counts each of them."""
    return sum(math.prod(layer.stack) for layer in layers)


def add_outer_lora(model: Transformer, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> list[str]:
    """Freezes the backbone and puts an outer LoRA on every linear layer but the head. Returns the adapted names."""
    model.requires_grad_(False)
    for layer in linear_layers(model).values():
        layer.add_lora(rank, alpha, dropout, generator)
    return list(linear_layers(model))


# ---- the published checkpoints ---------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """How one family of published checkpoints is written down."""

    names: dict[str, str]  # our module -> the published one; {i} is the layer, {x} the expert
    sizes: Callable[[dict], dict]  # config.json -> fields of Config; KeyError names what is missing
    only: dict[str, tuple]  # settings of config.json that have one meaning in this code: the values it can stand for


def dense_sizes(c: dict) -> dict:
    """config.json of LLaDA-8B."""
    sizes = {"vocab_size": c.get("embedding_size") or c["vocab_size"], "mask_id": c.get("mask_token_id")}
    sizes |= {"hidden": c["d_model"], "layers": c["n_layers"], "heads": c["n_heads"], "head_dim": c["d_model"] // c["n_heads"]}
    sizes |= {"kv_heads": c.get("n_kv_heads") or c["n_heads"], "ffn": c["mlp_hidden_size"], "rope_base": c["rope_theta"]}
    return sizes | {"rotary_fraction": 1.0, "norm_eps": c["rms_norm_eps"]}


def mixture_sizes(c: dict) -> dict:
    """What the config.json of LLaDA-MoE and of LLaDA2 have in common."""
    sizes = {"vocab_size": c["vocab_size"], "mask_id": c.get("mask_token_id"), "hidden": c["hidden_size"]}
    sizes |= {"layers": c["num_hidden_layers"], "heads": c["num_attention_heads"], "experts": c["num_experts"]}
    sizes |= {"kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"], "rope_base": c["rope_theta"]}
    sizes |= {"head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], "norm_eps": c["rms_norm_eps"]}
    sizes |= {"experts_per_token": c["num_experts_per_tok"], "rotary_fraction": c.get("partial_rotary_factor", 1)}
    return sizes | {"router_bias": bool(c.get("moe_router_enable_expert_bias"))}


def llada_moe_sizes(c: dict) -> dict:
    """config.json of LLaDA-MoE."""
    sizes = {"qk_norm": c["qk_layernorm"], "ffn": c["dense_intermediate_size"], "expert_ffn": c["expert_intermediate_size"]}
    sizes |= {"moe_layers": tuple(i for i, moe in enumerate(c["moe_layer_freq"]) if moe)}
    return mixture_sizes(c) | sizes | {"shared_ffn": c.get("shared_expert_intermediate_size") or 0}


def llada2_sizes(c: dict) -> dict:
    """config.json of LLaDA2.0 and LLaDA2.1."""
    sizes = {"qk_norm": c["use_qk_norm"], "ffn": c["intermediate_size"], "expert_ffn": c["moe_intermediate_size"]}
    sizes |= {"moe_layers": tuple(range(c["first_k_dense_replace"], c["num_hidden_layers"])), "fused_qkv": True}
    sizes |= {"shared_ffn": c["moe_intermediate_size"] * (c.get("num_shared_experts") or 0), "router": "sigmoid"}
    sizes |= {"router_groups": c["n_group"], "router_groups_kept": c["topk_group"]}
    return mixture_sizes(c) | sizes | {"routed_scale": c["routed_scaling_factor"]}


BLOCK = "model.transformer.blocks.{i}."
DENSE_NAMES = {"embedding": "model.transformer.wte", "norm": "model.transformer.ln_f", "output": "model.transformer.ff_out"}
DENSE_NAMES |= {"attention_norm": BLOCK + "attn_norm", "mlp_norm": BLOCK + "ff_norm", "attention.o": BLOCK + "attn_out"}
DENSE_NAMES |= {f"attention.{part}": BLOCK + f"{part}_proj" for part in "qkv"}
DENSE_NAMES |= {"mlp.gate": BLOCK + "ff_proj", "mlp.up": BLOCK + "up_proj", "mlp.down": BLOCK + "ff_out"}
LAYER = "model.layers.{i}."
MIXTURE_NAMES = {"norm": "model.norm", "output": "lm_head", "attention_norm": LAYER + "input_layernorm"}
MIXTURE_NAMES |= {"mlp_norm": LAYER + "post_attention_layernorm", "mlp.router": LAYER + "mlp.gate"}
MIXTURE_NAMES |= {f"mlp.{part}": LAYER + f"mlp.{part}_proj" for part in ("gate", "up", "down")}
MIXTURE_NAMES |= {f"mlp.experts.{part}": LAYER + f"mlp.experts.{{x}}.{part}_proj" for part in ("gate", "up", "down")}
LLADA_MOE_NAMES = MIXTURE_NAMES | {"embedding": "model.embed_tokens", "mlp.router_bias": LAYER + "mlp.expert_bias"}
LLADA_MOE_NAMES |= {f"attention.{part}": LAYER + f"self_attn.{part}_proj" for part in "qkvo"}
LLADA_MOE_NAMES |= {f"attention.{part}_norm": LAYER + f"self_attn.{part}_norm" for part in "qk"}
LLADA_MOE_NAMES |= {f"mlp.shared.{part}": LAYER + f"shared_expert.{part}_proj" for part in ("gate", "up", "down")}
LLADA2_NAMES = MIXTURE_NAMES | {"embedding": "model.word_embeddings", "mlp.router_bias": LAYER + "mlp.gate.expert_bias"}
LLADA2_NAMES |= {"attention.qkv": LAYER + "attention.query_key_value", "attention.o": LAYER + "attention.dense"}
LLADA2_NAMES |= {"attention.q_norm": LAYER + "attention.query_layernorm", "attention.k_norm": LAYER + "attention.key_layernorm"}
LLADA2_NAMES |= {f"mlp.shared.{part}": LAYER + f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}

NO, YES = (False, None), (True, None)
DENSE_ONLY = {"activation_type": ("silu",), "block_type": ("llama",), "rope": (True,), "alibi": NO, "layer_norm_type": ("rms",)}
DENSE_ONLY |= {"rope_full_precision": YES, "layer_norm_with_affine": YES, "block_group_size": (1, None), "clip_qkv": (None,)}
DENSE_ONLY |= dict.fromkeys(("include_bias", "include_qkv_bias", "bias_for_layer_norm", "attention_layer_norm"), NO)
DENSE_ONLY |= dict.fromkeys(("input_emb_norm", "scale_logits", "weight_tying", "multi_query_attention", "rope_scaling"), NO)
MIXTURE_ONLY = {"hidden_act": ("silu",), "rope_scaling": NO, "tie_word_embeddings": NO}
LLADA_MOE_ONLY = MIXTURE_ONLY | {
    "attention_bias": NO,
    "clip_qkv": (None,),
    "norm_topk_prob": NO,
    "routed_scaling_factor": (1, None),
}
LLADA_MOE_ONLY |= {
    "moe_router_score_function": ("softmax", None),
    "router_num_group": (None, 0, 1),
    "router_topk_group": (None, 0, 1),
}
LLADA2_ONLY = MIXTURE_ONLY | {"score_function": ("sigmoid", None), "norm_topk_prob": YES, "use_rmsnorm": YES}
LLADA2_ONLY |= {"router_dtype": ("fp32", None)}
LLADA2_ONLY |= dict.fromkeys(("use_bias", "use_qkv_bias", "norm_head", "norm_softmax", "use_sliding_window"), NO)
LLADA2_ONLY |= {"using_split_qkv_in_self_attention": NO}

ARCHITECTURES = {
    "llada": Architecture(DENSE_NAMES, dense_sizes, DENSE_ONLY),
    "llada-moe": Architecture(LLADA_MOE_NAMES, llada_moe_sizes, LLADA_MOE_ONLY),
    "llada2": Architecture(LLADA2_NAMES, llada2_sizes, LLADA2_ONLY),
}
# What `--backbone` may be called, the repository on the hub, and the sizes for `--random-weights` (a checkpoint's own
# config.json decides; that of LLaDA2.1-mini has been taken to be LLaDA2.0-mini's).
REAL_MOE = {"vocab_size": 157184, "mask_id": 156895, "hidden": 2048, "heads": 16, "head_dim": 128, "experts_per_token": 8}
REAL_MOE |= {"canon": 0, "qk_norm": True}
BACKBONES = {
    "llada-8b": (
        "GSAI-ML/LLaDA-8B-Base",
        {"architecture": "llada", "vocab_size": 126464, "mask_id": 126336, "hidden": 4096, "layers": 32, "heads": 32}
        | {"canon": 0, "kv_heads": 32, "head_dim": 128, "ffn": 12288, "rope_base": 500_000.0, "rotary_fraction": 1.0},
    ),
    "llada-moe": (
        "inclusionAI/LLaDA-MoE-7B-A1B-Base",
        REAL_MOE
        | {"architecture": "llada-moe", "layers": 16, "kv_heads": 16, "experts": 64, "expert_ffn": 1024, "ffn": 8192}
        | {"moe_layers": tuple(range(16)), "rope_base": 50_000.0, "rotary_fraction": 1.0},
    ),
    "llada2.1-mini": (
        "inclusionAI/LLaDA2.1-mini",
        REAL_MOE
        | {"architecture": "llada2", "layers": 20, "kv_heads": 4, "experts": 256, "expert_ffn": 512, "ffn": 5120}
        | {"moe_layers": tuple(range(1, 20)), "shared_ffn": 512, "rope_base": 600_000.0, "rotary_fraction": 0.5}
        | {"router": "sigmoid", "router_bias": True, "router_groups": 8, "router_groups_kept": 4, "routed_scale": 2.5}
        | {"fused_qkv": True, "norm_eps": 1e-6},
    ),
}


def published_name(config: Config, name: str) -> str:
    """Our module's (or buffer's) name -> the published one, with {x} for the expert where there is a stack of them."""
    layer, part = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)", name).groups()
    return ARCHITECTURES[config.architecture].names[part].replace("{i}", str(layer))


def published_tensors(model: Transformer) -> dict[str, tuple[str, int | None]]:
    """Every tensor that a checkpoint must have: its published name -> (our name, index in the stack of experts)."""
    tensors = {}
    for ours, tensor in model.state_dict().items():
        theirs = published_name(model.config, ours.removesuffix(".weight"))
        theirs += ".weight" if ours.endswith(".weight") else ""
        stack = range(len(tensor)) if "{x}" in theirs else (None,)
        tensors |= {theirs.replace("{x}", str(x)): (ours, x) for x in stack}
    return tensors


def read_llada_config(settings: dict, tensor_names: Iterable[str], where: Path) -> Config:
    """config.json -> Config. LLaDA-8B and LLaDA-MoE share their model_type; experts among the settings or tensors tell."""
    kind, experts = str(settings.get("model_type")), any(".experts." in name for name in tensor_names)
    if kind.startswith("llada2"):
        architecture = "llada2"
    elif kind in ("llada", "lladamoe", "llada_moe"):
        architecture = "llada-moe" if experts or settings.get("num_experts") else "llada"
    else:
        raise UserError(f"{where}: model_type {kind!r} is not a LLaDA model that this program knows.")
    for key, values in ARCHITECTURES[architecture].only.items():
        value = settings.get(key)
        if value not in values and key in settings:
            raise UserError(f"{where}: {key} = {value!r} is not supported (only {' or '.join(map(repr, values))}).")
    try:
        config = Config(**ARCHITECTURES[architecture].sizes(settings), architecture=architecture, canon=0)
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a size in it is not usable ({error}).") from None
    check_sizes(config, where)
    if "rotary_dim" in settings and settings["rotary_dim"] != int(config.head_dim * config.rotary_fraction):
        raise UserError(f"{where}: rotary_dim = {settings['rotary_dim']} contradicts partial_rotary_factor.")
    return config


def check_sizes(config: Config, where: Path) -> None:
    """Finds out here, not deep in torch, that a size is no size or that two of them do not go together."""
    kinds = {int: (int,), int | None: (int, type(None)), float: (int, float), bool: (bool,)}
    for field in fields(config):
        value, kind = getattr(config, field.name), kinds.get(field.type)
        if kind and (type(value) not in kind or (value or 0) < 0):
            raise UserError(f"{where}: {field.name} = {value!r} in it is not usable.")
    needed = {"vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "rope_base"}
    if config.moe_layers:
        needed |= {"experts", "experts_per_token", "expert_ffn", "router_groups", "router_groups_kept"}
    if none := [name for name in sorted(needed) if not getattr(config, name)]:
        raise UserError(f"{where}: {none[0]} = 0 in it is not usable.")
    whole = {"heads": config.heads % config.kv_heads, "experts": config.experts % config.router_groups}
    whole |= {"rotary_fraction": int(config.head_dim * config.rotary_fraction) % 2 or config.rotary_fraction > 1}
    whole |= {"experts_per_token": config.experts_per_token > config.experts * config.router_groups_kept / config.router_groups}
    if wrong := [name for name, bad in whole.items() if bad]:
        raise UserError(f"{where}: {wrong[0]} = {getattr(config, wrong[0])} does not go with the other sizes in it.")


def find_checkpoint(path_or_repo: str) -> Path:
    """The folder of a checkpoint: a local one, or the hub's after a download that resumes, with progress, below HF_HOME."""
    folder, repo = Path(path_or_repo), BACKBONES.get(path_or_repo, (path_or_repo,))[0]
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} is no checkpoint: it has no config.json.")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"there is no folder {folder}, and it is neither {', '.join(BACKBONES)} nor a repository OWNER/NAME.")
    return Path(fetch(repo))


def fetch(repo: str) -> str:
    """Downloads the files that are read here, and says what to do where that is not possible."""
    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*.json", "chat_template.jinja"]
    by_hand = f"put its {', '.join(wanted)} into a folder and name that folder instead"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError(f"downloading {repo} needs huggingface_hub (pip install huggingface_hub); or {by_hand}.") from None
    try:
        return snapshot_download(repo, allow_patterns=wanted)
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated: accept its terms on its page and log in (hf auth login), or {by_hand}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"the hub has no repository {repo} that you may read; check the name, or {by_hand}.") from None
    except Exception as error:  # no network, no space left, no possible name: the client raises several libraries' errors
        reason = str(error).splitlines()[0].split(". ")[0][:160]
        raise UserError(f"cannot download {repo} ({type(error).__name__}: {reason}); {by_hand}.") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from model.safetensors or from the index; each file must open and be whole."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = read_json(index).get("weight_map") or {}
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise UserError(f"{index}: its weight_map must name a file for each tensor.")
        files = {name: folder / file for name, file in listed.items()}
    else:
        files, listed = {"": folder / "model.safetensors"}, None
    found: dict[str, Path] = {}
    for path in sorted(set(files.values())):
        if path.parent != folder or not path.exists():
            raise UserError(f"{path} is missing: {'the index names it' if listed else 'and there is no index either'}.")
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged or cut off ({error}): download it again.") from None
        if twice := found.keys() & names:
            raise UserError(f"{path}: {sorted(twice)[0]} is in {found[sorted(twice)[0]].name} already.")
        found |= dict.fromkeys(names, path)
    if listed is not None and (
        wrong := {name for name, path in files.items() if found.get(name) != path} | found.keys() - files
    ):
        raise UserError(f"{index} and the files disagree about {len(wrong)} tensors, e.g. {sorted(wrong)[0]}.")
    return found


def load_llada(
    path_or_repo: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, load_4bit: bool = False
) -> Transformer:
    """A published checkpoint as a `Transformer` in eval mode: model(ids, attention_mask=None) -> (B, T, V).

    path_or_repo: a folder, OWNER/NAME on the hub, or a key of BACKBONES. The files are memory-mapped and each tensor is copied
    once, straight to its place: the peak is the weights and one file. load_4bit: NF4 for every linear layer but the head.
    Raises UserError unless every tensor is used exactly once and every parameter set, each in its shape.
    """
    folder = find_checkpoint(str(path_or_repo))
    files = tensor_files(folder)
    config = read_llada_config(read_json(folder / "config.json"), files, folder / "config.json")
    model = on_meta(config)
    wanted, shapes = published_tensors(model), {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if files.keys() != wanted.keys():
        missing, left = sorted(wanted.keys() - files), sorted(files.keys() - wanted)
        raise UserError(f"{folder}: {len(missing)} tensors missing {missing[:3]}, {len(left)} not used {left[:3]}.")
    slots: dict[str, Tensor] = {}  # places that are not full yet: a stack of experts fills slice by slice
    left = Counter(ours for ours, _ in wanted.values())
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                ours, x = wanted[name]
                shape, got = shapes[ours][x is not None :], tuple(file.get_slice(name).get_shape())
                if got != shape:
                    raise UserError(f"{path}: {name} has shape {list(got)}, not {list(shape)}.")
                if ours not in slots:
                    slots[ours] = torch.empty(shapes[ours], dtype=kept_dtype(config, ours, dtype), device=device)
                (slots[ours] if x is None else slots[ours][x]).copy_(file.get_tensor(name))
                left[ours] -= 1
                if left[ours] == 0:
                    put(model, ours, slots.pop(ours), load_4bit)
    return model.eval()


def on_meta(config: Config) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def kept_dtype(config: Config, name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but LLaDA2's router and every router bias stay in float32 at least, as published."""
    exact = name.endswith("router_bias") or (name.endswith("router.weight") and config.router == "sigmoid")
    return torch.promote_types(dtype, torch.float32) if exact else dtype


def put(model: Transformer, name: str, tensor: Tensor, load_4bit: bool) -> None:
    """One tensor into its place in the model."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf == "router_bias":
        module.router_bias = tensor
    elif load_4bit and module_name in linear_layers(model):
        module.quantize(tensor)
    else:
        module.weight = nn.Parameter(tensor)


def llada_config(name: str) -> Config:
    """The sizes of a key of BACKBONES, or of a folder with a config.json."""
    if name in BACKBONES:
        return Config(**BACKBONES[name][1])
    if not Path(name).is_dir():
        raise UserError(f"--random-weights: {name} is neither {', '.join(BACKBONES)} nor a folder with a config.json.")
    return read_llada_config(read_json(Path(name) / "config.json"), (), Path(name) / "config.json")


def random_llada(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, load_4bit: bool = False, seed: int = 0
) -> Transformer:
    """A backbone at its real size (a key of BACKBONES, or a folder with a config.json) with random weights, N(0, 0.02), made
    on the device: to try memory and speed without a download."""
    config = llada_config(name)
    model, generator = on_meta(config), torch.Generator(device).manual_seed(seed)
    for ours, tensor in model.state_dict().items():
        made = torch.empty(tensor.shape, dtype=kept_dtype(config, ours, dtype), device=device)
        if ours.endswith("router_bias"):
            put(model, ours, made.zero_(), load_4bit)
            continue
        put(model, ours, made.fill_(1) if tensor.dim() == 1 else made.normal_(0, 0.02, generator=generator), load_4bit)
    return model.eval()


# ---- adapters in PEFT's format ----------------------------------------------------------------------------------------------

PREFIX = "base_model.model."
# Settings of adapter_config.json that would change what the tensors mean.
ADAPTER_ONLY = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": NO, "use_rslora": NO, "lora_bias": NO}
ADAPTER_ONLY |= {"fan_in_fan_out": NO, "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {})}
ADAPTER_ONLY |= {"layer_replication": (None,), "use_qalora": NO}


def adapter_tensors(model: Transformer) -> dict[str, tuple[Tensor, str]]:
    """PEFT's name -> (a view of our tensor, our layer's name), for every layer that has an outer LoRA."""
    tensors = {}
    for name, layer in linear_layers(model).items():
        for letter in "AB":
            lora, theirs = getattr(layer, f"lora_{letter}"), published_name(model.config, name)
            if lora is not None:
                stack = lora.detach().unbind(0) if layer.stack else [lora.detach()]
                for x, part in enumerate(stack):
                    tensors[f"{PREFIX}{theirs.replace('{x}', str(x))}.lora_{letter}.weight"] = (part, name)
    return tensors


def save_adapter(model: Transformer, folder: Path, rank: int, alpha: float, dropout: float, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors, as `peft` reads them."""
    tensors = {name: part.contiguous() for name, (part, _) in adapter_tensors(model).items()}
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True, "bias": "none"}
    config |= {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": modules, "fan_in_fan_out": False}
    # LLaDA-8B calls its head what it calls a part of each block.
    config["exclude_modules"] = ["transformer.ff_out"] if model.config.architecture == "llada" else None
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def load_adapter(model: Transformer, folder: Path) -> list[str]:
    """An adapter in PEFT's format, ours or one trained with `peft`, as the model's outer LoRA. Returns the adapted layers.

    Every tensor must be used. A layer, or an expert of a stack, that the adapter leaves out keeps its weights (B = 0).
    """
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for key, values in ADAPTER_ONLY.items():
        if key in config and config[key] not in values:
            raise UserError(f"{folder}/adapter_config.json: {key} = {config[key]!r} is not supported.")
    if not isinstance(config.get("r"), int) or config["r"] < 1 or not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{folder}/adapter_config.json: r or lora_alpha is missing.")
    tensors = read_tensors(path)[0]
    modules = {name.split(".lora_")[0] for name in tensors}
    for name, layer in linear_layers(model).items():
        theirs = PREFIX + published_name(model.config, name)
        if modules & {theirs.replace("{x}", str(x)) for x in range(math.prod(layer.stack))}:
            layer.add_lora(config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0)
    places = adapter_tensors(model)
    if half := sorted(name for name in places.keys() - tensors if name.split(".lora_")[0] in modules):
        raise UserError(f"{path}: {half[0]} is missing.")
    unused = tensors.keys() - places
    wrong = [name for name in tensors.keys() & places.keys() if tensors[name].shape != places[name][0].shape]
    if unused or wrong or not tensors:
        example = next(iter([*sorted(unused), *sorted(wrong)]), "it is empty")
        raise UserError(
            f"{path} does not fit this backbone: {len(unused)} tensors have no place, {len(wrong)} no fit: {example}."
        )
    with torch.no_grad():
        for name, (part, _) in places.items():
            part.copy_(tensors[name]) if name in tensors else part.zero_()
    return list(dict.fromkeys(layer for _, layer in places.values()))


# ---- files: safetensors and JSON, written aside and renamed ---------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes aside, then renames: a process killed half-way never leaves a broken file under the good name."""
    aside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, metadata)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)  # it may be what has filled the disk
        raise UserError(f"cannot write {path}: {error}. Free some space or choose another folder with --out.") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata. Nothing is unpickled."""
    if not path.exists():
        raise UserError(f"there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}. Delete it to make it again.") from None


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Tensors, and `meta` as JSON in the file's header."""
    save_tensors(path, {name: t.detach().contiguous() for name, t in tensors.items()}, {"json": json.dumps(meta)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The reverse of `save_checkpoint`."""
    tensors, metadata = read_tensors(path)
    try:
        meta = json.loads(metadata["json"])
        if not isinstance(meta, dict) or "step" not in meta or "config" not in meta:
            raise KeyError
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is not a checkpoint of this program. Delete it to train that part again.") from None
    return tensors, meta


def load_model(path: Path, device: str = "cpu") -> tuple[Transformer, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint's metadata."""
    tensors, meta = load_checkpoint(path)
    if not meta.get("done"):
        raise UserError(f"{path} is not finished: its training was stopped. Go on with it by --resume.")
    try:
        model = Transformer(Config(**meta["config"]))
    except TypeError:
        raise UserError(f"{path} holds a model of another version of this program.") from None
    if meta.get("lora"):
        add_outer_lora(model, **meta["lora"], generator=torch.Generator())
    load_weights(model, tensors, path)
    return model.to(device).eval(), meta


def load_weights(model: Transformer, tensors: dict[str, Tensor], path: Path) -> None:
    """A checkpoint's model.* tensors into the model: each parameter set, each tensor used, or an error with `path`."""
    try:
        model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}") from None


def training_state(model: Transformer, optimizer: torch.optim.Optimizer | None, theta_only: bool = False) -> dict[str, Tensor]:
    """Tensors of a checkpoint: model.<parameter> and, while training, adam.<parameter>/<exp_avg, exp_avg_sq, step>.

    theta_only: without the frozen backbone, which lies elsewhere.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad} if theta_only else ()
    tensors = {f"model.{name}": p for name, p in model.state_dict().items() if name not in frozen}
    named = [(name, p) for name, p in model.named_parameters() if optimizer and p in optimizer.state]
    return tensors | {f"adam.{name}/{key}": value for name, p in named for key, value in optimizer.state[p].items()}


def restore(model: Transformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    """The reverse of saving: weights and AdamW's state back in place, bit for bit."""
    frozen = {f"model.{name}": p for name, p in model.named_parameters() if not p.requires_grad}
    load_weights(model, frozen | tensors, path)
    for name, p in model.named_parameters():
        state = {key.split("/")[1]: t for key, t in tensors.items() if key.startswith(f"adam.{name}/")}
        if state:
            optimizer.state[p] = {key: t.to(p.device) for key, t in state.items()}


def check_writable(folder: Path) -> None:
    """Finds out before the work, not after it, that a folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}. Choose another folder with --out.") from None


def write_text(path: Path, text: str) -> None:
    """Aside, then renamed, like the checkpoints."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. Choose another folder with --out.") from None


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing in {path.parent}: is that the right folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it must hold a JSON object.")
    return value
