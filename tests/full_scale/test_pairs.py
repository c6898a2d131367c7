"""
test_pairs.py: the pairs to train on, their sources, and which of them share a batch. Everything
that is wrong with a file is found before any work begins, and said in one line with its place.
"""

import json
import random
import re
from dataclasses import replace
from itertools import pairwise

import huggingface_hub
import pytest
from backbones import TOKENIZER
from commands import PAIRS, jsonl

from data import Example
from full_scale.pairs import PADS, collate, length_grouped, read_data, split_pairs
from full_scale.tokenizer import load_tokenizer
from model import UserError

TEMPLATED = load_tokenizer(TOKENIZER)
PLAIN = load_tokenizer(TOKENIZER, plain=True)


def line(prompt="Say hi.", response="hi") -> str:
    return json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False)


ALPACA = [
    {"instruction": "Read.\n", "input": "\tA long text.", "output": " Done. ", "file": "x"},
    {"instruction": "Say hi.\n", "input": " ", "output": "\n hi \n"},
    {"instruction": "Say <|mask|>.", "output": "<|mask|>"},
    {"instruction": "Say nothing.", "input": "", "output": " "},
]
# Instruction, blank line, input, stripped; an input of blanks is none, and the record without an
# answer is passed over.
IN_PAIRS = [
    {"prompt": "Read.\n\nA long text.", "response": "Done."},
    {"prompt": "Say hi.", "response": "hi"},
    {"prompt": "Say <|mask|>.", "response": "<|mask|>"},
]


def test_a_good_file_is_read_in_order(tmp_path):
    """Without a template a response is closed by EOS. Empty lines are passed over, further keys and
    blanks kept; a JSON string may hold a Unicode line separator, which ends no line; a typed
    "<|mask|>" is ordinary text."""
    path = tmp_path / "pairs.jsonl"
    extra = json.dumps({"prompt": "p", "response": "r", "source": 3})
    lines = [line() + "\r", "", "   ", line("Γεια\u2028👋\x85", " <|mask|> "), extra]
    path.write_bytes("\n".join(lines).encode())
    pairs, dropped = read_data(str(path), PLAIN, 100)
    assert dropped == 0
    texts = [(PLAIN.decode(pair.prompt), PLAIN.decode(pair.response)) for pair in pairs]
    assert texts == [("Say hi.", "hi"), ("Γεια\u2028👋\x85", " <|mask|> "), ("p", "r")]
    eos = PLAIN.eos
    assert all(pair.response.index(eos) == len(pair.response) - 1 for pair in pairs)
    assert not any(PLAIN.mask in pair.prompt + pair.response for pair in pairs)


