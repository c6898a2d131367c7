"""
experts.py: the mixture of experts of LLaDA-MoE and LLaDA2, and layers whose weights take 4 bits.

In a mixture of experts the feed-forward network of a layer exists X times, each with weights of its
own, and a router sends every token to k of them. A token so uses a small part of the weights:
LLaDA-MoE has 7 billion and computes with 1.

  router     scores every expert for every token and chooses k of them
  sorting    copies each token k times and sorts these rows, so that an expert's rows lie together
  experts    multiply their own rows, all experts in one kernel
  back       the k results of a token are added, each with the weight that the router gave it

Reading list
  Mixture of experts       Shazeer et al. 2017, arXiv 1701.06538
  Grouped sigmoid routing  DeepSeek-V3, arXiv 2412.19437
  NF4                      QLoRA, Dettmers et al. 2023, arXiv 2305.14314

Glossary
  name here      | meaning                                                     | shape
  chosen         | the k experts that a token goes to                          | (B T, k)
  weights        | what each of the k results counts in the token's sum        | (B T, k)
  rows           | the tokens' copies, sorted by expert; M = B T k             | (M, D)
  routes         | which token a row is a copy of, and where each expert ends  | Routes
B rows of the batch, T positions, D hidden size, X experts, N sets of phi, r rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from full_scale.configs import BackboneConfig
from model import Fast, Linear, SwiGLU

# ---- matrices of many experts ----------------------------------------------------------------


class Routes(NamedTuple):
    """Where the rows of a mixture lie: sorted by expert, and within an expert by set of phi."""

    token: Tensor  # (M,) the token that a row is a copy of
    place: Tensor  # (M,) where the row of (token, choice) has gone: it undoes the sorting
    ends: Tensor  # (X,) int32: the rows of expert x are ends[x - 1], ..., ends[x] - 1
    set_ends: Tensor  # (X N,) int32: the ends of each set's rows within each expert


def sort_by_expert(chosen: Tensor, experts: int, sets: int) -> Routes:
    """chosen (B T, k): the experts of each token. sets: N, the number of sets of fast weights."""
    tokens, k = chosen.shape
    owner = torch.arange(tokens, device=chosen.device) * sets // tokens  # (B T,) a token's set
    key = (chosen * sets + owner[:, None]).flatten()  # (M,)
    order = key.argsort(stable=True)
    set_ends = torch.bincount(key, minlength=experts * sets).cumsum(0).int()
    return Routes(order // k, order.argsort(), set_ends[sets - 1 :: sets].contiguous(), set_ends)


def kernel_fits(x: Tensor, weight: Tensor) -> bool:
    """Can torch multiply all experts in one kernel? That takes a recent torch and, if any, a recent
    GPU (H100); one of these dtypes; and rows whose length is a multiple of 16 bytes."""
    recent = hasattr(F, "grouped_mm")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if x.is_cuda:
        recent = recent and torch.cuda.get_device_capability(x.device) >= (9, 0)
        dtypes = (torch.bfloat16,)
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return recent and aligned and x.dtype in dtypes


def by_expert(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    """Each expert's matrix times its own rows: sorted rows x (M, in), weight (X, out, in) and
    ends (X,) -> (M, out). Without `ends`, one matrix (out, in) for all rows."""
    if ends is None:
        return F.linear(x, weight)
    if kernel_fits(x, weight):
        return F.grouped_mm(x, weight.mT, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ matrix.mT for rows, matrix in zip(x.split(counts), weight)])


class ExpertLinear(Linear):
    """`Linear` of model.py with an axis more: the matrices of X experts, (X, out, in), with outer
    LoRA and fast weights for each."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.shape = (experts, outputs, inputs)
        self.weight = nn.Parameter(torch.empty(self.shape))

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """W x alone, for sorted rows."""
        return by_expert(x, self.weight, ends)

    def forward(self, x: Tensor, routes: Routes, fast=None, name: str = "", lora_x=None) -> Tensor:
        """Sorted rows x (M, in) -> (M, out). name and lora_x as in `Linear.forward`."""
        y = self.product(x, routes.ends)
        if self.lora_A is not None:
            lora_x = self.drop(x) if lora_x is None else lora_x
            inner = by_expert(lora_x, self.lora_A.to(x.dtype), routes.ends)
            y += by_expert(self.lora_scale * inner, self.lora_B.to(x.dtype), routes.ends)
        if fast is not None and name in fast.weights:
            # (N, X, r, in) -> (X N, r, in): every set of every expert, in the order of the rows.
            A, B = (part.transpose(0, 1).flatten(0, 1).to(x.dtype) for part in fast.weights[name])
            inner = by_expert(x, A, routes.set_ends)
            y += by_expert(fast.scale * inner, B, routes.set_ends)
        return y


class Experts(nn.Module):
    """`SwiGLU` of model.py for X experts at once."""

    def __init__(self, experts: int, hidden: int, ffn: int):
        super().__init__()
        self.gate = ExpertLinear(experts, hidden, ffn)
        self.up = ExpertLinear(experts, hidden, ffn)
        self.down = ExpertLinear(experts, ffn, hidden)

    def forward(self, x: Tensor, routes: Routes, fast, name: str, lora_x: Tensor) -> Tensor:
        """Sorted rows x (M, D) -> (M, D). lora_x (M, D): what the outer LoRA reads instead of x."""
        gate = self.gate(x, routes, fast, f"{name}.gate", lora_x)
        up = self.up(x, routes, fast, f"{name}.up", lora_x)
        return self.down(F.silu(gate) * up, routes, fast, f"{name}.down")


# ---- routers: which experts a token goes to --------------------------------------------------


