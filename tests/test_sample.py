"""
test_sample.py: generation, writing a prompt into the weights, and the two measurements. What must hold whatever the model:
the sampler commits what it says it commits, a memory knows its own prompt alone, and the exposure-bias walk compares like
with like.
"""

import inspect
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import data
import eval_niah
from data import Batch
from memdlm import Memory, corrupt, draw_pre_anchor, generator_for, init_fast, memory_start, stage_loss
from model import UserError
from sample import (
    WRITE_RULES,
    Write,
    choose_tokens,
    commit_schedule,
    cut_windows,
    generate,
    guided_logits,
    select,
    token_surprise,
    write_prompt,
)

TIGHT = {"rtol": 0.0, "atol": 1e-9}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts_of(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, data.EOS, (rows, length), generator=seeded(seed))


def record(model, prompts, length, **options) -> tuple[list[torch.Tensor], int]:
    """The canvas before the first and after every pass, and how many forward passes the model really made."""
    canvases, passes = [], []
    hook = model.layers[0].attention.register_forward_hook(lambda *_: passes.append(1))
    response = generate(model, prompts, length, watch=lambda canvas: canvases.append(canvas.clone()), **options)
    hook.remove()
    assert torch.equal(canvases[-1][:, prompts.shape[1] :], response)
    return canvases, len(passes)


@pytest.fixture
def sharp(make_model):
    """A model that is sure of itself: with random weights every probability would be near 1 / vocabulary."""
    model = make_model()
    with torch.no_grad():
        model.output.weight.mul_(3.0)
    return model


