"""
test_plans.py: how the published samplers share an answer between blocks and passes: LLaDA's generate.py, dLLM's MDLMSampler,
and LLaDA2.1's block sampler with its block-causal attention. And answers to prompts of different lengths in one batch.
"""

import math
from itertools import pairwise

import pytest
import torch
from slow import TIGHT, prompts_of, record, seeded, sharpened

import data
from model import block_causal_mask
from sample import PLANS, cut_blocks, dllm_plan, generate, llada2_plan, llada_plan, rounded_schedule, select

CASES = [  # prompt, length, steps, block length
    *((prompt, 12, steps, block) for prompt in (0, 5, 8) for steps in (None, 3, 5, 12, 40) for block in (4, 5, 12)),
    (7, 1, None, 1),
    (3, 10, 10, 3),
    (4, 37, 9, 8),
]


@pytest.fixture
def sharp(make_model):
    return sharpened(make_model())


@pytest.fixture
def local(make_model):
    """Without the convolution, which looks at its neighbours whatever the attention mask says (the LLaDA models have none)."""
    return sharpened(make_model(canon=0))


# ---- plans on paper --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize(("prompt", "length", "steps", "block"), CASES)
def test_plans_cover_the_answer_once_and_commit_all_of_it(plan, prompt, length, steps, block):
    """Blocks follow each other without a gap or an overlap, from the answer's first token to its last at least, and each
    one's quotas add up to no less than its places: otherwise a [MASK] would be left. None commits more than the block has."""
    blocks = PLANS[plan](prompt, length, steps, block)
    for one, after in pairwise(blocks):
        assert one.stop == after.start
    assert blocks[0].start <= 0
    assert blocks[-1].stop >= length
    for start, stop, quotas in blocks:
        assert 0 < stop - start <= block
        assert sum(quotas) == (block if plan == "llada2" else stop - start)
        assert quotas == sorted(quotas, reverse=True) or plan == "dllm"
        assert min(quotas) >= (0 if plan == "llada2" else 1), "a pass that commits nothing is wasted"
    if plan != "llada2":
        assert (blocks[0].start, blocks[-1].stop) == (0, length)


@pytest.mark.parametrize(
    ("tokens", "steps", "quotas"), [(10, 4, [2, 3, 2, 3]), (8, 4, [2] * 4), (3, 5, [1, 1, 1]), (5, 2, [2, 3])]
)
def test_dllm_rounds_what_is_left_half_to_even(tokens, steps, quotas):
    """10 tokens in 4 steps: 10/4 = 2.5 -> 2, 8/3 -> 3, 5/2 = 2.5 -> 2, 3. Where LLaDA commits 3, 3, 2, 2. Python's round is
    half to even, as torch's is; steps that round to nothing are dropped, and cost no pass."""
    assert rounded_schedule(tokens, steps) == quotas


def test_dllm_gives_each_block_the_share_of_steps_rounded_up():
    """32 steps for 100 tokens in blocks of 32: four blocks, eight passes each, of which the short last one needs four. Where
    steps do not divide, dLLM takes more of them than it was given; LLaDA does not."""
    blocks = dllm_plan(7, 100, 32, 32)
    assert [(block.start, block.stop) for block in blocks] == cut_blocks(100, 32) == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert [len(block.quotas) for block in blocks] == [8, 8, 8, 4]
    assert [len(block.quotas) for block in dllm_plan(7, 12, 4, 4)] == [2, 2, 2], "4 steps for 3 blocks: 2 each"
    assert [len(block.quotas) for block in llada_plan(7, 12, 4, 4)] == [2, 1, 1]


def test_llada2_blocks_lie_on_a_grid_that_starts_with_the_prompt():
    """A prompt of 10 in blocks of 4: the first block has two places of the prompt and two of the answer. `steps` are those
    of each block, and the last block is decoded to its end, past the answer's."""
    blocks = llada2_plan(10, 9, 2, 4)
    assert [(block.start, block.stop) for block in blocks] == [(-2, 2), (2, 6), (6, 10)]
    assert [block.quotas for block in blocks] == [[2, 2]] * 3
    assert [block.quotas for block in llada2_plan(8, 4, None, 4)] == [[1] * 4]


# ---- plans in action -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize(("prompt", "length", "steps", "block"), CASES[3::5])
def test_every_plan_finishes_every_answer(sharp, plan, prompt, length, steps, block):
    """No [MASK] is left, the prompt is only read, committed tokens stay, and blocks are finished from left to right."""
    prompts = prompts_of(2, prompt)
    canvases, _ = record(sharp, prompts, length, steps=steps, block_length=block, plan=plan)
    assert (canvases[-1][:, : prompt + length] != data.MASK).all()
    for before, after in pairwise(canvases):
        assert torch.equal(after[:, :prompt], prompts)
        assert torch.equal(after[before != data.MASK], before[before != data.MASK])
    edges = [(prompt + max(0, b.start), prompt + b.stop) for b in PLANS[plan](prompt, length, steps, block)]
    for canvas in canvases:
        for row in canvas != data.MASK:
            done = [bool(row[start:stop].all()) for start, stop in edges]
            begun = [bool(row[start:stop].any()) for start, stop in edges]
            assert not any(late and not early for early, late in zip(done, begun[1:]))