class ExactRouter(nn.Module):
    """LLaDA2's router: it scores in float32 whatever the model computes in, and has no LoRA.

    It is no `Linear`: the published code has a bare matrix here, which `all-linear` passes by.
    """

    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor, lora_x: Tensor | None = None) -> Tensor:
        """x (B T, D) -> scores (B T, X). lora_x is there for `Linear` and not used."""
        return F.linear(x.to(self.weight.dtype), self.weight)


def softmax_router(scores: Tensor, bias: Tensor | None, config: BackboneConfig) -> tuple:
    """LLaDA-MoE: scores (B T, X) -> weights and indices (B T, k) of the most probable experts.

    The weights are the probabilities as they are: they do not add up to 1. A bias is part of the
    choice and, as in the published code, of the weights.
    """
    probability = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        probability = probability + bias
    return probability.topk(config.experts_per_token, sorted=False)


def sigmoid_router(scores: Tensor, bias: Tensor | None, config: BackboneConfig) -> tuple:
    """LLaDA2: scores (B T, X) -> weights and indices (B T, k), in three steps.

    A group of experts is worth the sum of its two best; the best groups are kept; the k best
    experts in them are chosen. The bias takes part in the choice and not in the weights, which are
    scaled to add up to `routed_scale`.
    """
    probability = scores.sigmoid()
    value = probability if bias is None else probability + bias
    groups = value.unflatten(-1, (config.router_groups, -1))  # (B T, groups, X / groups)
    best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values
    kept = best_two.sum(-1).topk(config.router_groups_kept, dim=-1).indices  # (B T, groups kept)
    closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
    value = groups.masked_fill(closed[..., None], -torch.inf).flatten(1)  # (B T, X)
    chosen = value.topk(config.experts_per_token, sorted=False).indices
    weights = probability.gather(1, chosen)
    return config.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


ROUTERS = {"softmax": softmax_router, "sigmoid": sigmoid_router}


# ---- the mixture -----------------------------------------------------------------------------


class Mixture(nn.Module):
    """The feed-forward network of a layer with experts; one of them may be shared by all tokens."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        router = ExactRouter if config.router == "sigmoid" else Linear
        self.router = router(config.hidden, config.experts)
        bias = torch.zeros(config.experts) if config.router_bias else None
        self.register_buffer("router_bias", bias)
        self.experts = Experts(config.experts, config.hidden, config.expert_ffn)
        self.shared = SwiGLU(config.hidden, config.shared_ffn) if config.shared_ffn else None

    def adaptable(self) -> dict[str, Linear]:
        """The matrices that a memory may adapt: never the router, and the shared expert as told."""
        found = {f"experts.{name}": m for name, m in self.experts.named_children()}
        if self.shared is not None and self.config.adapt_shared:
            found |= {f"shared.{name}": m for name, m in self.shared.adaptable().items()}
        return found

    def forward(self, h: Tensor, fast: Fast | None = None, name: str = "") -> Tensor:
        """h (B, T, D) -> (B, T, D)."""
        x = h.flatten(0, 1)  # (B T, D)
        # Router and experts share one draw of the outer LoRA's dropout, where PEFT draws for each.
        lora_x = self.experts.gate.drop(x)
        scores = self.router(x, lora_x=lora_x)  # (B T, X)
        weights, chosen = ROUTERS[self.config.router](scores, self.router_bias, self.config)
        routes = sort_by_expert(chosen, self.config.experts, 1 if fast is None else fast.sets())
        rows = x.index_select(0, routes.token)  # (M, D)
        lora_rows = rows if lora_x is x else lora_x.index_select(0, routes.token)
        y = self.experts(rows, routes, fast, f"{name}.experts", lora_rows)  # (M, D)
        y = y.index_select(0, routes.place).view(*chosen.shape, -1)  # (B T, k, D), unsorted
        y = torch.bmm(weights.to(y.dtype)[:, None], y).view_as(h)
        return y if self.shared is None else y + self.shared(h, fast, f"{name}.shared")


def make_mlp(config: BackboneConfig, layer: int) -> nn.Module:
    """The feed-forward network of a layer, for `Transformer(config, make_mlp)`."""
    return Mixture(config) if layer in config.moe_layers else SwiGLU(config.hidden, config.ffn)


# ---- frozen weights in 4 bits ----------------------------------------------------------------


class PackedProduct(torch.autograd.Function):
    """W x with a packed W, which is unpacked for the forward pass and again for the backward pass:
    the unpacked weight is never kept in between."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "Linear4bit", ends: Tensor | None) -> Tensor:
        ctx.layer, ctx.ends = layer, ends
        return by_expert(x, layer.unpack(x.dtype), ends)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return by_expert(grad, ctx.layer.unpack(grad.dtype).mT, ctx.ends), None, None


class Linear4bit(Linear):
    """A `Linear` whose frozen weight is NF4 with double quantization: 4.127 bits a number. `weight`
    holds two numbers in a byte, and `state` their scales. It needs bitsandbytes."""

    def __init__(self, weight: Tensor):
        from bitsandbytes.functional import quantize_4bit

        *experts, outputs, inputs = weight.shape
        with torch.device("meta"):  # the weight that `super` makes is not wanted
            super().__init__(*experts, inputs, outputs)
        # As one row: on a CPU, bitsandbytes 0.50 unpacks rows wrongly that are no multiple of 64.
        row = weight.flatten()
        packed, self.state = quantize_4bit(row, quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers again, in its shape."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.state).view(self.shape).to(dtype)

    def product(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """W x alone; with `ends`, for sorted rows."""
        return PackedProduct.apply(x, self, ends)


class ExpertLinear4bit(Linear4bit, ExpertLinear):
    """An `ExpertLinear` whose frozen weights are packed: the product is that of `Linear4bit`."""
