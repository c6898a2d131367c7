"""
test_outer.py: the outer loop and the step of theta (Eqs. 9, 10), against the formulas (slow.py).
"""

import math
from dataclasses import replace

import pytest
import slow
import torch
from slow import assert_gradients_equal, gradients, seeded, some_rows
from teaching import TIGHT, assert_same
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

import data
import memdlm
from data import Batch
from lab import variants
from lab.training import METHODS
from memdlm import Memory, init_fast, mdlm_loss, memdlm_loss, train_step


@pytest.mark.step6
@pytest.mark.parametrize(("fraction", "clip"), [(0.25, 0.0), (0.5, 0.5), (1.0, 0.0)])
def test_memdlm_loss_equals_three_forwards(model, batch, anchor, stages, memory, fraction, clip):
    """The plain reading of Eqs. 6-10: forward and backward on x_tpre, on x_t, and on x_t again with
    phi_2 held constant. Loss and every gradient are the same, though activations are shared."""
    memory = replace(memory, fraction=fraction, clip=clip, scope="batch")
    fast = init_fast(model, memory, 1, seeded())
    loss, inner = memdlm_loss(model, batch, anchor, stages, fast, memory)
    assert inner.shape == (2, 1), f"the inner losses are (K, N), here (2, 1), not {inner.shape}"
    phi = slow.inner_loop(model, batch, stages, fast, memory)
    expected = slow.outer_loss(model, batch, anchor, slow.merge(model, phi, fast.scale))
    pre = slow.inner_loop(model, batch, stages[:1], fast, memory)
    mistakes = {
        "phi is still empty: score with phi_K": mdlm_loss(model, batch, anchor),
        "phi_1 is taken, and not phi_2": slow.outer_loss(
            model, batch, anchor, slow.merge(model, pre, fast.scale)
        ),
    }
    assert_same(loss, expected, "the outer loss (Eq. 9)", mistakes)
    assert_gradients_equal(model, loss, expected)
    assert (loss - mdlm_loss(model, batch, anchor)).abs() > 1e-3, "the memory changes nothing"


def test_the_prefix_of_the_anchor_is_computed_once(model, batch, anchor, stages, memory):
    """The table in memdlm.py says what that saves."""
    runs = []
    for i in (0, 3):
        layer = model.layers[i]
        layer.register_forward_hook(lambda layer, *_: runs.append(layer))
    fast = init_fast(model, memory, 4, seeded())
    memdlm_loss(model, batch, anchor, stages, fast, replace(memory, epochs=2))
    assert [runs.count(model.layers[i]) for i in (0, 3)] == [2, 5]


@pytest.mark.step6
def test_the_loss_of_own_sets_is_the_sum_over_samples(model, batch, anchor, stages, memory):
    """Row i is scored with its own phi_2. Loss and gradients are those of single rows, put together
    with the batch's one denominator."""
    fast, total = init_fast(model, memory, 4, seeded()), 0.0
    loss, inner = memdlm_loss(model, batch, anchor, stages, fast, memory)
    assert inner.shape == (2, 4), f"the inner losses are (K, N), here (2, 4), not {inner.shape}"
    for i in range(4):
        own = fast.with_tensors([part[i : i + 1] for part in fast.tensors()])
        row = some_rows(slice(i, i + 1), batch, anchor, stages)
        total = total + memdlm_loss(model, *row, own, memory)[0] * batch.maskable[i].sum()
    assert_gradients_equal(model, loss, total / batch.maskable.sum())


