"""The tokenizer, the four reading tasks, the batches and the user's own JSONL: what the rest of the program relies on."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

import data
import eval_niah
from data import EOS, MASK, TOKENIZER, Example
from model import UserError

LENGTHS = (64, 96, 384)
TASK_NAMES = tuple(data.TASKS)


# ---- tokenizer ---------------------------------------------------------------------------------------------------------


def random_texts(n: int) -> list[str]:
    rng = random.Random(7)
    alphabets = (range(32, 127), range(0, 256), (*range(0x370, 0x3FF), *range(0x4E00, 0x4E50), *range(0x1F600, 0x1F640)))
    return ["".join(chr(rng.choice(rng.choice(alphabets))) for _ in range(rng.randrange(60))) for _ in range(n)]


TEXTS = [
    "",
    " ",
    "river holds 47.",
    " river holds 47. Question: what does river hold? Answer:",
    "  two  spaces\tand a tab\r\nand\u00a0a hard space\n\n\n",
    "naïve façade, Ελληνικά, русский, 漢字かな, العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é \u200b\ufeff \u2028\u2029\x85\x00\x7f",
    "<|mask|>",
    "<|endoftext|> <|mask|><|endoftext|>",
    "rivers riverriver Xriver 4747 4 7 ... ?!",
]


@pytest.mark.parametrize("text", [*TEXTS, *random_texts(30)])
def test_any_text_round_trips(text):
    """decode(encode(text)) == text for whatever is typed: 256 byte tokens stand below the word list."""
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < EOS for i in ids)


@pytest.mark.parametrize("text", ["<|mask|>", "a<|mask|>b", " <|endoftext|>", "<|endoftext|><|mask|>"])
def test_a_typed_special_token_is_ordinary_text(text):
    """Text from a user never yields the id of [MASK] or EOS: only the program itself puts these ids in place."""
    example = data.encode_pair({"prompt": text, "response": text}, "here", 100)
    *response, end = example.response
    assert end == EOS
    assert not {EOS, MASK} & {*example.prompt, *response}
    assert TOKENIZER.decode(response) == " " + text.removeprefix(" ")


def test_a_users_text_begins_like_the_training_text():
    """All training text begins with a space, and " river" is one token where "river" is five bytes: a space is put in front,
    unless there is one (or the text is empty, which is for the caller to refuse)."""
    assert data.TINY.encode("river holds") == data.TINY.encode(" river holds") == TOKENIZER.encode_ordinary(" river holds")
    assert data.TINY.encode("") == []


def test_special_ids_are_the_last_two_of_the_vocabulary():
    """Ids run 0 .. VOCAB_SIZE - 1 without a gap; the embedding has a row for each and no other."""
    ordinary = 256 + len(data.WORDS)
    assert ordinary == EOS
    assert [EOS + 1, EOS + 2] == [MASK, data.VOCAB_SIZE]


@pytest.mark.parametrize("name", [*data.CLASSES, "units"])
def test_each_word_class_is_one_run_of_ids(name):
    """add_noise draws "another word of this class" as first + random(size): every id in that run must be such a word."""
    first, size = data.class_range(name)
    texts = [TOKENIZER.decode([i]) for i in range(first, first + size)]
    assert texts == (list("0123456789") if name == "units" else [" " + word for word in data.CLASSES[name]])


def test_each_listed_word_is_one_token():
    """The tasks glue ids together by position, which is only right if every listed word is a single token."""
    assert len(set(data.WORDS)) == len(data.WORDS)
    assert [TOKENIZER.encode_ordinary(word) for word in data.WORDS] == [[256 + i] for i in range(len(data.WORDS))]


# ---- tasks: the answer, derived again from the text alone ----------------------------------------------------------------


def halves(example: Example) -> tuple[list[str], str]:
    """The sentences before the question, without their full stops, and the question."""
    hay, question = TOKENIZER.decode(example.prompt).split(" Question: ")
    assert hay.endswith(".")
    return [part.strip() for part in hay.split(".")[:-1]], question


def solve_mv(sentences: list[str], question: str) -> tuple[str, list[str]]:
    (key,) = re.fullmatch(r"what does (\w+) hold\? Answer:", question).groups()
    facts = [m.groups() for m in (re.fullmatch(r"(\w+) holds (\d\d)", s) for s in sentences) if m]
    assert sorted(Counter(name for name, _ in facts).values()) == [2, 2, 2]
    values = [value for name, value in facts if name == key]
    assert len(values) == 2
    return "".join(f" {key} holds {value}." for value in values), values


def solve_vt(sentences: list[str], question: str) -> tuple[str, list[str]]:
    (value,) = re.fullmatch(r"which = (\d\d)\? Answer:", question).groups()
    facts = [m.groups() for m in (re.fullmatch(r"(\w+) = (\w+)", s) for s in sentences) if m]
    assert len(facts) == len({name for name, _ in facts}) == 6
    known, chain, text = {}, [], ""
    for name, source in facts:  # a variable is defined before it is used, so one pass in reading order resolves all
        known[name] = source if source.isdigit() else known[source]
        if known[name] == value:
            chain.append(name)
            text += f" {name} = {source}."
    assert len(chain) == 3
    return text, chain


def solve_cwe(sentences: list[str], question: str) -> tuple[str, list[str]]:
    assert question == "which words are common? Answer:"
    counts = Counter(s for s in sentences if " " not in s)  # in order of first appearance
    assert sorted(counts.values()) == [1] * 8 + [4] * 2
    common = [word for word, count in counts.items() if count == 4]
    return f" {common[0]} {common[1]}.", common


def solve_babi(sentences: list[str], question: str) -> tuple[str, list[str]]:
    asked = re.fullmatch(r"where are (\w+) and (\w+)\? Answer:", question).groups()
    moves = [m.groups() for m in (re.fullmatch(r"(\w+) went (\w+)", s) for s in sentences) if m]
    assert sorted(Counter(name for name, _ in moves).values()) == [2, 2, 2, 2]
    last = dict(moves)  # a later move overwrites an earlier one
    found = [f"{name} went {last[name]}" for name in asked]
    return "".join(f" {text}." for text in found), found


SOLVERS = {"mv": solve_mv, "vt": solve_vt, "cwe": solve_cwe, "babi": solve_babi}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_answer_follows_from_the_text(task, length):
    """A reader with regular expressions, who sees the decoded prompt alone, arrives at the answer and its references."""
    for example in data.make_examples(task, 40, length, seed=length):
        answer, found = SOLVERS[task](*halves(example))
        assert TOKENIZER.decode(example.response[:-1]) == answer
        assert example.response[-1] == EOS
        assert sorted(example.references) == sorted(set(found))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_length_is_kept_and_used(task, length):
    """An example never exceeds the requested length, and the filler leaves less than one sentence of it unused."""
    sizes = {len(example.prompt) + len(example.response) for example in data.make_examples(task, 20, length, seed=1)}
    (size,) = sizes  # all of one task and length are equally long, so that they batch without padding
    assert length - len(TOKENIZER.encode_ordinary(data.FILLER[0])) < size <= length


@pytest.mark.parametrize("task", TASK_NAMES)
def test_filler_is_a_fixed_cycle(task):
    """The filler must be predictable (three sentences in turn): else writing a prompt into the weights writes noise."""
    cycle = [text.strip(" .") for text in data.FILLER]
    starts = set()
    for example in data.make_examples(task, 10, 384, seed=2):
        filler = [cycle.index(s) for s in halves(example)[0] if s in cycle]
        assert len(filler) > 30
        assert {(after - before) % 3 for before, after in pairwise(filler)} == {1}
        starts.add(filler[0])
    assert len(starts) == 1


@pytest.mark.parametrize("task", TASK_NAMES)
def test_facts_lie_anywhere_in_the_haystack(task):
    """Needles are spread over the whole text: no position is a shortcut to them."""
    cycle = [text.strip(" .") for text in data.FILLER]
    hays = [halves(example)[0] for example in data.make_examples(task, 50, 384, 3)]
    places = [i / len(hay) for hay in hays for i, text in enumerate(hay) if text not in cycle]
    share = np.histogram(places, 4, (0, 1))[0] / len(places)
    assert np.abs(share - 0.25).max() < 0.08


@pytest.mark.parametrize("task", TASK_NAMES)
def test_examples_depend_on_the_seed_alone(task):
    """Same seed, same examples; another seed or split, none in common: the test set is never trained on."""

    def prompts(seed: int) -> set:
        return {tuple(example.prompt) for example in data.make_examples(task, 50, 96, seed)}

    assert data.make_examples(task, 20, 96, 5, 0.5) == data.make_examples(task, 20, 96, 5, 0.5)
    sets = [prompts(data.split_seed(seed, split)) for seed in (0, 1) for split in ("train", "held out", "test")]
    assert all(len(found) == 50 for found in sets)
    assert sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_oracle_scores_one_and_silence_zero(task):
    """The clean answer contains every reference, an empty answer none, half of the answer a part."""
    for example in data.make_examples(task, 30, 96, 6):
        answer = data.decode(example.response)
        assert eval_niah.string_match_all(example.references, answer) == 1
        assert eval_niah.string_match_all(example.references, "") == 0
        assert 0 < eval_niah.string_match_all(example.references, re.match(r" \w+( (holds|went|=) \w+)?", answer)[0]) < 1


def test_score_is_the_share_of_references_found():
    """RULER's string_match_all, by hand: two of four references stand in the output."""
    assert eval_niah.string_match_all(("12", "34", "56", "78"), " river holds 34. river holds 78.") == 0.5


