"""
model.py: the denoiser p_theta(x0 | x_t), one bidirectional transformer, and the two kinds of LoRA that MemDLM puts on it.

A masked diffusion language model is a BERT-like network: it sees the whole sequence, masked in places, and predicts the
clean token at every masked place. There is no causal mask and no time input: the number of masks tells the noise level.

Reading list
  MemDLM        Pei et al. 2026, arXiv 2603.22241 (sections and equations cited below are this paper's)
  LLaDA         Nie et al. 2025, arXiv 2502.09992: masked diffusion at 8B
  LoRA          Hu et al. 2021, arXiv 2106.09685
  RoPE          Su et al. 2021, arXiv 2104.09864
  RMSNorm, SwiGLU, GQA   arXiv 1910.07467, 2002.05202, 2305.13245
  Canon layer   Allen-Zhu 2025: a short convolution beside attention, which small models need to find "the token after"

Glossary
  paper      | name here            | shape
  x_t        | ids                  | (B, T) token ids, some of them [MASK]
  theta      | model.parameters()   | all weights, or the outer LoRA alone on a frozen backbone
  phi        | fast                 | Fast: per adapted matrix A (N, r, in), B (N, out, r), N sets
  alpha / r  | scale, fast.scale    | float, factor of B A x
  -          | h                    | (B, T, D) hidden states; V vocabulary, D hidden, H heads, K key/value heads, E head_dim
  -          | attention_mask       | (B, T) 1 = real token, 0 = padding; or (B, 1, T, T) float, added to the scores

Who owns what: this file holds no training logic and no state between calls. The fast weights come in as an argument
(`fast=None` is the plain model) and never become parameters, so that forgetting them is letting go of a dictionary.
"""

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""


@dataclass
class Config:
    """Sizes and switches of the transformer. The defaults are the `--tiny` model's."""

    vocab_size: int
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4  # fewer than heads: grouped-query attention
    head_dim: int = 16
    ffn: int = 128
    rope_base: float = 10_000.0
    rotary_fraction: float = 0.5  # share of each head's channels that RoPE turns; LLaDA: 1.0
    qk_norm: bool = False  # RMSNorm per head on queries and keys (LLaDA-MoE)
    norm_eps: float = 1e-5
    canon: int = 7  # taps of the convolution before attention; 0 = none, as in the LLaDA backbones


class Fast(NamedTuple):
    """phi, the Parametric Memory (Sec. 3): plain tensors, made for one batch or one prompt and then dropped.

    weights: name of the adapted matrix, e.g. "layers.2.mlp.gate" -> (A (N, r, in), B (N, out, r)).
    scale:   alpha / r. The adapted matrix computes W x + scale * B A x.

    There are N sets, and N divides the number of rows: row i of a batch of `rows` uses set i // (rows / N). N = 1 is one
    set for the whole batch, as published; N = rows one per sample; in between, several windows of a text share one.
    """

    weights: dict[str, tuple[Tensor, Tensor]]
    scale: float


