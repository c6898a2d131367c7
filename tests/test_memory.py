"""
test_memory.py: noise, pre-anchor and inner loop (Sec. 3), against the formulas (slow.py).
"""

import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import slow
import torch
from slow import (
    assert_gradients_equal,
    assert_set_equals,
    one_set,
    seeded,
    some_rows,
    with_prefixes,
)
from teaching import assert_same

import data
import memdlm
from data import Batch
from lab import variants
from memdlm import Anchor, Memory, draw_anchor, draw_pre_anchor, init_fast


@pytest.mark.step1
def test_each_token_is_masked_with_probability_t():
    """Eq. 1: of 200 rows of 4000 tokens, the number of masked ones in a row, and in a column, is as
    near to what the rows' t say as chance makes it, and no nearer: it scatters by 1."""
    t, masked = draw_anchor(torch.ones(200, 4000, dtype=torch.bool), seeded())
    assert (t.shape, masked.shape) == ((200,), (200, 4000)), "t is one number a row: (B,)"
    assert len(t.unique()) > 100, f"{len(t.unique())} of 200 rows have a t of their own: draw (B,)"
    share, variance = masked.double().mean(1), t * (1 - t)
    by_row, by_column = (share - t) / (variance / 4000).sqrt(), masked.sum(0) - t.sum()
    row = int(by_row.abs().argmax())
    told = f"row {row} drew t = {t[row]:.2f}, but {share[row]:.2f} of its tokens are masked"
    assert by_row.abs().max() < 5, f"{told}: each is masked with chance t, one t for a whole row"
    columns = by_column / variance.sum().sqrt(), "column", "is one number drawn for all rows?"
    rows = by_row, "row", "is a fixed number masked, or one drawn for several tokens?"
    for found, kind, hint in (columns, rows):
        told = f"the number of masked tokens in a {kind} scatters by {found.var():.2f}, not by 1"
        assert (found.var() - 1).abs() < 5 * math.sqrt(2 / len(found)), f"{told}: {hint}"


@pytest.mark.step1
def test_the_noise_level_is_uniform_and_drawn_for_each_row():
    """t ~ U(eps, 1): of 20,000 rows of one token, ninths of that range are as even as chance makes
    them, and no evener (chi-square, 8 degrees of freedom). The generator decides everything."""
    maskable, generator = torch.ones(20_000, 1, dtype=torch.bool), seeded()
    t, masked = draw_anchor(maskable, generator, eps=0.1)
    assert t.min() >= 0.1, f"t = {t.min():.3f} < eps = 0.1: the weight 1/t would be without bound"
    again = draw_anchor(maskable, seeded(), eps=0.1)
    same = torch.equal(t, again.t) and torch.equal(masked, again.masked)
    assert same, "the same generator has drawn something else: are t and masks both drawn from it?"
    share = torch.histc(t, 9, 0.1, 1.0).double() / len(t)
    told = f"t is not uniform on (eps, 1): ninths of that range hold {share.tolist()}"
    assert 0.2 < (share - 1 / 9).square().sum() * 9 * len(t) < 45, told
    alone = masked.double().mean()
    told = f"{alone:.3f} of single tokens are masked, but the mean t is {t.mean():.3f}"
    assert (alone - t.mean()).abs() < 0.018, told
    assert draw_anchor(maskable, generator).t.min() < 0.002, "unless it is said, eps is 0.001"


@pytest.mark.step1
def test_corruption_hides_response_tokens_and_nothing_else(batch):
    """Asymmetric masking (Sec. 2.1): a prompt is never masked. x_0 itself, the target, stays."""
    before = batch.x0.clone()
    for seed in range(50):
        masked = draw_anchor(batch.maskable, seeded(seed)).masked
        prompt = int((masked & ~batch.maskable).sum())
        assert prompt == 0, f"{prompt} prompt tokens are masked: M_t must lie inside `maskable`"
    x_t = memdlm.corrupt(batch.x0, masked, data.MASK - 1)
    assert x_t.dtype == batch.x0.dtype, f"x_t holds {x_t.dtype}, and no ids"
    assert (x_t[masked] == data.MASK - 1).all(), "a place of `masked` does not hold mask_id"
    assert torch.equal(x_t[~masked], batch.x0[~masked]), "a token outside `masked` has changed"
    kept = torch.equal(batch.x0, before)
    assert kept, "x_0, the target, was changed in place: make a copy"


