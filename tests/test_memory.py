"""
test_memory.py: the noise (Sec. 2.1), the pre-anchor, and the inner loop that writes a memory
(Sec. 3), against the formulas written out the slow way (slow.py).
"""

import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import slow
import torch
from slow import TIGHT, assert_set_equals, fast_loop, one_set, seeded, some_rows

import data
import memdlm
from data import Batch
from memdlm import Anchor, Memory, draw_anchor, draw_pre_anchor, init_fast

# ---- the forward process (Eqs. 1 and 2) ----------------------------------------------------------


def test_each_token_is_masked_with_probability_t():
    """Eq. 1, with t ~ U(eps, 1). Each row's share of 4000 tokens lies within five standard
    deviations of its t, and the levels of 20,000 rows are spread evenly."""
    t, masked = draw_anchor(torch.ones(200, 4000, dtype=torch.bool), seeded())
    error = (masked.double().mean(1) - t).abs() / (t * (1 - t) / 4000).sqrt()
    assert error.max() < 5, f"off by {error.max():.1f} standard deviations"
    t = draw_anchor(torch.ones(20_000, 1, dtype=torch.bool), seeded(), eps=0.1).t
    assert t.min() >= 0.1, "the weight 1/t would be without bound"
    share = torch.histc(t, 9, 0.1, 1.0) / len(t)
    assert (share - 1 / 9).abs().max() < 5 * math.sqrt(1 / 9 * 8 / 9 / len(t))


def test_corruption_hides_response_tokens_and_nothing_else(batch):
    """Asymmetric masking (Sec. 2.1): a prompt is never masked. x_0 itself, the target, stays."""
    before = batch.x0.clone()
    for seed in range(50):
        masked = draw_anchor(batch.maskable, seeded(seed)).masked
        assert not (masked & ~batch.maskable).any()
    x_t = memdlm.corrupt(batch.x0, masked, data.MASK)
    assert (x_t[masked] == data.MASK).all()
    assert torch.equal(x_t[~masked], batch.x0[~masked])
    assert torch.equal(batch.x0, before)


@torch.no_grad()
def test_the_expected_loss_is_the_any_order_likelihood(model):
    """Why the weight is 1/t (Sahoo et al. 2024): averaged over t and masks, the loss is the
    negative log likelihood of predicting the tokens one by one, averaged over all orders.

    Three tokens, so that all 7 masks and all 3! orders can be gone through. The mean over t is a
    Gauss-Legendre sum, exact for p(mask | t) / t; what is left is the 1e-6 in the weight.
    """
    batch = Batch(torch.tensor([[11, 300, 42]]), torch.ones(1, 3, dtype=torch.bool), None)
    nodes, shares = np.polynomial.legendre.leggauss(6)
    expected_loss, any_order = 0.0, 0.0
    for masked in map(torch.tensor, product([False, True], repeat=3)):
        k = int(masked.sum())
        for t, share in zip((nodes + 1) / 2, shares / 2):
            loss = memdlm.mdlm_loss(model, batch, Anchor(torch.tensor([t]), masked[None])).item()
            expected_loss += share * t**k * (1 - t) ** (3 - k) * loss
    for order in permutations(range(3)):
        masked = torch.ones(1, 3, dtype=torch.bool)
        for place in order:
            any_order += slow.nll(model, {}, batch, masked)[0, place].item() / math.factorial(3)
            masked[0, place] = False
    assert expected_loss == pytest.approx(any_order / 3, rel=1e-4)  # the loss is per maskable token


# ---- the pre-anchor (Eq. 6) ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_the_pre_anchor_contains_the_anchor_and_stays_in_the_response(batch, scale):
    """Stage 1 may show less than stage 2, never something else (Sec. 3). Each row has the count of
    the published code, whose table test_published.py holds."""
    for seed in range(30):
        masked = draw_anchor(batch.maskable, seeded(seed)).masked
        pre_masked = draw_pre_anchor(masked, batch.maskable, scale, seeded(seed + 100))
        assert not (masked & ~pre_masked).any(), "a token of the anchor is visible"
        assert not (pre_masked & ~batch.maskable).any(), "a prompt token is masked"
        counts = memdlm.pre_anchor_count(masked.sum(1), batch.maskable.sum(1), scale)
        assert torch.equal(pre_masked.sum(1), counts)


