"""
test_write.py: writing a prompt into the weights (Sec. 4.5). A memory knows its own prompt alone,
leaves the model as it was, and is made by the steps of training's inner loop.
"""

import math
from dataclasses import replace

import pytest
import slow
import torch
from slow import assert_set_equals, fast_loop, one_set, prompts_of, seeded

import memdlm
import sample
from data import Batch
from memdlm import Memory
from sample import WRITE_RULES, Write, write_prompt

MEMORY = Memory(rank=3, alpha=6.0, lr=0.5, clip=0.0, fraction=0.5)


@pytest.fixture(params=WRITE_RULES)
def write(request) -> Write:
    """Each rule, with a window that cuts 19 tokens into three pieces, the last one overlapping."""
    return Write(request.param, MEMORY, window=8)


def everywhere(rows: torch.Tensor) -> Batch:
    return Batch(rows, torch.ones_like(rows, dtype=torch.bool), None)


# ---- what a memory is made of --------------------------------------------------------------------


def test_an_answer_with_memory_depends_on_its_own_prompt_alone(sharp, write):
    """One memory for each prompt, whose draws go by the prompt's number: one or four at a time, in
    any order, give the same answers; and other answers than without a memory. An expected answer is
    nowhere to be seen. (The published evaluation *loss* is written on what it then scores.)"""
    prompts, blocks = prompts_of(4, 40), sample.plan_blocks(6, 3)

    def answers(rows: list[int]) -> list:
        fast = write_prompt(sharp, prompts[rows], write, seed=0, numbers=rows)
        return sample.generate(sharp, prompts[rows], blocks, fast=fast).tolist()

    together = answers([0, 1, 2, 3])
    assert answers([3, 1, 2, 0]) == [together[i] for i in (3, 1, 2, 0)]
    assert [answers([i])[0] for i in range(4)] == together
    assert sample.generate(sharp, prompts, blocks).tolist() != together


VARIANTS = [("paper", {"strategy": name}) for name in memdlm.STRATEGIES]
VARIANTS += [("paper", {"places": "ffn+attention"}), ("surprise", {"form": "full"})]
VARIANTS += [(rule, {"loss": "kl", "steps": 3, "epochs": 2}) for rule in WRITE_RULES]


@pytest.mark.parametrize(("rule", "change"), VARIANTS, ids=str)
def test_every_variant_of_the_inner_loop_writes_each_prompt_alone(model, rule, change):
    """Masks are drawn, and teachers look, for each prompt by itself. A prompt of two tokens, of
    which hardly anything is masked, does no harm."""
    write = Write(rule, replace(MEMORY, **change), window=8)
    for length in (19, 2):
        prompts = prompts_of(2, length)
        together = write_prompt(model, prompts, write, seed=5)
        for i in range(2):
            alone = write_prompt(model, prompts[i : i + 1], write, seed=5, numbers=[i])
            assert_set_equals(together, one_set(alone), i)
        assert all(part.isfinite().all() for part in together.tensors())
        assert length == 2 or all(B.any() for _, B in together.weights.values())


def test_writing_follows_seed_and_number_and_leaves_the_model_alone(model, write):
    """Another seed or prompt number has other draws: else one lucky draw would serve a whole
    evaluation. The prompt goes into fast weights: the next one meets the same model."""
    before = {name: w.clone() for name, w in model.state_dict().items()}
    prompts, keys = prompts_of(1, 19), [(5, [0]), (5, [0]), (6, [0]), (5, [1])]
    first, again, *others = (write_prompt(model, prompts, write, *key).tensors() for key in keys)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in others:
        assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not any(part.requires_grad for part in first)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_written_prompt_is_easier_to_predict(model, write):
    """The purpose of writing, and more passes write more. The prompts repeat four words each, so
    that what is written under some masks helps under another one; small steps."""
    words = 260 + 4 * torch.arange(3)[:, None]
    prompts = words + torch.randint(0, 4, (3, 19), generator=seeded(2))
    small, batch = replace(MEMORY, lr=0.05), everywhere(prompts)
    stages = memdlm.chain([(torch.arange(19) % 4 == 1).expand(3, 19)], batch.maskable)
    losses = []
    for lr, passes in ((0.05, 5), (0.05, 1), (0.0, 1)):
        setting = write._replace(memory=replace(small, lr=lr), passes=passes)
        fast = write_prompt(model, prompts, setting, seed=5)
        losses.append(fast_loop(model, batch, stages, fast, small)[1].mean().item())
    assert losses == sorted(losses), "losses after five passes, after one, and without a memory"


