"""
test_write.py: writing a prompt into the weights (Sec. 4.5). A memory knows its own prompt alone, leaves the model as it was,
and is made by the training loop's own steps.
"""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from slow import TIGHT, prompts_of, seeded, sharpened

import data
import eval_niah
from data import Batch
from memdlm import (
    INNER_LOSSES,
    STRATEGIES,
    Memory,
    chain,
    corrupt,
    draw_pre_anchor,
    generator_for,
    init_fast,
    make_states,
    stage_loss,
)
from model import Fast
from sample import WRITE_RULES, Write, cut_windows, token_surprise, write_prompt


@pytest.fixture
def sharp(make_model):
    return sharpened(make_model())


@pytest.fixture(params=list(WRITE_RULES))
def write(request) -> Write:
    """Each rule of writing, with a window that cuts a prompt of 19 tokens into three pieces, the last one overlapping."""
    return Write(request.param, Memory(rank=3, alpha=6.0, lr=0.5, fraction=0.5, scope="sample"), window=8)


# ---- writing the prompt (Sec. 4.5) -----------------------------------------------------------------------------------------


def test_a_memory_is_made_from_the_prompt_alone():
    """Leak-free by construction: the function that writes is never handed an answer, so that it cannot look at one."""
    assert list(inspect.signature(write_prompt).parameters) == ["model", "prompts", "write", "seed", "numbers"]


def questions_of(task: str, n: int) -> list[data.Question]:
    """Test examples, put as an evaluation puts them."""
    examples = data.make_examples(task, n, 64, seed=0)
    return [data.Question(task, example.prompt, len(example.response), example.references) for example in examples]


def test_answers_do_not_change_with_the_expected_ones(sharp, write):
    """Everything about a question but its prompt is another: what the model answers with a memory must not change by a letter.
    The published evaluation *loss* fails this test: it writes the memory on the labels that it then scores."""
    questions = questions_of("mv", 3)
    changed = [q._replace(task="vt", references=("nothing",), text="none", asked="nothing", depth=0.5) for q in questions]
    answers = eval_niah.answer(sharp, questions, write, 0, range(3))
    assert eval_niah.answer(sharp, changed, write, 0, range(3)) == answers
    plain, passes = eval_niah.answer(sharp, questions, None, 0, range(3))
    assert plain != answers[0], "the memory changes no answer: the test sees nothing"
    assert passes == answers[1] == questions[0].tokens
    other = [q._replace(prompt=[*q.prompt[:20], 300, *q.prompt[21:]]) for q in questions]
    assert eval_niah.answer(sharp, other, write, 0, range(3)) != answers


def test_answers_with_memory_do_not_depend_on_batch_size_or_order(sharp, write):
    """One memory per prompt, whose random draws go by the prompt's number: 1 or 4 at a time, in any order, are the same."""
    questions = questions_of("vt", 4)
    together, _ = eval_niah.answer(sharp, questions, write, 0, range(4))
    assert len(set(together)) > 1
    assert [eval_niah.answer(sharp, [q], write, 0, [i])[0][0] for i, q in enumerate(questions)] == together
    assert eval_niah.answer(sharp, questions[::-1], write, 0, [3, 2, 1, 0])[0] == together[::-1]


def written_together_and_alone(model, prompts: torch.Tensor, write) -> Fast:
    """The fast weights of all prompts at once, after comparing each set with that of its prompt alone."""
    together = write_prompt(model, prompts, write, seed=5)
    for i in range(len(prompts)):
        alone = write_prompt(model, prompts[i : i + 1], write, seed=5, numbers=[i])
        for name, pair in alone.weights.items():
            for p, q in zip(pair, together.weights[name]):
                torch.testing.assert_close(q[i : i + 1], p, **TIGHT, msg=f"row {i}, {name}")
    return together


def test_prompts_written_together_equal_prompts_written_alone(model, write):
    """Row i's fast weights depend on its prompt and on (seed, i), not on its neighbours."""
    together = written_together_and_alone(model, prompts_of(3, 19), write)
    assert together.weights["layers.3.mlp.up"][1].abs().max() > 1e-4, "nothing was written"


VARIANTS = [*({"strategy": name} for name in STRATEGIES), {"steps": 1}, {"steps": 3}, {"epochs": 2}]
VARIANTS += [*({"loss": name} for name in INNER_LOSSES), {"targets": "newly_revealed"}]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_variant_of_the_inner_loop_writes_each_prompt_alone(model, write, change):
    """Strategies draw masks for each prompt by itself, and teachers see that prompt alone: rows written together equal rows
    written one by one, whatever the variant; a short prompt, of which hardly anything is masked, does no harm."""
    write = write._replace(memory=replace(write.memory, **change))
    for length in (19, 2):
        together = written_together_and_alone(model, prompts_of(3, length), write)
        if length == 19:
            assert all(B.isfinite().all() and B.any() for _, B in together.weights.values())


def test_the_papers_rule_follows_the_strategy(model):
    """Under the paper's rule a prompt's anchor goes through the same strategies as a response in training."""
    prompts = prompts_of(2, 19)
    for name, number in (("consistent", 3), ("pre_anchor_only", 1), ("anchor_only", 1), ("inconsistent", 3)):
        write = Write("paper", Memory(strategy=name, steps=3))
        _, stages = WRITE_RULES["paper"](model, prompts, write, [seeded(i) for i in range(2)])
        assert len(stages) == number
        assert all(stage.masked.shape == (2, 19) for stage in stages)
        assert all(stage.t.shape == (2,) for stage in stages)


@pytest.mark.parametrize("change", [{"seed": 6}, {"numbers": [1]}])
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
    batch = Batch(prompts, torch.ones_like(masked), None)
    (state,) = make_states(model, batch, chain([masked], batch.maskable), small.memory)

    def nll(fast) -> float:
        return stage_loss(model, batch, state, fast, small.memory, False).mean().item()

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
    windows, stages = WRITE_RULES["surprise"](model, prompts, write, [seeded(i) for i in range(3)])
    (first, second), last = (stage.masked for stage in stages), [stage.following for stage in stages]
    assert last == [None, None], "the halves do not follow each other: a teacher would see the clean tokens"
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
    rows, stages = WRITE_RULES["paper"](model, prompts, write, [seeded(i) for i in range(8)])
    pre, anchor = (stage.masked for stage in stages)
    assert torch.equal(stages[0].following, anchor)
    assert stages[1].following is None
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
            logits = torch.func.functional_call(model, matrices, (corrupt(prompts, masked, data.MASK),))
            nll = -logits.log_softmax(-1).gather(2, prompts[..., None])[..., 0][masked].mean()
            flat = [p for pair in leaves.values() for p in pair]
            steps = torch.autograd.grad(nll, flat)
        moved = [p.detach() - 0.5 * g for p, g in zip(flat, steps)]
        weights = dict(zip(weights, zip(moved[::2], moved[1::2])))
    got = write_prompt(model, prompts, Write("paper", memory), seed=5)
    for name, (A, B) in weights.items():
        torch.testing.assert_close(got.weights[name][0][0], A, **TIGHT)
        torch.testing.assert_close(got.weights[name][1][0], B, **TIGHT)