@pytest.mark.step2(first=True)
def test_the_loss_sends_a_gradient_to_every_weight(model, batch, anchor):
    """A loss without its graph, or with a half of it, has the right value and trains nothing."""
    loss = memdlm.denoising_loss(model, batch, anchor, memdlm.embed(model, batch.x0, anchor.masked))
    assert_gradients_equal(model, loss, slow.outer_loss(model, batch, anchor, {}))


@pytest.mark.step2
@torch.no_grad()
def test_the_loss_is_eq_2(model, batch, anchor):
    """Four rows with t = .31, .22, .6, .0015 mask 3, 2, 5 and 1 of 10, 9, 8 and 7 maskable tokens.
    Each nll is weighted by 1 / (t + 1e-6) of its row, and the sum divided by 34."""
    anchor = anchor._replace(t=torch.tensor([0.31, 0.22, 0.6, 0.0015]))
    nll = slow.nll(model, {}, batch, anchor.masked)  # (B, T), zero where nothing is masked
    weight = (1 / (anchor.t + 1e-6))[:, None]
    whole = slow.nll(model, {}, batch, batch.maskable) * weight
    mistakes = {
        "the weight w(t) = 1/t is missing": nll.sum() / 34,
        "the sum is divided by the number of masked tokens, not of maskable ones": (
            (nll * weight).sum() / 11
        ),
        "all rows have the weight of their mean t": nll.sum() / 34 / (anchor.t.mean() + 1e-6),
        "the weight is the share that is really masked, as in the inner loop": (
            (nll / anchor.masked.sum(1)[:, None] * batch.maskable.sum(1)[:, None]).sum() / 34
        ),
        "every response token is masked, whatever the anchor says": whole.sum() / 34,
        "each row is averaged by itself": ((nll * weight).sum(1) / batch.maskable.sum(1)).mean(),
    }
    h = memdlm.embed(model, batch.x0, anchor.masked)
    loss = memdlm.denoising_loss(model, batch, anchor, h)
    assert_same(loss, (nll * weight).sum() / 34, "the loss of Eq. 2", mistakes)
    h = memdlm.prefix(model, batch, anchor.masked, Memory(fraction=0.5))  # what layer 2 reads
    later = memdlm.denoising_loss(model, batch, anchor, h, 2)
    assert_same(later, loss, "the same from layer 2 on", hint="h is what the layer `start` reads.")
    fast = init_fast(model, Memory(rank=3, alpha=6.0, fraction=0.5), 4, seeded())
    fast = fast.with_tensors([part + 0.05 for part in fast.tensors()])
    rows = [slow.merge(model, one_set(fast, i), fast.scale) for i in range(4)]
    written = torch.stack([slow.nll(model, rows[i], batch, anchor.masked)[i] for i in range(4)])
    with_memory = memdlm.denoising_loss(model, batch, anchor, h, 2, fast)
    mistakes = {"`fast` has no effect: hand it to model.run (Eq. 9)": loss}
    assert_same(with_memory, (written * weight).sum() / 34, "the loss with a memory", mistakes)
    part = batch._replace(attention_mask=torch.arange(12) < torch.tensor([[12], [12], [12], [9]]))
    hidden = slow.nll(model, {}, part, anchor.masked) * weight
    loss = memdlm.denoising_loss(model, part, anchor, memdlm.embed(model, batch.x0, anchor.masked))
    hint = "Hand batch.attention_mask to model.run."
    assert_same(loss, hidden.sum() / 34, "the loss where three places are hidden", hint=hint)