@pytest.fixture(params=list(WRITE_RULES))
def write(request) -> Write:
    """Each rule of writing, with a window that cuts a prompt of 19 tokens into three pieces, the last one overlapping."""
    return Write(request.param, Memory(rank=3, alpha=6.0, lr=0.5, fraction=0.5, scope="sample"), window=8)


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
    tokens, confidence = choose_tokens(logits.clone(), 0.0, None)
    assert torch.equal(tokens, possible.argmax(1))
    torch.testing.assert_close(confidence, possible.softmax(1).amax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_is_never_chosen(temperature):
    """A committed [MASK] would look like an open place, and the answer would never be finished."""
    logits = torch.zeros(200, data.VOCAB_SIZE)
    logits[:, data.MASK] = 50.0
    tokens, confidence = choose_tokens(logits, temperature, seeded())
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
    tokens, confidence = choose_tokens(logits, temperature, seeded(1))
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
    """All at or above the threshold go, and at least `quota` even if none reaches it: else generation could stand still."""
    confidence = torch.tensor([[0.3, 0.9, 0.8, 0.5], [0.1, 0.2, -1.0, 0.15]])
    assert select(confidence, 1, 0.8).tolist() == [[False, True, True, False], [False, True, False, False]]
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
    """A pass commits its quota and everything at least as probable as the threshold (the sampler of LLaDA2.1). Replayed by
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
            sure, committed = confidence[row] >= threshold, after[row] != before[row]
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


# ---- writing the prompt (Sec. 4.5) -----------------------------------------------------------------------------------------


def test_a_memory_is_made_from_the_prompt_alone():
    """Leak-free by construction: the function that writes is never handed an answer, so that it cannot look at one."""
    assert list(inspect.signature(write_prompt).parameters) == ["model", "prompts", "write", "seed", "first_row"]


def test_answers_do_not_change_with_the_expected_ones(sharp, write):
    """Other responses and references, same prompts: what the model answers with a memory must not change by a letter. The
    published evaluation *loss* fails this test: it writes the memory on the labels that it then scores."""
    examples = data.make_examples("mv", 3, 64, seed=0)
    changed = [e._replace(response=[7] * len(e.response), references=("nothing",)) for e in examples]
    answers = eval_niah.answer(sharp, examples, write, seed=0)
    assert eval_niah.answer(sharp, changed, write, seed=0) == answers
    assert eval_niah.answer(sharp, examples, None, seed=0) != answers, "the memory changes no answer: the test sees nothing"
    other = [e._replace(prompt=[*e.prompt[:20], 300, *e.prompt[21:]]) for e in examples]
    assert eval_niah.answer(sharp, other, write, seed=0) != answers


def test_answers_with_memory_do_not_depend_on_the_batch_size(sharp, write):
    """One memory per prompt with random draws of its own: 1 or 4 prompts at a time give the same scores."""
    examples = data.make_examples("vt", 4, 64, seed=0)
    assert eval_niah.answer(sharp, examples, write, 0, batch_size=1) == eval_niah.answer(sharp, examples, write, 0)


def test_prompts_written_together_equal_prompts_written_alone(model, write):
    """Row i's fast weights depend on its prompt and on (seed, i), not on its neighbours."""
    prompts = prompts_of(3, 19)
    together = write_prompt(model, prompts, write, seed=5)
    for i in range(3):
        alone = write_prompt(model, prompts[i : i + 1], write, seed=5, first_row=i)
        for name, pair in alone.weights.items():
            for p, q in zip(pair, together.weights[name]):
                torch.testing.assert_close(q[i : i + 1], p, **TIGHT, msg=f"row {i}, {name}")
    assert together.weights["layers.3.mlp.up"][1].abs().max() > 1e-4, "nothing was written"


@pytest.mark.parametrize("change", [{"seed": 6}, {"first_row": 1}])
def test_each_row_of_an_evaluation_has_draws_of_its_own(model, write, change):
    """Another seed or another row of the test set: another A and other masks. Else one lucky draw would serve them all."""
    prompts = prompts_of(1, 19)
    first, again, other = (
        write_prompt(model, prompts, write, **({"seed": 5} | options)).weights["layers.3.mlp.up"]
        for options in ({}, {}, change)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_writing_leaves_the_model_as_it_was(model, write):
    """The prompt goes into fast weights, not into theta: the next prompt must meet the same model."""
    before = {name: w.clone() for name, w in model.state_dict().items()}
    fast = write_prompt(model, prompts_of(2, 19), write, seed=5)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for pair in fast.weights.values() for p in pair)
    assert all(len(A) == len(B) == 2 for A, B in fast.weights.values()), "one set per prompt"


def test_a_written_prompt_is_easier_to_predict(model, write):
    """The purpose of writing: with phi_2 the prompt's own tokens become more probable. The prompts repeat four words each, so
    that what is written under some masks helps under another one; small steps, and more passes write more."""
    prompts = 260 + 4 * torch.arange(3)[:, None] + torch.randint(0, 4, (3, 19), generator=seeded(2))
    small = write._replace(memory=replace(write.memory, lr=0.05))
    masked = (torch.arange(19) % 4 == 1).expand(3, 19)
    h = model.run(model.embedding(corrupt(prompts, masked)), 0, memory_start(model, Memory(fraction=0.5))).detach()
    batch = Batch(prompts, torch.ones_like(masked), None)

    def nll(fast) -> float:
        return stage_loss(model, batch, masked, h, fast, small.memory, False).mean().item()

    plain = nll(init_fast(model, small.memory, 3, seeded()))
    once, often = (nll(write_prompt(model, prompts, small._replace(passes=n), seed=5)) for n in (1, 5))
    assert often < once < plain


def test_windows_cover_the_prompt():
    """Surprise rule: every prompt token lies in some window, none is longer than trained on, and a prompt's windows stay
    together, since they write into one memory."""
    for length in range(1, 41):
        windows = cut_windows(torch.stack([torch.arange(length), 1000 + torch.arange(length)]), window=8)
        count, width = -(-length // 8), windows.shape[1]
        assert windows.shape[0] == 2 * count
        assert width <= 8
        assert set(windows[:count].flatten().tolist()) == set(range(length))
        assert torch.equal(windows[count:], windows[:count] + 1000), "the second prompt's windows come after the first's"
        assert (windows.diff(dim=1) == 1).all(), "a window is a contiguous piece"
        repeated = windows[:count].numel() - length
        assert repeated == 0 or repeated < width, "only the last window may overlap the one before"


@torch.no_grad()
def test_surprise_is_the_nll_under_four_complementary_masks(model):
    """Each token is predicted exactly once, with every fourth token hidden. Written out from full forwards."""
    rows, expected = prompts_of(2, 11), torch.zeros(2, 11, dtype=torch.float64)
    for fold in range(4):
        places = torch.arange(fold, 11, 4)
        ids = rows.clone()
        ids[:, places] = data.MASK
        expected[:, places] = -model(ids).log_softmax(-1).gather(2, rows[..., None])[:, places, 0]
    torch.testing.assert_close(token_surprise(model, rows), expected.float(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_surprise_rule_writes_the_most_surprising_tokens_in_two_disjoint_halves(model):
    """No two stages mask the same place, and together they mask the least predictable 30% of each prompt, no other token."""
    write = Write("surprise", window=8, share=0.3)
    prompts = prompts_of(3, 24)
    windows, (first, second) = WRITE_RULES["surprise"](model, prompts, write, [seeded(i) for i in range(3)])
    assert torch.equal(windows, prompts.view(9, 8))
    assert not (first & second).any()
    assert first.any()
    assert second.any()
    chosen, surprise = (first | second).view(3, 24), token_surprise(model, windows).view(3, 24)
    assert chosen.sum(1).tolist() == [math.ceil(0.3 * 24)] * 3
    for row in range(3):
        assert surprise[row][chosen[row]].min() >= surprise[row][~chosen[row]].max()


@torch.no_grad()
def test_paper_rule_masks_a_fifth_and_then_half_as_much_again(model):
    """Sec. 4.5: each prompt token is masked with probability 0.2, the anchor; stage 1 is its pre-anchor, 1.5 times as many.
    Each prompt has a mask of its own."""
    write, prompts = Write("paper"), prompts_of(8, 500)
    rows, (pre, anchor) = WRITE_RULES["paper"](model, prompts, write, [seeded(i) for i in range(8)])
    assert torch.equal(rows, prompts)
    assert abs(anchor.double().mean().item() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / anchor.numel())
    assert not (anchor & ~pre).any()
    assert pre.double().mean().item() == pytest.approx(1.5 * anchor.double().mean().item(), abs=0.003)
    assert not torch.equal(anchor[0], anchor[1])


@torch.no_grad()
def test_paper_rule_of_a_prompt_is_the_training_loop_without_weights(model):
    """What write_prompt adds to the inner loop is only the choice of masks: pre-anchor, then anchor, loss weight 1. The draws
    are repeated here in the documented order, and the two steps made on one set."""
    memory = Memory(rank=3, alpha=6.0, lr=0.5, clip=0.0, fraction=0.25, scope="sample")
    prompts, generator, everywhere = prompts_of(1, 19), generator_for(5, "write", 0), torch.ones(1, 19, dtype=torch.bool)
    weights = {name: [p[0] for p in pair] for name, pair in init_fast(model, memory, 1, generator).weights.items()}
    anchor = torch.rand(1, 19, generator=generator) < 0.2
    pre = draw_pre_anchor(anchor, everywhere, 1.5, generator)
    for masked in (pre, anchor):
        with torch.enable_grad():
            leaves = {name: [p.detach().requires_grad_() for p in pair] for name, pair in weights.items()}
            matrices = {f"{n}.weight": model.get_parameter(f"{n}.weight") + 2.0 * B @ A for n, (A, B) in leaves.items()}
            logits = torch.func.functional_call(model, matrices, (corrupt(prompts, masked),))
            nll = -logits.log_softmax(-1).gather(2, prompts[..., None])[..., 0][masked].mean()
            flat = [p for pair in leaves.values() for p in pair]
            steps = torch.autograd.grad(nll, flat)
        moved = [p.detach() - 0.5 * g for p, g in zip(flat, steps)]
        weights = dict(zip(weights, zip(moved[::2], moved[1::2])))
    got = write_prompt(model, prompts, Write("paper", memory), seed=5)
    for name, (A, B) in weights.items():
        torch.testing.assert_close(got.weights[name][0][0], A, **TIGHT)
        torch.testing.assert_close(got.weights[name][1][0], B, **TIGHT)


# ---- exposure bias (Sec. 2.2) ----------------------------------------------------------------------------------------------


class Stub:
    """Stands for a model whose predictions are known: `predict` maps ids (B, T) to logits (B, T, V)."""

    config = SimpleNamespace(layers=0)

    def __init__(self, predict):
        self.predict = predict

    def embedding(self, ids):
        return ids

    def run(self, h, start, stop, attention_mask=None, fast=None):
        return self.predict(h)

    def head(self, h):
        return h


def walk_inputs(rows: int = 3, prompt: int = 4, n: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0 = prompts_of(rows, prompt + n)
    response = (torch.arange(prompt + n) >= prompt).expand(rows, -1)
    return x0, response, torch.rand(x0.shape, generator=seeded(8))


def truth_logits(x0: torch.Tensor, height: float) -> torch.Tensor:
    return height * torch.nn.functional.one_hot(x0, data.VOCAB_SIZE).float()


@pytest.mark.parametrize(("n", "steps"), [(10, 5), (10, 8), (3, 8), (12, 1)])
def test_static_and_sequential_states_mask_the_same_number(sharp, n, steps):
    """R_EB compares losses at one noise level: both states must hide max(1, int(n * ratio)) tokens in every row. The static
    state shows true tokens; no state hides the prompt; both start all-masked and get less and less masked."""
    x0, response, order = walk_inputs(n=n)
    seen = []
    hook = sharp.embedding.register_forward_hook(lambda _, args, __: seen.append(args[0].clone()))
    curve = eval_niah.exposure_walk(sharp, x0, response, order, steps, None)
    hook.remove()
    assert [ratio for ratio, *_ in curve] == pytest.approx([1 - step / steps for step in range(steps)])
    static, sequential = seen[::2], seen[1::2]
    for (ratio, *_), a, b in zip(curve, static, sequential):
        expected = [max(1, round(n * ratio * steps) // steps)] * 3
        assert (a == data.MASK).sum(1).tolist() == expected
        assert (b == data.MASK).sum(1).tolist() == expected
        assert torch.equal(a[a != data.MASK], x0[a != data.MASK])
        assert torch.equal(b[~response], x0[~response])
    for states in (static, sequential):
        for before, after in pairwise(states):
            assert not ((after == data.MASK) & (before != data.MASK)).any(), "a visible token was hidden again"


def test_all_masked_static_equals_sequential(sharp):
    """At ratio 1 nothing of the answer is visible, so both are the same state and R_EB = 1 by definition; further on, a
    random model's own tokens are wrong and the two differ."""
    x0, response, order = walk_inputs()
    curve = eval_niah.exposure_walk(sharp, x0, response, order, 5, None)
    assert torch.equal(curve[0][1], curve[0][2])
    assert not any(torch.allclose(static, sequential) for _, static, sequential in curve[1:])


def test_static_loss_is_the_mean_nll_of_the_hidden_tokens(sharp):
    """Eq. 3, row by row, without the weight 1/t: what exactly the curves show."""
    x0, response, order = walk_inputs()
    _, static, _ = eval_niah.exposure_walk(sharp, x0, response, order, 2, None)[1]
    for row in range(3):
        places = [p for p in order[row].argsort().tolist() if response[row, p]][:5]
        ids = x0[row].clone()
        ids[places] = data.MASK
        with torch.no_grad():
            logp = sharp(ids[None])[0].log_softmax(-1)
        assert static[row].item() == pytest.approx(-sum(logp[p, x0[row, p]].item() for p in places) / 5, rel=1e-5)


def test_a_model_that_knows_the_answer_has_no_exposure_bias():
    """It commits true tokens only, so its own states are as good as the true ones: R_EB = 1 at every ratio, and its loss is
    the -log p that it was given."""
    x0, response, order = walk_inputs()
    height = 8.0
    knows = Stub(lambda ids: truth_logits(x0, height))
    nll = math.log(math.exp(height) + data.VOCAB_SIZE - 1) - height
    for _, static, sequential in eval_niah.exposure_walk(knows, x0, response, order, 5, None):
        torch.testing.assert_close(static, torch.full((3,), nll), rtol=0, atol=1e-5)
        torch.testing.assert_close(sequential, static)


def test_a_model_led_astray_by_its_own_mistake_has_exposure_bias():
    """It knows the answer, but is surest of one wrong token, and lost as soon as it sees one. Its static loss stays low, its
    sequential loss rises to that of pure guessing. Fails when the walk shows it true tokens instead of its own."""
    x0, response, order = walk_inputs()
    place = 9
    wrong = (x0[:, place] + 1) % data.EOS

    def predict(ids: torch.Tensor) -> torch.Tensor:
        lost = ((ids != x0) & (ids != data.MASK)).any(1)
        logits = truth_logits(x0, 8.0)
        logits[:, place] = 0
        logits[torch.arange(3), place, wrong] = 20.0
        return torch.where(lost[:, None, None], 0.0, logits)

    curve = eval_niah.exposure_walk(Stub(predict), x0, response, order, 10, None)
    for *_, sequential in curve[1:]:
        torch.testing.assert_close(sequential, torch.full((3,), math.log(data.VOCAB_SIZE)), rtol=0, atol=1e-5)
    rank = order.masked_fill(~response, 2.0).argsort(dim=1).argsort(dim=1)[:, place]
    for step, (_, static, _) in enumerate(curve):
        hidden = rank < 10 - step  # once the hard token is visible, the rest is easy
        assert (static[~hidden] < 0.2).all()
    assert not hidden.all(), "the hard token is never shown: choose another seed"


def test_exposure_ratio_is_against_the_static_loss_without_memory(make_model):
    """Both MemDLM rows share one denominator, the memory-free static loss; with its own, a memory that lowers both losses
    would look as if it had changed nothing (or the reverse)."""
    models = {"memdlm": make_model(torch.float32), "mdlm": make_model(torch.float32, seed=1)}
    write = Write("surprise", Memory(rank=3, alpha=6.0, lr=1.0, fraction=0.5, scope="sample"), window=32)
    records = eval_niah.exposure_bias(models, ["mv", "cwe"], 64, 2, 0, write, steps=3)
    by = {(r["method"], round(r["mask_ratio"], 3)): r for r in records}
    assert {method for method, _ in by} == {"mdlm", "memdlm_train", "memdlm_train_inference"}
    assert len(by) == len(records) == 9
    for (method, ratio), r in by.items():
        denominator = by["mdlm" if method == "mdlm" else "memdlm_train", ratio]["static"]
        assert r["ratio"] == pytest.approx(r["sequential"] / denominator)
    for method in ("mdlm", "memdlm_train"):
        assert by[method, 1.0]["ratio"] == 1
    assert by["memdlm_train_inference", 1.0]["static"] != by["memdlm_train", 1.0]["static"]


# ---- scores and intervals --------------------------------------------------------------------------------------------------


def test_score_cells_make_one_record_per_method_task_and_length(make_model):
    """Rows without a checkpoint are left out, and the two MemDLM rows come from one model: with the memory and without."""
    write = Write("surprise", Memory(rank=3, alpha=6.0, lr=1.0, fraction=0.5, scope="sample"), window=32)
    records = eval_niah.score_cells({"memdlm": make_model(torch.float32)}, ["cwe", "mv"], [64, 72], 2, 0, write)
    cells = {(r["method"], r["task"], r["length"]) for r in records}
    methods = ("memdlm_train", "memdlm_train_inference")
    assert cells == {(m, t, n) for m in methods for t in ("cwe", "mv") for n in (64, 72)}
    assert len(records) == 8
    assert all(r["ci95"][0] <= r["score"] <= r["ci95"][1] for r in records)


@pytest.mark.parametrize(
    ("mean", "n", "low", "high"),
    [(0.5, 10, 0.23659, 0.76341), (0.0, 10, 0.0, 0.27754), (1.0, 10, 0.72246, 1.0), (0.9, 100, 0.82563, 0.94477)],
)
def test_wilson_interval_equals_known_values(mean, n, low, high):
    """Published values of Wilson's score interval. Unlike mean ± 1.96 s it neither leaves [0, 1] nor vanishes at 0 and 1."""
    assert eval_niah.wilson_interval(mean, n) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [([1, 2, 3, 4, 5], 3.0, 1.9632), ([0, 1], 0.5, 6.3531), ([2.0, 2.0, 2.0], 2.0, 0.0), ([7.0], 7.0, math.inf)],
)
def test_t_interval_equals_known_values(values, mean, half):
    """Student's t over seeds: quantile 2.776 for five of them, 12.706 for two, and no interval at all for one."""
    assert eval_niah.t_interval(values) == pytest.approx((mean, half), abs=2e-3)
