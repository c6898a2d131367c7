"""
test_benchmark.py: `eval_niah.py --backbone` from end to end on toys. Each row answers with its own
weights, each flag does what it says, and what it cannot do is said in one line.
"""

import contextlib
import io
import json
import re
import shutil
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from backbones import TOKENIZER, random_tensors, write_checkpoint, write_tensors
from commands import contents, jsonl, questions, refusal, results
from toys import ESSAY, METHODS, ONE, answers_of, ask, command, predictions, settings_of, toys

from full_scale import backbone, benchmark
from full_scale.drafts import Style
from full_scale.prompts import BENCHMARKS, make_question
from full_scale.report import BIAS, title
from full_scale.samplers import rounded_schedule
from full_scale.tokenizer import load_tokenizer
from lab.report import matching

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
    """In the paper's order and by the paper's names. --show prints the first prompt of each cell.
    Adapters (one named, one told by its training.json) and memory each change the answers."""
    found = [(one["task"], one["length"], one["method"]) for one in results(table)["niah"]]
    assert found == [(*cell, method) for cell in CELLS for method in METHODS]
    text, printed = (table / "table.md").read_text(), (table / "printed.txt").read_text()
    for task, length in CELLS:
        for method in METHODS:
            assert f"\n| {title(method)} | {task} | {length} | 2 | " in text
        question = make_question(task, 0, length, 3, STYLE)
        size = f"{len(question.prompt)} tokens, {question.tokens} to generate"
        answer = f"a right answer contains {question.references[0]}"
        assert f"---- {task} {length}: {size}, {answer}\n{question.text}\n\n" in printed
        first = answers_of(table, task=task, length=length)[0]
        assert first["references"] == list(question.references)
    assert text.count(" | 2 | 3 | cpu | float32 |") == 16, "steps, seed, device and dtype"
    assert text.count("] (harness 0.000) | ") == 8, "by the other rule"
    assert text.strip() in printed
    assert printed.count("---- ") == 4
    assert "exposure bias on 2 of 4 pairs; 1 longer ones left out" in printed
    pictures = {name for name, content in contents(table).items() if content[:4] == b"\x89PNG"}
    assert pictures == {"niah.png", "depth.png", "exposure_bias.png"}
    assert len({tuple(predictions(table, method)) for method in METHODS}) == 4
    settings = [settings_of(table)[method] for method in METHODS]
    assert len({found.get("adapter_model.safetensors") for found in settings}) == 3
    assert ["write rule" in found for found in settings] == [False] * 3 + [True]


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
    """A larger --samples keeps what is there, and ends with what asking at once gives."""
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
    """Ratios that look alike are two rows, one named twice is one; each as if asked alone."""
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


def test_fewer_tasks_name_what_they_leave_out_and_leave_no_old_picture(tmp_path):
    """A table without a row that a picture beside it shows could not be read. Asked again together,
    all rows are back without a new answer."""
    both = "--tasks niah_single_1 ruler_vt --lengths 900 --steps 1 --samples 1"
    known = contents(ask(tmp_path, both, draw=True))
    left = "In this folder, but not in these tables: Base, niah_single_1 900."
    out = ask(tmp_path, both.replace("niah_single_1 ", ""), draw=True)
    assert "depth.png" in known
    assert "depth.png" not in contents(out)
    assert left in (out / "table.md").read_text()
    assert left not in known["table.md"].decode()
    assert contents(ask(tmp_path, both, draw=True)) == known


def test_prompts_that_are_not_full_are_named(tmp_path, monkeypatch):
    """The harness leaves RULER's questions short once all documents are there."""
    sampler = mock.Mock(return_value=torch.zeros(1, 1).long())
    monkeypatch.setattr(benchmark, "sampler_for", lambda *arguments: sampler)
    flags = f"--tasks ruler_qa_1 ruler_vt --lengths 12000 --samples 1 --qa {questions()}"
    short, other = (
        ask(tmp_path / one, f"{flags} --protocol {one}") for one in ("harness", "original")
    )
    share, full = (one["full"] for one in results(short)["niah"])
    assert share < 0.95 < full <= 1
    named = f"Prompts of ruler_qa_1 12000 are {share:.0%} full."
    assert named in (short / "table.md").read_text()
    assert min(one["full"] for one in results(other)["niah"]) > 0.95
    assert " full." not in (other / "table.md").read_text()


@pytest.fixture
def passes(monkeypatch) -> tuple[list, list]:
    """The ids that each forward pass reads, and the number of places of each call of the head."""
    read, heads, load = [], [], backbone.load_backbone

    def loading(*arguments):
        model = load(*arguments)
        model.embedding.register_forward_hook(lambda _, given, out: read.extend(given[0].tolist()))
        model.output.register_forward_hook(lambda _, given, out: heads.append(len(given[0])))
        return model

    monkeypatch.setattr(backbone, "load_backbone", loading)
    return read, heads


