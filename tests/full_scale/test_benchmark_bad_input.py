"""
test_benchmark_bad_input.py: what `eval_niah.py --backbone` cannot do, or would do without effect,
is said in one line that tells what to do; and nothing is written.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from backbones import random_tensors, write_checkpoint, write_tensors
from commands import contents, jsonl, refusal, results
from toys import ONE, answers_of, ask, command, toys

from eval_niah import main

# Flags -> what the one line must say. {} is the toys' folder, {tmp} the test's own.
BAD = {
    "--tasks mv": "niah_single_1",
    "--tasks ruler_cwe --lengths 64": "needs at least .* tokens; --lengths 64 is too short",
    "--out {}/llada": "name another folder",
    "--out {tmp}/other": "name another folder",
    f"{ONE} --out {{tmp}}/bytes": "choose another --out",
    f"{ONE} --out {{tmp}}/bytes/below": "choose another --out",
    # texts and stories
    "--haystack {}/absent": "cannot read --haystack .*absent",
    "--haystack {tmp}/bytes": "cannot read --haystack .*bytes",
    "--haystack {tmp}/empty --tasks niah_single_2 --lengths 400": "no word in it",
    "--haystack {tmp}/empty --tasks babilong_qa1 --lengths 900": "sentence",
    "--haystack {}/essay.txt --tasks ruler_vt niah_single_1": "--haystack is read by none",
    "--babi {tmp}/absent --tasks babilong_qa1 --lengths 900": "no qa1_.*absent",
    "--babi {tmp} --tasks niah_single_2 ruler_cwe": "--babi is read by the BABILong tasks",
    # the exposure bias
    "--exposure-bias": "needs --data",
    "--data {}/few.jsonl": "--data needs --exposure-bias",
    "--bias-steps 4 --max-length 40": "--max-length needs --exposure-bias",
    "--exposure-bias --data {}/absent.jsonl": "cannot read --data .*absent.jsonl",
    "--exposure-bias --data {}/few.jsonl --max-length 3": "few.jsonl: none of",
    "--exposure-bias --data {tmp}/no_prompt.jsonl": "no_prompt.jsonl, line 2: ",
    # the memory
    "--write surprise": "--write .*add --memory",
    "--write-lr 1 --write-rank 2 --write-passes 2": "--write-lr .*add --memory",
    "--anchor-ratio 0.3": "--anchor-ratio .*add --memory",
    "--memory --write surprise --anchor-ratio 0.1 0.2": "--anchor-ratio needs --write paper",
    # who answers
    "--adapter {}/mdlm mdlm={}/memdlm": "mdlm and .*memdlm are both of mdlm",
    "--adapter {tmp}/peft": "say what trained it, mdlm=.*or memdlm=",
    f"{ONE} --adapter memdlm={{}}/absent": "cannot read .*absent/adapter_model.safetensors",
    "--backbone {}/absent": "absent",
    # how it is decoded
    f"{ONE} --block-length 2": "--steps",
    f"{ONE} --backbone {{}}/llada2 --schedule dllm": "--schedule is not for LLaDA2",
    "--chat --backbone {tmp}/no_template": "has no chat template",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """A folder of things that cannot be used. Nobody writes into it."""
    root = tmp_path_factory.mktemp("things")
    (root / "empty").write_text(" \n")
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
    said = refusal(main, arguments, capsys)
    assert re.search(BAD[flags], said), said
    assert (contents(things), contents(toys()), contents(tmp_path)) == (*before, {})


def test_adapter_in_the_current_folder_is_found(tmp_path, monkeypatch):
    """Which method trained it stands in a file beside it, for "." as for any other name."""
    monkeypatch.chdir(toys() / "memdlm")
    out = ask(tmp_path / "eval", f"{ONE} --adapter .")
    assert [one["method"] for one in results(out)["niah"]] == ["base", "memdlm_train"]


@pytest.mark.parametrize(
    ("flags", "task"),
    [(ONE, "niah_single_1"), ("--exposure-bias --data {}/few.jsonl", "exposure bias")],
)
def test_weights_that_are_not_finite_stop_the_evaluation(tmp_path, capsys, flags, task):
    """One line says whose predictions, on what, and where to look; they are no answer that scores
    0, and no walk without a loss."""
    backbone = write_checkpoint(tmp_path / "backbone", "llada")
    tensors = random_tensors(json.loads((backbone / "config.json").read_text()))
    tensors["model.transformer.ln_f.weight"][3] = float("nan")
    write_tensors(backbone, tensors)
    said = refusal(main, command(tmp_path / "eval", f"{flags} --backbone {backbone}"), capsys)
    assert re.search(f"Base, {task}.* question 0: .*not finite.* weights", said), said
    assert answers_of(tmp_path / "eval") == []


def test_memory_that_blows_up_stops_the_evaluation_and_keeps_the_other_rows(tmp_path, capsys):
    """With a smaller step the same folder goes on: an answer that was never made binds nobody."""
    out, flags = tmp_path / "eval", f"{ONE} --memory --write-lr"
    said = refusal(main, command(out, f"{flags} 1e18"), capsys)
    assert "Base, memory at inference, niah_single_1" in said
    assert "not finite" in said
    assert [answer["method"] for answer in answers_of(out)] == ["base"]
    ask(out, f"{flags} 0.1")
    assert [one["n"] for one in results(out)["niah"]] == [1, 1]
