"""
test_benchmark.py: `eval_niah.py --backbone` from end to end on toys. Each row answers with its own
weights, each flag does what it says, an answer costs what its schedule says, and who knows the
answers gets 1 through the program's own questions, decoding and rules.
"""

import contextlib
import io
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from backbones import TOKENIZER
from commands import contents, questions, results
from toys import ESSAY, METHODS, ONE, answers_of, ask, predictions, settings_of

from eval_niah import matching
from full_scale import backbone, benchmark
from full_scale.drafts import Style
from full_scale.prompts import BENCHMARKS, make_question
from full_scale.report import BIAS, title
from full_scale.samplers import rounded_schedule
from full_scale.tokenizer import load_tokenizer

PLAIN = load_tokenizer(TOKENIZER, plain=True)
STYLE = Style(lambda text, prefix: PLAIN.encode(text + prefix), qa=questions())


FOUR = (  # rows from two adapters
    "--adapter mdlm={}/mdlm {}/memdlm --memory --show --steps 2 --samples 2 --seed 3 "
    "--tasks niah_single_1 babilong_qa1 --lengths 660 700 "
    "--exposure-bias --data {}/few.jsonl --bias-steps 3 --max-length 19"
)
CELLS = [(task, length) for length in (660, 700) for task in ("niah_single_1", "babilong_qa1")]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """What this command leaves, and what it prints (printed.txt). Nobody writes into it."""
    out, printed = tmp_path_factory.mktemp("eval") / "table", io.StringIO()
    with contextlib.redirect_stdout(printed):
        ask(out, FOUR, draw=True)
    (out / "printed.txt").write_text(printed.getvalue())
    return out


def test_table_has_a_line_for_each_row_and_cell(table):
    """In the paper's order and by the paper's names."""
    found = [(one["task"], one["length"], one["method"]) for one in results(table)["niah"]]
    assert found == [(*cell, method) for cell in CELLS for method in METHODS]
    text = (table / "table.md").read_text()
    for task, length in CELLS:
        for method in METHODS:
            assert f"\n| {title(method)} | {task} | {length} | 2 | " in text
    assert text.count(" | 2 | 3 | cpu | float32 |") == 16, "steps, seed, device and dtype"
    assert text.count("] (harness 0.000) | ") == 8, "by the other rule"
    assert text.strip() in (table / "printed.txt").read_text()
    pictures = {name for name, content in contents(table).items() if content[:4] == b"\x89PNG"}
    assert pictures == {"niah.png", "depth.png", "exposure_bias.png"}


def test_adapters_and_memory_each_change_the_answers(table):
    """One adapter was named, the other one is told by its training.json. The memory is that of the
    training, and the settings say so."""
    assert len({tuple(predictions(table, method)) for method in METHODS}) == 4
    settings = settings_of(table)
    adapters = {settings[method].get("adapter_model.safetensors") for method in METHODS}
    assert len(adapters) == 3
    assert ["write rule" in settings[method] for method in METHODS] == [False] * 3 + [True]
    names = ("rule", "anchor_ratio", "passes", "rank", "lr")
    written = [settings[METHODS[3]][f"write {name}"] for name in names]
    assert written == ["paper", 0.2, 1, 32, 0.1]


def test_show_prints_the_first_prompt_of_each_cell_as_the_model_reads_it(table):
    printed = (table / "printed.txt").read_text()
    for task, length in CELLS:
        question = make_question(task, 0, length, 3, STYLE)
        size = f"{len(question.prompt)} tokens, {question.tokens} to generate"
        answer = f"a right answer contains {question.references[0]}"
        assert f"---- {task} {length}: {size}, {answer}\n{question.text}\n\n" in printed
    assert printed.count("---- ") == 4
    assert "exposure bias on 2 of 4 pairs; 1 longer ones left out" in printed


def test_exposure_bias_is_the_mean_over_pairs_over_the_loss_without_memory(table):
    """The static losses of a row's own checkpoint without a memory are the denominator. Where all
    is masked, static and sequential states are the same, and R_EB is 1."""
    records, walks = results(table)["exposure_bias"], {}
    for method in METHODS:
        answers = answers_of(table, method=method, task=BIAS)
        walks[method] = np.mean([answer["walk"] for answer in answers], axis=0)  # (steps, 3)
        base = walks["memdlm_train" if method == METHODS[3] else method][:, 1]
        expected = np.column_stack([walks[method], walks[method][:, 2] / base])
        names = ("mask_ratio", "static", "sequential", "ratio")
        found = [[one[name] for name in names] for one in matching(records, method=method)]
        np.testing.assert_allclose(found, expected)
        np.testing.assert_allclose(expected[:, 0], [1, 2 / 3, 1 / 3])
    assert [one["ratio"] for one in matching(records, mask_ratio=1)[:3]] == [1, 1, 1]
    assert len({one["static"] for one in records}) == 12, "each row has losses of its own"