def test_decode_stops_at_the_first_end_of_text():
    """What a model writes after its EOS is not its answer."""
    assert data.decode([*TOKENIZER.encode_ordinary("yes"), EOS, *TOKENIZER.encode_ordinary("no"), EOS]) == "yes"
    assert data.decode(TOKENIZER.encode_ordinary("no end")) == "no end"


# ---- noise -------------------------------------------------------------------------------------------------------------


def in_class(ids: np.ndarray, names) -> np.ndarray:
    return np.any([(ids >= first) & (ids < first + size) for first, size in map(data.class_range, names)], axis=0)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_zero_noise_changes_nothing(task):
    """--noise 0 is the clean fine-tuning set, token by token."""
    response = np.array([example.response for example in data.make_examples(task, 20, 96, 0)])
    assert (data.add_noise(task, response, 0.0, np.random.default_rng(0)) == response).all()


@pytest.mark.parametrize("task", TASK_NAMES)
def test_full_noise_redraws_the_words_of_the_answer_alone(task):
    """Noise 1 redraws each answer word within its class (so 1/size of them stay); prompt, syntax, references are clean."""
    clean, noisy = (data.make_examples(task, 400, 96, 8, noise) for noise in (0.0, 1.0))
    assert [(e.prompt, e.references) for e in clean] == [(e.prompt, e.references) for e in noisy]
    before, after = (np.array([e.response for e in examples]) for examples in (clean, noisy))
    words = in_class(before, data.NOISE[task])
    assert (before == after)[~words].all()
    assert words.any(axis=1).all()
    for name in data.NOISE[task]:
        here, size = in_class(before, [name]), data.class_range(name)[1]
        assert in_class(after[here], [name]).all()
        changed = (before != after)[here].mean()
        assert abs(changed - (1 - 1 / size)) < 5 * (1 / size * (1 - 1 / size) / here.sum()) ** 0.5
        assert len(np.unique(after[here])) == size