def test_the_pre_anchor_hides_every_further_token_equally_often():
    """A fixed order would teach the memory one end of the answer only."""
    maskable = torch.ones(4000, 12, dtype=torch.bool)
    masked = torch.zeros_like(maskable)
    masked[:, [1, 4, 6, 9]] = True  # 4 of 12, so that the pre-anchor masks 2 of the other 8
    pre_masked = draw_pre_anchor(masked, maskable, 1.5, seeded())
    further = (pre_masked & ~masked).double().mean(0)[~masked[0]]
    assert (further - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


# ---- phi_0 and one step of SGD -------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_a_fresh_memory_sits_on_the_last_feed_forward_networks(model, memory, fraction):
    """A Kaiming-uniform, B = 0, on gate, up and down of the last layers (Sec. 4.1); each set has a
    draw of its own."""
    fast = init_fast(model, replace(memory, fraction=fraction), 3, seeded())
    layers, parts = range(4 - int(4 * fraction), 4), ("gate", "up", "down")
    assert set(fast.weights) == {f"layers.{i}.mlp.{part}" for i in layers for part in parts}
    assert fast.scale == memory.alpha / memory.rank
    for name, (A, B) in fast.weights.items():
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        assert A.shape == (3, memory.rank, inputs), name
        assert B.shape == (3, outputs, memory.rank), name
        assert not B.any(), name
        assert 0.9 < A.abs().max() * inputs**0.5 <= 1, name
        assert not torch.equal(A[0], A[1]), f"{name}: two samples share one draw"


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "0 = off"])
def test_each_tensor_of_each_set_is_clipped_alone(clip):
    """Here set 0 is clipped, from norm 5 to 1, and set 1 of norm 0.5 is not, though they are one
    tensor. (Published ablation: clipping per tensor scores .684, by the global norm .632.)"""
    grad = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    moved = memdlm.sgd(torch.zeros(2, 1, 2), grad, torch.ones(2), Memory(lr=0.1, clip=clip))
    first = [-0.06, -0.08] if clip else [-0.3, -0.4]
    torch.testing.assert_close(moved, torch.tensor([[first], [[-0.03, -0.04]]]))


# ---- the inner loop (Eqs. 6-8) -------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False], ids=["w = 1/t", "w = 1"])
@pytest.mark.parametrize(("fraction", "clip"), [(0.25, 0.5), (1.0, 0.0), (1.0, 0.5)])
def test_two_stages_equal_the_slow_way(model, batch, stages, memory, fraction, clip, weighted):
    """phi_2 against gradients through full forwards on W + alpha/r B A. Fails when a stage starts
    from phi_0 again, sees the wrong input, or is weighted, normalised or clipped otherwise."""
    memory = replace(memory, fraction=fraction, clip=clip)
    if not weighted:  # as where a prompt is written (Sec. 4.5)
        stages = [stage._replace(weight=torch.ones(4)) for stage in stages]
    fast = init_fast(model, memory, 1, seeded())
    got, _ = fast_loop(model, batch, stages, fast, memory)
    assert_set_equals(got, slow.inner_loop(model, batch, stages, fast, memory))
    assert all(B.abs().max() > 1e-4 for _, B in got.weights.values()), "it has hardly moved"


def test_stage_1_moves_B_alone(model, batch, stages, memory):
    """With B = 0 the gradient of A is zero: the first stage writes B along random directions A, the
    second stage moves both."""
    fast = init_fast(model, memory, 4, seeded())
    one, _ = fast_loop(model, batch, stages[:1], fast, memory)
    two, _ = fast_loop(model, batch, stages, fast, memory)
    for name, (A, B) in fast.weights.items():
        assert torch.equal(one.weights[name][0], A), name
        assert not torch.equal(one.weights[name][1], B), name
        assert not torch.equal(two.weights[name][0], A), name


