"""Whatever a user gets wrong, each of the three programs says in one line, exits with 2 and loses nothing."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from running import (
    METHODS,
    PAIR,
    PROMPT,
    QUICK,
    contents,
    jsonl,
    only,
    read,
    say,
    start,
    train,
)
from safetensors import safe_open
from safetensors.torch import save_file

import data
import eval_niah
import memdlm
import sample

# ---- bad input ----------------------------------------------------------------------------------------------------------


BAD_ARGUMENTS = {
    "no --tiny": ("", "--tiny"),
    "unknown flag": ("--tiny --wings 2", "--wings"),
    "abbreviated flag": ("--tiny --pretrain-step 3", "--pretrain-step"),
    "stray word": ("--tiny now", "now"),
    "flag without a value": ("--tiny --steps", "--steps"),
    "unknown task": ("--tiny --tasks mv chess", "chess"),
    "no task": ("--tiny --tasks", "--tasks"),
    "unknown pads": ("--tiny --pads maybe", "--pads"),
    "unknown scope": ("--tiny --memory-scope world", "--memory-scope"),
    "unknown strategy": ("--tiny --memory-strategy random", "--memory-strategy"),
    "unknown inner loss": ("--tiny --memory-loss mse", "--memory-loss"),
    "unknown targets": ("--tiny --memory-targets none", "--memory-targets"),
    "unknown loss norm": ("--tiny --loss-norm tokens", "--loss-norm"),
    "no stages": ("--tiny --memory-steps 0", "--memory-steps"),
    "no inner epochs": ("--tiny --memory-epochs 0", "--memory-epochs"),
    "a flag of real backbones": ("--tiny --accumulate 2", "--accumulate"),
    "unknown write rule": ("--tiny --write poem", "--write"),
    "no samples": ("--tiny --samples 0", "--samples"),
    "no steps": ("--tiny --steps 0", "--steps"),
    "no pretraining": ("--tiny --pretrain-steps 0", "--pretrain-steps"),
    "half a step": ("--tiny --steps 1.5", "--steps"),
    "too few examples": ("--tiny --examples 3", "--examples"),
    "too small a pretraining batch": ("--tiny --pretrain-batch 3", "--pretrain-batch"),
    "empty batch": ("--tiny --batch 0", "--batch"),
    "no seeds": ("--tiny --seeds 0", "--seeds"),
    "negative seed": ("--tiny --seed -1", "--seed"),
    "enormous seed": ("--tiny --seed 99999999999999999999999", "--seed"),
    "lr not a number": ("--tiny --lr nan", "--lr"),
    "lr infinite": ("--tiny --lr inf", "--lr"),
    "lr negative": ("--tiny --lr -1", "--lr"),
    "lr a word": ("--tiny --lr fast", "--lr"),
    "too much noise": ("--tiny --noise 2", "--noise"),
    "too short": ("--tiny --length 10", "--length"),
    "too long": ("--tiny --lengths 96 100000", "--lengths"),
    "dropout of everything": ("--tiny --lora-dropout 1", "--lora-dropout"),
    "memory without rank": ("--tiny --memory-rank 0", "--memory-rank"),
    "memory nowhere": ("--tiny --memory-fraction 0", "--memory-fraction"),
    "pre-anchor before the anchor": ("--tiny --start-scale 0.5", "--start-scale"),
    "superscript digit": ("--tiny --steps ²", "--steps"),
    "two minus signs": ("--tiny --steps --5", "--steps"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_get_one_line_and_lose_nothing(copied, refused, name):
    """One line that names the flag, exit code 2, and the run that is there keeps every byte."""
    arguments, named = BAD_ARGUMENTS[name]
    before = contents(copied)
    assert named in refused(memdlm.main, "--out", copied, *arguments.split())
    assert contents(copied) == before


BAD_DATA = {
    "not JSON": (jsonl(PAIR, "{oops"), "line 2"),
    "missing key": (jsonl(PAIR, PAIR, {"prompt": "a"}), "line 3"),
    "not a string": (jsonl({"prompt": "a", "response": 4}), "line 1"),
    "empty response": (jsonl(PAIR, {"prompt": "a", "response": ""}), "line 2"),
    "over the limit": (jsonl({"prompt": "x" * 100, "response": "b"}), "--max-length 50"),
    "no pairs": ("\n", "no examples"),
    "missing file": (None, "pairs.jsonl"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_any_work(copied, tmp_path, refused, name):
    """The whole file is checked first: no base is trained for it, and the run that is there keeps every byte."""
    content, named = BAD_DATA[name]
    path, fresh = tmp_path / "pairs.jsonl", tmp_path / "fresh"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    before = contents(copied)
    for out in (copied, fresh):
        message = refused(memdlm.main, *QUICK, "--max-length", 50, "--data", path, "--out", out)
        assert named in message
        assert str(path) in message
    assert contents(copied) == before
    assert not list(fresh.rglob("*.safetensors"))


def foreign_checkpoint(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("I am not a checkpoint.\nReally not.\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "other safetensors":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "other metadata":
        save_file({"weight": torch.zeros(3)}, path, {"json": "[1, 2]"})
    elif kind == "other tensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({"model.embedding.weight": torch.zeros(3)}, path, metadata)


@pytest.mark.parametrize("kind", ["text", "empty", "cut short", "other safetensors", "other metadata", "other tensors"])
def test_a_foreign_checkpoint_is_named(copied, refused, tmp_path, kind):
    """Whatever lies under a checkpoint's name: one line with that name from each program, and nothing is overwritten."""
    path = copied / "seed0" / "base.safetensors"
    foreign_checkpoint(path, kind)
    before = contents(copied)
    assert "base.safetensors" in refused(memdlm.main, *QUICK, "--out", copied)
    assert "base.safetensors" in refused(sample.main, "--run", copied, "--model", "base", "--prompt", PROMPT)
    assert "base.safetensors" in refused(eval_niah.main, "--run", copied, "--out", tmp_path / "eval")
    assert contents(copied) == before