CHAT = load_tokenizer(TOKENIZER)  # the user says the question, the assistant begins the answer
ASKED = {
    "--tasks ruler_vt --lengths 900 --protocol harness": {"protocol": "harness"},
    "--tasks niah_single_2 --lengths 500 --haystack {}/essay.txt": {"haystack": ESSAY},
    "--tasks babilong_qa4 --lengths 480 --haystack {}/essay.txt": {"haystack": ESSAY},
    "--tasks niah_single_3 --lengths 500 --haystack {}/essay.json": {"haystack": ESSAY},
    "--tasks niah_single_1 --lengths 440 --chat": {
        "encode": lambda text, prefix: CHAT.encode_prompt(text) + CHAT.encode(prefix.strip())
    },
}


@pytest.mark.parametrize("flags", ASKED)
def test_prompts_are_those_of_the_flags(tmp_path, passes, flags):
    """Token by token, and every flag makes other ones."""
    words = flags.split()
    task, length = words[words.index("--tasks") + 1], int(words[words.index("--lengths") + 1])
    wanted = make_question(task, 0, length, 0, STYLE._replace(**ASKED[flags])).prompt
    out = ask(tmp_path, f"{flags} --samples 1 --steps 1")
    [canvas], _ = passes  # one prompt at a time
    assert canvas[: answers_of(out)[0]["tokens"]] == wanted
    assert wanted != make_question(task, 0, length, 0, STYLE).prompt


def test_flags_of_writing_change_the_row_with_a_memory_alone(tmp_path):
    plain = ask(tmp_path / "plain", f"{ONE} --memory")
    for flags in ("--write surprise", "--write-lr 1", "--write-rank 2", "--write-passes 2"):
        other = ask(tmp_path / flags, f"{ONE} --memory {flags}")
        assert predictions(plain, "base") == predictions(other, "base")
        assert predictions(plain, "base_inference") != predictions(other, "base_inference"), flags


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
    """And each asks the head at the masked places alone: elsewhere it would cost too much."""
    quotas, (read, heads) = SCHEDULES[flags], passes
    out = ask(tmp_path, f"{flags} --samples 1")
    assert heads == [sum(quotas[i:]) for i in range(len(quotas))]
    assert answers_of(out)[0]["steps"] == len(read) == len(quotas)


def test_who_knows_the_answer_gets_1(tmp_path, monkeypatch):
    """On every task, through the program's own questions, decoding and rules, with as many tokens
    as a task leaves for its answer. That who does not know gets 0, test_prompts.py shows."""
    answers = {}
    for task in BENCHMARKS:
        between = "" if task == "ruler_vt" else ", "  # 30 tokens have no room for commas here
        question = make_question(task, 0, 2000, 0, STYLE)
        known = question.references[:1] if "_qa_" in task else question.references
        answers[tuple(question.prompt)] = PLAIN.encode(between.join(known))

    def sampler_for(args, architecture: str, length: int, eos: int):
        def sampler(model, prompts, **options):
            ids = answers[tuple(prompts[0].tolist())] + [PLAIN.eos] * length
            return torch.tensor([ids[:length]])

        return sampler

    monkeypatch.setattr(benchmark, "sampler_for", sampler_for)
    flags = f"--tasks {' '.join(BENCHMARKS)} --lengths 2000 --samples 1"
    out = ask(tmp_path, f"{flags} --qa {questions()}")
    for task, record in zip(BENCHMARKS, results(out)["niah"]):
        rules = {"any": 1} if "_qa_" in task else {"ruler": 1}
        rules = {"babilong": 1, "harness": 1} if task.startswith("babilong") else rules
        assert (record["task"], record["scores"], record["score"]) == (task, rules, 1)
        assert record["ci95"] == pytest.approx([0.207, 1], abs=1e-3)


