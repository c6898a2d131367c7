"""
test_sample.py: generation. What must hold whatever the model: the sampler commits what it says it
commits, never takes it back, and answers each prompt as if it were alone.
"""

import math
from itertools import pairwise

import pytest
import torch
from slow import merge, one_set, prompts_of, seeded
from teaching import assert_same
from torch.func import functional_call

import data
from memdlm import Memory, init_fast
from model import UserError
from sample import choose_tokens, generate, guided_logits, plan_blocks, select

# ---- plans ---------------------------------------------------------------------------------------

PLANS = [  # length, steps, block length -> tokens committed by each pass, block by block
    (8, None, None, [[1] * 8]),
    (10, 4, None, [[3, 3, 2, 2]]),
    (7, 1, None, [[7]]),
    (8, 3, 4, [[2, 2], [4]]),
    (9, None, 4, [[1] * 4, [1] * 4, [1]]),
    (9, 9, 4, [[2, 1, 1], [2, 1, 1], [1]]),
    (4, None, 10, [[1] * 4]),
]


def record(model, prompts, blocks, **options) -> tuple[list[torch.Tensor], int]:
    """The canvas before the first and after each pass, and how often the model really ran."""
    empty = torch.full((len(prompts), blocks[-1].stop), data.MASK)
    canvases, passes = [torch.cat([prompts, empty], dim=1)], []
    hook = model.norm.register_forward_hook(lambda *_: passes.append(1))
    response = generate(model, prompts, blocks, watch=canvases.append, **options)
    hook.remove()
    assert torch.equal(canvases[-1], torch.cat([prompts, response], dim=1))
    return canvases, len(passes)


@pytest.mark.step7
@pytest.mark.parametrize(("length", "steps", "block_length", "quotas"), PLANS)
def test_each_pass_commits_its_quota_in_each_row(model, length, steps, block_length, quotas):
    """The plan of LLaDA's generate.py: as even as whole numbers allow, since many tokens at once
    are predicted without seeing each other; each block is finished before those on its right. What
    is committed stays, and the prompt is only read."""
    blocks = plan_blocks(length, steps, block_length)
    assert [block.quotas for block in blocks] == quotas, "as even as can be, the larger ones first"
    prompts = prompts_of(3, 5)
    canvases, passes = record(model, prompts, blocks, temperature=1.0, generator=seeded())
    quotas = [quota for block in blocks for quota in block.quotas]
    assert passes == len(quotas)
    left = [(canvas == data.MASK).sum(1).tolist() for canvas in canvases]
    committed = [[a - b for a, b in zip(*pair)] for pair in pairwise(left)]
    assert committed == [[quota] * 3 for quota in quotas], "each pass commits its quota in each row"
    for before, after in pairwise(canvases):
        done = before != data.MASK
        assert torch.equal(after[done], before[done]), "a committed token has changed"
        for block in blocks:
            changed = (after != before)[:, 5 + block.start : 5 + block.stop]
            assert not changed.any() or done[:, : 5 + block.start].all(), "a block came too early"


def test_a_plan_that_cannot_be_kept_is_refused():
    """Three blocks need three passes."""
    for steps in (0, 2):
        with pytest.raises(UserError, match="steps"):
            plan_blocks(12, steps, 4)


