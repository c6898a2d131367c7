"""
model.py: the denoiser p_theta(x0 | x_t), a bidirectional transformer, and the two kinds of LoRA
that MemDLM puts on it.

A masked diffusion language model reads a whole sequence, masked in places, and predicts the clean
token at every masked place. Attention is not causal; the number of masks tells the noise level.

Reading list: MemDLM, arXiv 2603.22241 (sections and equations are cited from it); LLaDA, masked
diffusion at 8B, arXiv 2502.09992; LoRA, 2106.09685; RoPE, 2104.09864; RMSNorm, 1910.07467; SwiGLU,
2002.05202; grouped queries, 2305.13245; the Canon layer, Allen-Zhu 2025.

Glossary
  paper      | name here          | shape
  x_t        | ids                | (B, T) token ids, some of them [MASK]
  theta      | model.parameters() | all weights, or the outer LoRA alone on a frozen backbone
  phi        | fast               | Fast: for each adapted matrix A (N, r, in) and B (N, out, r)
  alpha / r  | scale              | float, the factor of B A x
  -          | h                  | (B, T, D) hidden states between two layers
  -          | attention_mask     | (B, T), 0 = padding; (B, 1, T, T), bool, or a bias
B rows, T positions, D hidden size, V vocabulary, H heads, E channels of a head, N sets of phi.

Fast weights are an argument of the forward pass (`fast=None` is the plain model) and never become
parameters: to forget them, drop them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can mend. A program prints it as one line and exits with code 2."""


@dataclass
class Config:
    """Sizes and switches of the transformer. The defaults are those of the `--tiny` model."""

    vocab_size: int
    mask_id: int | None = None  # the id of [MASK]; None where only the tokenizer knows it
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4  # heads of keys and values; fewer than `heads`: grouped queries
    head_dim: int = 16
    ffn: int = 128  # inner size of the feed-forward networks
    rope_base: float = 10_000.0
    rotary_fraction: float = 0.5  # share of each head's channels that RoPE turns; LLaDA: 1.0
    qk_norm: bool = False  # RMSNorm of each query and key (LLaDA-MoE, LLaDA2)
    fused_qkv: bool = False  # one matrix for queries, keys and values (LLaDA2)
    norm_eps: float = 1e-5
    canon: int = 7  # taps of the convolution before attention; 0 = none (all LLaDA models)


class Fast(NamedTuple):
    """phi, the Parametric Memory (Sec. 3): plain tensors, made for one batch or one prompt.

    There are N sets, and N divides the number of rows: row i uses set i // (rows / N). N = 1 is one
    set for the whole batch, as published; N = rows is one per sample.
    """

    # "layers.2.mlp.gate" -> A (N, r, in), B (N, out, r); X experts: (N, X, r, in), (N, X, out, r)
    weights: dict[str, tuple[Tensor, Tensor]]
    scale: float  # alpha / r; an adapted matrix computes W x + scale * B A x

    def sets(self) -> int:
        """N, the number of sets."""
        return len(next(iter(self.weights.values()))[1])

    def tensors(self) -> list[Tensor]:
        """A, B, A, B, ... of all matrices: what the inner loop moves."""
        return [part for pair in self.weights.values() for part in pair]

    def with_tensors(self, tensors: list[Tensor]) -> "Fast":
        """The same memory with other numbers, in the order of `tensors`."""
        return self._replace(weights=dict(zip(self.weights, zip(tensors[::2], tensors[1::2]))))