def test_pairs_of_an_alpaca_file_which_may_come_from_the_hub(tmp_path, monkeypatch):
    """NAME.json of OWNER/NAME, from wherever the hub's client puts it. A file of that name here
    goes before it; what ends in .json, or has no or two slashes, is never asked from the hub."""
    asked = []

    def download(repo, allow_patterns, repo_type) -> str:
        asked.append((repo, allow_patterns, repo_type))
        (tmp_path / "Long.json").write_text("\ufeff\n" + json.dumps(ALPACA, indent=2))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    pairs, _ = read_data("Some/Long", TEMPLATED, 1000)
    (tmp_path / "own.jsonl").write_text(jsonl(IN_PAIRS))
    assert pairs == read_data("own.jsonl", TEMPLATED, 1000)[0]
    assert pairs[0].prompt == TEMPLATED.encode_prompt(IN_PAIRS[0]["prompt"])
    assert pairs[0].response == [*TEMPLATED.encode("Done."), TEMPLATED.specials["<|role_end|>"]]
    (tmp_path / "Some").mkdir()
    (tmp_path / "Some" / "Long").write_text(jsonl(IN_PAIRS[:1]))
    assert len(read_data("Some/Long", TEMPLATED, 1000)[0]) == 1
    for source in ("Some/gone.json", "gone", "a/b/c"):
        with pytest.raises(UserError, match=f"cannot read --data {source}"):
            read_data(source, TEMPLATED, 1000)
    assert asked == [("Some/Long", ["Long.json"], "dataset")]


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path):
    """All of a conversation is counted, its template too, and may fill the length exactly."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(jsonl(PAIRS))
    pairs, _ = read_data(str(path), TEMPLATED, 1000)
    longest = sorted(len(pair.prompt) + len(pair.response) for pair in pairs)[11]
    kept = [pair for pair in pairs if len(pair.prompt) + len(pair.response) <= longest]
    assert 12 <= len(kept) < len(pairs) == 20
    assert read_data(str(path), TEMPLATED, longest) == (kept, 20 - len(kept))


# A tokenizer whose chat template refuses some texts.
REFUSING = "{% if 'forbidden' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
CHOOSY = replace(TEMPLATED, template=REFUSING + TEMPLATED.template)

# What stands in line 3 of a JSONL file, or is a whole file -> the place that is named.
BAD = {
    "{'prompt': 'a', 'response': 'b'}": ", line 3: ",
    "{" + '"a":[' * 100_000: ", line 3: ",  # nested without end
    '{"response": "b"}': ", line 3: ",
    '{"prompt": "a"}': ", line 3: ",
    '{"prompt": "a", "response": 3}': ", line 3: ",
    '["a", "b"]': ", line 3: ",
    line(prompt=""): ", line 3: ",
    line(response=" \n\t"): ", line 3: ",
    line(prompt="forbidden"): ", line 3: ",
    line(response="forbidden"): ", line 3: ",
    '{"prompt": "a", "response": "half a surrogate pair \\ud800"}': ", line 3: ",
    '[{"instruction": "a", "output": "b"}, {"output": "b"}]': ", record 2: ",
    '[{"instruction": "a", "output": 3}]': ", record 1: ",
    '[{"instruction": "a", "input": ["b"], "output": "c"}]': ", record 1: ",
    '["a"]': ", record 1: ",
    '[{"instruction": "a"': ": not valid JSON",
    "[]": " has not a single pair",
    "\n  \n": " has not a single pair",
    "\udcff": "",  # not UTF-8
    None: "",
}


@pytest.mark.parametrize(("content", "named"), BAD.items(), ids=range(len(BAD)))
def test_bad_input_is_named_by_file_and_place(tmp_path, content, named):
    """Lines are counted as an editor counts them, Alpaca's records from 1; a file may be missing,
    empty, or not UTF-8."""
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        text = f"{line()}\n\n{content}\n{line()}\n" if "line" in named else content
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(f"{path}{named}")) as caught:
        read_data(str(path), CHOOSY, 100)
    assert "\n" not in str(caught.value)


def test_padding_is_a_target_or_hidden():
    """pads="learn": visible and maskable, so that the model learns to stop; "ignore": neither. A
    prompt never is maskable, and each response's own EOS always is."""
    pairs = [Example([1], [4, 9]), Example([5], [6, 7, 8, 9])]
    learn, ignore = (collate(pairs, "cpu", 9, pads) for pads in PADS)
    assert learn.x0.tolist() == ignore.x0.tolist() == [[1, 4, 9, 9, 9], [5, 6, 7, 8, 9]]
    assert learn.maskable.int().tolist() == [[0, 1, 1, 1, 1]] * 2
    assert learn.attention_mask is None
    assert ignore.maskable.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert ignore.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_one_pair_in_twenty_is_held_out_and_a_single_one_is_in_both_parts():
    pairs = [Example([i], [9]) for i in range(40)]
    train_set, held_out = split_pairs(pairs)
    assert len(held_out) == 2
    assert sorted(train_set + held_out) == pairs
    assert split_pairs(pairs[:1]) == (pairs[:1], pairs[:1])


def test_length_grouping_saves_padding_and_does_not_sort_the_epoch():
    """Each pair is in one batch, and all batches but one are full. Lengths within a batch are
    alike, the batches come in no order of length, and other epochs and seeds mix other partners."""
    rng, partners = random.Random(0), []
    pairs = [Example([1] * rng.randrange(1000), [i]) for i in range(4001)]
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        batches = length_grouped(pairs, 8, seed, epoch)
        partners.append({frozenset(pair.response[0] for pair in batch) for batch in batches})
    assert partners[0] == partners[1]
    assert not partners[0] & (partners[2] | partners[3])
    assert sorted(pair.response[0] for batch in batches for pair in batch) == list(range(4001))
    assert sorted(len(batch) for batch in batches) == [1] + 500 * [8]
    longest = [max(len(pair.prompt) for pair in batch) for batch in batches]
    assert sum(8 * most for most in longest) < 1.03 * sum(len(pair.prompt) for pair in pairs)
    assert 0.4 < sum(a < b for a, b in pairwise(longest)) / len(longest) < 0.6