# ---- the choice of tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_suppressed_token_is_never_chosen_and_takes_no_confidence(temperature):
    """A committed [MASK] would look like an open place. Confidence is the probability among the
    tokens that are left."""
    logits = torch.zeros(200, 9)
    logits[:, [3, 8]] = 50.0
    tokens, confidence = choose_tokens(logits, temperature, seeded(), [3, 8])
    assert not torch.isin(tokens, torch.tensor([3, 8])).any()
    torch.testing.assert_close(confidence, torch.full((200,), 1 / 7))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_sampled_frequencies_are_softmax_of_logits_over_temperature(temperature):
    """Gumbel-max: of 8000 draws each share is within five standard deviations. Confidence stays the
    model's own probability, at temperature 1; and temperature 0 takes the most probable token."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 9.0]).expand(8000, 5)
    tokens, confidence = choose_tokens(logits, temperature, seeded(1), [4])
    expected = (logits[0, :4].double() / max(temperature, 1e-9)).softmax(0)
    share = torch.bincount(tokens, minlength=4).double() / 8000
    error = (share - expected).abs() / (expected * (1 - expected) / 8000).sqrt().clamp(min=1e-9)
    assert error.max() < 5, f"shares {share.tolist()}, expected {expected.tolist()}"
    torch.testing.assert_close(confidence, logits[0, :4].softmax(0)[tokens])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_no_numbers_stop_the_program(model, bad):
    """A model with broken weights must not answer: argmax of NaN is a token like any other."""
    with torch.no_grad():
        model.output.weight[7, 7] = bad
    with pytest.raises(UserError, match="finite"):
        generate(model, prompts_of(2, 5), plan_blocks(4))


CONFIDENCE = [[0.3, 0.9, -1.0, 0.5], [-1.0, 0.2, 0.0, -1.0], [0.8, 0.8, 0.8, -1.0]]
SELECTED = [  # quota, threshold -> the places that are committed
    (2, None, [[0, 1, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]),
    (1, 0.8, [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]),
    (1, 0.4, [[0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]]),
    (3, None, [[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 0]]),
]


@pytest.mark.step7(first=True)
@pytest.mark.parametrize(("quota", "threshold", "places"), SELECTED)
def test_select_takes_the_most_confident_and_all_above_the_threshold(quota, threshold, places):
    """Each row commits its own best `quota` places, the left one of equals, never one marked -1;
    and what is above the threshold, not just at it."""
    confidence, expected = torch.tensor(CONFIDENCE), torch.tensor(places).double()
    order = confidence.argsort(dim=1, descending=True, stable=True)
    mistakes = {
        "the ids of the places, in their order of confidence, are taken for ranks: the rank of a "
        "place is where it stands in that order, argsort of argsort": (
            (order < quota) & (confidence >= 0)
        ).double(),
        "places of confidence -1 are committed as well": (
            (order.argsort(dim=1) < quota)
            | (torch.zeros(3, 4, dtype=torch.bool) if threshold is None else confidence > threshold)
        ).double(),
        "the least confident places are committed": (
            (confidence.masked_fill(confidence < 0, 9).argsort(1).argsort(1) < quota)
            & (confidence >= 0)
        ).double(),
    }
    got = select(confidence, quota, threshold).double()
    what = f"of the confidences {CONFIDENCE}, quota {quota}, threshold {threshold}, what to commit"
    assert_same(got, expected, what, mistakes)


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_guidance_compares_with_a_model_that_knows_nothing_of_the_prompt(model, cfg_scale):
    """u + (scale + 1)(c - u). c sees the prompt and has the memory that was written from it; u sees
    [MASK] in the prompt's place, and has no memory, which would hold the prompt as well."""
    canvas = torch.cat([prompts_of(2, 4), torch.full((2, 5), data.MASK)], dim=1)
    canvas[0, 6] = 17
    given, at = (torch.arange(9) < 4).expand(2, 9), canvas == data.MASK
    fast = init_fast(model, Memory(rank=3, alpha=6.0, fraction=0.5), 1, seeded())
    fast = fast.with_tensors([part + 0.1 for part in fast.tensors()])
    blind = canvas.masked_fill(given, data.MASK)
    c = functional_call(model, merge(model, one_set(fast), fast.scale), (canvas,))[at]
    u = model(blind)[at]
    assert (model(blind, fast=fast)[at] - u).abs().max() > 0.1, "the memory makes no difference"
    got = guided_logits(model, canvas, given, fast, cfg_scale, None, at)
    expected = u + (cfg_scale + 1) * (c - u) if cfg_scale else c
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-5)


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.step7
@torch.no_grad()
@pytest.mark.parametrize(("quota", "threshold"), [(2, None), (1, 0.6), (1, 1.0)])
def test_each_greedy_pass_is_what_it_should_be(sharp, quota, threshold):
    """Replayed by hand: of the open places of each row the most confident ones, with a threshold
    all that are more probable, and there the most probable token. A threshold saves passes."""
    prompts, blocks = prompts_of(3, 5), plan_blocks(12, 12 // quota)
    canvases, passes = record(sharp, prompts, blocks, threshold=threshold)
    assert (passes < 12 // quota) == (threshold == 0.6)
    assert (canvases[-1] != data.MASK).all()
    for before, after in pairwise(canvases):
        logits = sharp(before)
        logits[..., data.MASK] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(before != data.MASK, -1.0)
        best = confidence.topk(quota, dim=1).indices
        chosen = torch.zeros_like(before, dtype=torch.bool).scatter(1, best, True)
        if threshold is not None:
            chosen |= confidence > threshold
        expected = torch.where(chosen & (confidence >= 0), tokens, before)
        assert torch.equal(after, expected), "a pass commits the most confident tokens, no others"


def test_sampling_follows_its_generator_alone(model):
    """Equal with one seed, different with another, and the global random state plays no part.
    Temperature 0 uses no generator."""
    prompts, blocks = prompts_of(2, 5), plan_blocks(8)

    def answer(temperature: float, seed: int, global_seed: int) -> list:
        torch.manual_seed(global_seed)
        return generate(model, prompts, blocks, temperature, generator=seeded(seed)).tolist()

    assert answer(1.0, 1, 5) == answer(1.0, 1, 6) != answer(1.0, 2, 5)
    assert answer(0.0, 1, 5) == answer(0.0, 2, 6)


OPTIONS = [((8,), {}), ((8, 4, 4), {}), ((8,), {"cfg_scale": 0.5}), ((8,), {"threshold": 0.5})]


@pytest.mark.parametrize(("plan", "options"), OPTIONS, ids=str)
def test_an_answer_depends_on_its_own_prompt_alone(sharp, plan, options):
    """Not on the other rows, and not on padding on the left that is hidden."""
    prompts, blocks = prompts_of(2, 6), plan_blocks(*plan)
    together = generate(sharp, prompts, blocks, **options)
    alone = [generate(sharp, row[None], blocks, **options) for row in prompts]
    assert torch.equal(together, torch.cat(alone))
    padded = torch.nn.functional.pad(prompts, (4, 0), value=data.EOS)
    mask = (torch.arange(18) >= 4).expand(2, -1)
    hidden = generate(sharp, padded, blocks, attention_mask=mask, **options)
    assert torch.equal(hidden, together)
    assert not torch.equal(generate(sharp, padded, blocks, **options), together)


def test_suppressed_tokens_are_never_written_and_eos_may_be(sharp):
    """What the model would have answered is taken away, and [MASK] always is, even where it is the
    most probable token; EOS, which ends an answer, must stay possible."""
    prompts, blocks = prompts_of(2, 6), plan_blocks(8)
    usual = generate(sharp, prompts, blocks).unique().tolist()
    answer = generate(sharp, prompts, blocks, suppress=usual)
    assert not torch.isin(answer, torch.tensor([*usual, data.MASK])).any()
    bias = torch.zeros(data.VOCAB_SIZE)
    bias[data.EOS], bias[data.MASK] = 90.0, 99.0
    sharp.output.register_forward_hook(lambda module, inputs, logits: logits + bias)
    assert (generate(sharp, prompts, blocks) == data.EOS).all()
