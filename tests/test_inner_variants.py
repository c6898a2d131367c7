"""
test_inner_variants.py: what the paper varies in its analyses (Sec. 4), each variant against its
definition, written out the slow way (slow.py).
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import slow
import torch
from slow import assert_set_equals, by_name, one_set, seeded, with_prefixes
from teaching import TIGHT

import memdlm
from lab.variants import CHOICES, STRATEGIES
from memdlm import Anchor, Memory, Stage, make_stages
from model import Fast

LENGTHS = [1, 2, 3, 5]  # K


@pytest.fixture
def wide() -> tuple[torch.Tensor, Anchor]:
    """What is maskable in forty rows, 10 to 30 tokens, so that rounding shows; and an anchor."""
    maskable = torch.arange(30) >= (torch.arange(40) % 21)[:, None]
    return maskable, memdlm.draw_anchor(maskable, seeded(2))


def stages_by(strategy: str, steps: int, maskable, anchor: Anchor, **change) -> list[Stage]:
    memory = by_name(strategy=strategy, steps=steps, **change)
    return make_stages(anchor, maskable, memory, seeded(3))


def moved_fast(model, memory: Memory, sets: int) -> Fast:
    """Equal sets that are not zero, as after a first stage: A has a gradient, too."""
    fast, tensors = memdlm.init_fast(model, memory, 1, seeded(4)), []
    for part in fast.tensors():
        noise = torch.randn(part.shape, generator=seeded(5), dtype=part.dtype)
        tensors.append((part + 0.02 * noise).repeat(sets, 1, 1))
    return fast.with_tensors(tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", LENGTHS)
def test_states_are_nested_and_inside_the_response(wide, strategy, steps):
    """Denoising only reveals: consistent states lead from the pre-anchor to the anchor. Each state
    names the next one, which a teacher sees; the last names none, but for stage 1 alone, whose next
    state is the anchor. (How many tokens each state masks, test_published.py knows.)"""
    maskable, anchor = wide
    stages = stages_by(strategy, steps, maskable, anchor)
    assert len(stages) == {"pre_anchor_only": 1, "anchor_only": 1}.get(strategy, steps)
    for stage, after in pairwise(stages):
        assert stage.following is after.masked
        assert not (after.masked & ~stage.masked).any()
    for stage in stages:
        assert not (stage.masked & ~maskable).any()
    expected = anchor.masked if strategy == "pre_anchor_only" else None
    assert stages[-1].following is expected
    pre_masked = memdlm.draw_pre_anchor(anchor.masked, maskable, 1.5, seeded(3))
    if strategy in ("consistent", "pre_anchor_only"):
        assert torch.equal(stages[0].masked, pre_masked)
        share = pre_masked.sum(1) / maskable.sum(1)
        torch.testing.assert_close(stages[0].weight, 1 / (share + 1e-6))
    if strategy == "anchor_only":  # its weight is that of the t that was drawn
        torch.testing.assert_close(stages[0].weight, 1 / (anchor.t + 1e-6))
    if strategy == "anchor_only" or (strategy == "consistent" and steps > 1):
        assert torch.equal(stages[-1].masked, anchor.masked)


@pytest.mark.parametrize("steps", LENGTHS)
def test_inconsistent_states_have_nothing_to_do_with_the_anchor(wide, steps):
    """Fig. 9: from 80% down to 20% masked, whatever the anchor masks. The first state of several is
    a Bernoulli draw, the others mask int(n * ratio) of its tokens; weights are nominal."""
    maskable, anchor = wide
    stages = stages_by("inconsistent", steps, maskable, anchor)
    other = memdlm.draw_anchor(maskable, seeded(9))
    other = stages_by("inconsistent", steps, maskable, other)
    assert all(torch.equal(a.masked, b.masked) for a, b in zip(stages, other))
    ratios = [0.8 + (0.2 - 0.8) * (i / (steps - 1)) for i in range(steps)] if steps > 1 else [0.2]
    for number, (stage, ratio) in enumerate(zip(stages, ratios)):
        torch.testing.assert_close(stage.weight, torch.full((40,), 1 / (ratio + 1e-6)))
        if number > 0 or steps == 1:
            nominal = (maskable.sum(1).double() * ratio).long()
            most = stages[0].masked.sum(1)
            assert torch.equal(stage.masked.sum(1), torch.minimum(nominal, most))


def test_states_are_fair_draws():
    """In the middle of three, half of the further masks are revealed; chance 0.8 masks 80%."""
    maskable = torch.ones(4000, 24, dtype=torch.bool)
    anchor = Anchor(torch.ones(4000), (torch.arange(24) < 16).expand(4000, 24))
    _, middle, _ = stages_by("consistent", 3, maskable, anchor)
    often = middle.masked[:, 16:].double().mean(0)
    assert (often - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5
    first, _ = stages_by("inconsistent", 2, maskable, anchor)
    assert (first.masked.double().mean(0) - 0.8).abs().max() < 5 * (0.16 / 4000) ** 0.5


def test_newly_revealed_targets_are_what_the_next_state_shows(batch, anchor):
    """Eq. 7 read literally. Together they are the pre-anchor, each token once, while "all" counts
    the anchor's tokens again at every state."""
    usual, stages = (
        stages_by("consistent", 3, batch.maskable, anchor, start_scale=3.0, targets=name)
        for name in ("all", "newly_revealed")
    )
    assert all(torch.equal(stage.scored, stage.masked) for stage in usual)
    assert torch.equal(sum(stage.scored.int() for stage in stages), usual[0].masked.int())
    assert torch.equal(stages[-1].scored, anchor.masked)
    assert all(stage.scored.any() for stage in stages)


