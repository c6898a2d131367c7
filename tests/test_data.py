"""
test_data.py: the tokenizer, the four reading tasks and their batches.
"""

import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

import data
from data import EOS, MASK, TINY, Example

TEXTS = [
    "",
    " river holds 47. Question: what does river hold? Answer:",
    "  two  spaces\tand a tab\r\nand\u00a0a hard space\n\n\n",
    "naïve façade, Ελληνικά, русский, 漢字かな, العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é \u200b\ufeff \u2028\u2029\x85\x00\x7f",
    "<|endoftext|> <|mask|><|endoftext|>",
]


def test_any_text_round_trips_and_none_is_a_special_token():
    """And a typed "<|mask|>" is bytes: the program alone puts [MASK] and EOS in place."""
    rng = random.Random(7)
    alphabet = [chr(i) for i in [*range(256), *range(0x370, 0x3FF), *range(0x1F600, 0x1F640)]]
    drawn = ["".join(rng.choices(alphabet, k=40)) for _ in range(30)]
    for text in TEXTS + drawn:
        ids = TINY.pieces(text)
        assert TINY.decode(ids) == text
        assert not {EOS, MASK} & {*ids}


def test_a_users_text_begins_like_the_training_text():
    """With a space, since " river" is one token and "river" five bytes. What follows an EOS is no
    answer any more, special tokens are the last two ids of the vocabulary, and each class of words
    is one run of ids: noise draws "another word of this class" as first + random(size)."""
    assert TINY.encode("river holds") == TINY.encode(" river holds") == TINY.pieces(" river holds")
    assert len(TINY.encode("river holds")) == 2
    assert TINY.decode([*TINY.encode("yes"), EOS, *TINY.encode("no"), EOS]) == " yes"
    assert {EOS, MASK} == {data.VOCAB_SIZE - 2, data.VOCAB_SIZE - 1}
    for name in (*data.CLASSES, "units"):
        first, size = data.class_range(name)
        words = [" " + word for word in data.CLASSES.get(name, ())] or list("0123456789")
        assert [TINY.decode([i]) for i in range(first, first + size)] == words


def halves(example: Example) -> tuple[list[str], str]:
    """The sentences before the question, without their full stops, and the question."""
    hay, question = TINY.decode(example.prompt).split(" Question: ")
    assert hay.endswith(".")
    return [part.strip() for part in hay.split(".")[:-1]], question


def matches(pattern: str, sentences: list[str]) -> list[tuple]:
    """The groups of the sentences that have this form."""
    found = [re.fullmatch(pattern, sentence) for sentence in sentences]
    return [match.groups() for match in found if match]


def solve_mv(sentences: list[str], question: str) -> tuple[str, list[str]]:
    (key,) = re.fullmatch(r"what does (\w+) hold\? Answer:", question).groups()
    facts = matches(r"(\w+) holds (\d\d)", sentences)
    assert sorted(Counter(name for name, _ in facts).values()) == [2, 2, 2]
    values = [value for name, value in facts if name == key]
    return "".join(f" {key} holds {value}." for value in values), values


def solve_vt(sentences: list[str], question: str) -> tuple[str, list[str]]:
    (value,) = re.fullmatch(r"which = (\d\d)\? Answer:", question).groups()
    facts = matches(r"(\w+) = (\w+)", sentences)
    assert len(facts) == len({name for name, _ in facts}) == 6
    known, chain, text = {}, [], ""
    for name, source in facts:  # a variable is defined before it is used: one pass resolves all
        known[name] = source if source.isdigit() else known[source]
        if known[name] == value:
            chain.append(name)
            text += f" {name} = {source}."
    return text, chain


def solve_cwe(sentences: list[str], question: str) -> tuple[str, list[str]]:
    assert question == "which words are common? Answer:"
    counts = Counter(s for s in sentences if " " not in s)  # in order of first appearance
    assert sorted(counts.values()) == [1] * 8 + [4] * 2
    common = [word for word, count in counts.items() if count == 4]
    return f" {common[0]} {common[1]}.", common


def solve_babi(sentences: list[str], question: str) -> tuple[str, list[str]]:
    asked = re.fullmatch(r"where are (\w+) and (\w+)\? Answer:", question).groups()
    moves = matches(r"(\w+) went (\w+)", sentences)
    assert sorted(Counter(name for name, _ in moves).values()) == [2, 2, 2, 2]
    last = dict(moves)  # a later move overwrites an earlier one
    found = [f"{name} went {last[name]}" for name in asked]
    return "".join(f" {text}." for text in found), found


SOLVERS = {"mv": solve_mv, "vt": solve_vt, "cwe": solve_cwe, "babi": solve_babi}


@pytest.mark.parametrize("length", [64, 96, 384])
@pytest.mark.parametrize("task", data.TASKS)
def test_the_answer_follows_from_the_text(task, length):
    """A reader of the decoded prompt alone, with regular expressions, arrives at the answer and its
    references. An example is at most `length` long, with no room for another sentence."""
    for example in data.make_examples(task, 40, length, seed=length):
        answer, found = SOLVERS[task](*halves(example))
        assert TINY.decode(example.response) == answer
        assert example.response.index(EOS) == len(example.response) - 1
        assert sorted(example.references) == sorted(set(found))
        size = len(example.prompt) + len(example.response)
        assert length - len(TINY.pieces(data.FILLER[0])) < size <= length