def test_half_noise_redraws_half_of_the_words():
    """The probability is per word, not per example."""
    clean, noisy = (data.make_examples("babi", 500, 96, 9, noise) for noise in (0.0, 0.5))
    before, after = (np.array([e.response for e in examples]) for examples in (clean, noisy))
    size = data.class_range("place")[1]
    assert abs((before != after)[in_class(before, ["place"])].mean() - 0.5 * (1 - 1 / size)) < 0.06


def test_noise_is_specific_to_the_sample():
    """Two examples with one and the same answer get different noise: no rule but the example itself explains it."""
    response = np.repeat([data.make_examples("mv", 1, 96, 0)[0].response], 20, axis=0)
    assert len(np.unique(data.add_noise("mv", response, 1.0, np.random.default_rng(0)), axis=0)) > 15


# ---- batches -------------------------------------------------------------------------------------------------------------


def places_of_answers(row: list[int]) -> list[bool]:
    """From behind " Answer:" to the next EOS, read off the ids."""
    start, inside, found = TOKENIZER.encode_ordinary(" Answer:"), False, []
    for i, token in enumerate(row):
        inside = inside or row[max(0, i - 2) : i] == start
        found.append(inside)
        inside = inside and token != EOS
    return found


@pytest.mark.parametrize("questions", [1, 3])
def test_pretraining_masks_answers_alone_unless_whole(questions):
    """whole = 0: exactly the tokens behind each " Answer:" up to its EOS can be masked, and no padding."""
    batch = data.pretraining_batch(0, 1, 16, 128, questions, whole=0.0)
    assert batch.x0.shape == batch.maskable.shape
    assert len(batch.x0) == 16
    assert batch.x0.shape[1] <= 128
    assert (batch.x0.dtype, batch.maskable.dtype, batch.attention_mask) == (torch.int64, torch.bool, None)
    assert batch.maskable.tolist() == [places_of_answers(row) for row in batch.x0.tolist()]
    assert batch.maskable.any(dim=1).all()