# ---- the paper's rule ----------------------------------------------------------------------------


def test_the_papers_rule_masks_a_fifth_and_then_half_as_much_again(model):
    """Each prompt token is masked with chance 0.2: the anchor. Stage 1 is its pre-anchor."""
    prompts, draws = prompts_of(8, 500), [seeded(i) for i in range(8)]
    rows, (pre, anchor) = WRITE_RULES["paper"](model, prompts, Write("paper"), draws)
    assert torch.equal(rows, prompts)
    assert torch.equal(pre.following, anchor.masked)
    share = anchor.masked.double().mean().item()
    assert abs(share - 0.2) < 5 * math.sqrt(0.2 * 0.8 / prompts.numel())
    assert not (anchor.masked & ~pre.masked).any()
    assert pre.masked.double().mean().item() == pytest.approx(1.5 * share, abs=0.003)


def test_the_papers_rule_is_training_with_the_weight_1(model):
    """What it adds to training's stages is only the choice of the anchor. Its draws are repeated
    here in their order, and the steps made the slow way."""
    prompts, generator = prompts_of(1, 19), memdlm.generator_for(5, "write", 0)
    batch, fast = everywhere(prompts), memdlm.init_fast(model, MEMORY, 1, generator)
    masked = torch.rand(1, 19, generator=generator) < 0.2
    anchor = memdlm.Anchor(torch.ones(1), masked)
    stages = memdlm.two_stages(anchor, batch.maskable, MEMORY, generator)
    stages = [stage._replace(weight=torch.ones(1)) for stage in stages]
    got = write_prompt(model, prompts, Write("paper", MEMORY), seed=5)
    assert_set_equals(got, slow.inner_loop(model, batch, stages, fast, MEMORY))


# ---- our rule: surprise --------------------------------------------------------------------------


def test_windows_cover_the_prompt():
    """None is longer than trained on, only the last may overlap, and a prompt's stay together,
    since they are written into one memory."""
    for length in range(1, 41):
        first = torch.arange(length)
        windows = sample.cut_windows(torch.stack([first, 1000 + first]), window=8)
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
    batch, expected = everywhere(prompts_of(2, 11)), 0
    for fold in range(4):
        masked = (torch.arange(11) % 4 == fold).expand(2, 11)
        expected = expected + slow.nll(model, {}, batch, masked)
    got = sample.token_surprise(model, batch.x0)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_most_surprising_tokens_are_written_in_two_disjoint_halves(model):
    """Together the stages mask the least predictable 30% of each prompt; and they do not follow
    each other: a teacher sees the clean tokens."""
    write, draws = Write("surprise", window=8, share=0.3), [seeded(i) for i in range(3)]
    windows, stages = WRITE_RULES["surprise"](model, prompts_of(3, 24), write, draws)
    first, second = (stage.masked.view(3, 24) for stage in stages)
    assert [stage.following for stage in stages] == [None, None]
    assert not (first & second).any()
    assert first.any()
    assert second.any()
    chosen, surprise = first | second, sample.token_surprise(model, windows).view(3, 24)
    assert chosen.sum(1).tolist() == [math.ceil(0.3 * 24)] * 3
    for row in range(3):
        assert surprise[row][chosen[row]].min() >= surprise[row][~chosen[row]].max()
