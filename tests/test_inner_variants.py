"""
test_inner_variants.py: the variants of the inner loop that the paper compares. Which states it goes through (Figs. 9-11), what
it learns from them (Fig. 6), at which positions (Sec. 4.6), and how often. Each against its definition written out by hand.
"""

import math
from dataclasses import replace

import pytest
import torch
from slow import TIGHT, assert_fast_equal, gradients, seeded, slow_matrices, slow_outer_loss
from torch.func import functional_call

import data
from data import Batch
from memdlm import (
    INNER_LOSSES,
    METHODS,
    STRATEGIES,
    TARGETS,
    Anchor,
    Memory,
    Stage,
    chain,
    draw_anchor,
    draw_pre_anchor,
    init_fast,
    inner_loop,
    make_states,
    memdlm_loss,
    stage_loss,
)
from model import Fast

LENGTHS = [1, 2, 3, 5]  # K
DISTILLED = [name for name in INNER_LOSSES if name != "ce"]


@pytest.fixture
def wide() -> Batch:
    """Forty rows of 30 tokens with 10 to 30 maskable ones, so that rounding shows."""
    x0 = torch.randint(0, data.EOS, (40, 30), generator=seeded(1))
    return Batch(x0, torch.arange(30)[None] >= (torch.arange(40) % 21)[:, None], None)


@pytest.fixture
def wide_anchor(wide) -> Anchor:
    return draw_anchor(wide.maskable, seeded(2))


def stages_by(strategy: str, steps: int, batch: Batch, anchor: Anchor, seed: int = 3) -> list[Stage]:
    return STRATEGIES[strategy](anchor, batch.maskable, Memory(strategy=strategy, steps=steps), seeded(seed))


