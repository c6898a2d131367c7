"""
test_memory.py: the noise and the inner loop. Masked diffusion (Sec. 2.1), the pre-anchor and the two stages that write a
memory (Sec. 3), each against the formula written out the slow way (slow.py). The outer loop is in test_outer.py, the variants
of the inner loop in test_inner_variants.py.

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
from slow import TIGHT, assert_fast_equal, one_row, one_set, seeded, slow_inner_loop, slow_matrices, slow_nll, states_of

import data
from data import Batch
from memdlm import (
    SCOPES,
    Anchor,
    Memory,
    corrupt,
    draw_anchor,
    draw_pre_anchor,
    embed,
    first_adapted_layer,
    init_fast,
    inner_loop,
    mdlm_loss,
    pre_anchor_count,
    sgd,
    stage_loss,
    token_nll,
)
from model import Fast

GOLDEN = json.loads((Path(__file__).parent / "golden" / "memory_tables.json").read_text())


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
    x_t = corrupt(batch.x0, anchor.masked, data.MASK)
    assert (x_t[anchor.masked] == data.MASK).all()
    assert torch.equal(x_t[~anchor.masked], batch.x0[~anchor.masked])
    assert torch.equal(batch.x0, before)


# ---- the loss (Eq. 2) --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_on_masked_rows_is_the_loss_from_full_logits(model, batch, anchor):
    """The head runs on masked positions only; picking rows and targets in different orders would pair the wrong ones."""
    h = model.read(embed(model, batch.x0, anchor.masked), 0, anchor.masked)
    expected = slow_nll(model, {}, batch, anchor.masked)[anchor.masked]
    torch.testing.assert_close(token_nll(model, h, batch.x0[anchor.masked]), expected, **TIGHT)


@torch.no_grad()
def test_denoising_loss_is_weighted_nll_over_maskable_tokens(model, batch, anchor):
    """sum over masked tokens of nll / (t + 1e-6), divided by the number of *maskable* tokens of the batch, not of masked
    ones (Eq. 2 and the published code). Written out token by token."""
    total = 0.0
    for i, place in anchor.masked.nonzero().tolist():
        logits = model(corrupt(batch.x0, anchor.masked, data.MASK)[i : i + 1])[0, place]
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
    (state,) = states_of(model, batch, [anchor.masked], memory)
    nll = slow_nll(model, {}, batch, anchor.masked).sum(1)
    count, n = anchor.masked.sum(1), batch.maskable.sum(1)
    assert count.tolist() == [3, 2, 5, 1]
    assert n.tolist() == [10, 9, 8, 7]
    weight = 1 / (count / n + 1e-6)
    for weighted, w in ((True, weight.double()), (False, torch.ones(4).double())):
        by_row = stage_loss(model, batch, state, init_fast(model, memory, 4, seeded()), memory, weighted)
        torch.testing.assert_close(by_row, w * nll / count, **TIGHT)
        shared = stage_loss(model, batch, state, init_fast(model, memory, 1, seeded()), memory, weighted)
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
    broken = states[0].h.clone()
    broken[1] = bad
    got, losses = inner_loop(model, batch, [states[0]._replace(h=broken), states[1]], fast, memory)
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
    before, after = (stage_loss(model, batch, states[1], phi, memory, True) for phi in (fast, with_memory))
    assert (after < before).all(), f"before {before.tolist()}, after {after.tolist()}"