# Flags -> what the one line must say. {} is the toys' folder, {tmp} the test's own.
BAD = {
    "--tasks mv": "niah_single_1",
    "--tasks ruler_cwe --lengths 64": "needs at least .* tokens; --lengths 64 is too short",
    "--out {}/llada": "name another folder",
    "--out {tmp}/other": "name another folder",
    f"{ONE} --out {{tmp}}/bytes": "choose another --out",
    f"{ONE} --out {{tmp}}/bytes/below": "choose another --out",
    "--haystack {}/absent": "cannot read --haystack .*absent",
    "--haystack {tmp}/bytes": "cannot read --haystack .*bytes",
    "--haystack {tmp}/empty --tasks niah_single_2 --lengths 400": "no word in it",
    "--haystack {tmp}/empty --tasks babilong_qa1 --lengths 900": "sentence",
    "--haystack {tmp}/essays.json --tasks niah_single_2": "essays.json must be plain text, or",
    "--haystack {tmp}/half.json --tasks niah_single_2": "half.json must be plain text, or",
    "--out {tmp}/bench --tasks niah_single_2": "name another folder",
    "--haystack {}/essay.txt --tasks ruler_vt niah_single_1": "--haystack is read by none",
    "--babi {tmp}/absent --tasks babilong_qa1 --lengths 900": "no qa1_.*absent",
    "--babi {tmp} --tasks niah_single_2 ruler_cwe": "--babi is read by the BABILong tasks",
    "--tasks ruler_qa_1 --lengths 1000": "ruler_qa_1: needs --qa DIR",
    "--tasks ruler_qa_2 --lengths 1000 --qa {}": "is a folder without hotpotqa.json",
    "--tasks ruler_vt --qa {}": "--qa is read by ruler_qa_1 and ruler_qa_2 alone",
    "--exposure-bias": "needs --data",
    "--data {}/few.jsonl": "--data needs --exposure-bias",
    "--bias-steps 4 --max-length 40": "--max-length needs --exposure-bias",
    "--exposure-bias --data {}/absent.jsonl": "cannot read --data .*absent.jsonl",
    "--exposure-bias --data {}/few.jsonl --max-length 3": "few.jsonl: none of",
    "--exposure-bias --data {tmp}/no_prompt.jsonl": "no_prompt.jsonl, line 2: ",
    "--write surprise": "--write .*add --memory",
    "--write-lr 1 --write-rank 2 --write-passes 2": "--write-lr .*add --memory",
    "--anchor-ratio 0.3": "--anchor-ratio .*add --memory",
    "--memory --write surprise --anchor-ratio 0.1 0.2": "--anchor-ratio needs --write paper",
    "--adapter {}/mdlm mdlm={}/mdlm": "mdlm and .*mdlm are both of mdlm",
    "--adapter mdlm={}/memdlm": "its training.json says that memdlm trained it",
    "--adapter {tmp}/peft": "say what trained it, mdlm=.*or memdlm=",
    f"{ONE} --adapter memdlm={{}}/absent": "adapter_config.json is missing in .*absent",
    "--backbone {}/absent": "absent",
    f"{ONE} --block-length 2": "--steps",
    f"{ONE} --backbone {{}}/llada2 --schedule dllm": "--schedule is not for LLaDA2",
    "--chat --backbone {tmp}/no_template": "has no chat template",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """A folder of things that cannot be used. Nobody writes into it."""
    root = tmp_path_factory.mktemp("things")
    (root / "empty").write_text(" \n")
    (root / "essays.json").write_text('["Once there was a fox."]')
    (root / "half.json").write_text('{"text": "Once there was \\ud800."}')
    (root / "bench").mkdir()
    (root / "bench" / "table.md").write_text("| case | s |")
    (root / "bytes").write_bytes(b"\xff\xfe\xff")
    pair, no_prompt = {"prompt": "who?", "response": "Mary"}, {"prompt": "", "response": "Mary"}
    (root / "no_prompt.jsonl").write_text(jsonl([pair, no_prompt]))
    (root / "other").mkdir()
    (root / "other" / "results.json").write_text("{}")
    shutil.copytree(toys() / "mdlm", root / "peft")
    (root / "peft" / "training.json").unlink()
    config = write_checkpoint(root / "no_template", "llada") / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["chat_template"]
    config.write_text(json.dumps(settings))
    return root


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_be_asked_is_one_line(things, tmp_path, capsys, flags):
    before = contents(things), contents(toys())
    arguments = command(tmp_path / "eval", flags.replace("{tmp}", str(things)))
    said = refusal("eval_niah", arguments, capsys)
    assert re.search(BAD[flags], said), said
    assert (contents(things), contents(toys()), contents(tmp_path)) == (*before, {})


def test_numbers_that_are_not_finite_stop_the_evaluation(tmp_path, capsys):
    """One line says whose predictions, on what, and where to look; nothing is scored, and the other
    rows are kept. With a smaller step the same folder goes on."""
    backbone = write_checkpoint(tmp_path / "backbone", "llada")
    tensors = random_tensors(json.loads((backbone / "config.json").read_text()))
    tensors["model.transformer.ln_f.weight"][3] = float("nan")
    write_tensors(backbone, tensors)
    for flags, task in ((ONE, "niah_"), ("--exposure-bias --data {}/few.jsonl", "exposure bias")):
        arguments = command(tmp_path / task, f"{flags} --backbone {backbone}")
        said = refusal("eval_niah", arguments, capsys)
        assert re.search(f"Base, {task}.* question 0: .*not finite.* weights", said), said
        assert answers_of(tmp_path / task) == []
    out, flags = tmp_path / "eval", f"{ONE} --memory --write-lr"
    said = refusal("eval_niah", command(out, f"{flags} 1e18"), capsys)
    assert re.search("Base, memory at inference, niah_single_1.* not finite", said), said
    assert [answer["method"] for answer in answers_of(out)] == ["base"]
    ask(out, f"{flags} 0.1")
    assert [one["n"] for one in results(out)["niah"]] == [1, 1]
