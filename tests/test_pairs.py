"""The pairs that a real backbone is fine-tuned on, from each source, and the batches made of them."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import data
from data import Example
from model import UserError

CHECKPOINT = Path(__file__).parent / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def toy() -> data.Tokenizer:
    return data.load_tokenizer(CHECKPOINT)


# ---- pairs ---------------------------------------------------------------------------------------------------------------

ALPACA = [
    {"instruction": "Read.", "input": "A long text.", "output": "Done.", "file": "x"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
    {"instruction": "Say <|mask|>.", "output": "<|mask|>"},
    {"instruction": "Say nothing.", "input": "", "output": " "},
]
ALPACA_PAIRS = [("Read.\n\nA long text.", "Done."), ("Say hi.", "hi"), ("Say <|mask|>.", "<|mask|>")]


def examples_of(pairs: list[tuple[str, str]], tokenizer: data.Tokenizer) -> list[Example]:
    return [Example(tokenizer.encode_prompt(p), [*tokenizer.encode(r), tokenizer.eos]) for p, r in pairs]


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("\n\n".join(json.dumps({"prompt": p, "response": r}) for p, r in pairs), encoding="utf-8")
    return str(path)


def test_pairs_of_a_jsonl_file(tmp_path, toy):
    """Prompts through the template, responses closed by the backbone's EOS."""
    source = write_jsonl(tmp_path / "pairs.jsonl", ALPACA_PAIRS)
    assert data.read_pairs(source, toy, 1000) == (examples_of(ALPACA_PAIRS, toy), 0)


def test_pairs_of_a_longalpaca_file(tmp_path, toy):
    """Instruction, blank line, input; the instruction alone without an input; records without an answer are passed over."""
    path = tmp_path / "long.json"
    path.write_text("\ufeff\n" + json.dumps(ALPACA, indent=2), encoding="utf-8")
    assert data.read_pairs(str(path), toy, 1000) == (examples_of(ALPACA_PAIRS, toy), 0)


def test_pairs_of_a_hub_dataset(tmp_path, toy, monkeypatch):
    """<name>.json of the dataset repository, fetched by huggingface_hub."""
    asked = []

    def download(**wanted) -> str:
        asked.append(wanted)
        (tmp_path / "cached.json").write_text(json.dumps(ALPACA))
        return str(tmp_path / "cached.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert data.read_pairs("Yukang/LongAlpaca-12k", toy, 1000) == (examples_of(ALPACA_PAIRS, toy), 0)
    assert asked == [{"repo_id": "Yukang/LongAlpaca-12k", "filename": "LongAlpaca-12k.json", "repo_type": "dataset"}]


def test_a_file_goes_before_a_hub_dataset_of_its_name(tmp_path, toy, monkeypatch):
    """Nor is what ends in .json or .jsonl, or holds no or two slashes, ever asked from the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    (tmp_path / "Yukang").mkdir()
    write_jsonl(tmp_path / "Yukang" / "LongAlpaca-12k", ALPACA_PAIRS)
    assert len(data.read_pairs("Yukang/LongAlpaca-12k", toy, 1000)[0]) == 3
    for source in ("Yukang/gone.json", "Yukang/gone.jsonl", "gone", "a/b/c"):
        with pytest.raises(UserError, match="cannot read --data " + source):
            data.read_pairs(source, toy, 1000)


def hub_error(kind: type) -> Exception:
    """An error of huggingface_hub without the response that its constructor asks for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (hub_error(errors.GatedRepoError), "gated"),
        (hub_error(errors.RepositoryNotFoundError), "no such dataset"),
        (hub_error(errors.LocalEntryNotFoundError), "cannot be reached"),
        (hub_error(errors.EntryNotFoundError), "has no file LongAlpaca-12k.json"),
        (ConnectionError("no route\nto host"), "download failed .ConnectionError"),
        (ImportError("huggingface_hub"), "pip install huggingface_hub"),
    ],
)
def test_a_failed_download_says_what_to_fetch(toy, monkeypatch, error, reason):
    """One line: why, which file to fetch by hand, and how to pass it."""

    def download(**_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=reason) as caught:
        data.read_pairs("Yukang/LongAlpaca-12k", toy, 1000)
    message = str(caught.value)
    assert "https://huggingface.co/datasets/Yukang/LongAlpaca-12k/resolve/main/LongAlpaca-12k.json" in message
    assert "--data LongAlpaca-12k.json" in message
    assert "\n" not in message


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path, toy):
    """prompt + response + EOS may fill the limit exactly; nothing left is an error."""
    pairs = [("a", "b " * 5), ("a", "b " * 50), ("a", "b")]
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    examples = examples_of(pairs, toy)
    sizes = [len(e.prompt) + len(e.response) for e in examples]
    assert data.read_pairs(source, toy, sizes[1]) == (examples, 0)
    assert data.read_pairs(source, toy, sizes[1] - 1) == ([examples[0], examples[2]], 1)
    assert data.read_pairs(source, toy, sizes[2]) == ([examples[2]], 2)
    with pytest.raises(UserError, match="none of its 3 fits"):
        data.read_pairs(source, toy, sizes[2] - 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}', "line 2: each line must be"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}', "line 2: the response is empty"),
        ('{"prompt": "a", "response": "b"}\n{', "line 2: not valid JSON"),
        ('[{"instruction": "a", "output": "b"}, {"output": "b"}]', "record 2: must be"),
        ('[{"instruction": "a", "output": 3}]', "record 1: must be"),
        ('[{"instruction": "a", "input": ["b"], "output": "c"}]', "record 1: must be"),
        ('["a"]', "record 1: must be"),
        ('[{"instruction": "a"', "not valid JSON"),
        ("[]", "no examples"),
        ("", "no examples"),
    ],
)
def test_a_bad_record_is_named(tmp_path, toy, content, reason):
    """File, and line or record."""
    path = tmp_path / "pairs.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + reason) as caught:
        data.read_pairs(str(path), toy, 1000)
    assert "\n" not in str(caught.value)


