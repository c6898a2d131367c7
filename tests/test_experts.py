"""
test_experts.py: the mixture of experts. Sorting rows by expert, running them through one kernel and putting them back must be
the same as asking each token which experts it wants, and so must what is learnt from it, in both LoRAs.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from backbones import (
    MIXTURES,
    SETTINGS,
    add_random_lora,
    gradients,
    random_fast,
    toy_batch,
    toy_config,
    toy_model,
)
from torch import Tensor

import data
from memdlm import (
    METHODS,
    SCOPES,
    STRATEGIES,
    Anchor,
    Memory,
    Stage,
    generator_for,
    init_fast,
    inner_loop,
    make_states,
    mdlm_loss,
    memdlm_loss,
    sgd,
)
from model import (
    ROUTERS,
    Config,
    Fast,
    Linear,
    Mixture,
    grouped_matmul,
    loop_matmul,
    lora_input,
    matmul,
    pick_matmul,
    sigmoid_router,
    softmax_router,
    sort_by_expert,
)
from sample import Write, generate, write_prompt

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
MEMORY = Memory(rank=4, alpha=8.0, lr=0.3, clip=0.5, fraction=0.5, scope="sample")


# ---- two kernels ---------------------------------------------------------------------------------------------------------

COUNTS = {"all in use": [3, 2, 4], "empty ones": [0, 5, 0], "the last takes all": [0, 0, 7], "one row": [0, 1, 0]}


def rows_and_weights(counts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted rows (M, 16), weights (X, 8, 16), ends (X,) and a gradient for the output (M, 8)."""
    generator, rows = torch.Generator().manual_seed(0), sum(counts)
    shapes = ((rows, 16), (len(counts), 8, 16), (rows, 8))
    x, weight, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(counts).cumsum(0).int(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_loop_and_the_grouped_kernel_agree_in_value_and_gradient(counts, dtype):
    """Also where experts have no rows: their gradient is zero, not missing and not garbage."""
    x, weight, ends, grad = rows_and_weights(counts, dtype)
    results = []
    for kernel in (loop_matmul, grouped_matmul):
        y = kernel(x, weight, ends)
        results.append((y.detach(), *torch.autograd.grad(y, (x, weight), grad)))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, **close)
    assert all((results[0][2][i] == 0).all() for i, n in enumerate(counts) if n == 0)


def test_no_rows_at_all_are_nothing_and_have_a_gradient_of_zero():
    x, weight, ends, grad = rows_and_weights([0, 0, 0], torch.float32)
    y = matmul(x, weight, ends)
    assert y.shape == (0, 8)
    assert all((g == 0).all() for g in torch.autograd.grad(y, (x, weight), grad))


def test_the_kernel_is_taken_where_torch_has_it_and_rows_are_aligned(monkeypatch):
    """16 bytes are 4 float32 or 8 bfloat16 numbers; float64 has no kernel at all."""

    def picked(rank: int, inputs: int, dtype: torch.dtype, rows: int = 6):
        return pick_matmul(torch.zeros(rows, inputs, dtype=dtype), torch.zeros(3, rank, inputs, dtype=dtype))

    assert picked(4, 16, torch.float32) is grouped_matmul
    assert picked(8, 16, torch.bfloat16) is grouped_matmul
    assert picked(4, 16, torch.bfloat16) is loop_matmul  # a rank of 4 in bfloat16: rows of 8 bytes
    assert picked(3, 16, torch.float32) is loop_matmul
    assert picked(4, 15, torch.float32) is loop_matmul
    assert picked(4, 16, torch.float64) is loop_matmul
    assert picked(4, 16, torch.float32, rows=0) is loop_matmul
    monkeypatch.delattr(F, "grouped_mm")  # an older torch
    assert picked(4, 16, torch.float32) is loop_matmul