class Linear(nn.Linear):
    """W x, plus the outer LoRA if there is one, plus the fast weights if they are passed in."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def add_lora(self, rank: int, alpha: float, dropout: float, generator: torch.Generator | None = None) -> None:
        """Outer LoRA, trainable (Sec. 4.1: r = 32, alpha = 64, dropout 0.05). B = 0: the model is unchanged at first."""
        A = kaiming_uniform(torch.empty(rank, self.in_features, dtype=self.weight.dtype), generator)  # drawn on the CPU
        self.lora_A = nn.Parameter(A.to(self.weight.device))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.lora_scale, self.lora_dropout = alpha / rank, dropout

    def forward(self, x: Tensor, fast: Fast | None = None, name: str = "") -> Tensor:
        """x (B, T, in) -> (B, T, out). `name` is where to look in `fast`."""
        y = F.linear(x, self.weight)
        if self.lora_A is not None:
            dropped = F.dropout(x, self.lora_dropout, self.training)
            y = y + self.lora_scale * F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        if fast is not None and name in fast.weights:
            A, B = fast.weights[name]  # (N, r, in), (N, out, r)
            rows = x.reshape(len(A), -1, x.shape[-1])  # (N, rows / N * T, in): each set meets its own rows
            y = torch.baddbmm(y.reshape(len(A), -1, y.shape[-1]), rows @ A.mT, B.mT, alpha=fast.scale).view_as(y)
        return y


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
        self.q = Linear(config.hidden, config.heads * config.head_dim)
        self.k = Linear(config.hidden, config.kv_heads * config.head_dim)
        self.v = Linear(config.hidden, config.kv_heads * config.head_dim)
        self.o = Linear(config.heads * config.head_dim, config.hidden)
        norm = (lambda: RMSNorm(config.head_dim, config.norm_eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        q = self.q_norm(self.q(x).view(split)).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(self.k(x).view(split)).transpose(1, 2)  # (B, K, T, E)
        v = self.v(x).view(split).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, attn_mask=bias, enable_gqa=grouped)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), the feed-forward network: the only place where the fast weights live (Sec. 4.1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Linear(config.hidden, config.ffn)
        self.up = Linear(config.hidden, config.ffn)
        self.down = Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor, fast: Fast | None, name: str) -> Tensor:
        gate, up = self.gate(x, fast, f"{name}.gate"), self.up(x, fast, f"{name}.up")
        return self.down(F.silu(gate) * up, fast, f"{name}.down")


class Layer(nn.Module):
    """Two residual halves: `mix` moves information between positions, `feed` works on each position alone.

    h += canon(norm(h)), where the config has it; h += attention(norm(h)); then h += mlp(norm(h)).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.canon = Canon(config) if config.canon else None
        self.attention_norm, self.attention = RMSNorm(config.hidden, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.hidden, config.norm_eps), SwiGLU(config)

    def mix(self, h: Tensor, rotary: tuple[Tensor, Tensor], attention_mask: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.canon is not None:
            h = self.canon(h, attention_mask)
        return h + self.attention(self.attention_norm(h), rotary, bias)

    def feed(self, h: Tensor, fast: Fast | None, name: str) -> Tensor:
        return h + self.mlp(self.mlp_norm(h), fast, f"{name}.mlp")


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V) for every position at once.

    `forward` is embed -> layers -> head. Training cuts it into these three, because the fast weights touch the last
    feed-forward networks only: the prefix h = run(embed(ids), 0, cut) of one x_t serves several suffixes
    run(h, cut, layers), and the head is applied to the masked rows alone.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
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
                h = layer.mix(h, rotary, attention_mask, bias)
            if start <= i + 0.5 < stop:
                h = layer.feed(h, fast, f"layers.{i}")
        return h

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
        return attention_mask.to(dtype)
    hidden = attention_mask[:, None, None, :] == 0  # (B, 1, 1, T)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


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


def add_outer_lora(model: Transformer, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> list[str]:
    """Freezes the backbone and puts an outer LoRA on every linear layer but the head. Returns the adapted names."""
    model.requires_grad_(False)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "output":
            module.add_lora(rank, alpha, dropout, generator)
            names.append(name)
    return names


# ---- files: safetensors and JSON, written aside and renamed ---------------------------------------------------------------


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Writes aside, then renames: a process killed half-way never leaves a broken file under the good name."""
    aside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, aside, {"json": json.dumps(meta)})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}. Free some space or choose another folder with --out.") from None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and the JSON in the header. Nothing is unpickled."""
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if not isinstance(meta, dict) or "step" not in meta or "config" not in meta:
            raise KeyError
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}. Delete it to train that part again.") from None
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


def training_state(model: Transformer, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Tensors of a checkpoint: model.<parameter> and, while training, adam.<parameter>/<exp_avg, exp_avg_sq, step>."""
    tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
    named = [(name, p) for name, p in model.named_parameters() if optimizer and p in optimizer.state]
    return tensors | {f"adam.{name}/{key}": value for name, p in named for key, value in optimizer.state[p].items()}


def restore(model: Transformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], device: str, path: Path) -> None:
    """The reverse of saving: weights and AdamW's state back in place, bit for bit."""
    load_weights(model, tensors, path)
    for name, p in model.named_parameters():
        state = {key.split("/")[1]: t for key, t in tensors.items() if key.startswith(f"adam.{name}/")}
        if state:
            optimizer.state[p] = {key: t.to(device) for key, t in state.items()}


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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