@pytest.mark.step2
@torch.no_grad()
def test_the_expected_loss_is_the_any_order_likelihood(model):
    """Why the weight is 1/t (Sahoo et al. 2024): averaged over t and all 7 masks of three tokens,
    the loss is the negative log likelihood of predicting them one by one, averaged over all orders.
    The mean over t is a Gauss-Legendre sum, exact but for the 1e-6 in the weight."""
    batch = Batch(torch.tensor([[11, 300, 42]]), torch.ones(1, 3, dtype=torch.bool), None)
    nodes, shares = np.polynomial.legendre.leggauss(6)
    expected_loss, any_order = 0.0, 0.0
    for masked in map(torch.tensor, product([False, True], repeat=3)):
        k = int(masked.sum())
        for t, share in zip((nodes + 1) / 2, shares / 2):
            loss = memdlm.mdlm_loss(model, batch, Anchor(torch.tensor([t]), masked[None])).item()
            assert math.isfinite(loss), f"{k} tokens are masked: the loss is {loss} (0 / 0?)"
            expected_loss += share * t**k * (1 - t) ** (3 - k) * loss
    for order in permutations(range(3)):
        masked = torch.ones(1, 3, dtype=torch.bool)
        for place in order:
            any_order += slow.nll(model, {}, batch, masked)[0, place].item() / math.factorial(3)
            masked[0, place] = False
    any_order = any_order / 3  # the loss is per maskable token
    told = f"the expected loss is {expected_loss:.4f}, the any-order likelihood {any_order:.4f}"
    right = expected_loss == pytest.approx(any_order, rel=1e-4)
    assert right, f"{told}: they are equal if every token weighs 1/t with the t that was drawn"


@pytest.mark.step4
@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_the_pre_anchor_contains_the_anchor_and_stays_in_the_response(batch, scale):
    """Stage 1 may show less than stage 2, never something else (Sec. 3). Each row has the count of
    the published code, whose table test_published.py holds."""
    for seed in range(30):
        masked = draw_anchor(batch.maskable, seeded(seed)).masked
        pre_masked = draw_pre_anchor(masked.clone(), batch.maskable, scale, seeded(seed + 100))
        shown = int((masked & ~pre_masked).sum())
        told = f"{shown} tokens that the anchor masks are visible in the pre-anchor"
        assert shown == 0, f"{told}: keep all that the anchor masks, and draw *further* ones"
        assert not (pre_masked & ~batch.maskable).any(), "a prompt token is masked"
        counts = memdlm.pre_anchor_count(masked.sum(1), batch.maskable.sum(1), scale)
        told = f"of rows that mask {masked.sum(1).tolist()}, it masks {pre_masked.sum(1).tolist()}"
        assert torch.equal(pre_masked.sum(1), counts), f"{told}, and not {counts.tolist()}"