def share(masked: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.tensor([row.sum().item() / n for row, n in zip(masked, batch.maskable.sum(1).tolist())])


# ---- states: which masks the inner loop goes through -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("steps", LENGTHS)
def test_every_strategy_masks_nested_states_inside_the_response(wide, wide_anchor, strategy, steps):
    """Denoising only reveals: a state's mask lies in that of the one before, and no prompt token is ever hidden. Each state
    names the next one, which a teacher sees, and the last one names none (but for stage 1 alone, whose next is the anchor)."""
    stages = stages_by(strategy, steps, wide, wide_anchor)
    assert len(stages) == {"pre_anchor_only": 1, "anchor_only": 1}.get(strategy, steps)
    for stage, after in zip(stages, [*stages[1:], None]):
        assert not (stage.masked & ~wide.maskable).any()
        assert stage.t.shape == (40,)
        if after is not None:
            assert stage.following is after.masked
            assert not (after.masked & ~stage.masked).any()
    last = stages[-1].following
    assert last is wide_anchor.masked if strategy == "pre_anchor_only" else last is None


@pytest.mark.parametrize("steps", LENGTHS)
def test_consistent_states_lead_from_the_pre_anchor_to_the_anchor_in_even_steps(wide, wide_anchor, steps):
    """K states: pre-anchor, anchor, and between them the further masks revealed evenly, each time an even share of what is
    left, rounded up. K = 1 is the pre-anchor alone. t is the share of maskable tokens that the state really masks, not the
    sampled one."""
    pre = draw_pre_anchor(wide_anchor.masked, wide.maskable, 1.5, seeded(3))
    stages = stages_by("consistent", steps, wide, wide_anchor)
    assert torch.equal(stages[0].masked, pre)
    if steps > 1:
        assert torch.equal(stages[-1].masked, wide_anchor.masked)
    kept, extra = wide_anchor.masked.sum(1), (pre & ~wide_anchor.masked).sum(1)
    left = extra.tolist()
    for number, stage in enumerate(stages):
        if number:
            left = [e - math.ceil(e / (steps - number)) for e in left]
        assert stage.masked.sum(1).tolist() == [k + e for k, e in zip(kept.tolist(), left)]
        torch.testing.assert_close(stage.t, share(stage.masked, wide))
    if steps > 2:
        assert extra.max() >= steps, "no row has a token for each step: the test sees nothing"


def test_two_consistent_states_draw_what_they_always_drew(wide, wide_anchor):
    """K = 2 asks the generator for the pre-anchor and nothing else, so that phi_0, drawn next, is the same as ever."""
    generator, alone = seeded(3), seeded(3)
    STRATEGIES["consistent"](wide_anchor, wide.maskable, Memory(steps=2), generator)
    draw_pre_anchor(wide_anchor.masked, wide.maskable, 1.5, alone)
    assert torch.equal(generator.get_state(), alone.get_state())
    assert torch.equal(
        stages_by("consistent", 5, wide, wide_anchor)[0].masked, stages_by("consistent", 2, wide, wide_anchor)[0].masked
    )


def test_states_between_reveal_each_token_equally_often():
    """Which tokens are shown first is a fair draw: of 8 further masks, half are revealed in the middle state."""
    everywhere = torch.ones(4000, 24, dtype=torch.bool)
    anchor = Anchor(torch.full((4000,), 16 / 24), (torch.arange(24) < 16).expand(4000, 24))
    _, middle, _ = stages_by("consistent", 3, Batch(everywhere, everywhere, None), anchor)
    often = middle.masked[:, 16:].double().mean(0)
    assert (often - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize("steps", LENGTHS)
def test_stage_1_alone_is_the_pre_anchor_and_knows_the_anchor(wide, wide_anchor, steps):
    """Fig. 10: whatever K, one state, the pre-anchor; unlike K = 1 its next state is the anchor."""
    (stage,) = stages_by("pre_anchor_only", steps, wide, wide_anchor)
    first = stages_by("consistent", 1, wide, wide_anchor)[0]
    assert torch.equal(stage.masked, first.masked)
    assert torch.equal(stage.t, first.t)
    assert stage.following is wide_anchor.masked
    assert first.following is None


@pytest.mark.parametrize("steps", LENGTHS)
def test_stage_2_alone_is_the_anchor_with_its_sampled_t(wide, wide_anchor, steps):
    """Fig. 10: whatever K, one state, the anchor, weighted by the t that it was drawn with. It draws nothing."""
    generator = seeded(3)
    (stage,) = STRATEGIES["anchor_only"](wide_anchor, wide.maskable, Memory(steps=steps), generator)
    assert torch.equal(stage.masked, wide_anchor.masked)
    assert torch.equal(stage.t, wide_anchor.t)
    assert torch.equal(generator.get_state(), seeded(3).get_state())


@pytest.mark.parametrize("steps", LENGTHS)
def test_inconsistent_states_have_nothing_to_do_with_the_anchor(wide, wide_anchor, steps):
    """Fig. 9: from 80% down to 20% masked, the same whatever the anchor masks. The first state is a Bernoulli draw, the others
    int(n * ratio) of its tokens; t is the nominal ratio. A single state masks int(n * 0.2)."""
    stages = stages_by("inconsistent", steps, wide, wide_anchor)
    other = stages_by("inconsistent", steps, wide, draw_anchor(wide.maskable, seeded(9)))
    assert all(torch.equal(a.masked, b.masked) for a, b in zip(stages, other))
    ratios = [0.8 + (0.2 - 0.8) * (i / (steps - 1)) for i in range(steps)] if steps > 1 else [0.2]
    first = stages[0].masked.sum(1).tolist()
    for number, (stage, ratio) in enumerate(zip(stages, ratios)):
        torch.testing.assert_close(stage.t, torch.full((40,), ratio))
        if number or steps == 1:
            counts = [min(most, int(n * ratio)) for n, most in zip(wide.maskable.sum(1).tolist(), first)]
            assert stage.masked.sum(1).tolist() == counts


def test_the_first_inconsistent_state_masks_each_token_with_probability_0_8():
    """A Bernoulli draw, so that the count varies: over 4000 rows of 20 tokens both mean and spread must be right."""
    everywhere = torch.ones(4000, 20, dtype=torch.bool)
    first, _ = stages_by("inconsistent", 2, Batch(everywhere, everywhere, None), Anchor(torch.ones(4000), everywhere))
    assert (first.masked.double().mean(0) - 0.8).abs().max() < 5 * (0.16 / 4000) ** 0.5
    assert first.masked.sum(1).double().std().item() == pytest.approx((20 * 0.16) ** 0.5, rel=0.1)


# ---- the slow way: full logits and hidden states of student and teacher ------------------------------------------------------


def slow_outputs(model, weights: dict, batch: Batch, masked: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The final norm's output (B, T, D) and log p (B, T, V), of the whole sequence, on x0 masked by `masked` (None: clean)."""
    ids, caught = batch.x0.clone(), []
    if masked is not None:
        ids[masked] = data.MASK
    hook = model.norm.register_forward_hook(lambda module, inputs, output: caught.append(output))
    logits = functional_call(model, weights, (ids, batch.attention_mask))
    hook.remove()
    return caught[0], logits.log_softmax(-1)


def slow_token_loss(name: str, student: tuple, teacher: tuple, target: int, row: int, place: int) -> torch.Tensor:
    """The inner loss at one position, by its definition."""
    (h, logp), (teacher_h, teacher_logp) = ([part[row, place] for part in side] for side in (student, teacher))
    if name == "ce":
        return -logp[target]
    if name == "kl":
        return (teacher_logp.exp() * (teacher_logp - logp)).sum()
    if name == "reverse_kl":
        return (logp.exp() * (logp - teacher_logp)).sum()
    if name == "hidden_mse":
        return sum((h - teacher_h) ** 2) / len(h)
    return 1 - (h @ teacher_h) / (h @ h).sqrt() / (teacher_h @ teacher_h).sqrt()


def slow_stage_loss(model, leaves: dict, scale: float, batch: Batch, stage: Stage, memory: Memory, constant=True) -> tuple:
    """Each row's sum of weighted losses (B,) and its number of loss positions (B,). constant: the teacher gets no gradient."""
    matrices = slow_matrices(model, leaves, scale)
    student = slow_outputs(model, matrices, batch, stage.masked)
    teacher = slow_outputs(model, matrices, batch, stage.following)
    teacher = [part.detach() for part in teacher] if constant else teacher
    where = stage.masked.clone()
    if memory.targets == "newly_revealed" and stage.following is not None:
        where &= ~stage.following
    sums = [torch.zeros((), dtype=torch.float64) for _ in batch.x0]
    for row, place in where.nonzero().tolist():
        loss = slow_token_loss(memory.loss, student, teacher, int(batch.x0[row, place]), row, place)
        sums[row] = sums[row] + (1 / (stage.t[row] + 1e-6)).double() * loss
    return torch.stack(sums), where.sum(1)


def slow_variant_loop(model, batch: Batch, stages: list[Stage], fast: Fast, memory: Memory, constant=True) -> dict:
    """phi_K of one shared set, {name: (A, B)}, without clipping."""
    weights = {name: (A[0], B[0]) for name, (A, B) in fast.weights.items()}
    for stage in stages * memory.epochs:
        leaves = [p.detach().requires_grad_() for pair in weights.values() for p in pair]
        weights = dict(zip(weights, zip(leaves[::2], leaves[1::2])))
        total, count = slow_stage_loss(model, weights, fast.scale, batch, stage, memory, constant)
        grads = torch.autograd.grad(total.sum() / count.sum(), leaves)
        moved = [(p - memory.lr * g).detach() for p, g in zip(leaves, grads)]
        weights = dict(zip(weights, zip(moved[::2], moved[1::2])))
    return weights


def moved_fast(model, memory: Memory, sets: int) -> Fast:
    """Fast weights that are not zero, as after a first stage: A has a gradient, too, and student and teacher feel phi."""
    fast = init_fast(model, memory, sets, seeded(4))
    return Fast(
        {
            name: (A, B + 0.02 * torch.randn(B.shape, generator=seeded(5), dtype=B.dtype))
            for name, (A, B) in fast.weights.items()
        },
        fast.scale,
    )


@pytest.fixture
def stages(batch, anchor) -> list[Stage]:
    """Three nested states; the last one is followed by none, so that its teacher sees the clean tokens."""
    return STRATEGIES["consistent"](anchor, batch.maskable, Memory(steps=3, start_scale=3.0), seeded(5))


# ---- losses: what the inner loop learns --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("loss", list(INNER_LOSSES))
def test_inner_loss_is_its_definition_on_full_outputs(model, batch, stages, memory, loss, targets):
    """From cached prefixes and the masked rows alone, against every logit and hidden state of two full forwards: student on
    the state, teacher on the next one (the clean tokens after the last), both with the same phi. Per sample and shared."""
    memory = replace(memory, loss=loss, targets=targets)
    for stage, state in zip(stages, make_states(model, batch, stages, memory)):
        shared = moved_fast(model, memory, 1)
        leaves = {name: (A[0], B[0]) for name, (A, B) in shared.weights.items()}
        total, count = slow_stage_loss(model, leaves, shared.scale, batch, stage, memory)
        torch.testing.assert_close(
            stage_loss(model, batch, state, shared, memory, True), (total.sum() / count.sum())[None], **TIGHT
        )
        each = Fast({name: (A.repeat(4, 1, 1), B.repeat(4, 1, 1)) for name, (A, B) in shared.weights.items()}, shared.scale)
        torch.testing.assert_close(stage_loss(model, batch, state, each, memory, True), total / count.clamp(min=1), **TIGHT)
        assert total.sum() > 1e-3


@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("loss", list(INNER_LOSSES))
def test_every_inner_loop_equals_the_slow_way(model, batch, stages, memory, loss, targets):
    """Three stages, twice through: phi_6 of each loss and set of targets, against gradients of the slow loss."""
    memory = replace(memory, loss=loss, targets=targets, epochs=2)
    fast = moved_fast(model, memory, 1)
    got, losses = inner_loop(model, batch, make_states(model, batch, stages, memory), fast, memory)
    assert losses.shape == (6, 1)
    assert_fast_equal(got, slow_variant_loop(model, batch, stages, fast, memory))
    assert all((got.weights[name][1] - B).abs().max() > 1e-6 for name, (_, B) in fast.weights.items()), "hardly moved"


@pytest.mark.parametrize("loss", DISTILLED)
def test_the_teacher_gets_no_gradient(model, batch, stages, memory, loss):
    """The teacher wears the same phi, but is a constant (Hinton et al. 2015): else it would run to meet the student. With a
    gradient through both sides phi comes out elsewhere."""
    memory = replace(memory, loss=loss)
    fast = moved_fast(model, memory, 1)
    got, _ = inner_loop(model, batch, make_states(model, batch, stages, memory), fast, memory)
    both = slow_variant_loop(model, batch, stages, fast, memory, constant=False)
    name = "layers.3.mlp.down"
    assert (got.weights[name][1][0] - both[name][1]).abs().max() > 1e-6


@pytest.mark.parametrize("loss", DISTILLED)
def test_nothing_is_learnt_from_a_teacher_who_sees_the_same(model, batch, anchor, memory, loss):
    """If the next state is the state itself, student and teacher agree: loss 0, gradient 0, and phi stays where it is."""
    memory, fast = replace(memory, loss=loss), moved_fast(model, memory, 4)
    same = [Stage(anchor.masked, anchor.masked, anchor.t)]
    got, losses = inner_loop(model, batch, make_states(model, batch, same, memory), fast, memory)
    torch.testing.assert_close(losses, torch.zeros(1, 4, dtype=torch.float64), **TIGHT)
    for name, pair in fast.weights.items():
        for p, q in zip(pair, got.weights[name]):
            torch.testing.assert_close(q, p, **TIGHT)


@torch.no_grad()
def test_kl_is_the_cross_entropy_against_the_teacher_up_to_its_entropy(model, batch, stages, memory):
    """The direction: "kl" is KL(teacher || student), whose gradient is that of a cross-entropy on the teacher's soft labels;
    "reverse_kl" swaps the sides. Both are positive, and they differ."""
    kl, reverse = (
        stage_loss(model, batch, make_states(model, batch, stages, m)[0], moved_fast(model, m, 1), m, True)
        for m in (replace(memory, loss=loss) for loss in ("kl", "reverse_kl"))
    )
    assert kl > 0
    assert reverse > 0
    assert abs(kl - reverse) > 1e-3
    swapped = [Stage(stages[0].following, stages[0].masked, stages[0].t)]
    where = replace(memory, loss="reverse_kl")
    (state,) = make_states(model, batch, swapped, where)
    state = state._replace(stage=stages[0])  # the same positions and weights
    torch.testing.assert_close(stage_loss(model, batch, state, moved_fast(model, where, 1), where, True), kl, **TIGHT)


# ---- targets, epochs ---------------------------------------------------------------------------------------------------------


def test_newly_revealed_targets_are_what_the_next_state_shows(batch, anchor, stages):
    """Eq. 7 read literally: each state is scored on the tokens that the next one reveals, the last on all it still hides.
    Together they are the pre-anchor, each token once, while "all" counts the anchor's tokens again at every state."""
    new = [TARGETS["newly_revealed"](stage) for stage in stages]
    assert torch.equal(sum(part.int() for part in new), stages[0].masked.int())
    assert torch.equal(new[-1], anchor.masked)
    assert all(part.any() for part in new)
    assert [TARGETS["all"](stage) is stage.masked for stage in stages] == [True] * 3


def test_epochs_are_the_stages_gone_through_again(model, batch, stages, memory):
    """Three epochs are three times the whole sequence of states, not each state three times, and not from phi_0 again."""
    memory = replace(memory, lr=0.01)
    states = make_states(model, batch, stages, memory)
    fast = init_fast(model, memory, 4, seeded())
    got, losses = inner_loop(model, batch, states, fast, replace(memory, epochs=3))
    again = fast
    for number in range(3):
        again, part = inner_loop(model, batch, states, again, memory)
        assert torch.equal(losses[3 * number : 3 * number + 3], part)
    assert all(torch.equal(a, b) for name in fast.weights for a, b in zip(got.weights[name], again.weights[name]))
    assert losses.shape == (9, 4)
    assert (losses[-1] < losses[2]).all(), "a second look at the same states must help"


# ---- the whole method with each variant --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "kl", "hidden_mse"])
@pytest.mark.parametrize(
    ("strategy", "steps"),
    [("consistent", 1), ("consistent", 5), ("pre_anchor_only", 2), ("anchor_only", 2), ("inconsistent", 3)],
)
def test_memdlm_loss_of_every_variant_equals_three_full_forwards(model, batch, anchor, memory, strategy, steps, loss):
    """Loss and gradients with shared prefixes, against the plain reading: the anchor's prefix is at hand for whichever state
    or teacher needs it, and a strategy that never visits the anchor must not get it by mistake."""
    memory = replace(memory, strategy=strategy, steps=steps, loss=loss, scope="batch", lr=0.2)
    stages = STRATEGIES[strategy](anchor, batch.maskable, memory, seeded(5))
    fast = moved_fast(model, memory, 1)
    got, inner = memdlm_loss(model, batch, anchor, stages, fast, memory)
    assert inner.shape == (len(stages), 1)
    phi = slow_variant_loop(model, batch, stages, fast, memory)
    expected = slow_outer_loss(model, batch, anchor, slow_matrices(model, phi, fast.scale))
    torch.testing.assert_close(got, expected, **TIGHT)
    grads, slow_grads = gradients(model, got), gradients(model, expected)
    for name in slow_grads:
        torch.testing.assert_close(grads[name], slow_grads[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


PREFIXES = [  # strategy, K, loss -> prefixes computed: one for each thing that is looked at, the anchor always
    ("consistent", 2, "ce", 2),  # anchor, pre-anchor
    ("consistent", 1, "ce", 2),
    ("consistent", 5, "ce", 5),
    ("anchor_only", 2, "ce", 1),
    ("inconsistent", 3, "ce", 4),  # none of its states is the anchor
    ("consistent", 2, "kl", 3),  # and the clean tokens, for the anchor's teacher
    ("pre_anchor_only", 2, "kl", 2),  # the anchor is the teacher's
    ("consistent", 1, "hidden_mse", 3),
]


@pytest.mark.parametrize(("strategy", "steps", "loss", "prefixes"), PREFIXES)
def test_no_prefix_is_computed_twice(model, batch, anchor, memory, strategy, steps, loss, prefixes):
    """Most of a step's cost is the prefix. Teachers and epochs must not repeat what is known."""
    memory = replace(memory, strategy=strategy, steps=steps, loss=loss, epochs=2)
    stages, runs = STRATEGIES[strategy](anchor, batch.maskable, memory, seeded(5)), []
    hook = model.layers[0].register_forward_hook(lambda *_: runs.append("layer"))
    mix = model.layers[0].attention.register_forward_hook(lambda *_: runs.append("attention"))
    memdlm_loss(model, batch, anchor, stages, init_fast(model, memory, 4, seeded()), memory)
    hook.remove()
    mix.remove()
    assert runs == ["attention"] * prefixes


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 1},
        {"steps": 3},
        {"epochs": 2},
        *({"loss": x} for x in DISTILLED),
        {"targets": "newly_revealed"},
        *({"strategy": x} for x in STRATEGIES if x != "consistent"),
    ],
    ids=str,
)
def test_each_variant_changes_the_training_loss_alone(model, batch, memory, change):
    """METHODS hands every setting on: another loss than the default's, while Standard MDLM does not know them."""
    varied = replace(memory, start_scale=3.0, **change)
    usual = replace(memory, start_scale=3.0)
    assert METHODS["memdlm"](model, batch, varied, seeded(3)) != METHODS["memdlm"](model, batch, usual, seeded(3))
    assert METHODS["mdlm"](model, batch, varied, seeded(3)) == METHODS["mdlm"](model, batch, usual, seeded(3))


# ---- bfloat16 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", list(INNER_LOSSES))
def test_fast_weights_stay_float32_beside_a_bfloat16_model(make_model, batch, anchor, memory, loss):
    """A clipped step of 0.1 * 1.0 spread over a matrix is small beside bfloat16's spacing of 2^-8: summed up in bfloat16 it
    would be rounded away. The model computes in bfloat16, the memory is kept in float32, and the losses are finite and near
    those of float32."""
    memory, outer, inner = replace(memory, loss=loss, clip=1.0, lr=0.1), {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        model = make_model(dtype)
        fast = init_fast(model, memory, 4, seeded())
        assert {p.dtype for pair in fast.weights.values() for p in pair} == {torch.float32}
        stages = STRATEGIES["consistent"](anchor, batch.maskable, memory, seeded(5))
        written, _ = inner_loop(model, batch, make_states(model, batch, stages, memory), fast, memory)
        assert {p.dtype for pair in written.weights.values() for p in pair} == {torch.float32}
        outer[dtype], inner[dtype] = memdlm_loss(model, batch, anchor, stages, fast, memory)
        assert outer[dtype].isfinite()
        assert inner[dtype].isfinite().all()
        outer[dtype].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(outer[torch.bfloat16].float(), outer[torch.float32], rtol=0.1, atol=0.05)


def test_small_steps_are_not_rounded_away(make_model, batch, anchor, memory):
    """One clipped step of 1e-4, spread over a whole matrix, must move nearly every number of B: in bfloat16 no number near 0.1
    moves by less than 2e-4."""
    model, memory = make_model(torch.bfloat16), replace(memory, lr=1e-4, clip=1.0)
    fast = moved_fast(model, memory, 1)
    states = make_states(model, batch, chain([anchor.masked], batch.maskable), memory)
    got, _ = inner_loop(model, batch, states, fast, memory)
    for name, (_, B) in fast.weights.items():
        step = got.weights[name][1] - B
        assert (step != 0).double().mean() > 0.9, name
        assert step.norm().item() <= 1e-4 * 1.01, name
