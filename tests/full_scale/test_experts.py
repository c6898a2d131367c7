"""
test_experts.py: the mixture of experts. Sorting rows by expert, running them through one kernel and
putting them back must be the same as asking each token which experts it wants; gradients, too.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from backbones import MIXTURES, add_random_lora, random_fast, toy_batch, toy_model
from torch import Tensor

from full_scale.experts import ExpertLinear, Mixture, by_expert
from lab.variants import CHOICES
from memdlm import (
    Memory,
    adapted_matrices,
    generator_for,
    init_fast,
    inner_step,
    prefix,
    two_stages,
)
from model import Fast, Linear

MEMORY = Memory(rank=4, alpha=8.0, lr=0.3, clip=0.5, fraction=0.5, scope="sample")


KERNEL = [
    (4, 16, torch.float32, True),  # rows of 16 bytes are 4 numbers in float32 ...
    (8, 16, torch.bfloat16, True),  # ... and 8 in bfloat16
    (4, 16, torch.bfloat16, False),
    (3, 16, torch.float32, False),
    (4, 15, torch.float32, False),
    (4, 16, torch.float64, False),  # there is no kernel for float64
]


@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 0], [0, 0, 7], [0, 1, 0]], ids=str)
@pytest.mark.parametrize(("rank", "inputs", "dtype", "fits"), KERNEL)
def test_the_kernel_and_the_loop_agree_in_value_and_gradient(
    counts, rank, inputs, dtype, fits, monkeypatch
):
    """What the kernel does not take goes through the loop. An expert without rows has a gradient of
    zero, not a missing one and not garbage."""
    generator = generator_for(0)
    x = torch.randn(sum(counts), inputs, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), rank, inputs, generator=generator).to(dtype).requires_grad_()
    direction = torch.randn(sum(counts), rank, generator=generator).to(dtype)
    ends, results = torch.tensor(counts).cumsum(0).int(), []
    kernel, calls = F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **b: calls.append(a) or kernel(*a, **b))
    for _ in range(2):
        y = by_expert(x, weight, ends)
        results.append((y.detach(), *torch.autograd.grad(y, (x, weight), direction)))
        monkeypatch.delattr(F, "grouped_mm", raising=False)  # the second time, an older torch
    assert bool(calls) == fits
    rtol, atol = (0.02, 0.1) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=atol)
    assert all((results[0][2][i] == 0).all() for i, n in enumerate(counts) if n == 0)


def softmax_routed(scores: Tensor, bias: Tensor | None, config) -> dict[int, Tensor]:
    """LLaDA-MoE, expert -> weight for the scores (X,) of a token: the weights are not renormalised,
    and a bias is part of them."""
    terms = scores.exp()
    value = terms / terms.sum() + (0 if bias is None else bias)
    best = sorted(range(len(scores)), key=lambda x: -value[x])
    return {x: value[x] for x in best[: config.experts_per_token]}


def sigmoid_routed(scores: Tensor, bias: Tensor, config) -> dict[int, Tensor]:
    """LLaDA2: a group counts for its two best experts; the bias moves the choice and not the
    weights, which add up to the scale."""
    p, size = 1 / (1 + (-scores).exp()), len(scores) // config.router_groups
    value = (p + bias).tolist()
    worth = [sum(sorted(value[g : g + size])[-2:]) for g in range(0, len(value), size)]
    groups = sorted(range(config.router_groups), key=lambda g: -worth[g])
    kept = [x for x in range(len(value)) if x // size in groups[: config.router_groups_kept]]
    best = sorted(kept, key=lambda x: -value[x])[: config.experts_per_token]
    return {x: config.routed_scale * p[x] / sum(p[y] for y in best) for x in best}


ROUTED = {"softmax": softmax_routed, "sigmoid": sigmoid_routed}


def whole_matrix(layer: Linear, fast: Fast | None, name: str, index: int, x: int | None) -> Tensor:
    """W + outer B A + fast B A, (out, in), of one set of phi and of expert x (None: no stack)."""
    at = ... if x is None else x
    weight = layer.weight[at]
    if getattr(layer, "lora_A", None) is not None:
        weight = weight + layer.lora_scale * layer.lora_B[at] @ layer.lora_A[at]
    if fast is not None and name in fast.weights:
        A, B = (part[index][at] for part in fast.weights[name])
        weight = weight + fast.scale * B @ A
    return weight


def one_network(network, v: Tensor, fast, name: str, index: int, x: int | None = None) -> Tensor:
    """What one feed-forward network makes of one token v (D,)."""
    gate = whole_matrix(network.gate, fast, f"{name}.gate", index, x)
    up = whole_matrix(network.up, fast, f"{name}.up", index, x)
    down = whole_matrix(network.down, fast, f"{name}.down", index, x)
    return down @ (F.silu(gate @ v) * (up @ v))


def token_by_token(mixture: Mixture, h: Tensor, fast: Fast | None, name: str) -> tuple[Tensor, set]:
    """The definition, without sorting: h (B, T, D) -> (B, T, D), and the experts in use."""
    rows, used, routed = [], set(), ROUTED[mixture.config.router]
    for b, row in enumerate(h):
        index = b * fast.sets() // len(h) if fast else 0
        for v in row:
            scores = whole_matrix(mixture.router, None, "", 0, None) @ v
            y = torch.zeros_like(v)
            for x, w in routed(scores, mixture.router_bias, mixture.config).items():
                y = y + w * one_network(mixture.experts, v, fast, f"{name}.experts", index, x)
                used.add(x)
            if mixture.shared is not None:
                y = y + one_network(mixture.shared, v, fast, f"{name}.shared", index)
            rows.append(y)
    return torch.stack(rows).view_as(h), used


FULL_RANK = replace(MEMORY, **CHOICES["form"]["full"])  # Fig. 7
# The memory, and its number of sets for four rows; 0: there is none.
CASES = [(MEMORY, 0), (MEMORY, 1), (MEMORY, 2), (MEMORY, 4), (FULL_RANK, 4)]


@pytest.mark.parametrize(("memory", "sets"), CASES)
@pytest.mark.parametrize("mixture_kind", MIXTURES)
def test_a_mixture_is_what_each_token_computes_with_its_own_experts(mixture_kind, memory, sets):
    """In value and in every gradient: input, router, experts, shared expert, outer LoRA and fast
    weights. Tokens choose and weigh their experts as published. Some experts have no rows: 12
    tokens of 3 choices do not fill 32."""
    model = toy_model(mixture_kind, num_experts=32, num_experts_per_tok=3)
    model = add_random_lora(model).requires_grad_(True)
    mixture, name = model.layers[2].mlp, "layers.2.mlp"
    h = torch.randn(4, 3, 32, generator=generator_for(8), dtype=torch.float64).requires_grad_()
    leaves = {"h": h, **dict(mixture.named_parameters())}
    fast = random_fast(model, memory, sets) if sets else None
    if sets:
        for matrix, pair in fast.weights.items():
            if matrix.startswith(name):
                leaves[f"A {matrix}"], leaves[f"B {matrix}"] = (p.requires_grad_() for p in pair)
    expected, used = token_by_token(mixture, h, fast, name)
    assert 1 < len(used) < 32
    y = mixture(h, fast, name)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    direction = torch.randn(h.shape, generator=generator_for(9), dtype=torch.float64)
    ours = torch.autograd.grad((y * direction).sum(), list(leaves.values()))
    theirs = torch.autograd.grad((expected * direction).sum(), list(leaves.values()))
    for leaf, one, other in zip(leaves, ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=lambda m, n=leaf: n + m)
        assert other.abs().max() > 0, leaf


def test_the_memory_adapts_experts_and_llada2s_shared_expert_but_no_router():
    """The published target names match LLaDA2's shared expert and miss LLaDA-MoE's."""
    own = ["experts.gate", "experts.up", "experts.down"]
    shared = ["shared.gate", "shared.up", "shared.down"]
    memory = Memory(fraction=0.5)
    for kind, names in (("llada-moe, rich", own), ("llada2", own + shared)):
        found = adapted_matrices(toy_model(kind), memory)
        assert list(found) == [f"layers.{i}.mlp.{name}" for i in (1, 2) for name in names]


def test_router_and_experts_share_one_draw_of_dropout(monkeypatch):
    """One draw for a token's x, one for the inner activations of its experts. PEFT draws for each
    matrix and each expert, which costs more and means the same."""
    model = add_random_lora(toy_model("llada-moe"), dropout=0.5).train()
    drawn = []
    monkeypatch.setattr(ExpertLinear, "drop", lambda layer, x: drawn.append(x.shape) or x)
    monkeypatch.setattr(Linear, "drop", None)  # the router's own must not be called
    model.layers[1].mlp(torch.randn(2, 5, 32, dtype=torch.float64))
    assert drawn == [(10, 32), (20, 16)]


@pytest.mark.parametrize("kind", ["llada-moe", "llada2"])
def test_clipping_looks_at_each_expert_of_each_set_alone(kind, monkeypatch):
    """As published, where each has tensors of its own. So is what is not finite left out."""
    model, (batch, anchor) = toy_model(kind), toy_batch(2, 12)
    memory, generator = replace(MEMORY, clip=1.0), generator_for(0)
    fast = init_fast(model, memory, 2, generator)
    [_, stage] = two_stages(anchor, batch.maskable, memory, generator)
    stage = stage._replace(h=prefix(model, batch, stage.masked, memory).detach())
    place = next(i for i, part in enumerate(fast.tensors()) if i % 2 and part.dim() == 4)  # a B
    grads = [torch.randn(part.shape, generator=generator).double() for part in fast.tensors()]
    grads[place][0, 1] *= 100
    grads[place][1, 2, 0, 0] = math.nan
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: grads)
    moved, _ = inner_step(model, batch, stage, fast, memory)
    expected, grad = fast.tensors()[place].clone(), grads[place]
    for n, x in product(*map(range, grad.shape[:2])):
        if (n, x) != (1, 2):
            expected[n, x] -= 0.3 * grad[n, x] * min(1.0, 1.0 / grad[n, x].norm().item())
    torch.testing.assert_close(moved.tensors()[place], expected, rtol=1e-9, atol=1e-10)