@pytest.mark.parametrize(("plan", "counts"), [("llada", [3, 3, 2, 2]), ("dllm", [2, 3, 2, 3])])
def test_each_pass_commits_its_planned_quota(sharp, plan, counts):
    """The two schedules on one answer: 10 tokens in 4 passes."""
    canvases, passes = record(sharp, prompts_of(2, 5), 10, steps=4, plan=plan)
    left = [(canvas == data.MASK).sum(1).tolist() for canvas in canvases]
    assert passes == 4
    assert [[a - b for a, b in zip(*pair)] for pair in pairwise(left)] == [[n] * 2 for n in counts]


def test_llada2_commits_its_quota_in_every_block_and_stops_when_a_block_is_full(sharp):
    """A prompt of 10, blocks of 4, 2 passes each: the first block has two open places, done in one pass; then 2 and 2, and the
    last block, of which the answer needs three, is filled to its end."""
    canvases, passes = record(sharp, prompts_of(2, 10), 9, steps=2, block_length=4, plan="llada2")
    left = [(canvas == data.MASK).sum(1).tolist() for canvas in canvases]
    assert passes == 5
    assert left == [[10] * 2, [8] * 2, [6] * 2, [4] * 2, [2] * 2, [0] * 2]


# ---- LLaDA2: block-causal attention ----------------------------------------------------------------------------------------


