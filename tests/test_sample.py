"""
test_sample.py: generation. What must hold whatever the model: the sampler commits what it says it commits, never takes it back,
and answers each prompt as if it were alone. The plans of the published samplers are in test_plans.py.
"""

from itertools import pairwise

import pytest
import torch
from slow import prompts_of, record, seeded, sharpened

import data
from model import UserError
from sample import choose_tokens, commit_schedule, generate, guided_logits, select


@pytest.fixture
def sharp(make_model):
    return sharpened(make_model())


# ---- the sampler's parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 10, 37])
def test_schedule_commits_every_token_as_evenly_as_possible(tokens):
    """Uneven steps cost quality: many tokens at once are predicted without seeing each other."""
    for steps in range(1, tokens + 1):
        schedule = commit_schedule(tokens, steps)
        assert len(schedule) == steps
        assert sum(schedule) == tokens
        assert max(schedule) - min(schedule) <= 1
        assert schedule == sorted(schedule, reverse=True)
    assert commit_schedule(10, 4) == [3, 3, 2, 2]


def test_greedy_choice_is_the_most_probable_token_and_its_probability():
    """Confidence is the model's probability of the chosen token, among all tokens but [MASK]."""
    logits = torch.randn(50, data.VOCAB_SIZE, generator=seeded())
    possible = logits.clone()
    possible[:, data.MASK] = -torch.inf
    tokens, confidence = choose_tokens(logits, 0.0, None, [data.MASK])
    assert torch.equal(tokens, possible.argmax(1))
    torch.testing.assert_close(confidence, possible.softmax(1).amax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_is_never_chosen(temperature):
    """A committed [MASK] would look like an open place, and the answer would never be finished."""
    logits = torch.zeros(200, data.VOCAB_SIZE)
    logits[:, data.MASK] = 50.0
    tokens, confidence = choose_tokens(logits, temperature, seeded(), [data.MASK])
    assert (tokens != data.MASK).all()
    torch.testing.assert_close(confidence, torch.full((200,), 1 / (data.VOCAB_SIZE - 1)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampled_frequencies_are_softmax_of_logits_over_temperature(temperature):
    """Gumbel-max must draw from softmax(logits / T). Four tokens, 8000 draws: each share within five standard deviations.
    Confidence stays the model's own probability, at temperature 1."""
    logits = torch.full((8000, data.VOCAB_SIZE), -torch.inf)
    logits[:, [5, 70, 200, 300]] = torch.tensor([2.0, 1.0, 0.0, -1.0])
    plain = logits[0].softmax(0)
    expected = (logits[0].double() / temperature).softmax(0)
    tokens, confidence = choose_tokens(logits, temperature, seeded(1), [data.MASK])
    shares = torch.bincount(tokens, minlength=data.VOCAB_SIZE).double() / len(tokens)
    error = (shares - expected).abs() / (expected * (1 - expected) / len(tokens)).sqrt().clamp(min=1e-9)
    assert error.max() < 5, f"shares {shares[expected > 0].tolist()}, expected {expected[expected > 0].tolist()}"
    torch.testing.assert_close(confidence, plain[tokens])


def test_select_takes_the_most_confident_of_each_row():
    """Each row commits its own best `quota` places, never one that is marked -1 (given, committed, or of another block)."""
    confidence = torch.tensor([[0.3, 0.9, -1.0, 0.5], [-1.0, 0.2, 0.1, -1.0], [-1.0, -1.0, 0.4, -1.0]])
    expected = [[False, True, False, True], [False, True, True, False], [False, False, True, False]]
    assert select(confidence, 2, None).tolist() == expected


def test_select_threshold_adds_to_the_quota():
    """All above the threshold go, not those just at it (as in LLaDA2.1's sampler), and at least `quota` even if none is above:
    else generation could stand still."""
    confidence = torch.tensor([[0.3, 0.9, 0.8, 0.5], [0.1, 0.2, -1.0, 0.15]])
    assert select(confidence, 1, 0.75).tolist() == [[False, True, True, False], [False, True, False, False]]
    assert select(confidence, 1, 0.8).tolist() == [[False, True, False, False], [False, True, False, False]]
    assert select(confidence, 1, 0.0).tolist() == [[True] * 4, [True, True, False, True]]


def test_select_breaks_ties_from_the_left():
    """Equal confidences occur (repeated tokens); without a rule for them two machines could generate different answers."""
    assert select(torch.full((1, 5), 0.5), 2, None).tolist() == [[True, True, False, False, False]]


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_guided_logits_follow_the_formula(model, cfg_scale):
    """u + (scale + 1)(c - u): c sees the prompt, u sees [MASK] in its place. By hand, from two full forwards."""
    canvas = torch.cat([prompts_of(2, 4), torch.full((2, 5), data.MASK)], dim=1)
    canvas[0, 6] = 17
    given = (torch.arange(9) < 4).expand(2, 9)
    at = canvas == data.MASK
    blind = canvas.clone()
    blind[:, :4] = data.MASK
    c, u = model(canvas)[at], model(blind)[at]
    got = guided_logits(model, canvas, given, None, cfg_scale, None, at)
    torch.testing.assert_close(got, (c if cfg_scale == 0 else u + (cfg_scale + 1) * (c - u)).float(), rtol=0, atol=1e-5)
    assert (c - u).abs().max() > 0.1, "the prompt makes no difference: the test sees nothing"


# ---- generation ------------------------------------------------------------------------------------------------------------


SETTINGS = [  # length, steps, block length -> tokens committed by each pass
    (8, None, None, [1] * 8),
    (10, 4, None, [3, 3, 2, 2]),
    (7, 1, None, [7]),
    (8, 4, 4, [2, 2, 2, 2]),
    (8, 3, 4, [2, 2, 4]),
    (9, 3, 3, [3, 3, 3]),
    (6, 50, None, [1] * 6),  # more steps than tokens: a pass cannot commit less than one
]


@pytest.mark.parametrize(("length", "steps", "block", "quotas"), SETTINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_pass_commits_its_quota_in_each_row(model, length, steps, block, quotas, temperature):
    """N passes for the whole answer, spread evenly; the same number of tokens in each row, whatever its confidences. Fails
    when a pass is wasted, or when a row ends with places still open."""
    options = {"steps": steps, "block_length": block, "temperature": temperature, "generator": seeded()}
    canvases, passes = record(model, prompts_of(3, 5), length, **options)
    assert passes == len(quotas)
    open_places = [(canvas == data.MASK).sum(1).tolist() for canvas in canvases]
    assert open_places[0] == [length] * 3
    assert open_places[-1] == [0] * 3
    committed = [[a - b for a, b in zip(before, after)] for before, after in pairwise(open_places)]
    assert committed == [[quota] * 3 for quota in quotas]


@pytest.mark.parametrize(("length", "block"), [(9, 4), (10, 8)])
def test_default_is_one_token_per_pass_even_with_a_short_last_block(model, length, block):
    """`steps` defaults to one token each: the slowest and best setting. A last block that is shorter than the others must
    not make the earlier ones commit several tokens at once."""
    _, passes = record(model, prompts_of(2, 5), length, block_length=block)
    assert passes == length


def test_committed_tokens_and_prompt_never_change(model):
    """There is no remasking: what is committed stays, and the prompt is only read. No [MASK] is left at the end."""
    prompts = prompts_of(3, 5)
    canvases, _ = record(model, prompts, 10, steps=5, block_length=5, temperature=1.0, generator=seeded())
    for before, after in pairwise(canvases):
        done = before != data.MASK
        assert torch.equal(after[done], before[done])
        assert torch.equal(after[:, :5], prompts)
    assert (canvases[-1] != data.MASK).all()


def test_greedy_pass_commits_the_most_confident_tokens(sharp):
    """Every pass replayed by hand: of the open places of each row those with the highest probability, with the most probable
    token. Committing at random, or the least confident, would also finish."""
    canvases, _ = record(sharp, prompts_of(3, 5), 8, steps=4)
    for before, after in pairwise(canvases):
        with torch.no_grad():
            logits = sharp(before)
        logits[..., data.MASK] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        for row in range(3):
            changed = after[row] != before[row]
            stay = after[row] == data.MASK
            assert torch.equal(after[row, changed], tokens[row, changed])
            if stay.any():
                assert confidence[row, changed].min() >= confidence[row, stay].max()


def test_blocks_are_finished_from_left_to_right(model):
    """Semi-autoregressive decoding: nothing of a block is committed before all blocks to its left are complete."""
    canvases, _ = record(model, prompts_of(3, 5), 12, steps=9, block_length=4)
    for canvas in canvases:
        for row in (canvas[:, 5:] != data.MASK).view(3, 3, 4):
            for block in (1, 2):
                assert row[:block].all() or not row[block].any(), row.int().tolist()


@pytest.mark.parametrize(("cfg_scale", "per_step"), [(0.0, 1), (0.5, 2)])
def test_number_of_forward_passes(model, cfg_scale, per_step):
    """The cost of an answer is its passes: one per step, and two with guidance. Without guidance the second is not made."""
    assert record(model, prompts_of(2, 5), 8, steps=4, cfg_scale=cfg_scale)[1] == 4 * per_step


def test_threshold_commits_all_that_is_sure_and_saves_passes(sharp):
    """A pass commits its quota and everything more probable than the threshold (the sampler of LLaDA2.1). Replayed by
    hand; rows may differ in how far they are."""
    prompts, threshold = prompts_of(3, 5), 0.6
    canvases, passes = record(sharp, prompts, 12, threshold=threshold)
    assert passes < 12
    assert (canvases[-1] != data.MASK).all()
    for before, after in pairwise(canvases):
        with torch.no_grad():
            logits = sharp(before)
        logits[..., data.MASK] = -torch.inf
        confidence = logits.softmax(-1).amax(-1).masked_fill(before != data.MASK, -1.0)
        for row in range(3):
            sure, committed = confidence[row] > threshold, after[row] != before[row]
            best = torch.zeros_like(sure)
            best[confidence[row].argmax()] = bool((before[row] == data.MASK).any())
            assert torch.equal(committed, sure | best)


def test_threshold_that_nothing_reaches_changes_nothing(sharp):
    """With a threshold of 1 the quota alone decides."""
    prompts = prompts_of(2, 5)
    assert torch.equal(generate(sharp, prompts, 8, steps=4, threshold=1.0), generate(sharp, prompts, 8, steps=4))


def test_fewer_steps_than_blocks_is_a_user_error(model):
    """Each block needs a pass. The message must say so, instead of a division by zero or a half-masked answer."""
    with pytest.raises(UserError, match="--steps"):
        generate(model, prompts_of(1, 5), 12, steps=2, block_length=4)


def test_temperature_zero_is_deterministic_and_needs_no_generator(model):
    """Two calls, and one with a generator that must not be used, give the same answer."""
    prompts, generator = prompts_of(2, 5), seeded(4)
    before = generator.get_state()
    first = generate(model, prompts, 8)
    assert torch.equal(generate(model, prompts, 8), first)
    assert torch.equal(generate(model, prompts, 8, generator=generator), first)
    assert torch.equal(generator.get_state(), before)


def test_sampling_follows_its_generator(model):
    """Reproducible with one seed, different with another: the global random state must play no part."""
    prompts = prompts_of(2, 5)
    torch.manual_seed(0)
    first = generate(model, prompts, 8, temperature=1.0, generator=seeded(1))
    torch.manual_seed(99)
    assert torch.equal(generate(model, prompts, 8, temperature=1.0, generator=seeded(1)), first)
    assert not torch.equal(generate(model, prompts, 8, temperature=1.0, generator=seeded(2)), first)


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"block_length": 4}, {"cfg_scale": 0.5}, {"threshold": 0.5}])
def test_answers_do_not_depend_on_the_batch_size(sharp, options):
    """Each prompt's answer is that of the prompt alone. Fails when rows share a quota, a rank or a position."""
    prompts = prompts_of(4, 6)
    together = generate(sharp, prompts, 8, **options)
    alone = torch.cat([generate(sharp, row[None], 8, **options) for row in prompts])
    assert torch.equal(together, alone)


def test_hidden_left_padding_changes_no_answer(sharp):
    """Prompts of different lengths share a batch by padding on the left; hidden, it must not matter."""
    prompts = prompts_of(3, 6)
    padded = torch.cat([torch.full((3, 4), data.EOS), prompts], dim=1)
    mask = (torch.arange(4 + 6 + 8) >= 4).expand(3, -1)
    expected = generate(sharp, prompts, 8, cfg_scale=0.3)
    assert torch.equal(generate(sharp, padded, 8, cfg_scale=0.3, attention_mask=mask), expected)
    assert not torch.equal(generate(sharp, padded, 8, cfg_scale=0.3), expected)