def fresh_lora(shape: tuple, rank: int, dtype: torch.dtype, generator=None) -> tuple:
    """Sec. 3: A and B for a matrix of `shape` (..., out, in), which change nothing: A (..., r, in)
    is Kaiming-uniform, a = sqrt(5): U(-1/sqrt(in), 1/sqrt(in)); B (..., out, r) is zero."""
    *stack, outputs, inputs = shape
    bound = 1 / math.sqrt(inputs)
    A = torch.empty(*stack, rank, inputs, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(*stack, outputs, rank, dtype=dtype)


def apply_lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Sec. 3: y + scale * B A x, for y (B, T, out), x (B, T, in), A (N, r, in), B (N, out, r); row
    i of the batch has the set i // (rows / N)."""
    rows = x.reshape(len(A), -1, x.shape[-1])  # (N, B T / N, in): each set, its own rows
    sums = y.reshape(len(A), -1, y.shape[-1])  # (N, B T / N, out)
    return torch.baddbmm(sums, rows @ A.mT, B.mT, alpha=scale).view_as(y)


class Linear(nn.Module):
    """W x, plus the outer LoRA if there is one, plus the fast weights if given. No bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.shape = (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale, self.lora_dropout = 0.0, 0.0

    def add_lora(self, rank: int, alpha: float, dropout: float, generator=None) -> None:
        """Adds a trainable outer LoRA (Sec. 4.1). B = 0, so that the model is unchanged at first.
        It is float32 at least: a step of 2e-5 would be lost in bfloat16's rounding."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        pair = fresh_lora(self.shape, rank, dtype, generator)  # drawn on the CPU
        self.lora_A, self.lora_B = (nn.Parameter(part.to(self.weight.device)) for part in pair)
        self.lora_scale, self.lora_dropout = alpha / rank, dropout

    def product(self, x: Tensor) -> Tensor:
        """W x alone. 4-bit layers compute it in their own way."""
        return F.linear(x, self.weight)

    def drop(self, x: Tensor) -> Tensor:
        """What the outer LoRA reads instead of x: in training, x after dropout."""
        return F.dropout(x, self.lora_dropout, self.training)

    def forward(self, x: Tensor, fast: Fast | None = None, name: str = "", lora_x=None) -> Tensor:
        """x (B, T, in) -> (B, T, out). name: this matrix's key in `fast`. lora_x: the result of
        `drop`, where several matrices read the same x and share one draw of dropout."""
        y = self.product(x)
        if self.lora_A is not None:
            inner = F.linear(self.drop(x) if lora_x is None else lora_x, self.lora_A.to(x.dtype))
            y = y + F.linear(self.lora_scale * inner, self.lora_B.to(x.dtype))
        if fast is not None and name in fast.weights:
            A, B = (part.to(x.dtype) for part in fast.weights[name])
            y = apply_lora(y, x, A, B, fast.scale)
        return y


class Canon(nn.Module):
    """h + a convolution of norm(h) over neighbouring positions, each channel for itself.

    Attention finds "the number after the key" by looking for a token that knows what stands before
    it; with this layer every token does, which small models need.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.taps = nn.Parameter(torch.zeros(config.hidden, 1, config.canon))

    def forward(self, h: Tensor, attention_mask: Tensor | None) -> Tensor:
        """h (B, T, D) -> (B, T, D)."""
        n = self.norm(h)
        if attention_mask is not None and attention_mask.dim() == 2:
            n = n * attention_mask[..., None].to(n.dtype)  # padding must not leak to its neighbours
        n = n.transpose(1, 2)  # (B, D, T), as conv1d wants it
        return h + F.conv1d(n, self.taps, padding="same", groups=n.shape[1]).transpose(1, 2)


def rotary_angles(length: int, channels: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2j / channels), (T, channels / 2) each."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, channels, 2, dtype=dtype, device=like.device) / channels
    positions = torch.arange(length, dtype=dtype, device=like.device)
    angles = positions[:, None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (B, H, T, E): turns channel j with channel j + half, for j < half."""
    cos, sin = rotary  # (T, half)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class Attention(nn.Module):
    """Multi-head attention over the whole sequence, with RoPE and grouped keys and values."""

    def __init__(self, config: Config):
        super().__init__()
        self.grouped, self.head_dim = config.heads != config.kv_heads, config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.sizes = [queries, keys, keys]
        if config.fused_qkv:
            self.qkv = Linear(config.hidden, sum(self.sizes))
        else:
            self.q, self.k, self.v = (Linear(config.hidden, size) for size in self.sizes)
        self.o = Linear(queries, config.hidden)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def adaptable(self) -> dict[str, Linear]:
        """The matrices that a memory may adapt (Fig. 7), by their names in here."""
        return {name: part for name, part in self.named_children() if isinstance(part, Linear)}

    def project(self, x: Tensor, rotary, fast=None, name: str = "") -> tuple[Tensor, ...]:
        """x (B, T, D) -> queries (B, H, T, E), keys and values (B, kv_heads, T, E). name: this
        attention's key in `fast`, before the dot."""
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x, fast, f"{name}.qkv").split(self.sizes, dim=-1)
        else:
            lora_x = self.q.drop(x)
            q, k, v = (getattr(self, part)(x, fast, f"{name}.{part}", lora_x) for part in "qkv")
        split = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(q.view(split)).transpose(1, 2), rotary)
        k = rotate(self.k_norm(k.view(split)).transpose(1, 2), rotary)
        return q, k, v.view(split).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias, fast=None, name: str = "") -> Tensor:
        """What each query reads: (B, K, D) for K queries, which may be fewer than the keys."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2), fast, f"{name}.o")


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), the feed-forward network: the fast weights' place (Sec. 4.1)."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.gate = Linear(hidden, ffn)
        self.up = Linear(hidden, ffn)
        self.down = Linear(ffn, hidden)

    def adaptable(self) -> dict[str, Linear]:
        """The matrices that a memory may adapt, by their names in here."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def forward(self, x: Tensor, fast: Fast | None = None, name: str = "") -> Tensor:
        """x (B, T, D) -> (B, T, D). name: this network's key in `fast`, before the dot."""
        lora_x = self.gate.drop(x)
        gate = self.gate(x, fast, f"{name}.gate", lora_x)
        up = self.up(x, fast, f"{name}.up", lora_x)
        return self.down(F.silu(gate) * up, fast, f"{name}.down")


