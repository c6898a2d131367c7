"""
test_inner_variants.py: what the paper varies in its analyses. Through which states the inner loop
goes (Figs. 9-11), what it learns from them (Fig. 6), at which positions (Sec. 4.6) and how often.
Each variant against its definition, written out the slow way (slow.py).
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import slow
import torch
from slow import assert_set_equals, fast_loop, one_set, seeded
from teaching import TIGHT

import memdlm
from memdlm import INNER_LOSSES, STRATEGIES, TARGETS, Anchor, Memory, Stage, make_stages
from model import Fast

LENGTHS = [1, 2, 3, 5]  # K
DISTILLED = [name for name in INNER_LOSSES if name != "ce"]


@pytest.fixture
def wide() -> tuple[torch.Tensor, Anchor]:
    """What is maskable in forty rows, 10 to 30 tokens, so that rounding shows; and an anchor."""
    maskable = torch.arange(30) >= (torch.arange(40) % 21)[:, None]
    return maskable, memdlm.draw_anchor(maskable, seeded(2))


@pytest.fixture
def three(batch, anchor) -> list[Stage]:
    """Three nested states, each of which reveals something."""
    return make_stages(anchor, batch.maskable, Memory(steps=3, start_scale=3.0), seeded(5))


def stages_by(strategy: str, steps: int, maskable: torch.Tensor, anchor: Anchor) -> list[Stage]:
    return make_stages(anchor, maskable, Memory(strategy=strategy, steps=steps), seeded(3))


def moved_fast(model, memory: Memory, sets: int) -> Fast:
    """Equal sets that are not zero, as after a first stage: A has a gradient, too, and students and
    teachers feel the memory."""
    fast, tensors = memdlm.init_fast(model, memory, 1, seeded(4)), []
    for A, B in fast.weights.values():
        noise = torch.randn(B.shape, generator=seeded(5), dtype=B.dtype)
        tensors += [A.repeat(sets, 1, 1), (B + 0.02 * noise).repeat(sets, 1, 1)]
    return fast.with_tensors(tensors)


# ---- states: which masks the inner loop goes through ---------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", LENGTHS)
def test_states_are_nested_and_inside_the_response(wide, strategy, steps):
    """Denoising only reveals. Each state names the next one, which a teacher sees; the last names
    none, but for stage 1 alone, whose next state is the anchor."""
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


@pytest.mark.parametrize("steps", LENGTHS)
def test_consistent_states_lead_from_pre_anchor_to_anchor_in_even_steps(wide, steps):
    """Each state reveals an even share of what is left, rounded up; K = 1 is the pre-anchor alone.
    The weight is that of the share of maskable tokens which the state really masks."""
    maskable, anchor = wide
    masked = anchor.masked
    pre_masked = memdlm.draw_pre_anchor(masked, maskable, 1.5, seeded(3))
    stages = stages_by("consistent", steps, maskable, anchor)
    assert torch.equal(stages[0].masked, pre_masked)
    assert steps == 1 or torch.equal(stages[-1].masked, masked)
    left = (pre_masked & ~masked).sum(1).tolist()
    assert max(left) >= steps, "no row has a token for each step: the test sees nothing"
    for number, stage in enumerate(stages):
        if number > 0:
            left = [count - math.ceil(count / (steps - number)) for count in left]
        assert (stage.masked & ~masked).sum(1).tolist() == left
        share = stage.masked.sum(1) / maskable.sum(1)
        torch.testing.assert_close(stage.weight, 1 / (share + 1e-6))


def test_one_stage_alone_is_a_stage_of_the_two(wide):
    """Fig. 10, whatever K: stage 1 as it is; stage 2 weighted by the t that was drawn."""
    maskable, anchor = wide
    (only,) = stages_by("pre_anchor_only", 5, maskable, anchor)
    first = stages_by("consistent", 2, maskable, anchor)[0]
    assert torch.equal(only.masked, first.masked)
    assert torch.equal(only.weight, first.weight)
    (only,) = stages_by("anchor_only", 5, maskable, anchor)
    assert torch.equal(only.masked, anchor.masked)
    torch.testing.assert_close(only.weight, 1 / (anchor.t + 1e-6))


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
    """Of 4000 rows: half of the further masks are revealed in the middle of three consistent
    states; the first inconsistent state masks each token with chance 0.8."""
    maskable = torch.ones(4000, 24, dtype=torch.bool)
    anchor = Anchor(torch.ones(4000), (torch.arange(24) < 16).expand(4000, 24))
    _, middle, _ = stages_by("consistent", 3, maskable, anchor)
    often = middle.masked[:, 16:].double().mean(0)
    assert (often - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5
    first, _ = stages_by("inconsistent", 2, maskable, anchor)
    assert (first.masked.double().mean(0) - 0.8).abs().max() < 5 * (0.16 / 4000) ** 0.5


def test_newly_revealed_targets_are_what_the_next_state_shows(batch, anchor, three):
    """Eq. 7 read literally: each state is scored on the tokens that the next one reveals, the last
    on all it still hides. Together they are the pre-anchor, each token once, while "all" counts the
    anchor's tokens again at every state."""
    assert all(torch.equal(stage.scored, stage.masked) for stage in three)
    memory = Memory(steps=3, start_scale=3.0, targets="newly_revealed")
    stages = make_stages(anchor, batch.maskable, memory, seeded(5))
    assert torch.equal(sum(stage.scored.int() for stage in stages), three[0].masked.int())
    assert torch.equal(stages[-1].scored, anchor.masked)
    assert all(stage.scored.any() for stage in stages)