# ---- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(1, 4), (400, 4), (403, 4), (37, 1), (5, 8)])
def test_length_grouping_uses_each_index_once(n, batch):
    """All batches are full but one at most."""
    rng = random.Random(n)
    batches = data.length_grouped([rng.randrange(1000) for _ in range(n)], batch, 0, 0)
    assert sorted(i for found in batches for i in found) == list(range(n))
    assert sorted(map(len, batches)) == sorted([batch] * (n // batch) + [n % batch] * (n % batch > 0))


def test_length_grouping_is_a_function_of_seed_and_epoch():
    """A resumed run draws the same batches; another seed or epoch, or other lengths, others."""
    lengths = [i * 7919 % 1000 for i in range(1000)]
    drawn = [data.length_grouped(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] != drawn[3] != drawn[0]
    assert drawn[0] != data.length_grouped(lengths[::-1], 8, 0, 0)


def test_length_grouping_saves_padding_and_does_not_sort_the_epoch():
    """Lengths within a batch are alike, the batches come in no order of length, and epochs mix partners."""
    rng = random.Random(0)
    lengths = [rng.randrange(10000) for _ in range(4000)]
    batches = data.length_grouped(lengths, 8, 0, 0)
    padding = sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches) / sum(lengths)
    assert padding < 0.03
    tops = [max(lengths[i] for i in b) for b in batches]
    assert 0.4 < sum(a < b for a, b in pairwise(tops)) / len(tops) < 0.6
    other = {frozenset(b) for b in data.length_grouped(lengths, 8, 0, 1)}
    assert not other & {frozenset(b) for b in batches}


@pytest.mark.parametrize("pads", data.PADS)
def test_collate_pads_with_the_id_it_is_given(pads):
    """A backbone's EOS in place of the tiny one, and nothing else changes."""
    examples = [Example([1, 2], [3, 9]), Example([4], [9])]
    tiny, other = data.collate(examples, pads=pads), data.collate(examples, pads=pads, eos=9)
    assert other.x0.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert tiny.x0.tolist() == [[1, 2, 3, 9], [4, 9, data.EOS, data.EOS]]
    assert other.maskable.tolist() == tiny.maskable.tolist()