def test_rows_share_static_masks_and_no_memory_sees_a_response(tmp_path, monkeypatch):
    """Masks and draws go by seed and index. What is written into weights is the prompt alone."""
    spies = []
    for name in ("exposure_walk", "write_prompt"):
        spies.append(mock.Mock(wraps=getattr(benchmark, name)))
        monkeypatch.setattr(benchmark, name, spies[-1])
    flags = "--memory --exposure-bias --data {}/few.jsonl --bias-steps 2 --samples 2 --seed 4"
    ask(tmp_path, flags)
    walked, written = ([call.args for call in spy.call_args_list] for spy in spies)
    orders = [order.tolist() for _, _, _, order, *_ in walked]
    assert orders[:2] == orders[2:]
    prompts = [PLAIN.encode_prompt(f"Who is {i}?") for i in (0, 1)]
    assert [one.tolist() for _, one, *_ in written] == [[prompt] for prompt in prompts]
    assert [(seed, numbers) for *_, seed, numbers in written] == [(4, [0]), (4, [1])]


def test_one_model_is_open_at_a_time_and_only_where_something_is_left_to_do(tmp_path, monkeypatch):
    """A backbone of 8 billion weights leaves no room for another one. A larger --samples keeps what
    is there, and ends with what asking at once gives: an answer depends on its question alone."""
    alive, load = [], backbone.load_backbone

    def loading(*arguments):
        assert all(reference() is None for reference in alive), "two models at once"
        model = load(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(backbone, "load_backbone", loading)
    flags = f"{ONE} --adapter {{}}/mdlm {{}}/memdlm --memory --samples"
    out = ask(tmp_path / "eval", f"{flags} 3")
    assert len(alive) == 3, "four rows, three checkpoints"
    before = contents(out)
    ask(out, f"{flags} 2")
    assert {one["n"] for one in results(out)["niah"]} == {2}
    ask(out, f"{flags} 3")
    assert (len(alive), contents(out)) == (3, before), "asked again"
    ask(out, f"{flags} 4")
    assert (out / "predictions.jsonl").read_bytes().startswith(before["predictions.jsonl"])
    assert results(out) == results(ask(tmp_path / "at once", f"{flags} 4"))


def test_sweep_of_anchor_ratios_has_a_row_for_each(tmp_path):
    """Fig. 8, drawn, here for an adapter that was trained without a memory. Ratios that look alike
    are two rows; one named twice is one; and a row is the same as if it had been asked alone."""
    flags = f"{ONE} --adapter {{}}/mdlm --memory --anchor-ratio"
    out = ask(tmp_path / "eval", f"{flags} 0.1 0.6 0.6000001 0.1", draw=True)
    rows = {f"mdlm_inference@{ratio}": ratio for ratio in (0.1, 0.6, 0.6000001)}
    assert [one["method"] for one in results(out)["niah"]] == ["base", "mdlm", *rows]
    assert all(settings_of(out)[row]["write anchor_ratio"] == rows[row] for row in rows)
    low, high, _ = rows
    assert len({tuple(predictions(out, method)) for method in ("mdlm", low, high)}) == 3
    assert {"anchor_ratio.png", "niah.png"} <= contents(out).keys()
    alone = ask(tmp_path / "alone", f"{flags} 0.6")
    assert predictions(alone, "mdlm_inference") == predictions(out, high)


@pytest.fixture
def passes(monkeypatch) -> tuple[list, list]:
    """What models are asked: the ids that they read in each forward pass, and at how many places
    each call of the head is made."""
    read, heads, load = [], [], backbone.load_backbone

    def loading(*arguments):
        model = load(*arguments)
        model.embedding.register_forward_hook(lambda _, given, out: read.extend(given[0].tolist()))
        model.output.register_forward_hook(lambda _, given, out: heads.append(len(given[0])))
        return model

    monkeypatch.setattr(backbone, "load_backbone", loading)
    return read, heads


def chat(text: str, prefix: str) -> list[int]:
    """The question is the user's message; the prefix begins the assistant's."""
    tokenizer = load_tokenizer(TOKENIZER)
    return tokenizer.encode_prompt(text) + tokenizer.encode(prefix.strip())


ASKED = {
    "--seed 5 --tasks niah_single_2 --lengths 330": {"seed": 5},
    "--tasks ruler_vt --lengths 900 --protocol harness": {"protocol": "harness"},
    "--tasks niah_single_2 --lengths 500 --haystack {}/essay.txt": {"haystack": ESSAY},
    "--tasks babilong_qa4 --lengths 480 --haystack {}/essay.txt": {"haystack": ESSAY},
    "--tasks niah_single_1 --lengths 440 --chat": {"encode": chat},
}


@pytest.mark.parametrize("flags", ASKED)
def test_prompts_are_those_of_the_flags(tmp_path, passes, flags):
    """Token by token, and every flag makes other ones."""
    words, changes = flags.split(), dict(ASKED[flags])
    task, length = words[words.index("--tasks") + 1], int(words[words.index("--lengths") + 1])
    seed = changes.pop("seed", 0)
    wanted = make_question(task, 0, length, seed, STYLE._replace(**changes)).prompt
    out = ask(tmp_path, f"{flags} --samples 1 --steps 1")
    [canvas], _ = passes  # one prompt at a time
    assert canvas[: answers_of(out)[0]["tokens"]] == wanted
    assert wanted != make_question(task, 0, length, 0, STYLE).prompt


@pytest.mark.parametrize(
    "flags", ["--write surprise", "--write-lr 1", "--write-rank 2", "--write-passes 2"]
)
def test_flags_of_writing_change_the_row_with_a_memory_alone(tmp_path, flags):
    plain = ask(tmp_path / "plain", f"{ONE} --memory")
    other = ask(tmp_path / "other", f"{ONE} --memory {flags}")
    assert predictions(plain, "base") == predictions(other, "base")
    assert predictions(plain, "base_inference") != predictions(other, "base_inference")


NEEDLE, STORY = "--tasks niah_single_1 --lengths 330", "--tasks babilong_qa1 --lengths 660"
SCHEDULES = {  # tokens that are committed in each pass: a needle has 128 to answer, BABILong 20
    f"{NEEDLE} --steps 8": [16] * 8,
    f"{NEEDLE} --threshold 0": [128],
    f"{NEEDLE} --steps 48 --schedule dllm": rounded_schedule(128, 48),
    STORY: [1] * 20,
    f"{STORY} --steps 64": [1] * 20,
}


@pytest.mark.parametrize("flags", SCHEDULES)
def test_answer_takes_the_passes_of_its_schedule(tmp_path, passes, flags):
    """And each asks the head at the masked places alone: at 126,464 words and 8,192 places it would
    otherwise cost more than the model."""
    quotas, (read, heads) = SCHEDULES[flags], passes
    out = ask(tmp_path, f"{flags} --samples 1")
    assert heads == [sum(quotas[i:]) for i in range(len(quotas))]
    assert answers_of(out)[0]["steps"] == len(read) == len(quotas)


def test_who_knows_the_answer_gets_1(tmp_path, monkeypatch):
    """On every task, through the program's own questions, decoding and rules, with as many tokens
    as a task leaves for its answer. That who does not know gets 0, test_scoring.py shows."""
    answers = {}
    for task in BENCHMARKS:
        between = "" if task == "ruler_vt" else ", "  # 30 tokens have no room for commas here
        for index in range(2):
            question = make_question(task, index, 2000, 0, STYLE)
            known = question.references[:1] if "_qa_" in task else question.references
            answers[tuple(question.prompt)] = PLAIN.encode(between.join(known))

    def sampler_for(args, architecture: str, length: int, eos: int):
        def sampler(model, prompts, **options):
            ids = answers[tuple(prompts[0].tolist())] + [PLAIN.eos] * length
            return torch.tensor([ids[:length]])

        return sampler

    monkeypatch.setattr(benchmark, "sampler_for", sampler_for)
    flags = f"--tasks {' '.join(BENCHMARKS)} --lengths 2000 --samples 2"
    out = ask(tmp_path, f"{flags} --qa {questions()}")
    for task, record in zip(BENCHMARKS, results(out)["niah"]):
        rules = {"any": 1} if "_qa_" in task else {"ruler": 1}
        rules = {"babilong": 1, "harness": 1} if task.startswith("babilong") else rules
        assert (record["task"], record["scores"], record["score"]) == (task, rules, 1)
        assert record["ci95"] == pytest.approx([0.342, 1], abs=1e-3)