# ---- losses: what the inner loop learns ----------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("loss", INNER_LOSSES)
def test_every_inner_loss_is_its_definition(model, batch, anchor, memory, loss, targets):
    """Against every logit and hidden state of two full forwards: the student on the state, the
    teacher on the next one (the clean tokens after the last), both with the same phi. First each
    state's loss, per sample; then phi after all three stages, gone
    through twice."""
    memory = replace(memory, loss=loss, targets=targets, steps=3, start_scale=3.0, epochs=2)
    stages, fast = (
        make_stages(anchor, batch.maskable, memory, seeded(5)),
        moved_fast(model, memory, 4),
    )
    with torch.no_grad():
        matrices = slow.merge(model, one_set(fast), fast.scale)
        for stage in memdlm.with_prefixes(model, batch, stages, memory):
            sums = slow.stage_sums(model, matrices, batch, stage, loss)
            expected = sums / stage.scored.sum(1).clamp(min=1)
            ours = memdlm.stage_loss(model, batch, stage, fast, memory)
            torch.testing.assert_close(ours, expected, **TIGHT)
            assert expected.sum() > 1e-3
    fast = moved_fast(model, memory, 1)
    got, losses = fast_loop(model, batch, stages, fast, memory)
    assert losses.shape == (6, 1)
    assert_set_equals(got, slow.inner_loop(model, batch, stages, fast, memory))
    for after, before in zip(got.tensors(), fast.tensors()):
        assert (after - before).abs().max() > 1e-6, "the memory has hardly moved"


@pytest.mark.parametrize("loss", DISTILLED)
def test_a_teacher_is_a_constant_who_must_see_more(model, batch, three, memory, loss):
    """It gets no gradient (Hinton et al. 2015), though it has the same phi: else it would run to
    meet its student, and phi would come out elsewhere. And where the next state is the state
    itself, loss and gradient are 0, and phi stays."""
    memory = replace(memory, loss=loss)
    fast, name = moved_fast(model, memory, 1), "layers.3.mlp.down"
    got, _ = fast_loop(model, batch, three, fast, memory)
    both = slow.inner_loop(model, batch, three, fast, memory, teacher_learns=True)
    assert (got.weights[name][1][0] - both[name][1]).abs().max() > 1e-6
    same = three[0]._replace(following=three[0].masked)
    got, losses = fast_loop(model, batch, [same], fast, memory)
    torch.testing.assert_close(losses, torch.zeros(1, 1, dtype=torch.float64), **TIGHT)
    assert_set_equals(got, one_set(fast))


# ---- the whole method with each variant ----------------------------------------------------------

TRAJECTORIES = [("consistent", 1, "ce"), ("consistent", 5, "kl"), ("pre_anchor_only", 2, "ce")]
TRAJECTORIES += [("anchor_only", 2, "hidden_mse"), ("inconsistent", 3, "ce")]