def test_an_output_that_cannot_be_written_is_named_before_any_work(quick, tmp_path, refused):
    """A folder that cannot exist (under a regular file) is found out at the start."""
    (tmp_path / "file").write_text("I am in the way.")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        began = time.monotonic()
        assert str(out) in refused(memdlm.main, *QUICK, "--pretrain-steps", 100000, "--out", out)
        assert str(out) in refused(eval_niah.main, "--run", quick, "--out", out)
        assert time.monotonic() - began < 5
    assert (tmp_path / "file").read_text() == "I am in the way."


def test_resume_needs_a_run(tmp_path, refused):
    """--resume in an empty or missing folder is an error, not a new run."""
    for out in (tmp_path, tmp_path / "missing"):
        assert str(out) in refused(memdlm.main, *QUICK, "--out", out, "--resume")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}"])
def test_a_foreign_config_is_refused(tmp_path, refused, content):
    """A config.json that no run has written: one line from each program."""
    (tmp_path / "config.json").write_text(content)
    refused(memdlm.main, *QUICK, "--out", tmp_path, "--resume")
    refused(sample.main, "--run", tmp_path, "--prompt", PROMPT)
    refused(eval_niah.main, "--run", tmp_path, "--out", tmp_path / "eval")


@pytest.mark.parametrize(
    "flag", ["--steps 5", "--lr 0.5", "--memory-scope batch", "--tasks mv vt", "--seeds 2", "--write paper"]
)
def test_resume_with_another_setting_names_the_flag(copied, refused, flag):
    """A run goes on with the settings it was started with, or not at all."""
    before = contents(copied)
    message = refused(memdlm.main, *QUICK, *flag.split(), "--out", copied, "--resume")
    assert flag.split()[0] in message
    assert contents(copied) == before


def test_resume_with_changed_data_is_refused(finished, copied, tmp_path, refused):
    """The same --data path with other pairs in it is not the run that was started."""
    path, arguments = tmp_path / "pairs.jsonl", [*QUICK, "--data", tmp_path / "pairs.jsonl", "--out", copied]
    path.write_text(jsonl(*[{"prompt": f"{i}?", "response": f" {i}."} for i in range(10)]))
    train(*arguments)
    (copied / "seed0" / "results.json").unlink()
    path.write_text(jsonl(*[{"prompt": f"{i}?", "response": f" {9 - i}."} for i in range(10)]))
    assert "--resume" in refused(memdlm.main, *arguments, "--resume")


