"""
test_memory.py: the method. Masked diffusion (Sec. 2.1), the inner loop that writes a memory and the outer loop that learns
what the memory does not hold (Sec. 3), each against the formula written out the slow way.

golden/memory_tables.json holds numbers recorded from the paper's published code.
"""

import json
import math
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from data import Batch
from memdlm import (
    METHODS,
    SCOPES,
    Anchor,
    Memory,
    corrupt,
    denoising_loss,
    draw_anchor,
    draw_pre_anchor,
    first_adapted_layer,
    generator_for,
    init_fast,
    inner_loop,
    masked_nll,
    mdlm_loss,
    memdlm_loss,
    memory_start,
    pre_anchor_count,
    sgd,
    stage_loss,
    train_step,
)
from model import Fast

GOLDEN = json.loads((Path(__file__).parent / "golden" / "memory_tables.json").read_text())
TIGHT = {"rtol": 0.0, "atol": 1e-9}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the slow way: full forwards on explicit matrices W + scale * B A ------------------------------------------------------


def slow_nll(model, weights: dict, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
    """-log p(x0) at every position (B, T), zero where not masked, from logits of the whole sequence."""
    ids = batch.x0.clone()
    ids[masked] = data.MASK
    logits = functional_call(model, weights, (ids, batch.attention_mask))
    return -logits.log_softmax(-1).gather(2, batch.x0[..., None])[..., 0] * masked


def slow_matrices(model, fast: dict, scale: float) -> dict:
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") + scale * B @ A for name, (A, B) in fast.items()}


def slow_inner_loop(model, batch, masks, fast: Fast, memory: Memory, weighted=True, create_graph=False) -> dict:
    """SGD on one shared set: {name: (A, B)}. With create_graph, a graph through all steps: the second-order memory."""
    weights = {name: (A[0], B[0]) for name, (A, B) in fast.weights.items()}
    for masked in masks:
        leaves = [p if create_graph and p.requires_grad else p.detach().requires_grad_() for ab in weights.values() for p in ab]
        weights = dict(zip(weights, zip(leaves[::2], leaves[1::2])))
        nll = slow_nll(model, slow_matrices(model, weights, fast.scale), batch, masked)
        t = masked.sum(1) / batch.maskable.sum(1)  # in float32, as the method has it: noise levels are not exact numbers
        w = 1 / (t + 1e-6) if weighted else torch.ones(len(masked))
        loss = (w.double()[:, None] * nll).sum() / masked.sum()
        moved = []
        for p, g in zip(leaves, torch.autograd.grad(loss, leaves, create_graph=create_graph)):
            norm = g.norm().item()
            moved.append(p - memory.lr * g * (memory.clip / norm if 0 < memory.clip < norm else 1.0))
        weights = dict(zip(weights, zip(moved[::2], moved[1::2])))
    return weights


def slow_outer_loss(model, batch, anchor: Anchor, weights: dict) -> torch.Tensor:
    w = (1 / (anchor.t + 1e-6)).double()  # t and w are float32 numbers
    return (w[:, None] * slow_nll(model, weights, batch, anchor.masked)).sum() / batch.maskable.sum()


def one_row(batch: Batch, i: int) -> Batch:
    hidden = None if batch.attention_mask is None else batch.attention_mask[i : i + 1]
    return Batch(batch.x0[i : i + 1], batch.maskable[i : i + 1], hidden)


def one_set(fast: Fast, i: int) -> Fast:
    return Fast({name: (A[i : i + 1], B[i : i + 1]) for name, (A, B) in fast.weights.items()}, fast.scale)


def prefix(model, batch, masked, memory) -> torch.Tensor:
    cut = memory_start(model, memory)
    with torch.no_grad():
        return model.run(model.embedding(corrupt(batch.x0, masked)), 0, cut, batch.attention_mask)


def states_of(model, batch, masks, memory) -> list:
    return [(masked, prefix(model, batch, masked, memory)) for masked in masks]


def assert_fast_equal(got: Fast, expected: dict, index: int = 0, note: str = "") -> None:
    for name, (A, B) in expected.items():
        torch.testing.assert_close(got.weights[name][0][index], A, **TIGHT, msg=f"{note} {name}.A")
        torch.testing.assert_close(got.weights[name][1][index], B, **TIGHT, msg=f"{note} {name}.B")


def gradients(model, loss: torch.Tensor) -> dict:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.fixture
def pre_masked(batch, anchor):
    return draw_pre_anchor(anchor.masked, batch.maskable, 1.5, seeded(5))


# ---- the forward process (Eq. 1) -------------------------------------------------------------------------------------------


def test_share_of_masked_tokens_is_t():
    """Each maskable token is masked with probability t (Eq. 1). Per row of 4000 tokens the share must lie within five
    standard deviations of t; rows cover both ends of (0, 1)."""
    maskable = torch.ones(200, 4000, dtype=torch.bool)
    t, masked = draw_anchor(maskable, seeded())
    error = (masked.double().mean(1) - t).abs() / (t * (1 - t) / 4000).sqrt()
    assert error.max() < 5, f"off by {error.max():.1f} standard deviations"
    assert t.min() < 0.05
    assert t.max() > 0.95


def test_t_is_uniform_and_never_below_eps():
    """t ~ U(eps, 1): the weight 1/t would be without bound at t = 0."""
    t = draw_anchor(torch.ones(20000, 1, dtype=torch.bool), seeded(), eps=0.1).t
    assert t.min() >= 0.1
    assert t.max() <= 1.0
    share = torch.histc(t, 9, 0.1, 1.0) / len(t)
    assert (share - 1 / 9).abs().max() < 5 * math.sqrt(1 / 9 * 8 / 9 / len(t))


def test_prompt_is_never_masked(batch):
    """Asymmetric masking (Sec. 2.1): only the response is. A masked prompt would change the task from answering to guessing."""
    for seed in range(50):
        masked = draw_anchor(batch.maskable, seeded(seed)).masked
        assert not (masked & ~batch.maskable).any()
    assert masked.any()


def test_corrupt_changes_masked_tokens_only(batch, anchor):
    """x_t is x_0 with [MASK] at masked places, and x_0 itself is left as it was: it is still the target."""
    before = batch.x0.clone()
    x_t = corrupt(batch.x0, anchor.masked)
    assert (x_t[anchor.masked] == data.MASK).all()
    assert torch.equal(x_t[~anchor.masked], batch.x0[~anchor.masked])
    assert torch.equal(batch.x0, before)


# ---- the loss (Eq. 2) --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_on_masked_rows_is_the_loss_from_full_logits(model, batch, anchor):
    """The head runs on masked positions only; picking rows and targets in different orders would pair the wrong ones."""
    h = model.run(model.embedding(corrupt(batch.x0, anchor.masked)), 0, 4)
    expected = slow_nll(model, {}, batch, anchor.masked)[anchor.masked]
    torch.testing.assert_close(masked_nll(model, h, batch.x0, anchor.masked), expected, **TIGHT)


@torch.no_grad()
def test_denoising_loss_is_weighted_nll_over_maskable_tokens(model, batch, anchor):
    """sum over masked tokens of nll / (t + 1e-6), divided by the number of *maskable* tokens of the batch, not of masked
    ones (Eq. 2 and the published code). Written out token by token."""
    total = 0.0
    for i, place in anchor.masked.nonzero().tolist():
        logits = model(corrupt(batch.x0, anchor.masked)[i : i + 1])[0, place]
        total += (1 / (anchor.t[i].item() + 1e-6)) * -logits.log_softmax(0)[batch.x0[i, place]].item()
    expected = total / batch.maskable.sum().item()
    assert mdlm_loss(model, batch, anchor).item() == pytest.approx(expected, rel=1e-6)  # the weight 1/t is a float32


@torch.no_grad()
@pytest.mark.parametrize("index", range(10))
def test_loss_weight_is_the_published_schedule(model, batch, index):
    """w(t) = 1 / (t + 1e-6) for the linear schedule alpha = 1 - t, against values from the published code (which takes t back
    from a float32 alpha, hence five digits)."""
    t, weight = (GOLDEN["linear_scheduler"][key][index] for key in ("t", "weight"))
    masked = torch.zeros_like(batch.maskable[:1])
    masked[0, 7] = True
    row = one_row(batch, 0)
    nll = slow_nll(model, {}, row, masked).sum()
    loss = mdlm_loss(model, row, Anchor(torch.tensor([t]), masked))
    assert (loss * row.maskable.sum() / nll).item() == pytest.approx(weight, rel=2e-5)


@torch.no_grad()
def test_expected_loss_is_the_any_order_likelihood(model):
    """Why the weight is 1/t (MDLM, Sahoo et al. 2024): with it, the loss averaged over t and masks equals the negative log
    likelihood of predicting the tokens one by one, averaged over all orders. Any other weight breaks the equality.

    Three tokens, so that all 7 masks and all 3! orders can be gone through. The mean over t is a Gauss-Legendre sum, exact
    for the polynomials that p(mask | t) / t are; what is left is the 1e-6 in the weight.
    """
    batch = Batch(torch.tensor([[11, 300, 42]]), torch.ones(1, 3, dtype=torch.bool), None)
    nodes, shares = np.polynomial.legendre.leggauss(6)
    masks = [torch.tensor([mask]) for mask in product([False, True], repeat=3)]
    expected_loss = 0.0
    for t, share in zip((nodes + 1) / 2, shares / 2):
        for masked in masks:
            k = int(masked.sum())
            anchor = Anchor(torch.tensor([t], dtype=torch.float64), masked)
            expected_loss += share * t**k * (1 - t) ** (3 - k) * mdlm_loss(model, batch, anchor).item()
    any_order = 0.0
    for order in permutations(range(3)):
        masked = torch.ones(1, 3, dtype=torch.bool)
        for place in order:
            any_order += slow_nll(model, {}, batch, masked)[0, place].item() / math.factorial(3)
            masked[0, place] = False
    assert expected_loss == pytest.approx(any_order / 3, rel=1e-4)  # the loss is per maskable token


@torch.no_grad()
def test_batch_with_nothing_masked_has_loss_zero(model, batch):
    """At a small t it happens that no token is masked. The loss must then be 0, not 0 / 0."""
    nothing = Anchor(torch.full((4,), 0.001), torch.zeros_like(batch.maskable))
    assert mdlm_loss(model, batch, nothing) == 0


# ---- the pre-anchor (Eq. 6) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_pre_anchor_contains_the_anchor_and_stays_in_maskable(batch, scale):
    """x_tpre is the anchor, masked *further*: stage 1 may show less than stage 2, never something else (Sec. 3). And no
    prompt token may be hidden."""
    for seed in range(30):
        masked = draw_anchor(batch.maskable, seeded(seed)).masked
        pre = draw_pre_anchor(masked, batch.maskable, scale, seeded(seed + 100))
        assert not (masked & ~pre).any(), "a token of the anchor is visible in the pre-anchor"
        assert not (pre & ~batch.maskable).any(), "a token outside the response is masked"
        if scale == 1.0:
            assert torch.equal(pre, masked)


def test_pre_anchor_count_equals_the_published_code():
    """int(n * min(1, 1.5 r)) in float32: in float64 some counts would be one off, and replays of the published code fail."""
    wrong = [
        row for row in GOLDEN["pmc_pre_anchor_count"]["rows"] if pre_anchor_count(row[2], row[1], start_scale=row[0]) != row[3]
    ]
    assert not wrong, f"{len(wrong)} rows differ, the first (scale, maskable, anchor, pre-anchor): {wrong[0]}"


def test_pre_anchor_masks_as_many_tokens_as_counted():
    """Each row of a batch has a count of its own; checked on the recorded counts, 100 rows of different sizes at once."""
    rows = [row for row in GOLDEN["pmc_pre_anchor_count"]["rows"] if row[0] == 1.5][::5]
    width = max(n for _, n, _, _ in rows) + 3
    maskable = torch.arange(width)[None] < torch.tensor([[n] for _, n, _, _ in rows])
    masked = torch.arange(width)[None] < torch.tensor([[k] for _, _, k, _ in rows])
    pre = draw_pre_anchor(masked, maskable, 1.5, seeded())
    assert pre.sum(1).tolist() == [count for *_, count in rows]


def test_pre_anchor_hides_every_further_token_equally_often():
    """Which tokens are masked further is a fair draw; a fixed order would teach the memory one end of the answer only."""
    maskable, masked = torch.ones(4000, 12, dtype=torch.bool), torch.zeros(4000, 12, dtype=torch.bool)
    masked[:, [1, 4, 6, 9]] = True  # 4 of 12, so that the pre-anchor masks 2 of the other 8
    further = (draw_pre_anchor(masked, maskable, 1.5, seeded()) & ~masked).double().mean(0)[~masked[0]]
    assert (further - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_adapted_layers_equal_the_published_code():
    """The last int(n * (1 - fraction)) .. n - 1 (Sec. 4.1: 10% of 16 layers are 2). Rows outside the flag's range 0 to 1,
    and those without any adapted layer, are left out."""
    table = [(n, f, first) for n, f, first in GOLDEN["layer_selection"]["rows"] if 0 < f <= 1 and first < n]
    assert len(table) > 80
    for n, fraction, first in table:
        assert first_adapted_layer(n, fraction) == first, f"{n} layers, fraction {fraction}"
    assert [first_adapted_layer(n, 0.1) for n in (16, 20)] == [14, 18]


# ---- phi_0 and one SGD step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_fresh_memory_sits_on_the_last_feed_forward_networks(model, memory, fraction):
    """A Kaiming-uniform, B = 0, on gate, up and down of the last layers and nowhere else (Sec. 4.1), each set its own draw."""
    fast = init_fast(model, replace(memory, fraction=fraction), 3, seeded())
    layers = range(4 - int(4 * fraction), 4)
    assert set(fast.weights) == {f"layers.{i}.mlp.{part}" for i in layers for part in ("gate", "up", "down")}
    assert fast.scale == memory.alpha / memory.rank
    for name, (A, B) in fast.weights.items():
        out, inputs = model.get_parameter(f"{name}.weight").shape
        assert A.shape == (3, memory.rank, inputs), name
        assert B.shape == (3, out, memory.rank), name
        assert not B.any(), name
        bound = inputs**-0.5
        assert 0.9 * bound < A.abs().max() <= bound, name
        assert not torch.equal(A[0], A[1]), f"{name}: two samples share one draw"


def test_sgd_clips_each_tensor_of_each_set_alone():
    """Published ablation: clipping per tensor .684, globally .632. Here set 0 is clipped (norm 5 to 1) and set 1 (norm 0.5)
    is not, though they are one tensor."""
    memory = Memory(lr=0.1, clip=1.0)
    grad = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    moved = sgd(torch.zeros(2, 1, 2), grad, torch.ones(2), memory)
    torch.testing.assert_close(moved, torch.tensor([[[-0.06, -0.08]], [[-0.03, -0.04]]]))


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_clip_of_zero_or_less_means_no_clipping(clip):
    """As in the published code. Taken literally, a limit of 0 would stop the memory from learning anything."""
    grad = torch.tensor([[[300.0, 400.0]]])
    moved = sgd(torch.zeros(1, 1, 2), grad, torch.ones(1), Memory(lr=0.1, clip=clip))
    torch.testing.assert_close(moved, -0.1 * grad)


def test_inner_step_is_sgd_with_clipping_where_it_is_due(model, batch, anchor, memory):
    """One stage by hand, with a limit that some tensors' gradients exceed and others do not. Fails when the norm is taken
    over all tensors together, or when a gradient below the limit is scaled *up* to it."""
    fast = init_fast(model, memory, 1, seeded())
    fast = Fast({name: (A, B + 0.1) for name, (A, B) in fast.weights.items()}, fast.scale)  # so that A has a gradient too
    leaves = {name: [p[0].clone().requires_grad_() for p in pair] for name, pair in fast.weights.items()}
    nll = slow_nll(model, slow_matrices(model, leaves, fast.scale), batch, anchor.masked)
    t = anchor.masked.sum(1) / batch.maskable.sum(1)
    loss = ((1 / (t + 1e-6)).double()[:, None] * nll).sum() / anchor.masked.sum()
    grads = torch.autograd.grad(loss, [p for pair in leaves.values() for p in pair])
    clip = sorted(g.norm().item() for g in grads)[len(grads) // 2] * 1.0001
    expected = [
        (p - 0.3 * g * min(1.0, clip / g.norm().item())).detach()
        for p, g in zip([p for pair in leaves.values() for p in pair], grads)
    ]
    assert {g.norm().item() > clip for g in grads} == {True, False}, "the limit must bind on some tensors only"
    got, losses = inner_loop(
        model, batch, states_of(model, batch, [anchor.masked], memory), fast, replace(memory, clip=clip, lr=0.3)
    )
    torch.testing.assert_close(losses, loss.detach().view(1, 1), **TIGHT)
    assert_fast_equal(got, dict(zip(leaves, zip(expected[::2], expected[1::2]))))


# ---- the inner loop (Eqs. 6-8) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False], ids=["w = 1/t", "w = 1"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_stages_equal_the_slow_way(model, batch, anchor, pre_masked, memory, fraction, clip, weighted):
    """phi_2 from cached prefixes and batched low-rank products, against full forwards on W + alpha/r B A. Fails when a stage
    starts from phi_0 again, sees the wrong input, or is weighted or normalised otherwise."""
    memory = replace(memory, fraction=fraction, clip=clip)
    fast, masks = init_fast(model, memory, 1, seeded()), [pre_masked, anchor.masked]
    got, _ = inner_loop(model, batch, states_of(model, batch, masks, memory), fast, memory, weighted)
    expected = slow_inner_loop(model, batch, masks, fast, memory, weighted)
    assert_fast_equal(got, expected)
    assert all(B.abs().max() > 1e-4 for _, B in got.weights.values()), "the memory has hardly moved"


def test_stage_1_moves_only_B(model, batch, pre_masked, anchor, memory):
    """With B = 0 the gradient of A is zero: the first stage writes B along random directions A, the second moves both."""
    fast = init_fast(model, memory, 4, seeded())
    one, _ = inner_loop(model, batch, states_of(model, batch, [pre_masked], memory), fast, memory)
    two, _ = inner_loop(model, batch, states_of(model, batch, [pre_masked, anchor.masked], memory), fast, memory)
    for name, (A, B) in fast.weights.items():
        assert torch.equal(one.weights[name][0], A), name
        assert not torch.equal(one.weights[name][1], B), name
        assert not torch.equal(two.weights[name][0], A), name


@torch.no_grad()
def test_stage_weight_is_the_share_really_masked(model, batch, anchor, memory):
    """Inner loss: 1 / (masked / maskable + 1e-6) per row, over the number of masked tokens, while the outer loss takes the
    *sampled* t and divides by maskable tokens (published code). Per set, and for one set over the whole batch."""
    h = prefix(model, batch, anchor.masked, memory)
    nll = slow_nll(model, {}, batch, anchor.masked).sum(1)
    count, n = anchor.masked.sum(1), batch.maskable.sum(1)
    assert count.tolist() == [3, 2, 5, 1]
    assert n.tolist() == [10, 9, 8, 7]
    weight = 1 / (count / n + 1e-6)
    for weighted, w in ((True, weight.double()), (False, torch.ones(4).double())):
        by_row = stage_loss(model, batch, anchor.masked, h, init_fast(model, memory, 4, seeded()), memory, weighted)
        torch.testing.assert_close(by_row, w * nll / count, **TIGHT)
        shared = stage_loss(model, batch, anchor.masked, h, init_fast(model, memory, 1, seeded()), memory, weighted)
        torch.testing.assert_close(shared, ((w * nll).sum() / count.sum())[None], **TIGHT)


def test_memories_per_sample_equal_runs_of_one_sample(model, batch, anchor, pre_masked, memory):
    """Scope "sample": what is written for one row must not depend on who else is in the batch."""
    memory, masks = replace(memory, clip=0.5), [pre_masked, anchor.masked]
    fast = init_fast(model, memory, SCOPES["sample"](4), seeded())
    together, losses = inner_loop(model, batch, states_of(model, batch, masks, memory), fast, memory)
    for i in range(4):
        row, row_masks = one_row(batch, i), [masked[i : i + 1] for masked in masks]
        alone, loss = inner_loop(model, row, states_of(model, row, row_masks, memory), one_set(fast, i), memory)
        assert_fast_equal(together, {name: (A[0], B[0]) for name, (A, B) in alone.weights.items()}, i, f"row {i}")
        torch.testing.assert_close(losses[:, i : i + 1], loss, **TIGHT)


def test_one_memory_for_the_batch_is_another_method(model, batch, anchor, memory):
    """Scope "batch", as published: rows share one set, so a row's memory changes with its neighbours."""
    fast = init_fast(model, memory, SCOPES["batch"](4), seeded())
    other = Batch(batch.x0.clone(), batch.maskable, None)
    other.x0[3, 8] = (other.x0[3, 8] + 1) % data.EOS  # one target token of the last row
    got = [inner_loop(model, b, states_of(model, b, [anchor.masked], memory), fast, memory)[0] for b in (batch, other)]
    name = "layers.3.mlp.down"
    assert got[0].weights[name][1].shape[0] == 1
    assert (got[0].weights[name][1] - got[1].weights[name][1]).abs().max() > 1e-6


def test_windows_of_one_text_share_its_memory(model, batch, anchor, memory):
    """N = 2 sets for 4 rows: rows 0, 1 are windows of one text, rows 2, 3 of another. Each pair is a batch with one set."""
    fast = init_fast(model, memory, 2, seeded())
    together, _ = inner_loop(model, batch, states_of(model, batch, [anchor.masked], memory), fast, memory)
    for i, rows in enumerate((slice(0, 2), slice(2, 4))):
        part = Batch(batch.x0[rows], batch.maskable[rows], None)
        expected = slow_inner_loop(model, part, [anchor.masked[rows]], one_set(fast, i), memory)
        assert_fast_equal(together, expected, i, f"text {i}")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_inner_loss_skips_only_its_own_update(model, batch, anchor, pre_masked, memory, bad):
    """One broken sample must not poison the batch (published code: such an update is skipped). Row 1 is broken in stage 1
    only: its memory is that of stage 2 alone, and all others are just what they would have been."""
    fast = init_fast(model, memory, 4, seeded())
    states = states_of(model, batch, [pre_masked, anchor.masked], memory)
    whole, _ = inner_loop(model, batch, states, fast, memory)
    second, _ = inner_loop(model, batch, states[1:], fast, memory)
    broken = states[0][1].clone()
    broken[1] = bad
    got, losses = inner_loop(model, batch, [(pre_masked, broken), states[1]], fast, memory)
    assert losses.isfinite().tolist() == [[True, False, True, True], [True] * 4]
    for name, pair in got.weights.items():
        for p, usual, skipped in zip(pair, whole.weights[name], second.weights[name]):
            assert torch.equal(p[[0, 2, 3]], usual[[0, 2, 3]]), f"{name}: a healthy row has changed"
            assert torch.equal(p[1], skipped[1]), f"{name}: the broken row's stage 1 was not skipped cleanly"


def test_nothing_masked_writes_nothing(model, batch, memory):
    """A row without masked tokens has no loss; its memory must stay phi_0 and not become 0 / 0."""
    masked = batch.maskable.clone()
    masked[2] = False
    fast = init_fast(model, memory, 4, seeded())
    got, losses = inner_loop(model, batch, states_of(model, batch, [masked], memory), fast, memory)
    assert losses[0, 2] == 0
    for name, (A, B) in got.weights.items():
        assert torch.equal(A[2], fast.weights[name][0][2])
        assert not B[2].any()
        assert all(B[i].any() for i in (0, 1, 3))


def test_inner_loop_leaves_no_trace_in_theta(model, batch, anchor, pre_masked, memory):
    """The memory's gradients end at the fast weights: no base weight may move or collect a .grad, which the next
    optimizer step would take for its own."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fast = init_fast(model, memory, 4, seeded())
    masks = [pre_masked, anchor.masked]
    got, losses = inner_loop(model, batch, states_of(model, batch, masks, memory), fast, memory)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not losses.requires_grad
    assert not any(p.requires_grad for pair in got.weights.values() for p in pair), "phi_2 must be a constant"


def test_memory_lowers_the_loss_it_is_written_on(model, batch, anchor, pre_masked, memory):
    """Writing must help: with small steps downhill, every row's loss with phi_2 is lower than with phi_0."""
    memory = replace(memory, lr=0.01)
    fast = init_fast(model, memory, 4, seeded())
    states = states_of(model, batch, [pre_masked, anchor.masked], memory)
    with_memory, _ = inner_loop(model, batch, states, fast, memory)
    before, after = (stage_loss(model, batch, *states[1], phi, memory, True) for phi in (fast, with_memory))
    assert (after < before).all(), f"before {before.tolist()}, after {after.tolist()}"


# ---- the outer loop (Eqs. 9-10) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_shared_prefix_equals_three_full_forwards(model, batch, anchor, pre_masked, memory, fraction, clip):
    """memdlm_loss saves work by sharing activations. Loss and every gradient must equal the plain reading of Eqs. 6-10:
    forward and backward on x_tpre, on x_t, and on x_t again with phi_2 held constant."""
    memory = replace(memory, fraction=fraction, clip=clip, scope="batch")
    fast = init_fast(model, memory, 1, seeded())
    loss, _ = memdlm_loss(model, batch, anchor, pre_masked, fast, memory)
    phi = slow_inner_loop(model, batch, [pre_masked, anchor.masked], fast, memory)
    constant = {name: (A.detach(), B.detach()) for name, (A, B) in phi.items()}
    expected = slow_outer_loss(model, batch, anchor, slow_matrices(model, constant, fast.scale))
    torch.testing.assert_close(loss, expected, **TIGHT)
    got, grads = gradients(model, loss), gradients(model, expected)
    for name in grads:
        torch.testing.assert_close(got[name], grads[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    assert (loss - mdlm_loss(model, batch, anchor)).abs() > 1e-3, "the memory changes nothing here"


def test_outer_loss_with_memories_per_sample_is_the_sum_over_samples(model, batch, anchor, pre_masked, memory):
    """Scope "sample": row i is scored with its own phi_2. Loss and gradients are those of single rows, put together with
    the batch's one denominator."""
    fast = init_fast(model, memory, 4, seeded())
    loss, _ = memdlm_loss(model, batch, anchor, pre_masked, fast, memory)
    total, n = 0.0, batch.maskable.sum(1).double()
    for i in range(4):
        rows = slice(i, i + 1)
        one = Anchor(anchor.t[rows], anchor.masked[rows])
        alone, _ = memdlm_loss(model, one_row(batch, i), one, pre_masked[rows], one_set(fast, i), memory)
        total = total + alone * n[i] / n.sum()
    torch.testing.assert_close(loss, total, **TIGHT)
    got, grads = gradients(model, loss), gradients(model, total)
    for name in grads:
        torch.testing.assert_close(got[name], grads[name], **TIGHT)


def test_outer_gradient_is_first_order(model, batch, anchor, pre_masked, memory):
    """Eq. 10 takes phi_2 for a constant, as first-order MAML does. Differentiating through the inner steps as well gives
    the same loss but another gradient; if ours were that one, training would silently cost a Hessian."""
    memory = replace(memory, scope="batch")
    fast = init_fast(model, memory, 1, seeded())
    loss, _ = memdlm_loss(model, batch, anchor, pre_masked, fast, memory)
    first = gradients(model, loss)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        phi = slow_inner_loop(model, batch, [pre_masked, anchor.masked], fast, memory, create_graph=True)
        through = slow_outer_loss(model, batch, anchor, slow_matrices(model, phi, fast.scale))
        second = gradients(model, through)
    torch.testing.assert_close(loss, through, **TIGHT)
    for name in ("embedding.weight", "layers.0.attention.q.weight", "layers.3.mlp.down.weight", "output.weight"):
        difference = (first[name] - second[name]).norm() / second[name].norm()
        assert difference > 1e-3, f"{name}: the gradient goes through the inner loop"


def test_hidden_padding_changes_neither_memory_nor_loss(model, batch, anchor, pre_masked, memory):
    """--pads ignore: padding is hidden and never a target. Five more pads must leave phi_2, the loss and theta's gradient as
    they are, or the result would depend on the longest row of a batch."""

    def wider(batch: Batch, anchor: Anchor, pre: torch.Tensor, pads: int) -> tuple[Batch, Anchor, torch.Tensor]:
        def more(x: torch.Tensor, value) -> torch.Tensor:
            return torch.cat([x, torch.full((4, pads), value, dtype=x.dtype)], dim=1)

        seen = more(torch.ones_like(batch.maskable), False)
        wide = Batch(more(batch.x0, data.EOS), more(batch.maskable, False), seen)
        return wide, Anchor(anchor.t, more(anchor.masked, False)), more(pre, False)

    results = []
    for pads in (0, 5):
        wide, wide_anchor, wide_pre = wider(batch, anchor, pre_masked, pads)
        fast = init_fast(model, memory, 4, seeded())
        loss, inner = memdlm_loss(model, wide, wide_anchor, wide_pre, fast, memory)
        results.append((loss, inner, gradients(model, loss)))
    (loss, inner, grads), (wide_loss, wide_inner, wide_grads) = results
    torch.testing.assert_close(wide_loss, loss, **TIGHT)
    torch.testing.assert_close(wide_inner, inner, **TIGHT)
    for name in grads:
        torch.testing.assert_close(wide_grads[name], grads[name], **TIGHT)
    visible, *_ = wider(batch, anchor, pre_masked, 5)
    seen = memdlm_loss(model, visible._replace(attention_mask=None), wide_anchor, wide_pre, fast, memory)[0]
    assert (seen - loss).abs() > 1e-4, "unhidden pads change nothing: the test sees nothing"


# ---- methods and the step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", list(SCOPES))
def test_both_methods_see_the_same_noise(model, batch, memory, scope):
    """Standard MDLM and MemDLM are compared on identical anchors. With an inner learning rate of 0 the memory is empty, so
    from generators of one seed the two losses must be equal, and with another seed not."""
    empty = replace(memory, lr=0.0, scope=scope)
    for seed in range(5):
        standard, ours = (METHODS[name](model, batch, empty, seeded(seed)) for name in ("mdlm", "memdlm"))
        torch.testing.assert_close(ours, standard, **TIGHT)
    assert METHODS["mdlm"](model, batch, empty, seeded(5)) != standard
    assert METHODS["memdlm"](model, batch, memory, seeded(4)) != standard


def test_pretraining_loss_is_the_mean_over_masked_tokens(model, batch):
    """No 1/t: rows with little masked would dominate it. The optimum is the same, the noise is smaller."""
    masked = draw_anchor(batch.maskable, seeded(3)).masked
    expected = slow_nll(model, {}, batch, masked).sum() / masked.sum()
    torch.testing.assert_close(METHODS["base"](model, batch, Memory(), seeded(3)), expected, **TIGHT)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_step_with_a_non_finite_loss_changes_nothing(model, batch, anchor, bad):
    """One bad batch must cost one step, not the run: NaN in AdamW's averages would never leave again."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert train_step(model, optimizer, mdlm_loss(model, batch, anchor), 1.0) is True
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    assert train_step(model, optimizer, mdlm_loss(model, batch, anchor) * bad, 1.0) is False
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments))
    assert train_step(model, optimizer, mdlm_loss(model, batch, anchor), 1.0) is True, "the step after it must work again"
    assert all(p.isfinite().all() for p in model.parameters())


def test_step_with_a_finite_loss_and_a_non_finite_gradient_changes_nothing(model, batch, anchor):
    """sqrt has an infinite slope at 0: the loss looks fine, its gradient is not."""
    weights = [p.detach().clone() for p in model.parameters()]
    loss = (mdlm_loss(model, batch, anchor) * 0).sqrt()
    assert loss.isfinite()
    assert train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, 1.0) is False
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))


@pytest.mark.parametrize("clip", [0.01, 0.0], ids=["clipped", "clip 0 = off"])
def test_global_norm_is_that_of_theta_alone(model, batch, anchor, clip):
    """The published code counts other weights' gradients in the norm, which shrinks theta's step. Here frozen weights carry
    a huge stale .grad: with plain SGD of rate 1 the step must still be just as long as the limit, and theirs zero."""
    model.requires_grad_(False)
    theta = [model.layers[2].mlp.up.weight, model.layers[1].attention.q.weight]
    for p in theta:
        p.requires_grad_()
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = torch.full_like(p, 1e6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = mdlm_loss(model, batch, anchor)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, theta, retain_graph=True)]).norm().item()
    assert norm > 0.02
    assert train_step(model, torch.optim.SGD(theta, lr=1.0), loss, clip)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    length = torch.cat([m.flatten() for m in moved.values()]).norm().item()
    assert length == pytest.approx(clip or norm, rel=1e-4)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not any(moved[name].any() for name in still)


def test_draws_depend_on_the_key_alone():
    """A resumed run has no generator state: step 70 must draw what it would have drawn. The pinned seed also catches keys
    made with Python's hash(), which changes from process to process."""
    first, again = (torch.rand(5, generator=generator_for(3, "anchor", 7)) for _ in range(2))
    assert torch.equal(first, again)
    assert generator_for(3, "anchor", 7).initial_seed() == 79268165


def test_different_keys_give_different_draws():
    """Every part of the key counts, and so does their order: two purposes must not share their noise."""
    keys = [(0,), (1,), (0, "anchor"), (0, "write"), (0, "anchor", 1), (0, "anchor", 2), (1, "anchor", 0), ("anchor", 0)]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)


def test_denoising_loss_can_start_at_any_layer(model, batch, anchor):
    """memdlm_loss hands over h after the prefix; started there or at the embedding, the loss is the same."""
    h = model.embedding(corrupt(batch.x0, anchor.masked))
    whole = mdlm_loss(model, batch, anchor)
    for cut in range(5):
        torch.testing.assert_close(denoising_loss(model, batch, anchor, model.run(h, 0, cut), None, cut), whole, **TIGHT)