@pytest.mark.step6(first=True)
def test_the_outer_gradient_is_first_order(model, batch, anchor, stages, memory):
    """Eq. 10 takes phi_2 for a constant, as first-order MAML does. Through the inner steps as well,
    the loss is the same and the gradient another; that one would silently cost a Hessian."""
    fast = init_fast(model, memory, 1, seeded())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        loss, _ = memdlm_loss(model, batch, anchor, stages, fast, memory)
        first = gradients(model, loss)
        phi = slow.inner_loop(model, batch, stages, fast, memory, second_order=True)
        through = slow.outer_loss(model, batch, anchor, slow.merge(model, phi, fast.scale))
        second = gradients(model, through)
    torch.testing.assert_close(loss, through, **TIGHT)
    for name in ("embedding.weight", "layers.0.attention.q.weight", "layers.3.mlp.down.weight"):
        difference = (first[name] - second[name]).norm() / second[name].norm()
        told = f"the gradient of {name} is the second-order one: it goes through the inner loop"
        assert difference > 1e-3, f"{told}. Detach phi_K, or the parts that it is made from"


@pytest.mark.step6
def test_hidden_padding_changes_neither_memory_nor_loss(model, batch, anchor, stages, memory):
    """Five pads that are hidden and no targets leave inner losses, loss and theta's gradient as
    they are, or the result would depend on the longest row of a batch."""
    fast = init_fast(model, memory, 4, seeded())
    loss, inner = memdlm_loss(model, batch, anchor, stages, fast, memory)
    real = pad(torch.ones_like(batch.maskable), (0, 5))
    wide = Batch(pad(batch.x0, (0, 5), value=data.EOS), pad(batch.maskable, (0, 5)), real)
    wide_anchor = anchor._replace(masked=pad(anchor.masked, (0, 5)))
    wide_stages = variants.chain([pad(stage.masked, (0, 5)) for stage in stages], wide.maskable)
    wide_loss, wide_inner = memdlm_loss(model, wide, wide_anchor, wide_stages, fast, memory)
    torch.testing.assert_close(wide_inner, inner, **TIGHT)
    assert_gradients_equal(model, wide_loss, loss)
    seen = wide._replace(attention_mask=None)
    seen_loss, _ = memdlm_loss(model, seen, wide_anchor, wide_stages, fast, memory)
    assert (seen_loss - wide_loss).abs() > 1e-4, "visible pads change nothing: no test"


@pytest.mark.step6
def test_each_batch_starts_from_an_empty_memory(model, batch, memory):
    """phi is drawn anew for each batch (Sec. 3): after another batch, the loss of this one is what
    it was. Else theta would be trained on a memory of samples that are long past."""
    alone = METHODS["memdlm"](model, batch, memory, seeded(4))
    METHODS["memdlm"](model, batch._replace(x0=batch.x0.flip(0)), memory, seeded(7))
    again = METHODS["memdlm"](model, batch, memory, seeded(4))
    hint = "Is phi carried over from the last batch, and not reset to phi_0?"
    assert_same(again, alone, "the loss of a batch after another batch", hint=hint)


def test_the_pretraining_loss_is_the_mean_over_masked_tokens(model, batch):
    """No 1/t: the optimum is the same, the noise is smaller."""
    masked = memdlm.draw_anchor(batch.maskable, seeded(3)).masked
    expected = slow.nll(model, {}, batch, masked).sum() / masked.sum()
    loss = METHODS["base"](model, batch, Memory(), seeded(3))
    torch.testing.assert_close(loss, expected, **TIGHT)


def test_draws_depend_on_every_part_of_their_key_and_on_nothing_else():
    """A resumed run has no generator's state: step 70 must draw what it would have drawn. The known
    seed also catches keys made by Python's hash(), which changes from process to process."""
    assert memdlm.generator_for(3, "anchor", 7).initial_seed() == 79268165
    keys = [(0,), (1,), (0, "anchor"), (0, "write"), ("anchor", 0), (0, "anchor", 1)]
    assert len({memdlm.generator_for(*key).initial_seed() for key in keys}) == len(keys)


BROKEN = {  # what happens to the losses of a step
    "the loss is infinite, its gradient is not": [lambda loss: loss + math.inf, lambda loss: loss],
    "the gradient is infinite, the loss is not": [lambda loss: (loss * 0).sqrt()],
    "one of three is NaN": [lambda loss, by=by: loss * by for by in (1.0, math.nan, 1.0)],
}


