"""
test_outer.py: the outer loop (Eqs. 9-10), which learns what the memory does not hold, and the step. Loss and gradients against
the formulas written out the slow way (slow.py).
"""

import math
from dataclasses import replace

import pytest
import torch
from slow import TIGHT, gradients, one_row, one_set, seeded, slow_inner_loop, slow_matrices, slow_nll, slow_outer_loss
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from data import Batch
from memdlm import (
    METHODS,
    NORMS,
    SCOPES,
    Anchor,
    Memory,
    Objective,
    Phase,
    Stage,
    chain,
    denoising_loss,
    draw_anchor,
    draw_pre_anchor,
    embed,
    generator_for,
    init_fast,
    mdlm_loss,
    memdlm_loss,
    micro_losses,
    train_step,
)


@pytest.fixture
def pre_masked(batch, anchor):
    return draw_pre_anchor(anchor.masked, batch.maskable, 1.5, seeded(5))


def stages_of(batch: Batch, pre_masked: torch.Tensor, anchor: Anchor) -> list[Stage]:
    """The paper's two stages: pre-anchor, then anchor."""
    return chain([pre_masked, anchor.masked], batch.maskable)


# ---- the outer loop (Eqs. 9-10) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_shared_prefix_equals_three_full_forwards(model, batch, anchor, pre_masked, memory, fraction, clip):
    """memdlm_loss saves work by sharing activations. Loss and every gradient must equal the plain reading of Eqs. 6-10:
    forward and backward on x_tpre, on x_t, and on x_t again with phi_2 held constant."""
    memory = replace(memory, fraction=fraction, clip=clip, scope="batch")
    fast = init_fast(model, memory, 1, seeded())
    loss, _ = memdlm_loss(model, batch, anchor, stages_of(batch, pre_masked, anchor), fast, memory)
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
    loss, _ = memdlm_loss(model, batch, anchor, stages_of(batch, pre_masked, anchor), fast, memory)
    total, n = 0.0, batch.maskable.sum(1).double()
    for i in range(4):
        rows = slice(i, i + 1)
        one = Anchor(anchor.t[rows], anchor.masked[rows])
        row = one_row(batch, i)
        alone, _ = memdlm_loss(model, row, one, stages_of(row, pre_masked[rows], one), one_set(fast, i), memory)
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
    loss, _ = memdlm_loss(model, batch, anchor, stages_of(batch, pre_masked, anchor), fast, memory)
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
        loss, inner = memdlm_loss(model, wide, wide_anchor, stages_of(wide, wide_pre, wide_anchor), fast, memory)
        results.append((loss, inner, gradients(model, loss)))
    (loss, inner, grads), (wide_loss, wide_inner, wide_grads) = results
    torch.testing.assert_close(wide_loss, loss, **TIGHT)
    torch.testing.assert_close(wide_inner, inner, **TIGHT)
    for name in grads:
        torch.testing.assert_close(wide_grads[name], grads[name], **TIGHT)
    visible, *_ = wider(batch, anchor, pre_masked, 5)
    visible = visible._replace(attention_mask=None)
    seen = memdlm_loss(model, visible, wide_anchor, stages_of(visible, wide_pre, wide_anchor), fast, memory)[0]
    assert (seen - loss).abs() > 1e-4, "unhidden pads change nothing: the test sees nothing"


# ---- what the loss is averaged over ----------------------------------------------------------------------------------------


def naive_norm(norm: str, by_row: list[float], maskable: list[int]) -> float:
    """by_row: each row's sum of weighted token losses. What each of the published averages is, in words of one line."""
    if norm == "token":
        return sum(by_row) / sum(maskable)
    return sum(total / n if norm == "sequence" else total for total, n in zip(by_row, maskable)) / len(by_row)


@torch.no_grad()
@pytest.mark.parametrize("norm", list(NORMS))
def test_each_norm_is_the_average_that_it_says(model, batch, anchor, norm):
    """ "token": over all maskable tokens; "sequence": over those of each row, then over rows; "batch": over rows alone. Rows of
    7 to 10 maskable tokens, so that no two of them agree; for both methods, where an empty memory must change nothing."""
    weighted = (1 / (anchor.t + 1e-6)).double() * slow_nll(model, {}, batch, anchor.masked).sum(1)
    expected = naive_norm(norm, weighted.tolist(), batch.maskable.sum(1).tolist())
    assert mdlm_loss(model, batch, anchor, norm).item() == pytest.approx(expected, rel=1e-9)
    memory = Memory(rank=3, lr=0.0, fraction=0.5)
    fast, stages = init_fast(model, memory, 1, seeded()), chain([anchor.masked], batch.maskable)
    with_memory, _ = memdlm_loss(model, batch, anchor, stages, fast, memory, norm)
    assert with_memory.item() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_norms_differ_only_where_rows_do(model, batch, anchor):
    """With equally long responses "token" and "sequence" are one; "batch" is longer by their length, so that it needs another
    learning rate (or AdamW, which does not care)."""
    same = batch._replace(maskable=torch.arange(12).expand(4, 12) >= 2)
    token, sequence, rows = (mdlm_loss(model, same, anchor, norm) for norm in ("token", "sequence", "batch"))
    torch.testing.assert_close(sequence, token, **TIGHT)
    torch.testing.assert_close(rows, 10 * token, **TIGHT)
    assert mdlm_loss(model, batch, anchor, "sequence") != mdlm_loss(model, batch, anchor, "token")