def test_an_absent_device_is_named(quick, tmp_path, refused):
    """No machine has both kinds of GPU, so one of the two can always be asked for in vain."""
    absent = "mps" if torch.cuda.is_available() else "cuda"
    assert f"--device {absent}" in refused(memdlm.main, *QUICK, "--device", absent, "--out", tmp_path / "run")
    assert f"--device {absent}" in refused(sample.main, "--run", quick, "--prompt", PROMPT, "--device", absent)
    assert f"--device {absent}" in refused(eval_niah.main, "--run", quick, "--out", tmp_path / "eval", "--device", absent)
    assert not list(tmp_path.iterdir())


def test_the_real_commands_refuse_in_one_line(tmp_path):
    """The same as a process: nothing but the one line on stderr, nothing on stdout."""
    commands = [
        start("memdlm.py", "--tiny", "--out", tmp_path / "run", "--samples", 0),
        start("sample.py", "--run", tmp_path / "none", "--prompt", PROMPT),
    ]
    for process in commands:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors


# ---- sample.py -----------------------------------------------------------------------------------------------------------


def test_sample_shows_each_step_and_the_answer(quick, capsys):
    """One line before the first and after each pass, one mask fewer in each, then the answer; --quiet leaves the answer."""
    lines = say(capsys, quick, "--length", 6)
    assert [line.count("_") for line in lines[:-1]] == [6, 5, 4, 3, 2, 1, 0]
    assert say(capsys, quick, "--length", 6, "--quiet") == lines[-1:]


def test_sample_steps_and_blocks(quick, capsys):
    """--steps 2 commits half each time; blocks are finished from left to right; --threshold 0 commits all at once."""
    assert [line.count("_") for line in say(capsys, quick, "--length", 8, "--steps", 2)[:-1]] == [8, 4, 0]
    lines = say(capsys, quick, "--length", 8, "--block-length", 4)[:-1]
    assert all(line.endswith(" _ _ _ _") for line in lines[:5])
    assert lines[4].count("_") == 4
    assert [line.count("_") for line in say(capsys, quick, "--length", 8, "--threshold", 0)[:-1]] == [8, 0]


def test_sample_schedules_and_suppressed_tokens(quick, capsys):
    """--schedule dllm shares the steps otherwise where they do not divide; --suppress takes away what the answer had."""
    counts = {
        name: [line.count("_") for line in say(capsys, quick, "--length", 10, "--steps", 4, "--schedule", name)[:-1]]
        for name in ("llada", "dllm")
    }
    assert counts == {"llada": [10, 7, 4, 2, 0], "dllm": [10, 8, 5, 3, 0]}
    usual = say(capsys, quick, "--length", 6, "--quiet")
    ids = sorted(set(data.TOKENIZER.encode(f" {usual[0]}")) | {data.EOS})
    other = say(capsys, quick, "--length", 6, "--quiet", "--suppress", *ids)
    assert other != usual
    assert not set(data.TOKENIZER.encode(f" {other[0]}")) & set(ids)


def test_sample_is_reproducible_and_its_flags_matter(quick, finished, capsys):
    """The same words for the same flags; temperature, guidance, memory, model and seed each lead elsewhere."""
    plain = say(capsys, quick, "--length", 12)
    assert say(capsys, quick, "--length", 12) == plain
    hot = say(capsys, quick, "--length", 12, "--temperature", 3)
    assert hot != plain
    assert say(capsys, quick, "--length", 12, "--temperature", 3) == hot
    assert say(capsys, quick, "--length", 12, "--model", "base") != plain
    assert say(capsys, finished, "--length", 12, "--seed", 1) != say(capsys, finished, "--length", 12, "--seed", 0)
    for flags in (["--memory"], ["--cfg-scale", 1.5]):
        assert len(say(capsys, quick, "--length", 12, *flags)) == len(plain)


def test_a_typed_mask_in_a_prompt_stays_text(quick, capsys, monkeypatch):
    """ "<|mask|>" in --prompt reaches the model as bytes: the only masks in its input are the answer's."""
    seen, generate = [], sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda model, prompts, *a, **k: seen.append(prompts) or generate(model, prompts, *a, **k)
    )
    sample.main(["--run", str(quick), "--prompt", "<|mask|> <|endoftext|>", "--length", "4", "--memory", "--quiet"])
    assert data.TOKENIZER.decode(seen[0][0].tolist()) == " <|mask|> <|endoftext|>"
    assert seen[0].max() < data.EOS