@pytest.mark.parametrize("task", data.TASKS)
def test_needles_lie_anywhere_in_a_predictable_haystack(task):
    """No position is a shortcut to the needles, and the filler is three sentences in turn."""
    cycle = [text.strip(" .") for text in data.FILLER]
    hays = [halves(example)[0] for example in data.make_examples(task, 50, 384, 3)]
    places = [i / len(hay) for hay in hays for i, text in enumerate(hay) if text not in cycle]
    share = np.histogram(places, 4, (0, 1))[0] / len(places)
    assert np.abs(share - 0.25).max() < 0.08
    for hay in hays:
        filler = [cycle.index(text) for text in hay if text in cycle]
        assert {(after - before) % 3 for before, after in pairwise(filler)} == {1}


@pytest.mark.parametrize("task", data.TASKS)
def test_examples_depend_on_the_seed_alone(task):
    """Another seed or split has no example in common: the test set is never trained on."""
    assert data.make_examples(task, 20, 96, 5, 0.5) == data.make_examples(task, 20, 96, 5, 0.5)
    prompts = []
    for seed in (0, 1):
        for split in ("train", "held out", "test"):
            examples = data.make_examples(task, 50, 96, data.split_seed(seed, split))
            prompts += [tuple(example.prompt) for example in examples]
    assert len(set(prompts)) == 300


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("task", data.TASKS)
def test_noise_redraws_a_share_of_the_answers_words(task, noise):
    """Each answer word is redrawn within its class with this probability, so that 1/size of them
    stay all the same, and for each example by itself. Prompts, syntax, references remain clean."""
    clean, noisy = (data.make_examples(task, 400, 96, 8, share) for share in (0.0, noise))
    assert [e.prompt for e in clean] == [e.prompt for e in noisy]
    assert [e.references for e in clean] == [e.references for e in noisy]
    before, after = (np.array([e.response for e in examples]) for examples in (clean, noisy))
    fixed = np.ones_like(before, dtype=bool)
    for name in data.NOISE[task]:
        first, size = data.class_range(name)
        here = (before >= first) & (before < first + size)
        assert ((after[here] >= first) & (after[here] < first + size)).all()
        expected, n = noise * (1 - 1 / size), here.sum()
        error = abs((before != after)[here].mean() - expected)
        assert error <= 5 * (expected * (1 - expected) / n) ** 0.5
        fixed &= ~here
    assert (before == after)[fixed].all()


@pytest.mark.parametrize("questions", [1, 3])
def test_pretraining_masks_answers_alone_unless_whole(questions):
    """whole = 0: what stands between an " Answer:" and its EOS may be masked, with this EOS, and no
    padding. whole = 1: every token, as a real base has learnt to predict any text. A batch depends
    on seed and step alone: a resumed run needs no generator's state."""
    batch = data.pretraining_batch(0, 1, 16, 128, questions, open_all=0.0)
    assert batch.x0.shape[0] == 16
    assert batch.x0.shape[1] <= 128
    assert batch.attention_mask is None
    start = TINY.pieces(" Answer:")
    for row, maskable in zip(batch.x0.tolist(), batch.maskable.tolist()):
        inside, found = False, 0
        for i, token in enumerate(row):
            if row[max(0, i - len(start)) : i] == start:
                inside, found = True, found + 1
            assert maskable[i] == inside, f"token {i} of {TINY.decode(row)}"
            inside = inside and token != EOS
        assert 1 <= found <= questions
    assert data.pretraining_batch(0, 1, 8, 96, questions, open_all=1.0).maskable.all()
    for seed, step, same in ((0, 1, True), (0, 2, False), (1, 1, False)):
        again = data.pretraining_batch(seed, step, 16, 128, questions, open_all=0.0)
        assert torch.equal(again.x0, batch.x0) == same


def test_padding_is_a_target_and_the_prompt_never_is():
    """EOS pads are visible and maskable: the model learns to stop (asymmetric masking, Sec.
    2.1)."""
    batch = data.collate([Example([1, 2], [4, EOS]), Example([5], [6, 7, 8, EOS])])
    assert batch.x0.tolist() == [[1, 2, 4, EOS, EOS], [5, 6, 7, 8, EOS]]
    assert batch.maskable.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert batch.attention_mask is None


@pytest.mark.parametrize("task", data.TASKS)
def test_new_wording_asks_the_same_in_other_words(task):
    """Haystacks, answers and what is asked about stay; other words were never in pretraining."""
    old, new = (data.make_examples(task, 6, 96, 0, wording=wording) for wording in data.WORDINGS)
    assert [e.response for e in old] == [e.response for e in new]
    assert [e.references for e in old] == [e.references for e in new]
    common = {TINY.pieces(" " + word)[0] for word in data.OTHER.split()}
    for before, after in zip(old, new):
        assert len(before.prompt) == len(after.prompt)
        start = before.prompt.index(TINY.pieces(" Question")[0])
        assert before.prompt[:start] == after.prompt[:start]
        for one, other in zip(before.prompt[start:], after.prompt[start:]):
            assert (one != other) == (one in common)
        assert TINY.pieces(" Answer:")[0] not in after.prompt