@pytest.mark.step6
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_step_changes_nothing(model, batch, anchor, broken):
    """One bad batch must cost one step, not the run: a NaN in AdamW's averages would never leave.
    Both count, whether the sum of all losses is finite and whether its gradient is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert train_step(model, optimizer, [mdlm_loss(model, batch, anchor)], 1.0)[0]
    before = [p.detach().clone() for p in model.parameters()]
    before += [state["exp_avg"].clone() for state in optimizer.state.values()]
    losses = (change(mdlm_loss(model, batch, anchor)) for change in BROKEN[broken])
    assert not train_step(model, optimizer, losses, 1.0)[0], f"{broken}: the step was taken"
    after = [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]
    kept = all(torch.equal(p, q) for p, q in zip(before, after))
    assert kept, "a step that is not taken must leave weights and AdamW's averages as they are"
    told = "a good loss after a broken one: are old gradients, with a NaN, still there (zero_grad)?"
    assert train_step(model, optimizer, [mdlm_loss(model, batch, anchor)], 1.0)[0], told


@pytest.mark.step6
@pytest.mark.parametrize("clip", [0.01, 0.0], ids=["clipped", "0 = off"])
def test_the_global_norm_is_that_of_theta_alone(model, batch, anchor, clip):
    """The published code counts other weights' gradients, which shrinks theta's step. Here frozen
    weights carry a huge stale .grad: with plain SGD of rate 1 theta still moves by the limit."""
    theta = [model.layers[2].mlp.up.weight, model.layers[1].attention.q.weight]
    for p in model.requires_grad_(False).parameters():
        p.grad = torch.full_like(p, 1e6)
    for p in theta:
        p.requires_grad_()
    before = [p.detach().clone() for p in model.parameters()]
    loss = mdlm_loss(model, batch, anchor)
    grads = torch.autograd.grad(loss, theta, retain_graph=True)
    norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
    assert train_step(model, torch.optim.SGD(theta, lr=1.0), [loss], clip) == (True, loss.item())
    moved = torch.stack([(p.detach() - q).norm() for p, q in zip(model.parameters(), before)])
    told = f"theta moved by {moved.norm():.6f}, and not by {clip or norm:.6f}"
    right = moved.norm().item() == pytest.approx(clip or norm, rel=1e-4)
    hint = "clip by the global norm of the weights that require a gradient alone, whose old .grad"
    assert right, f"{told}: {hint} must be cleared first"
    assert (moved > 0).sum() == 2, "a frozen weight has moved"


@pytest.mark.step6
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_micro_batches_add_up_and_one_has_a_graph_at_a_time(model, batch, anchor, clip):
    """The step is that of the sum of the losses; and each is made only after the backward of the
    one before it, which is what micro-batches are there for."""
    p, backwards = model.layers[0].mlp.up.weight, []

    def losses():
        for rows in (slice(0, 2), slice(2, 4)):
            backwards.append(p.grad is not None)
            part, part_anchor, _ = some_rows(rows, batch, anchor, [])
            yield mdlm_loss(model, part, part_anchor) * part.maskable.sum() / 34

    whole = mdlm_loss(model, batch, anchor)  # 19 and 15 of its 34 maskable tokens are in the halves
    grads, before = gradients(model, whole), p.detach().clone()
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    taken = train_step(model, torch.optim.SGD([p], lr=1.0), losses(), clip)
    told = f"the losses add up to {whole.item():.6f}; the step has returned {taken}"
    assert taken == (True, pytest.approx(whole.item(), rel=1e-9)), told
    assert isinstance(taken[1], float), "the sum is a float: a tensor may hold on to a graph"
    step = grads["layers.0.mlp.up.weight"] * (clip / norm if clip else 1)
    hint = "Clip once, behind the last backward."
    torch.testing.assert_close(before - p.detach(), step, rtol=1e-4, atol=1e-9, msg=hint)
    assert backwards == [False, True], "backward each loss before the next one is made"