BAD_SAMPLES = {
    "no run": ("--run {tmp} --prompt x", "{tmp}"),
    "no prompt flag": ("--run {run}", "--prompt"),
    "no run flag": ("--prompt x", "--run"),
    "a run and a backbone": ("--run {run} --backbone llada-8b --prompt x", "--run"),
    "an adapter for a run": ("--run {run} --adapter {tmp} --prompt x", "--adapter"),
    "unknown schedule": ("--run {run} --prompt x --schedule yearly", "--schedule"),
    "suppressing no token": ("--run {run} --prompt x --suppress 5 100000", "--suppress"),
    "suppressing a word": ("--run {run} --prompt x --suppress the", "--suppress"),
    "missing seed": ("--run {run} --prompt x --seed 7", "seed7"),
    "unknown model": ("--run {run} --prompt x --model gpt", "--model"),
    "no tokens": ("--run {run} --prompt x --length 0", "--length"),
    "too many tokens": ("--run {run} --prompt x --length 4097", "--length"),
    "fewer steps than blocks": ("--run {run} --prompt x --length 16 --block-length 4 --steps 3", "--steps"),
    "no block": ("--run {run} --prompt x --block-length 0", "--block-length"),
    "cold": ("--run {run} --prompt x --temperature -1", "--temperature"),
    "guidance nan": ("--run {run} --prompt x --cfg-scale nan", "--cfg-scale"),
    "threshold over one": ("--run {run} --prompt x --threshold 2", "--threshold"),
    "abbreviated": ("--run {run} --prompt x --mem", "--mem"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_requests_to_sample_get_one_line(quick, tmp_path, refused, name):
    """The line names the flag or the folder at fault."""
    arguments, named = (text.format(run=quick, tmp=tmp_path) for text in BAD_SAMPLES[name])
    assert named in refused(sample.main, *arguments.split())


@pytest.mark.parametrize(("prompt", "count"), [("", 0), ("x" * 4097, 4098), ("é" * 2049, 4099)])
def test_a_prompt_that_is_empty_or_too_long_is_refused(quick, refused, prompt, count):
    """The limit is the run's --max-length, in tokens; the message says how many there are."""
    assert str(count) in refused(sample.main, "--run", quick, "--prompt", prompt)


# ---- eval_niah.py --------------------------------------------------------------------------------------------------------


def test_eval_scores_a_run_at_other_lengths(finished, tmp_path, capsys, pictures):
    """Both seeds, the asked tasks and lengths, all four rows; the run itself is left as it was."""
    before, out = contents(finished), tmp_path / "eval"
    arguments = "--tasks vt babi --lengths 80 --samples 3 --device cpu".split()
    eval_niah.main(["--run", str(finished), "--out", str(out), *arguments])
    records = read(out)["niah"]
    cells = [(m, task, 80, 3, seed) for m in METHODS for task in ("vt", "babi") for seed in (0, 1)]
    assert sorted((r["method"], r["task"], r["length"], r["n"], r["seed"]) for r in records) == sorted(cells)
    assert (out / "niah.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "MemDLM (Train & Inference)" in table
    assert table.strip() in capsys.readouterr().out
    assert contents(finished) == before


def test_eval_repeats_the_runs_own_scores(finished, tmp_path):
    """With the run's tasks, lengths and samples the scores of its results.json come out again."""
    eval_niah.main(["--run", str(finished), "--out", str(tmp_path / "eval"), "--device", "cpu"])
    assert read(tmp_path / "eval")["niah"] == read(finished)["niah"]


def test_eval_can_write_the_prompt_otherwise(quick, tmp_path):
    """The five --write flags of an evaluation replace the run's; rows without a memory keep their scores."""
    other = "--write paper --write-lr 3 --write-rank 2 --write-passes 1 --anchor-ratio 0.9".split()
    eval_niah.main(["--run", str(quick), "--out", str(tmp_path), "--tasks", "mv", "--device", "cpu", *other])
    found = read(tmp_path)
    assert found["config"]["write"] == "paper"
    assert [found["config"][key] for key in ("write_lr", "write_rank", "write_passes", "anchor_ratio")] == [3, 2, 1, [0.9]]
    for method in METHODS[:3]:
        assert only(found["niah"], method=method) == only(read(quick)["niah"], method=method)


def test_eval_compares_two_runs_seed_by_seed(finished, quick, tmp_path, capsys, refused):
    """--compare RUN:METHOD RUN:METHOD: the paired difference by length, worked out here again, and what each has learnt."""
    better = Path(shutil.copytree(finished, tmp_path / "better"))
    results = read(better)
    for record in results["niah"]:
        record["score"] = 0.75 if record["seed"] else 0.5
    (better / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    eval_niah.main(["--compare", f"{better}:memdlm_train", f"{finished}:mdlm"])
    printed = capsys.readouterr().out
    plain = {seed: only(read(finished)["niah"], method="mdlm", length=64, seed=seed) for seed in (0, 1)}
    gains = [score - sum(r["score"] for r in plain[seed]) / len(plain[seed]) for seed, score in ((0, 0.5), (1, 0.75))]
    assert f"{sum(gains) / 2:+.3f}" in printed
    assert "training loss without memory" in printed
    assert "--compare" in refused(eval_niah.main, "--compare", f"{finished}:gpt", f"{finished}:mdlm")
    assert "none" in refused(eval_niah.main, "--compare", f"{tmp_path / 'none'}:mdlm", f"{finished}:mdlm")
    assert "--run" in refused(eval_niah.main, "--out", tmp_path / "eval")


def test_only_tasks_that_both_runs_have_are_compared(tmp_path, capsys, refused):
    """A mean over four tasks is not to be set beside a mean over one of them."""
    for name, scores in (("one", {"mv": 0.5, "vt": 0.9}), ("other", {"mv": 0.25, "cwe": 0.1})):
        (tmp_path / name).mkdir()
        records = [{"method": "mdlm", "task": t, "length": 96, "seed": 0, "score": score} for t, score in scores.items()]
        (tmp_path / name / "results.json").write_text(json.dumps({"niah": records}))
    eval_niah.main(["--compare", f"{tmp_path}/one:mdlm", f"{tmp_path}/other:mdlm"])
    printed = capsys.readouterr().out
    assert "96 (mv)" in printed
    assert "+0.250" in printed
    (tmp_path / "other" / "results.json").write_text(json.dumps({"niah": [{**records[0], "length": 192}]}))
    assert "in common" in refused(eval_niah.main, "--compare", f"{tmp_path}/one:mdlm", f"{tmp_path}/other:mdlm")
    assert "has no scores of base" in refused(eval_niah.main, "--compare", f"{tmp_path}/one:base", f"{tmp_path}/other:mdlm")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--lengths 10", "--lengths"),
        ("--lengths 96 nine", "--lengths"),
        ("--tasks chess", "chess"),
        ("--samples 0", "--samples"),
        ("--length 96", "--length"),
        ("--run {tmp}", "{tmp}"),
    ],
)
def test_bad_requests_to_eval_get_one_line(quick, tmp_path, refused, arguments, named):
    """Refused before anything is written."""
    out = tmp_path / "eval"
    assert named.format(tmp=tmp_path) in refused(
        eval_niah.main, "--run", quick, "--out", out, *arguments.format(tmp=tmp_path).split()
    )
    assert not out.exists()


def test_eval_of_an_unfinished_run_loses_no_earlier_table(copied, tmp_path, refused):
    """A checkpoint is missing: one line, and the results of an earlier evaluation in --out stay."""
    out = tmp_path / "eval"
    eval_niah.main(["--run", str(copied), "--out", str(out), "--tasks", "mv", "--device", "cpu"])
    before = contents(out)
    (copied / "seed0" / "memdlm.safetensors").unlink()
    assert "memdlm.safetensors" in refused(eval_niah.main, "--run", copied, "--out", out, "--tasks", "mv")
    assert contents(out) == before


def test_eval_does_not_overwrite_the_run(copied):
    """--out the run's own folder: whatever happens, results.json keeps the run's losses and exposure bias."""
    before = read(copied)
    with pytest.raises(SystemExit) as stop:
        eval_niah.main(["--run", str(copied), "--out", str(copied), "--tasks", "mv", "--device", "cpu"])
    assert stop.value.code == 2
    assert read(copied) == before