@pytest.mark.parametrize("method", ["mdlm", "memdlm"])
def test_both_methods_pass_the_norm_on(model, batch, memory, method):
    """METHODS is what training calls; the norm must not be lost on the way, and the draws must not depend on it."""
    losses = {norm: METHODS[method](model, batch, memory, seeded(3), norm).item() for norm in NORMS}
    assert len(set(losses.values())) == 3
    assert METHODS[method](model, batch, memory, seeded(3)).item() == losses["token"], "the paper's is the default"


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
    assert train_step(model, optimizer, [mdlm_loss(model, batch, anchor)], 1.0)[0] is True
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    taken, loss = train_step(model, optimizer, [mdlm_loss(model, batch, anchor) * bad], 1.0)
    assert taken is False
    assert not math.isfinite(loss), "the log must show what was skipped"
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments))
    assert train_step(model, optimizer, [mdlm_loss(model, batch, anchor)], 1.0)[0] is True, "the step after it must work again"
    assert all(p.isfinite().all() for p in model.parameters())


def test_step_with_a_finite_loss_and_a_non_finite_gradient_changes_nothing(model, batch, anchor):
    """sqrt has an infinite slope at 0: the loss looks fine, its gradient is not."""
    weights = [p.detach().clone() for p in model.parameters()]
    loss = (mdlm_loss(model, batch, anchor) * 0).sqrt()
    assert loss.isfinite()
    assert train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [loss], 1.0)[0] is False
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
    assert train_step(model, torch.optim.SGD(theta, lr=1.0), [loss], clip) == (True, loss.item())
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
    """memdlm_loss hands over h after the prefix; started there, at the latest before the last feed-forward, or at the
    embedding, the loss is the same."""
    h = embed(model, batch.x0, anchor.masked)
    whole = mdlm_loss(model, batch, anchor)
    for cut in (0, 0.5, 1, 2, 2.5, 3, 3.5):
        torch.testing.assert_close(denoising_loss(model, batch, anchor, model.run(h, 0, cut), None, cut), whole, **TIGHT)


# ---- accumulation: several micro-batches make one step ----------------------------------------------------------------------


def phase_of(batches: list[Batch], method: str, memory: Memory, **more) -> Phase:
    return Phase(method, 5, 1, 0.1, 0.0, 1.0, 0.0, memory, "test", lambda step, micro: batches[micro], None, {}, **more)


@pytest.mark.parametrize("method", ["mdlm", "memdlm"])
def test_accumulated_gradient_is_the_mean_of_the_micro_batches(model, batch, memory, method):
    """`accumulate` 2: one step of SGD with rate 1 moves theta by minus the mean of two gradients, each worked out alone on its
    own rows with draws of its own; the loss that is shown is the mean, too."""
    batches = [Batch(*(part[rows] if part is not None else None for part in batch)) for rows in (slice(0, 2), slice(2, 4))]
    phase = phase_of(batches, method, memory, accumulate=2)
    keys = [(5, "test", 0), (5, "test", 0, 1)]
    losses = [METHODS[method](model, part, memory, generator_for(*key)) for part, key in zip(batches, keys)]
    first, second = (gradients(model, loss) for loss in losses)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    taken, shown = train_step(model, optimizer, micro_losses(Objective(model, phase), phase, 0), 0.0)
    assert taken
    assert shown == pytest.approx((losses[0].item() + losses[1].item()) / 2, rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), (first[name] + second[name]) / 2, **TIGHT)


def test_without_accumulation_the_draws_are_those_of_one_batch(model, batch, memory):
    """The first micro-batch's key is the step's own, so that a run without accumulation is what it was before there was any."""
    phase = phase_of([batch], "memdlm", memory)
    (loss,) = micro_losses(Objective(model, phase), phase, 0)
    assert torch.equal(loss, METHODS["memdlm"](model, batch, memory, generator_for(5, "test", 0)))


def test_only_one_micro_batch_has_a_graph_at_a_time(model, batch, memory):
    """Accumulation is there to save memory: a micro-batch's loss is made only after the backward of the one before it."""
    phase, alive = phase_of([batch] * 3, "mdlm", memory, accumulate=3), []
    losses = micro_losses(Objective(model, phase), phase, 0)
    p = next(model.parameters())

    def watched():
        for number, loss in enumerate(losses):
            alive.append((number, p.grad is not None))
            yield loss

    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), watched(), 0.0)
    assert alive == [(0, False), (1, True), (2, True)]


def test_one_bad_micro_batch_skips_the_whole_step(model, batch, anchor):
    """Its NaN is in the accumulated gradient already; nothing of the step may be kept."""
    weights = [p.detach().clone() for p in model.parameters()]
    losses = (mdlm_loss(model, batch, anchor) * factor for factor in (1.0, math.nan, 1.0))
    assert train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), losses, 1.0)[0] is False
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
