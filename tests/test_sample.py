"""
test_sample.py: generation, and writing a prompt into the weights (Sec. 4.5). The sampler commits
what it says it commits, never takes it back, and answers each prompt as if it were alone. A memory
knows its own prompt alone, and is made by the steps of training's inner loop.
"""

import math
from itertools import pairwise

import pytest
import slow
import torch
from slow import assert_set_equals, by_name, merge, one_set, prompts_of, seeded
from teaching import assert_same
from torch.func import functional_call

import data
import memdlm
from data import Batch
from lab import variants
from lab.variants import WRITE_RULES
from memdlm import Memory, init_fast
from model import UserError
from sample import Write, choose_tokens, generate, guided_logits, plan_blocks, select, write_prompt

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
    """The plan of LLaDA's generate.py: as even as can be, and each block is finished before those
    on its right. What is committed stays, and the prompt is only read."""
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


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_sampled_frequencies_are_softmax_of_logits_over_temperature(temperature):
    """Gumbel-max: of 8000 draws each share is within five standard deviations; temperature 0 takes
    the most probable token. Confidence stays the model's own probability, at temperature 1. A token
    that is suppressed, here the most probable one, is never drawn and takes no confidence."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 9.0]).expand(8000, 5)
    tokens, confidence = choose_tokens(logits, temperature, seeded(1), [4])
    expected = (logits[0, :4].double() / max(temperature, 1e-9)).softmax(0)
    assert tokens.max() < 4, "a suppressed token was chosen"
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


CONFIDENCE = [[0.3, 0.99, -1.0, 0.98], [-1.0, 0.2, 0.0, -1.0], [0.8, 0.8, 0.8, -1.0]]
SELECTED = [  # quota, threshold -> the places that are committed
    (2, None, [[0, 1, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]),
    (1, None, [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]),
    (1, 0.8, [[0, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]),
    (1, 0.0, [[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]]),
    (0, 0.4, [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]),
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
        "the threshold has no effect (0 is one, too, and not the same as None)": (
            (order.argsort(dim=1) < quota) & (confidence >= 0)
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
    """The global random state plays no part, and temperature 0 uses no generator."""
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
    """[MASK] never is, even where it is the most probable token; EOS, which ends an answer, may."""
    prompts, blocks = prompts_of(2, 6), plan_blocks(8)
    usual = generate(sharp, prompts, blocks).unique().tolist()
    answer = generate(sharp, prompts, blocks, suppress=usual)
    assert not torch.isin(answer, torch.tensor([*usual, data.MASK])).any()
    bias = torch.zeros(data.VOCAB_SIZE)
    bias[data.EOS], bias[data.MASK] = 90.0, 99.0
    sharp.output.register_forward_hook(lambda module, inputs, logits: logits + bias)
    assert (generate(sharp, prompts, blocks) == data.EOS).all()


MEMORY = Memory(rank=3, alpha=6.0, lr=0.5, clip=0.0, fraction=0.5)
VARIANTS = [("paper", {"strategy": name}) for name in variants.STRATEGIES]
VARIANTS += [("paper", {"places": "ffn+attention"}), ("surprise", {"form": "full"})]
VARIANTS += [("paper", {"clip_by": "global", "clip": 0.1})]
VARIANTS += [(rule, {"loss": "kl", "steps": 3, "epochs": 2}) for rule in WRITE_RULES]


@pytest.mark.parametrize(("rule", "change"), VARIANTS, ids=str)
def test_every_variant_of_the_inner_loop_writes_each_prompt_alone(model, rule, change):
    """One memory for each prompt, whose draws go by the prompt's number: what else is asked changes
    no answer. A prompt of two tokens, of which hardly anything is masked, does no harm."""
    write = variants.write_with(by_name(lr=0.5, **change), rule, 1, 0.2, 8, None, None)
    for length in (19, 2):
        prompts = prompts_of(2, length)
        together = write_prompt(model, prompts, write, seed=5)
        for i in range(2):
            alone = write_prompt(model, prompts[i : i + 1], write, seed=5, numbers=[i])
            assert_set_equals(together, one_set(alone), i)
        assert all(part.isfinite().all() for part in together.tensors())
        assert length == 2 or all(B.any() for _, B in together.weights.values())


@pytest.mark.parametrize("rule", WRITE_RULES)
def test_writing_follows_seed_and_number_and_leaves_the_model_alone(model, rule):
    """Another seed or prompt number has other draws: else one lucky draw would serve a whole
    evaluation. The prompt goes into fast weights: the next one meets the same model."""
    write = variants.write_with(MEMORY, rule, 1, 0.2, 8, None, None)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    prompts, keys = prompts_of(1, 19), [(5, [0]), (5, [0]), (6, [0]), (5, [1])]
    first, again, *others = (write_prompt(model, prompts, write, *key).tensors() for key in keys)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in others:
        assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not any(part.requires_grad for part in first)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_papers_rule_is_training_with_the_weight_1(model):
    """What it adds to training's stages is only the choice of the anchor. Its draws are repeated
    here in their order, and the steps made the slow way."""
    prompts, generator = prompts_of(1, 19), memdlm.generator_for(5, "write", 0)
    batch = Batch(prompts, torch.ones_like(prompts, dtype=torch.bool), None)
    fast = memdlm.init_fast(model, MEMORY, 1, generator)
    masked = torch.rand(1, 19, generator=generator) < 0.2
    anchor = memdlm.Anchor(torch.ones(1), masked)
    stages = memdlm.two_stages(anchor, batch.maskable, MEMORY, generator)
    stages = [stage._replace(weight=torch.ones(1)) for stage in stages]
    got = write_prompt(model, prompts, Write(MEMORY), seed=5)
    assert_set_equals(got, slow.inner_loop(model, batch, stages, fast, MEMORY))


def test_windows_cover_the_prompt():
    """None is longer than trained on, only the last may overlap, a prompt's stay together."""
    for length in range(1, 41):
        first = torch.arange(length)
        windows = variants.cut_windows(torch.stack([first, 1000 + first]), window=8)
        count, width = -(-length // 8), windows.shape[1]
        assert windows.shape == (2 * count, width)
        assert width <= 8
        assert torch.equal(windows[count:], windows[:count] + 1000)
        assert (windows.diff(dim=1) == 1).all(), "a window is one piece"
        assert set(windows[:count].flatten().tolist()) == {*range(length)}
        assert count * width - length < width


@torch.no_grad()
def test_surprise_is_the_nll_under_four_complementary_masks(model):
    """Each token is predicted exactly once, with every fourth token hidden."""
    batch, expected = Batch(prompts_of(2, 11), torch.ones(2, 11, dtype=torch.bool), None), 0
    for fold in range(4):
        masked = (torch.arange(11) % 4 == fold).expand(2, 11)
        expected = expected + slow.nll(model, {}, batch, masked)
    got = variants.token_surprise(model, batch.x0)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_most_surprising_tokens_are_written_in_two_disjoint_halves(model):
    """The least predictable 30% of each prompt, and neither half is the other's teacher."""
    write, draws = Write(), [seeded(i) for i in range(3)]
    windows, stages = variants.surprise_rule(
        model, prompts_of(3, 24), write, draws, window=8, share=0.3, passes=1
    )
    first, second = (stage.masked.view(3, 24) for stage in stages)
    assert [stage.following for stage in stages] == [None, None]
    assert not (first & second).any()
    assert first.any()
    assert second.any()
    chosen, surprise = first | second, variants.token_surprise(model, windows).view(3, 24)
    assert chosen.sum(1).tolist() == [math.ceil(0.3 * 24)] * 3
    for row in range(3):
        assert surprise[row][chosen[row]].min() >= surprise[row][~chosen[row]].max()


@torch.no_grad()
def test_a_short_prompt_is_written_with_two_passes_a_window_at_most(model):
    """Eight passes over one window make it remembered word for word, which spoils the answer, and
    two still cost some; over four windows eight are what was measured to help. The stages are the
    same in each pass."""
    for length, passes, expected in ((5, 8, 1), (8, 2, 1), (9, 8, 2), (15, 8, 4), (31, 8, 8)):
        draws = [seeded(i) for i in range(2)]
        asked = prompts_of(2, length), Write(), draws
        _, stages = variants.surprise_rule(model, *asked, window=8, passes=passes)
        assert len(stages) == 2 * expected, f"{length} tokens, {passes} passes asked"
        for stage, again in zip(stages, stages[2:]):
            assert torch.equal(stage.masked, again.masked)
            assert torch.equal(stage.h, again.h)