@pytest.mark.parametrize(("strategy", "steps", "loss"), TRAJECTORIES)
def test_memdlm_loss_of_every_variant(model, batch, anchor, memory, strategy, steps, loss):
    """Loss and gradients against full forwards. The anchor's prefix is at hand for whichever state
    needs it, and a strategy that never visits the anchor must not get it by mistake."""
    memory = replace(memory, strategy=strategy, steps=steps, loss=loss, scope="batch", lr=0.2)
    stages, fast = (
        make_stages(anchor, batch.maskable, memory, seeded(5)),
        moved_fast(model, memory, 1),
    )
    got, inner = memdlm.memdlm_loss(model, batch, anchor, stages, fast, memory)
    assert inner.shape == (len(stages), 1)
    phi = slow.inner_loop(model, batch, stages, fast, memory)
    expected = slow.outer_loss(model, batch, anchor, slow.merge(model, phi, fast.scale))
    slow.assert_gradients_equal(model, got, expected)


OTHERS = [{"places": "ffn+attention"}, {"form": "full"}, {"clip_by": "global", "clip": 0.3}]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_memdlm_loss_of_every_kind_of_memory(model, batch, anchor, stages, memory, change):
    """Fig. 7: attention is adapted, too, or a full-rank change of each matrix, whose A is the
    identity and stays; and all gradients of a set clipped together. Against full forwards."""
    memory = replace(memory, scope="batch", **change)
    fast = memdlm.init_fast(model, memory, 1, seeded())
    parts = {name.partition(".")[2].partition(".")[2] for name in fast.weights}
    attention = {f"attention.{letter}" for letter in "qkvo"}
    assert parts & attention == (attention if "places" in change else set())
    got, _ = memdlm.memdlm_loss(model, batch, anchor, stages, fast, memory)
    phi = slow.inner_loop(model, batch, stages, fast, memory)
    expected = slow.outer_loss(model, batch, anchor, slow.merge(model, phi, fast.scale))
    slow.assert_gradients_equal(model, got, expected)
    assert (got - memdlm.mdlm_loss(model, batch, anchor)).abs() > 1e-3, "the memory is empty"
    if "form" in change:
        for name, (A, B) in phi.items():
            assert A.equal(torch.eye(len(A), dtype=A.dtype)), name
            assert torch.linalg.matrix_rank(B) > memory.rank, f"{name} has a low rank"


CHANGES = [*OTHERS, {"steps": 3}, {"epochs": 2}, {"targets": "newly_revealed"}, {"scope": "batch"}]
CHANGES += [{"loss": loss} for loss in DISTILLED]
CHANGES += [{"strategy": name} for name in STRATEGIES if name != "consistent"]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_each_variant_changes_memdlm_alone(model, batch, memory, change):
    """METHODS hands every setting on; Standard MDLM does not know them."""
    usual = replace(memory, start_scale=3.0)
    varied = replace(usual, **change)

    def loss(method: str, setting: Memory) -> float:
        return memdlm.METHODS[method](model, batch, setting, seeded(3)).item()

    assert loss("memdlm", varied) != loss("memdlm", usual)
    assert loss("mdlm", varied) == loss("mdlm", usual)


# ---- bfloat16 ------------------------------------------------------------------------------------


def test_fast_weights_stay_float32_beside_a_bfloat16_model(make_model, batch, stages, memory):
    """A step of 1e-4, spread over a whole matrix, must move nearly every number of B. In bfloat16 a
    number near 0.1 moves by no less than 2e-4: the step would be rounded away."""
    model, memory = make_model(torch.bfloat16), replace(memory, lr=1e-4, clip=1.0)
    fast = moved_fast(model, memory, 1)
    got, losses = fast_loop(model, batch, stages[1:], fast, memory)
    assert losses.isfinite().all()
    for name, (_, B) in fast.weights.items():
        step = got.weights[name][1] - B
        assert step.dtype == torch.float32
        assert (step != 0).double().mean() > 0.9, name
        assert step.norm().item() <= 1e-4 * 1.01, name