@pytest.mark.parametrize("rank", [3, 4], ids=["misaligned rank", "aligned rank"])
@pytest.mark.parametrize("scope", list(SCOPES))
@pytest.mark.parametrize("kind", MIXTURES)
def test_either_kernel_leads_to_the_same_memory_loss_and_gradients(kind, scope, rank, monkeypatch):
    """MemDLM's whole loss in float32: experts, outer LoRA and fast weights. With a rank of 3 some products can run in the
    loop only, between others in the kernel."""
    batch, anchor = toy_batch()
    results, used = [], set()

    def forced(kernel):
        def pick(x, weight):
            chosen = kernel if pick_matmul(x, weight) is grouped_matmul else loop_matmul
            used.add((kernel, chosen))
            return chosen

        return pick

    for kernel in (loop_matmul, grouped_matmul):
        monkeypatch.setattr("model.pick_matmul", forced(kernel))
        model = add_random_lora(toy_model(kind, torch.float32), rank)
        stages = STRATEGIES["consistent"](anchor, batch.maskable, MEMORY, generator_for(0))
        fast = init_fast(model, MEMORY, SCOPES[scope](len(batch.x0)), generator_for(1))
        loss, inner = memdlm_loss(model, batch, anchor, stages, fast, MEMORY)
        loss.backward()
        results.append((loss.detach(), inner, gradients(model)))
    assert (grouped_matmul, grouped_matmul) in used
    assert results[0][2].keys() == results[1][2].keys()
    assert len(results[0][2]) == 2 * len([name for name in results[0][2] if name.endswith("lora_A")]) > 0
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-4)