def dense_mlp(config: Config, layer: int) -> SwiGLU:
    """The ordinary choice of `Transformer`'s make_mlp: the same network in every layer."""
    return SwiGLU(config.hidden, config.ffn)


class Layer(nn.Module):
    """Attention moves information between positions; the network `mlp` then works on each alone:
    h += convolution(norm(h)), where there is one; h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: Config, mlp: nn.Module):
        super().__init__()
        self.canon = Canon(config) if config.canon else None
        self.attention_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.mlp = mlp

    def forward(self, h: Tensor, rotary, attention_mask, bias, fast, name: str, at=None) -> Tensor:
        """h (B, T, D) -> (B, T, D), or with `at`, the places (B, K) that are wanted, (B, K, D)."""
        if self.canon is not None:
            h = self.canon(h, attention_mask)
        inside = f"{name}.attention"
        q, k, v = self.attention.project(self.attention_norm(h), rotary, fast, inside)
        if at is not None:  # every place is read, as key and value; what follows is for few
            if bias is not None and bias.shape[2] > 1:  # (B, 1, T, T), a row for each query
                bias = bias.take_along_dim(at[:, None, :, None], 2)
            h, q = h.take_along_dim(at[..., None], 1), q.take_along_dim(at[:, None, :, None], 2)
        h = h + self.attention.attend(q, k, v, bias, fast, inside)
        return h + self.mlp(self.mlp_norm(h), fast, f"{name}.mlp")


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V) for every position at once.

    Training runs embedding, layers and head by themselves: fast weights touch the last layers only,
    so that one pass through the layers before (the *prefix*) serves several through the rest.
    make_mlp(config, layer) -> the layer's feed-forward network, with the methods of SwiGLU.
    """

    def __init__(self, config: Config, make_mlp: Callable = dense_mlp):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        mlps = [make_mlp(config, i) for i in range(config.layers)]
        self.layers = nn.ModuleList(Layer(config, mlp) for mlp in mlps)
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.output = Linear(config.hidden, config.vocab_size)

    def forward(self, ids: Tensor, attention_mask=None, fast: Fast | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        return self.head(self.run(self.embedding(ids), 0, None, attention_mask, fast))

    def run(self, h, start=0, stop=None, attention_mask=None, fast=None, at=None) -> Tensor:
        """The layers start, ..., stop - 1 on h (B, T, D); by default all to the last one. at (B, T)
        bool: where the output is wanted; it is then (M, D), as run(...)[at] would be. The last of
        these layers then works at these places alone: a fifth of a training step is saved."""
        turned = int(self.config.head_dim * self.config.rotary_fraction)
        rotary = rotary_angles(h.shape[1], turned, self.config.rope_base, h)
        bias = attention_bias(attention_mask, h.dtype)
        last, wanted = (len(self.layers) if stop is None else stop) - 1, None
        for i in range(start, last + 1):
            if at is not None and i == last:
                # (B, K), K as in the fullest row; a row with fewer places goes on with others.
                order = at.int().argsort(dim=1, descending=True, stable=True)
                wanted = order[:, : max(1, int(at.sum(1).max()))]
                at = at.gather(1, wanted)
            h = self.layers[i](h, rotary, attention_mask, bias, fast, f"layers.{i}", wanted)
        return h if at is None else h[at]

    def head(self, h: Tensor) -> Tensor:
        """Final norm and output matrix: h (..., D) -> logits (..., V), each row for itself."""
        return self.output(self.norm(h))


def attention_bias(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What attention adds to its scores, (B, 1, 1 or T, T); None where everything is visible. It
    hides padded *keys* by the lowest finite number: with -inf, a row of padding would be NaN."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask.to(dtype)
    hidden = attention_mask[:, None, None, :] == 0  # (B, 1, 1, T)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill(hidden, torch.finfo(dtype).min)


@torch.no_grad()
def init_weights(model: Transformer, generator: torch.Generator) -> Transformer:
    """A start from which retrieval emerges within minutes.

    Embeddings are N(0, 1), and what writes into the residual stream is zero: with the N(0, 0.02) of
    large models, the first layers' output hides which token stands where. The head is 0.1 times the
    embedding, so that a token that attention copies is predicted at once. Keys equal queries, so
    that attention looks for the same word.
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
        attention = layer.attention
        attention.k.weight.copy_(attention.q.weight[: len(attention.k.weight)])
    return model
