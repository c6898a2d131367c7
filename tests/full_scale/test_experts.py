"""
test_experts.py: the mixture of experts. Sorting rows by expert, running them through one kernel and
putting them back must be the same as asking each token which experts it wants; gradients, too.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backbones import MIXTURES, SETTINGS, add_random_lora, random_fast, toy_batch, toy_model
from torch import Tensor

from data import Batch
from full_scale.configs import BackboneConfig
from full_scale.experts import ROUTERS, ExpertLinear, Mixture, by_expert
from memdlm import (
    Memory,
    Stage,
    adapted_matrices,
    each_norm,
    generator_for,
    init_fast,
    inner_loop,
    sgd,
    two_stages,
    with_prefixes,
)
from model import Fast, Linear

MEMORY = Memory(rank=4, alpha=8.0, lr=0.3, clip=0.5, fraction=0.5, scope="sample")


@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 0], [0, 0, 7], [0, 1, 0]], ids=str)
@pytest.mark.parametrize(
    ("rank", "inputs", "dtype", "fits"),
    [
        (4, 16, torch.float32, True),  # rows of 16 bytes are 4 numbers in float32 ...
        (8, 16, torch.bfloat16, True),  # ... and 8 in bfloat16
        (4, 16, torch.bfloat16, False),
        (3, 16, torch.float32, False),
        (4, 15, torch.float32, False),
        (4, 16, torch.float64, False),  # there is no kernel for float64
    ],
)
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


CONFIG = BackboneConfig(
    vocab_size=10,
    experts=12,
    experts_per_token=3,
    router_groups=4,
    router_groups_kept=2,
    routed_scale=2.5,
)


def softmax_routed(scores: list[float], bias: list[float]) -> dict[int, float]:
    """LLaDA-MoE: the weights are not renormalised, and a bias is part of them."""
    terms = [math.exp(score) for score in scores]
    value = [term / sum(terms) + b for term, b in zip(terms, bias)]
    best = sorted(range(12), key=lambda x: -value[x])[:3]
    return {x: value[x] for x in best}


def sigmoid_routed(scores: list[float], bias: list[float]) -> dict[int, float]:
    """LLaDA2: a group counts for its two best experts; the bias moves the choice and not the
    weights, which add up to the scale."""
    p = [1 / (1 + math.exp(-score)) for score in scores]
    value = [p[x] + bias[x] for x in range(12)]
    worth = [sum(sorted(value[3 * g : 3 * g + 3])[1:]) for g in range(4)]
    groups = sorted(range(4), key=lambda g: -worth[g])[:2]
    best = sorted((x for x in range(12) if x // 3 in groups), key=lambda x: -value[x])[:3]
    return {x: 2.5 * p[x] / sum(p[y] for y in best) for x in best}


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("router", "expected"), [("softmax", softmax_routed), ("sigmoid", sigmoid_routed)]
)
def test_routers_choose_and_weigh_as_published(router, expected, biased):
    """Expert -> weight of each of 40 tokens, against the definition."""
    scores = torch.randn(40, 12, generator=generator_for(3))
    bias = 0.3 * torch.randn(12, generator=generator_for(4)) if biased else None
    weights, chosen = ROUTERS[router](scores, bias, CONFIG)
    offset = bias.tolist() if biased else [0.0] * 12
    for row in range(40):
        routed = dict(zip(chosen[row].tolist(), weights[row].tolist()))
        assert routed == pytest.approx(expected(scores[row].tolist(), offset), abs=1e-6)


# ---- the mixture -----------------------------------------------------------------------------


def whole_matrix(layer: Linear, fast: Fast | None, name: str, index: int, x: int | None) -> Tensor:
    """W + outer B A + fast B A, (out, in), of one set of phi and of expert x (None: no stack)."""
    at = ... if x is None else x
    weight = layer.weight[at]
    if getattr(layer, "lora_A", None) is not None:
        weight = weight + layer.lora_scale * layer.lora_B[at] @ layer.lora_A[at]
    if fast is not None and name in fast.weights:
        A, B = fast.weights[name]
        weight = weight + fast.scale * B[index][at] @ A[index][at]
    return weight


def one_network(network, v: Tensor, fast, name: str, index: int, x: int | None = None) -> Tensor:
    """What one feed-forward network makes of one token v (D,)."""
    gate = whole_matrix(network.gate, fast, f"{name}.gate", index, x)
    up = whole_matrix(network.up, fast, f"{name}.up", index, x)
    down = whole_matrix(network.down, fast, f"{name}.down", index, x)
    return down @ (F.silu(gate @ v) * (up @ v))


def token_by_token(mixture: Mixture, h: Tensor, fast: Fast | None, name: str) -> tuple[Tensor, set]:
    """The definition, without sorting: h (B, T, D) -> (B, T, D), and the experts in use."""
    rows, used = [], set()
    route = ROUTERS[mixture.config.router]
    for b, row in enumerate(h):
        index = b * fast.sets() // len(h) if fast else 0
        for v in row:
            scores = whole_matrix(mixture.router, None, "", 0, None) @ v
            weights, chosen = route(scores[None], mixture.router_bias, mixture.config)
            y = torch.zeros_like(v)
            for w, x in zip(weights[0].double(), chosen[0].tolist()):
                y = y + w * one_network(mixture.experts, v, fast, f"{name}.experts", index, x)
                used.add(x)
            if mixture.shared is not None:
                y = y + one_network(mixture.shared, v, fast, f"{name}.shared", index)
            rows.append(y)
    return torch.stack(rows).view_as(h), used


SETS = {"no phi": 0, "one set": 1, "two rows share a set": 2, "a set per row": 4}


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
@pytest.mark.parametrize("mixture_kind", MIXTURES)
def test_a_mixture_is_what_each_token_computes_with_its_own_experts(mixture_kind, sets):
    """In value and in every gradient: input, router, experts, shared expert, outer LoRA and fast
    weights. Some experts have no rows: 8 tokens of 3 choices cannot fill 32."""
    model = toy_model(mixture_kind, num_experts=32, num_experts_per_tok=3)
    model = add_random_lora(model).requires_grad_(True)
    mixture, name = model.layers[2].mlp, "layers.2.mlp"
    h = torch.randn(4, 2, 32, generator=generator_for(8), dtype=torch.float64).requires_grad_()
    leaves = {"h": h, **dict(mixture.named_parameters())}
    fast = random_fast(model, MEMORY, sets) if sets else None
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


@pytest.mark.parametrize("change", [{"places": "ffn+attention"}, {"form": "full"}], ids=str)
@pytest.mark.parametrize("kind", ["llada", "llada-moe", "llada2"])
def test_other_kinds_of_memory_write_each_row_alone(kind, change):
    """Fig. 7 on experts: attention adapted, too, or a full-rank change of each matrix. Each row of
    a batch has the memory that it would have by itself."""
    model, (batch, anchor) = toy_model(kind), toy_batch(2, 12)
    memory = replace(MEMORY, **change)
    fast = init_fast(model, memory, 2, generator_for(1))
    assert any("attention" in name for name in fast.weights) == ("places" in change)
    stages = two_stages(anchor, batch.maskable, memory, generator_for(2))
    ready = with_prefixes(model, batch, stages, memory)
    together, _ = inner_loop(model, batch, ready, fast, memory)
    for i in range(2):
        row = slice(i, i + 1)
        own = fast.with_tensors([part[row] for part in fast.tensors()])
        part = [Stage(s.masked[row], s.scored[row], s.weight[row], None, s.h[row]) for s in ready]
        one = Batch(batch.x0[row], batch.maskable[row], None)
        alone, _ = inner_loop(model, one, part, own, memory)
        for got, expected in zip(together.tensors(), alone.tensors()):
            torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-9)
    assert all(B.any() for _, B in together.weights.values())


def test_router_and_experts_share_one_draw_of_dropout(monkeypatch):
    """One draw for a token's x, one for the inner activations of its experts. PEFT draws for each
    matrix and each expert, which costs more and means the same."""
    model = add_random_lora(toy_model("llada-moe"), dropout=0.5).train()
    drawn = []
    monkeypatch.setattr(ExpertLinear, "drop", lambda layer, x: drawn.append(x.shape) or x)
    monkeypatch.setattr(Linear, "drop", None)  # the router's own must not be called
    model.layers[1].mlp(torch.randn(2, 5, 32, dtype=torch.float64))
    assert drawn == [(10, 32), (20, 16)]


def test_dropout_drops_its_share_and_scales_the_rest():
    x, layer = torch.full((1001, 99), 3.0), ExpertLinear(2, 99, 5)
    layer.add_lora(rank=4, alpha=8.0, dropout=0.05)
    dropped = layer.drop(x)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.05, abs=0.005)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, x / 0.95))
    assert layer.eval().drop(x) is x


def test_clipping_looks_at_each_expert_of_each_set_alone():
    """As published, where each has tensors of its own. So is what is not finite left out."""
    generator = generator_for(0)
    p, grad = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    grad[0, 1] *= 100
    grad[1, 2, 0, 0] = math.nan
    memory, [norm] = Memory(lr=0.5, clip=1.0), each_norm([grad])
    new = sgd(p, grad, norm, torch.tensor([1.0, 1.0]), memory)
    expected = p.clone()
    for n, x in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        expected[n, x] -= 0.5 * grad[n, x] * min(1.0, 1.0 / grad[n, x].norm().item())
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", SETTINGS)
@torch.no_grad()
def test_masked_padding_changes_no_logit(kind, side):
    """Hidden padding is seen by no token, on whichever side, also by way of the experts."""
    model, ids = toy_model(kind, torch.float32), toy_batch(3, 10)[0].x0
    pad = (0, 5) if side == "right" else (5, 0)
    real = slice(0, 10) if side == "right" else slice(5, 15)
    padded, mask = F.pad(ids, pad, value=1), F.pad(torch.ones_like(ids), pad)
    logits = model(padded, attention_mask=mask)[:, real]
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-4)
    assert not torch.allclose(model(padded)[:, real], model(ids), atol=1e-2)  # it would count