def test_block_causal_mask_shows_each_block_itself_and_what_lies_before():
    """Written out for seven positions in blocks of three."""
    expected = [[key // 3 <= query // 3 for key in range(7)] for query in range(7)]
    assert block_causal_mask(7, 3, torch.device("cpu"))[0, 0].tolist() == expected


@torch.no_grad()
def test_tokens_behind_the_current_block_change_nothing(local):
    """Block-causal: what lies behind a block is not seen from it. So it need not be there at all, which saves the sampler the
    work of computing it; one token inside the block or before it does matter."""
    ids = prompts_of(2, 12)
    mask = block_causal_mask(12, 4, torch.device("cpu"))
    plain = local(ids, mask)[:, :8]
    later, inside, before = ids.clone(), ids.clone(), ids.clone()
    later[:, 8:] = data.MASK
    inside[:, 7] = data.MASK
    before[:, 1] = data.MASK
    torch.testing.assert_close(local(later, mask)[:, :8], plain, **TIGHT)
    torch.testing.assert_close(local(ids[:, :8], mask[..., :8, :8]), plain, **TIGHT)
    assert (local(inside, mask)[:, 4:8] - plain[:, 4:]).abs().max() > 1e-3
    assert (local(before, mask)[:, 4:8] - plain[:, 4:]).abs().max() > 1e-3
    assert (local(later)[:, :8] - local(ids)[:, :8]).abs().max() > 1e-3, "bidirectional attention sees no difference: no test"


def test_llada2_blocks_do_not_depend_on_how_much_follows(local):
    """A longer answer begins with the shorter one: later blocks, masked or not, are invisible. Under LLaDA's bidirectional plan
    the length of the answer is known from the start, and changes it."""
    prompts, options = prompts_of(3, 6), {"block_length": 4, "steps": 4}
    short, long = (generate(local, prompts, n, plan="llada2", **options) for n in (6, 18))
    assert torch.equal(short, long[:, :6])
    both = [generate(local, prompts, n, block_length=4) for n in (6, 18)]
    assert not torch.equal(both[0], both[1][:, :6])


@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_llada2_equals_a_sampler_that_computes_everything(local, threshold):
    """Every pass replayed by hand, over the whole canvas with the whole mask: greedy tokens, the most confident of the block
    up to the quota, and all above the threshold."""
    prompts = prompts_of(2, 6)
    canvases, _ = record(local, prompts, 9, steps=2, block_length=4, plan="llada2", threshold=threshold)
    canvas, mask, number = canvases[0], block_causal_mask(16, 4, torch.device("cpu")), 0
    for start, stop in ((6, 8), (8, 12), (12, 16)):
        while (canvas[:, start:stop] == data.MASK).any():
            logits = local(canvas, mask)
            logits[..., data.MASK] = -torch.inf
            confidence, tokens = logits.float().softmax(-1).max(-1)
            open_ = (canvas == data.MASK) & (torch.arange(16) >= start) & (torch.arange(16) < stop)
            chosen = select(confidence.masked_fill(~open_, -1.0), 2, threshold)
            canvas, number = torch.where(chosen, tokens, canvas), number + 1
            assert torch.equal(canvas, canvases[number])
    assert number == len(canvases) - 1


def test_llada2_answers_do_not_depend_on_the_batch_size(local):
    """Rows finish their blocks at different passes when a threshold is set; each must still get its own answer."""
    prompts, options = prompts_of(4, 6), {"plan": "llada2", "block_length": 4, "threshold": 0.4}
    alone = torch.cat([generate(local, row[None], 9, **options) for row in prompts])
    assert torch.equal(generate(local, prompts, 9, **options), alone)


# ---- prompts of different lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"steps": 3, "block_length": 4}, {"cfg_scale": 0.5}, {"threshold": 0.4}], ids=str)
@pytest.mark.parametrize("plan", ["llada", "dllm"])
def test_ragged_prompts_get_the_answers_of_the_rows_alone(sharp, plan, options):
    """Prompts are padded on the right, and each answer follows its own prompt: what lies behind it (a longer prompt's place) is
    hidden, its positions are those of the row alone, and the padding is never read."""
    if plan == "llada" and options.get("steps"):
        options = {**options, "steps": 4}
    lengths = torch.tensor([6, 3, 5, 1])
    prompts = torch.where(torch.arange(6) < lengths[:, None], prompts_of(4, 6), data.EOS)
    together = generate(sharp, prompts, 8, plan=plan, prompt_lengths=lengths, **options)
    alone = [generate(sharp, row[None, :n], 8, plan=plan, **options) for row, n in zip(prompts, lengths.tolist())]
    assert torch.equal(together, torch.cat(alone))
    noise = torch.where(torch.arange(6) < lengths[:, None], prompts, 17)
    assert torch.equal(generate(sharp, noise, 8, plan=plan, prompt_lengths=lengths, **options), together)
    assert not torch.equal(generate(sharp, prompts, 8, plan=plan, **options), together)


def test_the_block_sampler_refuses_ragged_prompts(sharp):
    """LLaDA2's grid of blocks starts with the prompt: one grid for rows of several lengths would give wrong answers."""
    for wrong in ({"prompt_lengths": torch.tensor([6, 6, 6])}, {"attention_mask": torch.ones(3, 16)}):
        with pytest.raises(ValueError, match="one length"):
            generate(sharp, prompts_of(3, 6), 8, plan="llada2", block_length=4, **wrong)


@pytest.mark.parametrize("plan", ["llada", "dllm"])
def test_prompts_of_one_length_need_no_lengths(sharp, plan):
    """Naming the lengths of prompts that all fill the row changes nothing."""
    prompts, options = prompts_of(3, 6), {"plan": plan, "block_length": 4}
    named = generate(sharp, prompts, 8, prompt_lengths=torch.tensor([6, 6, 6]), **options)
    assert torch.equal(named, generate(sharp, prompts, 8, **options))


# ---- suppressed tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_are_never_chosen(sharp, temperature):
    """The tokens that the model would have chosen first are taken away, [MASK] with them; everything else stays possible."""
    prompts, options = prompts_of(3, 6), {"temperature": temperature, "generator": seeded(1)}
    usual = generate(sharp, prompts, 8, temperature=temperature, generator=seeded(1))
    taken = [data.MASK, *usual.unique().tolist()]
    answer = generate(sharp, prompts, 8, suppress=taken, **options)
    assert not torch.isin(answer, torch.tensor(taken)).any()


def test_confidence_is_that_among_the_tokens_left(sharp):
    """Suppressed tokens take no part in the softmax: the order of commitment is that of a model that does not know them."""
    prompts, banned = prompts_of(3, 6), [data.MASK, *range(0, 300, 2)]
    answer = generate(sharp, prompts, 8, suppress=banned)
    bias = torch.zeros(data.VOCAB_SIZE, dtype=torch.float64)
    bias[banned] = -math.inf
    hook = sharp.output.register_forward_hook(lambda module, inputs, logits: logits + bias)
    assert torch.equal(generate(sharp, prompts, 8, suppress=[]), answer)
    hook.remove()


def test_only_mask_is_suppressed_by_default(sharp):
    """[MASK] alone: EOS, which ends an answer, must stay possible."""
    prompts = prompts_of(3, 6)
    assert torch.equal(generate(sharp, prompts, 8), generate(sharp, prompts, 8, suppress=[data.MASK]))
    eos = torch.tensor([data.EOS])
    hook = sharp.output.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, eos, 50.0))
    assert (generate(sharp, prompts, 8) == data.EOS).all()
    hook.remove()