# ---- routing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_softmax_router_takes_the_most_probable_experts_as_they_are(bias):
    """LLaDA-MoE: not renormalised; a bias, where there is one, is part of the weight too."""
    config = Config(10, experts=6, experts_per_token=2)
    scores, offset = torch.randn(20, 6, generator=generator_for(1)), 0.3 * torch.randn(6, generator=generator_for(2))
    weights, chosen = softmax_router(scores, offset if bias else None, config)
    for row in range(20):
        terms = [math.exp(s) for s in scores[row].tolist()]
        value = [term / sum(terms) + (offset[x].item() if bias else 0) for x, term in enumerate(terms)]
        best = sorted(range(6), key=lambda x: -value[x])[:2]
        assert dict(zip(chosen[row].tolist(), weights[row].tolist())) == pytest.approx({x: value[x] for x in best}, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_sigmoid_router_chooses_groups_then_experts_and_renormalises(bias):
    """LLaDA2: a group counts for its two best; the bias moves the choice and never the weight; weights add up to 2.5."""
    config = Config(10, experts=12, experts_per_token=3, router_groups=4, router_groups_kept=2, routed_scale=2.5)
    scores, offset = torch.randn(40, 12, generator=generator_for(3)), torch.randn(12, generator=generator_for(4))
    weights, chosen = sigmoid_router(scores, offset if bias else None, config)
    for row in range(40):
        p = [1 / (1 + math.exp(-s)) for s in scores[row].tolist()]
        value = [p[x] + (offset[x].item() if bias else 0) for x in range(12)]
        groups = sorted(range(4), key=lambda g: -sum(sorted(value[3 * g : 3 * g + 3])[1:]))[:2]
        best = sorted((x for g in groups for x in range(3 * g, 3 * g + 3)), key=lambda x: -value[x])[:3]
        expected = {x: 2.5 * p[x] / sum(p[y] for y in best) for x in best}
        assert dict(zip(chosen[row].tolist(), weights[row].tolist())) == pytest.approx(expected, abs=1e-6)


def test_routers_decide_in_float32_whatever_the_model_computes_in():
    """In bfloat16 these two scores would be one number, and the choice an accident."""
    scores, config = torch.tensor([[1.0, 1.001, 0.0, 0.0]]), Config(10, experts=4, experts_per_token=1)
    for router in ROUTERS.values():
        weights, chosen = router(scores, None, config)
        assert chosen.tolist() == [[1]]
        assert weights.dtype == torch.float32


@pytest.mark.parametrize("sets", [1, 2, 3, 6])
def test_rows_are_sorted_by_expert_and_then_by_set_of_fast_weights(sets):
    """Each row (token, choice) appears once; ends bound the experts, set_ends the sets within; `place` undoes the order."""
    batch, length, experts, k = 6, 5, 7, 3
    order = torch.rand(batch * length, experts - 1, generator=generator_for(0)).argsort(1)[:, :k]
    chosen = order + (order >= 4)  # nobody wants expert 4
    routes = sort_by_expert(chosen, experts, torch.arange(batch * length) // length * sets // batch, sets)
    assert routes.place.sort().values.tolist() == list(range(batch * length * k))
    expected = sorted(
        (x, token // length * sets // batch, token, choice)
        for token, row in enumerate(chosen.tolist())
        for choice, x in enumerate(row)
    )
    assert routes.token.tolist() == [token for _, _, token, _ in expected]
    assert routes.place.view(-1, k)[[t for _, _, t, _ in expected], [c for *_, c in expected]].tolist() == [
        *range(len(expected))
    ]
    for ends, key in ((routes.ends, lambda e: e[0]), (routes.set_ends, lambda e: e[0] * sets + e[1])):
        counts = [sum(key(e) == i for e in expected) for i in range(len(ends))]
        assert ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
        assert ends.dtype == torch.int32
    assert len(routes.ends) == experts
    assert len(routes.set_ends) == experts * sets


# ---- the mixture ---------------------------------------------------------------------------------------------------------


def whole_matrix(layer: Linear, fast: Fast | None, name: str, index: int, x: int | None) -> Tensor:
    """W + outer B A + fast B A of one expert and one set, as a matrix."""
    at = (lambda part: part) if x is None else (lambda part: part[x])
    weight = at(layer.weight)
    if layer.lora_A is not None:
        weight = weight + layer.lora_scale * at(layer.lora_B) @ at(layer.lora_A)
    if fast is not None and name in fast.weights:
        A, B = (at(part[index]) for part in fast.weights[name])
        weight = weight + fast.scale * B @ A
    return weight


def one_network(network, v: Tensor, fast: Fast | None, name: str, index: int, x: int | None = None) -> Tensor:
    gate, up, down = (whole_matrix(getattr(network, p), fast, f"{name}.{p}", index, x) for p in ("gate", "up", "down"))
    return down @ (F.silu(gate @ v) * (up @ v))


def token_by_token(mixture: Mixture, h: Tensor, fast: Fast | None, name: str) -> tuple[Tensor, set]:
    """The definition, without any of the sorting: h (B, T, D) -> (B, T, D), and which experts were used."""
    rows, used = [], set()
    for b, row in enumerate(h):
        for v in row:
            index = b * fast.sets() // len(h) if fast else 0
            scores = whole_matrix(mixture.router, None, "", 0, None) @ v
            weights, chosen = ROUTERS[mixture.config.router](scores[None], mixture.router_bias, mixture.config)
            y = sum(
                w.double() * one_network(mixture.experts, v, fast, f"{name}.experts", index, x)
                for w, x in zip(weights[0], chosen[0].tolist())
            )
            used.update(chosen[0].tolist())
            if mixture.shared is not None:
                y = y + one_network(mixture.shared, v, fast, f"{name}.shared", index)
            rows.append(y)
    return torch.stack(rows).view_as(h), used


@pytest.mark.parametrize("sets", [0, 1, 2, 4], ids=["no phi", "one set", "two windows share a set", "a set per sample"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_what_each_token_computes_with_its_own_experts(kind, sets):
    """In value and in every gradient: input, router, experts, shared expert, outer LoRA, fast weights. Some experts are
    empty: 6 tokens cannot fill 32."""
    changes = {"num_experts": 32, "num_experts_per_tok": 3} | ({"n_group": 4} if kind == "llada2" else {})
    model = add_random_lora(toy_model(kind, **changes)).requires_grad_(True)
    mixture, name = model.layers[2].mlp, "layers.2.mlp"
    fast, leaves = None, {}
    if sets:
        fast = random_fast(model, MEMORY, sets)
        mine = {n: pair for n, pair in fast.weights.items() if n.startswith(name)}
        assert len(mine) == (6 if kind == "llada2" else 3)  # LLaDA2's shared expert has fast weights, LLaDA-MoE's has not
        leaves = {f"phi {n} {i}": p.requires_grad_() for n, pair in mine.items() for i, p in enumerate(pair)}
    h = torch.randn(4, 2, 32, generator=generator_for(8), dtype=torch.float64).requires_grad_()
    leaves |= {"h": h} | dict(mixture.named_parameters())
    direction = torch.randn(h.shape, generator=generator_for(9), dtype=torch.float64)
    expected, used = token_by_token(mixture, h, fast, name)
    assert 1 < len(used) < 32
    y = mixture(h, fast, name)
    torch.testing.assert_close(y, expected, **TIGHT)
    sides = [torch.autograd.grad((out * direction).sum(), list(leaves.values()), allow_unused=True) for out in (y, expected)]
    for leaf, one, other in zip(leaves, *sides):
        other = torch.zeros_like(leaves[leaf]) if other is None else other
        torch.testing.assert_close(one, other, msg=lambda text, leaf=leaf: f"{leaf}: {text}", rtol=1e-6, atol=1e-9)
        assert other.abs().max() > 0, leaf


@pytest.mark.parametrize("sets", [1, 2, 4])
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_what_is_read_at_some_places_is_what_all_places_give(kind, sets):
    """`read` runs the last mixture on the masked rows alone, which are not spread evenly over the sets of phi. Values and
    gradients are those of the whole stack."""
    model, (batch, anchor) = add_random_lora(toy_model(kind)), toy_batch()
    fast = random_fast(model, MEMORY, sets)
    leaves = [p.requires_grad_() for pair in fast.weights.values() for p in pair]
    leaves += [p for p in model.parameters() if p.requires_grad]
    h = model.embedding(batch.x0)
    direction = torch.randn(int(anchor.masked.sum()), 32, generator=generator_for(1), dtype=torch.float64)
    results = []
    for y in (model.read(h, 0, anchor.masked, None, fast), model.run(h, 0, model.config.layers, None, fast)[anchor.masked]):
        results.append((y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_clipping_looks_at_each_expert_of_each_set_alone():
    """The published code clips each fast tensor by itself, and there each expert has tensors of its own. What is not finite
    is left out as narrowly: a set by its loss, an expert by its gradient."""
    generator = generator_for(0)
    p, grad = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    grad[0, 1] *= 100
    grad[1, 2, 0, 0] = math.nan
    memory = Memory(lr=0.5, clip=1.0)
    new = sgd(p, grad, torch.tensor([1.0, 1.0]), memory)
    for n in range(2):
        for x in range(3):
            if (n, x) == (1, 2):
                assert torch.equal(new[n, x], p[n, x])
                continue
            factor = min(1.0, 1.0 / (grad[n, x].norm().item() + 1e-12))
            torch.testing.assert_close(new[n, x], p[n, x] - 0.5 * factor * grad[n, x], **TIGHT)
    lost = sgd(p, grad, torch.tensor([math.inf, 1.0]), memory)
    assert torch.equal(lost[0], p[0])
    assert torch.equal(lost[1], new[1])


# ---- the whole stack -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("method", ["mdlm", "memdlm"])
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_recomputing_activations_changes_neither_loss_nor_gradients(kind, method, dropout):
    """--checkpoint-activations spends time for memory and nothing else: dropout draws the same numbers the second time."""
    batch, results = toy_batch()[0], []
    for checkpointing in (False, True):
        model = add_random_lora(toy_model(kind), dropout=dropout).train()
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        loss = METHODS[method](model, batch, MEMORY, generator_for(4))
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    plain = METHODS[method](add_random_lora(toy_model(kind)).train(), batch, MEMORY, generator_for(4))
    assert (plain.item() == pytest.approx(results[0][0].item(), rel=1e-12)) == (dropout == 0)


def one_row(batch: data.Batch, anchor: Anchor, stages: list[Stage], fast: Fast, rows: list[int]) -> tuple:
    """These rows of everything, with each its own set of fast weights."""
    picked = [Stage(s.masked[rows], None if s.following is None else s.following[rows], s.t[rows]) for s in stages]
    weights = {name: (A[rows], B[rows]) for name, (A, B) in fast.weights.items()}
    part = data.Batch(batch.x0[rows], batch.maskable[rows], None)
    return part, Anchor(anchor.t[rows], anchor.masked[rows]), picked, Fast(weights, fast.scale)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_under_scope_sample_a_row_does_not_depend_on_its_batch(kind):
    """Order and size of the batch change neither what is written nor loss nor gradient; one set for the whole batch, as
    published, makes the batch a part of the method."""
    batch, anchor = toy_batch()
    model = add_random_lora(toy_model(kind))
    stages = STRATEGIES["consistent"](anchor, batch.maskable, MEMORY, generator_for(0))
    fast = init_fast(model, MEMORY, 4, generator_for(1))

    def outcome(groups: list[list[int]], one_set: bool = False) -> tuple:
        """Row -> what is written for it; loss and gradients summed over the rows."""
        model.zero_grad()
        written, total = {}, 0.0
        for rows in groups:
            part, at, picked, phi = one_row(batch, anchor, stages, fast, rows)
            phi = Fast({n: (A[:1], B[:1]) for n, (A, B) in phi.weights.items()}, phi.scale) if one_set else phi
            states = make_states(model, part, picked, MEMORY)
            end = inner_loop(model, part, states, phi, MEMORY)[0]
            written |= {row: [B[0 if one_set else i] for _, B in end.weights.values()] for i, row in enumerate(rows)}
            loss, _ = memdlm_loss(model, part, at, picked, phi, MEMORY, norm="sequence")
            (loss * len(rows)).backward()
            total += loss.item() * len(rows)
        return [written[row] for row in range(4)], total, gradients(model)

    together = outcome([[0, 1, 2, 3]])
    for groups in ([[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        torch.testing.assert_close(outcome(groups), together, rtol=1e-5, atol=1e-7)
    alone, shared = outcome([[0], [1], [2], [3]], one_set=True), outcome([[0, 1, 2, 3]], one_set=True)
    assert abs(alone[1] - shared[1]) > 1e-6


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_reading_and_answering_do_not_depend_on_the_batch(kind):
    """Each prompt is written into weights of its own, from draws of its own; answers come out the same one by one."""
    model, prompts = add_random_lora(toy_model(kind)), toy_batch()[0].x0
    write = Write(memory=MEMORY)
    options = {"plan": "llada2" if kind == "llada2" else "llada", "steps": 2, "block_length": 4}
    fast = write_prompt(model, prompts, write, seed=0)
    answers = generate(model, prompts, 6, fast=fast, **options)
    for i, prompt in enumerate(prompts):
        own = write_prompt(model, prompt[None], write, seed=0, numbers=[i])
        mine = {name: (A[i : i + 1], B[i : i + 1]) for name, (A, B) in fast.weights.items()}
        torch.testing.assert_close(own.weights, mine, rtol=1e-5, atol=1e-7)
        assert torch.equal(generate(model, prompt[None], 6, fast=own, **options)[0], answers[i])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(SETTINGS))
@torch.no_grad()
def test_masked_padding_changes_no_logit(kind, side):
    """In float32, in all architectures: hidden padding is seen by no token, on whichever side, also by way of the experts."""
    model, ids = toy_model(kind, torch.float32), toy_batch(3, 10)[0].x0
    pad = (0, 5) if side == "right" else (5, 0)
    logits = model(F.pad(ids, pad, value=1), attention_mask=F.pad(torch.ones_like(ids), pad))
    torch.testing.assert_close(F.pad(logits, (0, 0, *(-p for p in pad))), model(ids), rtol=0, atol=1e-4)
    seen = F.pad(model(F.pad(ids, pad, value=1)), (0, 0, *(-p for p in pad)))
    assert not torch.allclose(seen, model(ids), atol=1e-2)  # without the mask the padding would count


def test_the_toys_have_what_they_are_to_test():
    """Dense layers, shared experts, biases, groups, fused projections, partial rotation, grouped-query attention."""
    rich, llada2, dense = toy_config("llada-moe, rich"), toy_config("llada2"), toy_config("llada")
    assert rich.moe_layers == llada2.moe_layers == (1, 2)
    assert rich.shared_ffn > 0 < llada2.shared_ffn
    assert rich.router_bias
    assert llada2.router_bias
    assert llada2.router_groups_kept < llada2.router_groups
    assert (rich.rotary_fraction, llada2.rotary_fraction, dense.rotary_fraction) == (0.5, 0.5, 1.0)
    assert llada2.fused_qkv
    assert dense.kv_heads < dense.heads


# ---- nothing to read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mdlm", "memdlm"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_batch_without_a_masked_token_costs_nothing_and_teaches_nothing(kind, method):
    """A short answer draws no mask now and then (t near 0). The last mixture then gets no rows at all: the loss must be
    zero, and so must every gradient, not an error that a resumed run would meet again."""
    model, (batch, anchor) = add_random_lora(toy_model(kind)), toy_batch()
    nothing = Anchor(anchor.t, torch.zeros_like(anchor.masked))
    if method == "mdlm":
        loss = mdlm_loss(model, batch, nothing)
    else:
        stages, fast = (
            STRATEGIES["consistent"](nothing, batch.maskable, MEMORY, generator_for(0)),
            random_fast(model, MEMORY, 4),
        )
        loss, inner = memdlm_loss(model, batch, nothing, stages, fast, MEMORY)
        assert (inner == 0).all()
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_dropout_keeps_the_mean_and_drops_the_share_it_is_asked_to():
    """On a CPU the outer LoRA's dropout is made of 16-bit numbers: its share and its scale must be those of F.dropout."""
    layer = Linear(8, 8)
    layer.add_lora(4, 8.0, 0.05)
    x = torch.ones(500, 800, requires_grad=True)
    y = lora_input(x, layer.train())
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.95))
    assert (y == 0).double().mean().item() == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / x.numel()) ** 0.5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())
    assert lora_input(x, layer.eval()) is x