@pytest.mark.parametrize("targets", CHOICES["targets"])
@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_every_inner_loss_is_its_definition(model, batch, anchor, loss, targets):
    """Against full forwards: the student on the state, the teacher, a constant with the same phi,
    on the next one (the clean tokens after the last). First each state's loss, per sample; then phi
    after all three stages, gone through twice."""
    memory = by_name(loss=loss, targets=targets, steps=3, start_scale=3.0, epochs=2)
    stages = make_stages(anchor, batch.maskable, memory, seeded(5))
    fast = moved_fast(model, memory, 4)
    with torch.no_grad():
        matrices = slow.merge(model, one_set(fast), fast.scale)
        for stage in with_prefixes(model, batch, stages, memory):
            sums = slow.stage_sums(model, matrices, batch, stage, loss)
            expected = sums / stage.scored.sum(1).clamp(min=1)
            ours = memdlm.stage_loss(model, batch, stage, fast, memory)
            torch.testing.assert_close(ours, expected, **TIGHT)
            assert expected.sum() > 1e-3
    fast = moved_fast(model, memory, 1)
    got, losses = memdlm.inner_loop(model, batch, stages, fast, memory)
    assert losses.shape == (6, 1)
    assert_set_equals(got, slow.inner_loop(model, batch, stages, fast, memory))
    for after, before in zip(got.tensors(), fast.tensors()):
        assert (after - before).abs().max() > 1e-6, "the memory has hardly moved"


METHODS = [
    {"steps": 1},
    {"steps": 5, "loss": "kl"},
    {"strategy": "pre_anchor_only"},
    {"strategy": "anchor_only", "loss": "hidden_mse"},
    {"strategy": "inconsistent", "steps": 3},
    {"places": "ffn+attention"},
    {"form": "full"},
    {"clip_by": "global", "clip": 0.3},
]


@pytest.mark.parametrize("change", METHODS, ids=str)
def test_memdlm_loss_of_every_variant(model, batch, anchor, change):
    """Loss and gradients against full forwards. The anchor's prefix is at hand for whichever state
    needs it, and a strategy that never visits the anchor must not get it by mistake. The A of a
    full-rank change (Fig. 7) is the identity, and stays."""
    memory = by_name(scope="batch", lr=0.2, **change)
    stages = make_stages(anchor, batch.maskable, memory, seeded(5))
    fast = moved_fast(model, memory, 1)
    attention = {name.rpartition(".")[2] for name in fast.weights if ".attention." in name}
    assert attention == (set("qkvo") if "places" in change else set())
    got, inner = memdlm.memdlm_loss(model, batch, anchor, stages, fast, memory)
    assert inner.shape == (len(stages), 1)
    phi = slow.inner_loop(model, batch, stages, fast, memory)
    expected = slow.outer_loss(model, batch, anchor, slow.merge(model, phi, fast.scale))
    slow.assert_gradients_equal(model, got, expected)
    if "form" in change:
        assert all(A.equal(torch.eye(len(A), dtype=A.dtype)) for A, _ in phi.values())


def test_fast_weights_stay_float32_beside_a_bfloat16_model(make_model, batch, stages, memory):
    """A step of 1e-4 must move nearly every number of B: in bfloat16 it would be rounded away."""
    model, memory = make_model(torch.bfloat16), replace(memory, lr=1e-4, clip=1.0)
    fast = moved_fast(model, memory, 1)
    got, losses = memdlm.inner_loop(model, batch, stages[1:], fast, memory)
    assert losses.isfinite().all()
    for name, (_, B) in fast.weights.items():
        step = got.weights[name][1] - B
        assert step.dtype == torch.float32
        assert (step != 0).double().mean() > 0.9, name
        assert step.norm().item() <= 1e-4 * 1.01, name