def test_pretraining_whole_makes_every_token_maskable():
    """whole = 1: the haystack is predicted too, as a real base model has learnt to."""
    assert data.pretraining_batch(0, 1, 8, 96, 3, whole=1.0).maskable.all()


def test_pretraining_batches_are_fresh_and_reproducible():
    """The batch is a function of (seed, step): a resumed run needs no generator state."""
    x0 = [data.pretraining_batch(seed, step, 8, 96, 1, 0.3).x0 for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(x0[0], x0[1])
    assert not torch.equal(x0[0], x0[2])
    assert not torch.equal(x0[0], x0[3])


PAIRS = [Example([1, 2, 3], [4, EOS]), Example([5], [6, 7, 8, 9, EOS]), Example([], [4, EOS])]


def test_collate_pads_with_targets_by_default():
    """pads="learn": EOS padding is visible and maskable, so that the model learns to stop; the prompt never is maskable."""
    batch = data.collate(PAIRS)
    assert batch.x0.tolist() == [[1, 2, 3, 4, EOS, EOS], [5, 6, 7, 8, 9, EOS], [4, EOS, EOS, EOS, EOS, EOS]]
    assert batch.maskable.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch.attention_mask is None


def test_collate_can_hide_the_padding():
    """pads="ignore": padding is neither a target nor visible; the response's own EOS stays both."""
    batch = data.collate(PAIRS, pads="ignore")
    assert batch.x0.tolist() == data.collate(PAIRS).x0.tolist()
    assert batch.maskable.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]


def test_collated_prompts_are_never_maskable():
    """Asymmetric masking on the real tasks: what can be masked decodes to the answers, padding aside."""
    examples = [data.make_examples(task, 1, 96, 0)[0] for task in TASK_NAMES]
    for pads in data.PADS:
        batch = data.collate(examples, pads=pads)
        for row, maskable, example in zip(batch.x0, batch.maskable, examples):
            hidden = row[maskable].tolist()
            assert hidden[: len(example.response)] == example.response
            assert set(hidden[len(example.response) :]) <= {EOS}
            assert row[~maskable].tolist()[: len(example.prompt)] == example.prompt