@torch.no_grad()
def test_a_stage_is_weighted_by_the_share_that_it_really_masks(model, batch, stages, memory):
    """Its loss is a mean over masked tokens with the weight 1 / (masked / maskable + 1e-6), while
    the outer loss takes the *sampled* t and divides by the maskable tokens (published code)."""
    stage = memdlm.with_prefixes(model, batch, stages, memory)[1]
    count, maskable = torch.tensor([3, 2, 5, 1]), torch.tensor([10, 9, 8, 7])
    weighted = slow.nll(model, {}, batch, stage.masked).sum(1) * (1 / (count / maskable + 1e-6))
    for sets, expected in ((4, weighted / count), (1, weighted.sum()[None] / count.sum())):
        fast = init_fast(model, memory, sets, seeded())
        loss = memdlm.stage_loss(model, batch, stage, fast, memory)
        torch.testing.assert_close(loss, expected, **TIGHT)


@pytest.mark.parametrize("sets", [4, 2], ids=["one per row", "rows 0, 1 and rows 2, 3"])
def test_sets_do_not_mix(model, batch, anchor, stages, memory, sets):
    """What is written for one sample, or for the windows of one text, does not depend on what else
    is in the batch: each set is what its rows alone would write."""
    memory, each = replace(memory, clip=0.5), 4 // sets
    fast = init_fast(model, memory, sets, seeded())
    together, _ = fast_loop(model, batch, stages, fast, memory)
    for i in range(sets):
        own = fast.with_tensors([part[i : i + 1] for part in fast.tensors()])
        rows = slice(i * each, (i + 1) * each)
        part, _, part_stages = some_rows(rows, batch, anchor, stages)
        alone, _ = fast_loop(model, part, part_stages, own, memory)
        assert_set_equals(together, one_set(alone), i)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_loss_skips_its_own_update_alone(model, batch, stages, memory, bad):
    """One broken sample must not poison the batch. Row 1 is broken in stage 1: its memory is that
    of stage 2 alone, and the others' are what they would have been."""
    fast = init_fast(model, memory, 4, seeded())
    usual, _ = fast_loop(model, batch, stages, fast, memory)
    second, _ = fast_loop(model, batch, stages[1:], fast, memory)
    broken = memdlm.with_prefixes(model, batch, stages, memory)
    broken[0].h[1] = bad
    got, losses = memdlm.inner_loop(model, batch, broken, fast, memory)
    assert losses.isfinite().tolist() == [[True, False, True, True], [True] * 4]
    for ours, whole, skipped in zip(got.tensors(), usual.tensors(), second.tensors()):
        assert torch.equal(ours[[0, 2, 3]], whole[[0, 2, 3]]), "a healthy row has changed"
        assert torch.equal(ours[1], skipped[1]), "the broken row's stage was not skipped cleanly"


def test_nothing_masked_writes_nothing(model, batch, anchor, memory):
    """At a small t it happens that a row has no masked token: its loss is 0 and not 0 / 0, and its
    memory stays phi_0."""
    masked = batch.maskable.clone()
    masked[2] = False
    fast, stages = init_fast(model, memory, 4, seeded()), memdlm.chain([masked], batch.maskable)
    got, losses = fast_loop(model, batch, stages, fast, memory)
    assert losses[0, 2] == 0
    for ours, start in zip(got.tensors(), fast.tensors()):
        assert torch.equal(ours[2], start[2])
    assert all(B[[0, 1, 3]].flatten(1).any(dim=1).all() for _, B in got.weights.values())
    nothing = anchor._replace(masked=torch.zeros_like(masked))
    assert memdlm.mdlm_loss(model, batch, nothing) == 0