@pytest.mark.step4
def test_the_pre_anchor_hides_every_further_token_equally_often():
    """A fixed order would teach the memory one end of the answer only."""
    maskable = torch.ones(4000, 12, dtype=torch.bool)
    masked = torch.zeros_like(maskable)
    masked[:, [1, 4, 6, 9]] = True  # 4 of 12, so that the pre-anchor masks 2 of the other 8
    pre_masked = draw_pre_anchor(masked, maskable, 1.5, seeded())
    further = (pre_masked & ~masked).double().mean(0)[~masked[0]]
    shares = [f"{share:.2f}" for share in further.tolist()]
    fair = (further - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert fair, f"each further token is to be masked in .25 of the rows, but it is in {shares}"


@pytest.mark.step4
def test_the_two_stages_are_pre_anchor_and_anchor(batch, anchor):
    """In this order, both at all of their masked tokens, each weighted by 1 / (q + 1e-6) with the
    share q of the maskable tokens that it really masks; stage 1 names what stage 2 masks."""
    before = anchor.masked.clone()
    stages = memdlm.two_stages(anchor, batch.maskable, Memory(), seeded(5))
    assert torch.equal(anchor.masked, before), "the anchor was changed in place: make a copy"
    assert len(stages) == 2, f"K = 2 stages, not {len(stages)}"
    pre, last = stages
    assert torch.equal(last.masked, anchor.masked), "stage 2 is to read the anchor itself, x_t"
    assert not (anchor.masked & ~pre.masked).any(), "stage 1 shows what the anchor masks"
    for number, stage in enumerate(stages, 1):
        q = stage.masked.sum(1) / batch.maskable.sum(1)
        sampled = 1 / (anchor.t + 1e-6)
        mistakes = {"the sampled t is taken, which belongs to the outer loss": sampled}
        assert_same(stage.weight, 1 / (q + 1e-6), f"the weight of stage {number}", mistakes)
        assert torch.equal(stage.scored, stage.masked), f"stage {number}: score all masked tokens"
    assert torch.equal(pre.following, anchor.masked), "what follows stage 1 is the anchor's mask"
    assert last.following is None, "nothing follows stage 2"
    other = memdlm.two_stages(anchor, batch.maskable, Memory(start_scale=3.0), seeded(5))[0]
    assert other.masked.sum() > pre.masked.sum(), "memory.start_scale has no effect"
    again = memdlm.two_stages(anchor, batch.maskable, Memory(start_scale=3.0), seeded(5))[0]
    assert torch.equal(other.masked, again.masked), "the same generator, another draw: is it used?"
    nothing = torch.zeros_like(batch.maskable)
    empty = memdlm.two_stages(anchor._replace(masked=nothing), nothing, Memory(), seeded())[1]
    assert empty.weight.isfinite().all(), "a row with nothing maskable: q is 0 / 1, not 0 / 0"


@pytest.mark.step3
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_a_fresh_memory_sits_on_the_last_feed_forward_networks(model, memory, fraction):
    """On gate, up and down of the last layers (Sec. 4.1); each set has a draw of its own."""
    fast = init_fast(model, replace(memory, fraction=fraction), 3, seeded())
    layers, parts = range(4 - int(4 * fraction), 4), ("gate", "up", "down")
    assert set(fast.weights) == {f"layers.{i}.mlp.{part}" for i in layers for part in parts}
    assert fast.scale == memory.alpha / memory.rank
    for name, (A, B) in fast.weights.items():
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        assert A.shape == (3, memory.rank, inputs), f"{name}: A is (N, r, in)"
        assert B.shape == (3, outputs, memory.rank), f"{name}: B is (N, out, r)"
        assert not B.any(), f"{name}: B must be zero, so that the product B A changes nothing"
        largest = A.abs().max() * inputs**0.5
        told = f"{name}: the largest |A| is {largest:.2f} / sqrt(in)"
        assert 0.9 < largest <= 1, f"{told}; U(-1/sqrt(in), 1/sqrt(in)) reaches almost 1"
        assert not torch.equal(A[0], A[1]), f"{name}: two samples share one draw"


@pytest.mark.step5(first=True)
def test_each_tensor_of_each_set_is_clipped_alone(model, batch, stages, memory):
    """A and B of each matrix have a norm of their own, and so has each set. The limit lies in the
    middle of these norms: half of the tensors are shortened."""
    fast = init_fast(model, memory, 4, seeded())
    fast = fast.with_tensors([part + 0.02 for part in fast.tensors()])  # B = 0: no gradient of A
    stage = with_prefixes(model, batch, stages, memory)[1]

    def lengths(clip: float) -> torch.Tensor:
        """Of a step on each tensor of each set, (tensors, N)."""
        got = memdlm.inner_step(model, batch, stage, fast, replace(memory, clip=clip))[0]
        steps = [after - before for after, before in zip(got.tensors(), fast.tensors())]
        return torch.stack([step.flatten(1).norm(dim=1) for step in steps]) / memory.lr

    norms = lengths(0.0)
    limit = norms.median().item()
    together = norms.square().sum(0, keepdim=True).sqrt().expand_as(norms)  # (tensors, N)
    over_sets = norms.square().sum(1, keepdim=True).sqrt().expand_as(norms)

    def shortened(by: torch.Tensor) -> torch.Tensor:
        return norms * (limit / (by + 1e-12)).clamp(max=1)

    mistakes = {
        "nothing is clipped": norms,
        "all tensors are clipped together, by one global norm": shortened(together),
        "the sets of a tensor are clipped together": shortened(over_sets),
        "short gradients are stretched to the limit": torch.full_like(norms, limit),
    }
    what = "the lengths of the steps, a row for each A and B"
    assert_same(lengths(limit), shortened(norms), what, mistakes)


@pytest.mark.step5
@pytest.mark.parametrize("weighted", [True, False], ids=["w = 1/t", "w = 1"])
@pytest.mark.parametrize(("fraction", "clip"), [(0.25, 0.5), (1.0, 0.0), (1.0, 0.5)])
def test_two_stages_equal_the_slow_way(model, batch, stages, memory, fraction, clip, weighted):
    """phi_2 against gradients through full forwards on W + alpha/r B A. Fails when a stage starts
    from phi_0 again, sees the wrong input, or is weighted, normalised or clipped otherwise."""
    memory = replace(memory, fraction=fraction, clip=clip)
    if not weighted:  # as where a prompt is written (Sec. 4.5)
        stages = [stage._replace(weight=torch.ones(4)) for stage in stages]
    fast = init_fast(model, memory, 1, seeded())
    before = [part.clone() for part in fast.tensors()]
    got, losses = memdlm.inner_loop(model, batch, stages, fast, memory)
    assert all(map(torch.equal, fast.tensors(), before)), "phi_0 was changed in place"
    first = with_prefixes(model, batch, stages, memory)[0]
    first = memdlm.stage_loss(model, batch, first, fast, memory)
    assert_same(losses[0], first, "the loss of stage 1, which is that *before* its step")
    assert not any(part.requires_grad for part in (*got.tensors(), losses)), (
        "detach what you return"
    )
    assert_set_equals(got, slow.inner_loop(model, batch, stages, fast, memory))
    assert all(B.abs().max() > 1e-4 for _, B in got.weights.values()), "it has hardly moved"


@pytest.mark.step5
def test_an_inner_step_finds_its_gradient_where_gradients_are_off(model, batch, stages, memory):
    """An evaluation, which writes memories, has switched them off."""
    fast = init_fast(model, memory, 4, seeded())
    stage = with_prefixes(model, batch, stages, memory)[1]
    usual, _ = memdlm.inner_step(model, batch, stage, fast, memory)
    try:
        with torch.no_grad():
            got, _ = memdlm.inner_step(model, batch, stage, fast, memory)
    except RuntimeError as error:
        pytest.fail(f"under torch.no_grad(): {error}. Take the gradient in torch.enable_grad()")
    assert all(map(torch.equal, got.tensors(), usual.tensors())), "another step under no_grad"
    told = "an inner step leaves a gradient in theta, which the outer step would add to its own"
    assert all(p.grad is None for p in model.parameters()), f"{told}: take torch.autograd.grad"


@pytest.mark.step5
def test_stage_1_moves_B_alone(model, batch, stages, memory):
    """With B = 0 the gradient of A is zero: the first stage writes B along random directions A, the
    second stage moves both."""
    fast = init_fast(model, memory, 4, seeded())
    one, _ = memdlm.inner_loop(model, batch, stages[:1], fast, memory)
    two, _ = memdlm.inner_loop(model, batch, stages, fast, memory)
    for name, (A, B) in fast.weights.items():
        assert torch.equal(one.weights[name][0], A), f"{name}: A has moved in stage 1"
        assert not torch.equal(one.weights[name][1], B), f"{name}: B has not moved in stage 1"
        assert not torch.equal(two.weights[name][0], A), f"{name}: A has not moved in stage 2"


@pytest.mark.step5
@torch.no_grad()
def test_a_stage_is_weighted_by_the_share_that_it_really_masks(model, batch, stages, memory):
    """Its loss is a mean over masked tokens with the weight 1 / (masked / maskable + 1e-6), while
    the outer loss takes the *sampled* t and divides by the maskable tokens (published code)."""
    stage = with_prefixes(model, batch, stages, memory)[1]
    count, maskable = torch.tensor([3, 2, 5, 1]), torch.tensor([10, 9, 8, 7])
    weighted = slow.nll(model, {}, batch, stage.masked).sum(1) * (1 / (count / maskable + 1e-6))
    nlls = slow.nll(model, {}, batch, stage.masked).sum(1)
    for sets in (4, 2, 1):

        def by_set(sums: torch.Tensor, sets=sets) -> torch.Tensor:
            return sums.view(sets, -1).sum(1) / count.view(sets, -1).sum(1)

        expected, fast = by_set(weighted), init_fast(model, memory, sets, seeded())
        loss = memdlm.stage_loss(model, batch, stage, fast, memory)
        aside = [part.view(-1, sets).sum(0) for part in (weighted, count)]
        mistakes = {
            "it is divided by the maskable tokens, as the outer loss": expected * 11 / 34,
            "each set is divided by the scored places of all sets": weighted / 11,
            "it is summed over the rows, though each set has a loss": weighted.sum() / 11,
            "the weight is missing": by_set(nlls),
            "the rows of a set lie side by side: view(N, -1), not view(-1, N)": aside[0] / aside[1],
        }
        assert_same(loss, expected, f"the loss of {sets} sets", mistakes)
    some = stage._replace(scored=stage.masked & (torch.arange(12) > 4))  # 2, 1, 4 and 1 of them
    expected = (slow.nll(model, {}, batch, stage.masked) * some.scored).sum(1) * stage.weight
    loss = memdlm.stage_loss(model, batch, some, init_fast(model, memory, 4, seeded()), memory)
    hint = "Sum, and count, at stage.scored, and not at all that stage.masked hides."
    assert_same(loss, expected / torch.tensor([2, 1, 4, 1]), "a loss at some places", hint=hint)
    part = batch._replace(attention_mask=torch.arange(12) < torch.tensor([[12], [12], [12], [9]]))
    stage = with_prefixes(model, part, stages, memory)[1]
    hidden = slow.nll(model, {}, part, stage.masked).sum(1) * stage.weight / count
    loss = memdlm.stage_loss(model, part, stage, init_fast(model, memory, 4, seeded()), memory)
    hint = "Hand batch.attention_mask to model.run."
    assert_same(loss, hidden, "the loss where three places are hidden", hint=hint)


@pytest.mark.step5
@pytest.mark.parametrize("sets", [4, 2], ids=["one per row", "rows 0, 1 and rows 2, 3"])
def test_sets_do_not_mix(model, batch, anchor, stages, memory, sets):
    """What is written for one sample, or for the windows of one text, does not depend on what else
    is in the batch: each set is what its rows alone would write."""
    memory, each = replace(memory, clip=0.5), 4 // sets
    fast = init_fast(model, memory, sets, seeded())
    together, _ = memdlm.inner_loop(model, batch, stages, fast, memory)
    for i in range(sets):
        own = fast.with_tensors([part[i : i + 1] for part in fast.tensors()])
        rows = slice(i * each, (i + 1) * each)
        part, _, part_stages = some_rows(rows, batch, anchor, stages)
        alone, _ = memdlm.inner_loop(model, part, part_stages, own, memory)
        assert_set_equals(together, one_set(alone), i)


@pytest.mark.step5
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_loss_skips_its_own_update_alone(model, batch, stages, memory, bad):
    """One broken sample must not poison the batch. Row 1 is broken in stage 1: its memory is that
    of stage 2 alone, and the others' are what they would have been."""
    fast = init_fast(model, memory, 4, seeded())
    usual, _ = memdlm.inner_loop(model, batch, stages, fast, memory)
    second, _ = memdlm.inner_loop(model, batch, stages[1:], fast, memory)
    broken = with_prefixes(model, batch, stages, memory)
    broken[0].h[1] = bad
    got, losses = memdlm.inner_loop(model, batch, broken, fast, memory)
    told = "stage.h of row 1 is broken in stage 1; all other losses must be finite (0 * inf is NaN)"
    assert losses.isfinite().tolist() == [[True, False, True, True], [True] * 4], told
    for ours, whole, skipped in zip(got.tensors(), usual.tensors(), second.tensors()):
        assert torch.equal(ours[[0, 2, 3]], whole[[0, 2, 3]]), "a healthy row has changed"
        assert torch.equal(ours[1], skipped[1]), "the broken row's stage was not skipped cleanly"


@pytest.mark.step5
def test_an_infinite_loss_skips_its_set_where_the_gradient_is_finite(model, batch, stages, memory):
    """A token of row 1 has chance 0: -log p is infinite, and its gradient, p - 1, is not."""
    batch.x0[1, 3], never = data.EOS, torch.zeros(data.VOCAB_SIZE)
    never[data.EOS] = -math.inf
    model.output.register_forward_hook(lambda module, inputs, logits: logits + never)
    fast = init_fast(model, memory, 4, seeded())
    stage = with_prefixes(model, batch, stages, memory)[1]
    got, loss = memdlm.inner_step(model, batch, stage, fast, memory)
    assert loss.isinf().tolist() == [False, True, False, False]
    for before, after in zip(fast.tensors()[1::2], got.tensors()[1::2]):  # each B
        assert torch.equal(before[1], after[1]), "set 1 has moved, though its loss is infinite"
        assert not torch.equal(before[0], after[0]), "set 0 has not moved: its loss is finite"


@pytest.mark.step5
def test_a_gradient_that_is_not_finite_skips_its_own_matrix_alone(model, batch, stages, memory):
    """The loss is finite, but row 1 sends a NaN back into one unit of the gate of layer 2: that A
    and B of set 1 stay, all of them, and all others move as they would have."""
    fast = init_fast(model, memory, 4, seeded())
    fast = fast.with_tensors([part + 0.02 for part in fast.tensors()])
    stage = with_prefixes(model, batch, stages, memory)[1]
    usual, _ = memdlm.inner_step(model, batch, stage, fast, memory)
    broken = torch.ones(4, 1, 48, dtype=torch.float64)
    broken[1, 0, 0] = math.nan

    def spoil(module, inputs, output) -> None:
        output.register_hook(lambda grad: grad * broken)

    model.layers[2].mlp.gate.register_forward_hook(spoil)
    got, loss = memdlm.inner_step(model, batch, stage, fast, memory)
    assert loss.isfinite().all()
    for name in fast.weights:
        for before, after, free in zip(*(m.weights[name] for m in (fast, got, usual))):
            own = name == "layers.2.mlp.gate"
            expected = torch.cat([free[:1], before[1:2], free[2:]]) if own else free
            what = f"{name} after a step with a NaN in the gradient of layers.2.mlp.gate, set 1"
            assert_same(after, expected, what, hint="What is not finite must be skipped.")


@pytest.mark.step5
def test_nothing_masked_writes_nothing(model, batch, anchor, memory):
    """It happens at a small t: that row's loss is 0 and not 0 / 0, and its memory stays phi_0."""
    masked = batch.maskable.clone()
    masked[2] = False
    fast, stages = init_fast(model, memory, 4, seeded()), variants.chain([masked], batch.maskable)
    got, losses = memdlm.inner_loop(model, batch, stages, fast, memory)
    assert losses[0, 2] == 0, f"no masked token: the loss is 0, not {losses[0, 2]} (0 / 0?)"
    for ours, start in zip(got.tensors(), fast.tensors()):
        assert torch.equal(ours[2], start[2])
    assert all(B[[0, 1, 3]].flatten(1).any(dim=1).all() for _, B in got.weights.values())
    nothing = anchor._replace(masked=torch.zeros_like(masked))
    assert memdlm.mdlm_loss(model, batch, nothing) == 0