# ---- the user's own data -------------------------------------------------------------------------------------------------


def line(prompt="Say hi.", response="hi") -> str:
    return json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False)


def test_a_good_file_is_read_in_order(tmp_path):
    """Pairs in file order, responses closed by EOS, empty lines passed over, further keys allowed."""
    path = tmp_path / "pairs.jsonl"
    extra = json.dumps({"prompt": "p", "response": "r", "source": 3})
    path.write_bytes(f"{line()}\r\n\n   \n{line('Γεια 👋', ' <|mask|> ')}\n{extra}".encode())
    pairs = data.read_jsonl(path, 100)
    assert [(TOKENIZER.decode(e.prompt), TOKENIZER.decode(e.response)) for e in pairs] == [
        (" Say hi.", " hi<|endoftext|>"),
        (" Γεια 👋", " <|mask|> <|endoftext|>"),
        (" p", " r<|endoftext|>"),
    ]
    assert all(e.response[-1] == EOS and MASK not in e.response and EOS not in e.response[:-1] for e in pairs)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_jsonl_line(tmp_path, separator):
    """JSON strings may hold Unicode line separators as they are; they are text, not the end of the record."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(line(f"a{separator}b") + "\n", encoding="utf-8", newline="")
    (pair,) = data.read_jsonl(path, 100)
    assert TOKENIZER.decode(pair.prompt) == f" a{separator}b"


BAD_LINES = {
    "not JSON": ("{'prompt': 'a', 'response': 'b'}", "not valid JSON"),
    "cut short": (line()[:-4], "not valid JSON"),
    "missing prompt": ('{"response": "b"}', "prompt"),
    "missing response": ('{"prompt": "a"}', "response"),
    "not a string": ('{"prompt": "a", "response": 3}', "string"),
    "null": ('{"prompt": null, "response": "b"}', "string"),
    "not an object": ('["a", "b"]', "prompt"),
    "empty response": (line(response=""), "empty"),
    "blank response": (line(response=" \n\t"), "empty"),
    "too long": (line(prompt="x" * 30), "31 + 4 tokens exceed --max-length 20"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, name):
    """The message says where (file, line number as an editor counts) and what, in one line."""
    bad, reason = BAD_LINES[name]
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{line()}\n\n{bad}\n{line()}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        data.read_jsonl(path, 20)
    message = str(caught.value)
    assert f"{path}, line 3" in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [None, b"", b"\n  \n", line().encode() + b"\n\xff\xfe\n", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    """Missing, empty, blank, not UTF-8, or a folder: one line with the file's name."""
    path = tmp_path / "pairs.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        data.read_jsonl(path, 20)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limit_counts_the_closing_token():
    """prompt + response + EOS may fill --max-length exactly; one token more is refused."""
    record = {"prompt": " x", "response": " y"}
    assert len(data.encode_pair(record, "here", 5).response) == 3
    with pytest.raises(UserError, match="exceed --max-length 4"):
        data.encode_pair(record, "here", 4)


# ---- fingerprint ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_every_change_of_the_data(monkeypatch):
    """A base trained on other data must not be reused: filler, a task or a word list changed -> another fingerprint."""
    found = {data.fingerprint()}
    assert found == {data.fingerprint()}
    with monkeypatch.context() as patch:
        patch.setattr(data, "FILLER", data.FILLER[::-1])
        found.add(data.fingerprint())
    for task in TASK_NAMES:
        with monkeypatch.context() as patch:
            drawn = data.TASKS[task]
            patch.setitem(data.TASKS, task, lambda rng, n, drawn=drawn: drawn(np.random.default_rng(1), n))
            found.add(data.fingerprint())
    assert len(found) == 2 + len(TASK_NAMES)
