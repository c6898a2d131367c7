"""
test_bad_input.py: whatever a user gets wrong, each program says in one line that names the culprit,
exits with 2, and loses nothing.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import ASKED, PROMPT, SEVERAL, TINY, copy_of_finished, finished, refusal, stamps
from safetensors import safe_open
from safetensors.torch import save_file

import eval_niah
import memdlm
import sample

PROGRAMS = {"memdlm": memdlm, "sample": sample, "eval_niah": eval_niah}

# ---- one table for each program: what is typed, and what the line must name ----------------------

USUAL = {
    "memdlm": "--tiny --out {out}",
    "sample": "--run {run} --prompt x",
    "eval_niah": "--run {run} --out {out} --samples 1",
}
BAD_FLAGS = {  # beside the usual ones; the line names the last of them
    "memdlm": (
        "--wings 2; --pretrain-step 3; --steps; --steps 1.5; --steps -1; --steps ²; --steps --5; "
        "--pretrain-steps 0; --pretrain-batch 3; --pretrain-lr -1; --examples 3; --noise 2; "
        "--length 10; --wording odd; --stretch 0; --draws 0; --control-lr nan; --batch 0; "
        "--seeds 0; --seed -1; --seed 99999999999999999999; --device tpu; "
        "--save-every 0; --lr nan; --lr inf; --lr fast; --lr 1e-320; --warmup 1.1; --clip -1; "
        "--loss-norm tokens; --memory-rank 0; --memory-alpha nan; --memory-lr -1; "
        "--memory-clip -1; --memory-fraction 0; --memory-scope world; --memory-steps 0; "
        "--memory-epochs 0; --memory-strategy random; --memory-loss mse; --memory-targets none; "
        "--start-scale 0.5; --lora-rank 8; --samples 8; --data pairs.jsonl; --max-length 9"
    ),
    "sample": (
        "--model gpt; --draw -1; --length 0; --length 4097; --steps 0; --length 16 --steps 17; "
        "--length 16 --block-length 4 --steps 3; --block-length 0; --threshold 2; --seed x; "
        "--temperature -1; --temperature 1e-320; --cfg-scale nan; --mem; --write paper; "
        "--write-lr 1; --write-rank 4; --write-passes 2; --anchor-ratio 0.5; --memory --write poem"
    ),
    "eval_niah": (
        "--tasks; --tasks chess; --memory-lengths 10; --memory-draws -1; --lengths 10; "
        "--lengths 96 nine; --length 96; --samples 0; "
        "--bias-steps 1; --steps 0; --block-length 0; --threshold -1; --write poem; "
        "--write-rank 0; --write-lr inf; --anchor-ratio 0.5"
    ),
}
CASES = [
    ("memdlm", "", "--tiny"),
    ("memdlm", "--tiny now", "now"),
    ("memdlm", "--tiny --out {out} --control-lr 1e-3 --lr 1e-3", "--control-lr"),
    ("memdlm", "--tiny --out {out} --control-lr 1e-4 1.0000001e-4", "--control-lr"),
    ("memdlm", "--tiny --out {out} --control-lr 0", "--control-lr"),
    ("eval_niah", "--run {run} --out {out} --memory-lengths 80", "--memory-lengths"),
    ("memdlm", "--tiny --out {out} --resume", "{out}"),  # there is nothing to resume
    ("sample", "--prompt x", "--run"),
    ("sample", "--run {run}", "--prompt"),
    ("sample", "--run {out} --prompt x", "{out}"),
    ("sample", "--run {run} --prompt x --seed 7", "seed7"),
    ("sample", "--run {run} --prompt x --draw 7", "draw7"),
    ("sample", "--run {run} --prompt x --memory --anchor-ratio 0.5", "--write paper"),
    ("eval_niah", "", "--run"),
    ("eval_niah", "--run {out}", "{out}"),
]
for program, table in BAD_FLAGS.items():
    for flags in table.split("; "):
        CASES.append((program, f"{USUAL[program]} {flags}", re.findall("--[a-z-]+", flags)[-1]))


@pytest.mark.parametrize(("program", "typed", "named"), CASES)
def test_bad_flags_get_one_line(tmp_path, capsys, program, typed, named):
    """The line names the flag or the folder at fault, and no run or result is begun."""
    out = tmp_path / "out"
    typed, named = (text.format(run=finished(), out=out) for text in (typed, named))
    assert named in refusal(capsys, PROGRAMS[program].main, *typed.split())
    assert not list(out.glob("*.json"))


# ---- files that are not what they should be ------------------------------------------------------


def spoil(path: Path, kind: str) -> None:
    """Puts something else under a checkpoint's name."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if kind == "text":
        path.write_text("I am not a checkpoint.\nReally not.\n")
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "other metadata":
        save_file({"weight": torch.zeros(3)}, path, {"json": "[1, 2]"})
    else:
        save_file({"model.embedding.weight": torch.zeros(3)}, path, metadata)


@pytest.mark.parametrize("kind", ["text", "cut short", "other metadata", "other tensors"])
def test_a_checkpoint_that_is_none_is_named(tmp_path, capsys, kind):
    """Each program names the file, and overwrites nothing."""
    run = copy_of_finished(tmp_path)
    spoil(run / "seed0/base.safetensors", kind)
    before = stamps(run / "seed0")
    resume = [*TINY, *SEVERAL, "--out", run, "--resume"]
    ask = ["--run", run, "--model", "base", "--prompt", PROMPT]
    score = ["--run", run, *ASKED, "--out", tmp_path / "eval"]
    assert "base.safetensors" in refusal(capsys, memdlm.main, *resume)
    assert "base.safetensors" in refusal(capsys, sample.main, *ask)
    assert "base.safetensors" in refusal(capsys, eval_niah.main, *score)
    assert stamps(run / "seed0") == before


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}", '{"dial": "backbone"}'])
def test_a_config_that_no_tiny_run_has_written_is_refused(tmp_path, capsys, content):
    """One line from each program, which names the folder."""
    (tmp_path / "config.json").write_text(content)
    run = str(tmp_path)
    assert run in refusal(capsys, memdlm.main, *TINY, "--out", run, "--resume")
    assert run in refusal(capsys, sample.main, "--run", run, "--prompt", PROMPT)
    assert run in refusal(capsys, eval_niah.main, "--run", run, "--out", tmp_path / "eval")


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, capsys):
    """A folder cannot lie under a regular file."""
    (tmp_path / "file").write_text("I am in the way.")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(out) in refusal(capsys, memdlm.main, *TINY, "--out", out)
        score = ["--run", finished(), *ASKED, "--out", out]
        assert str(out) in refusal(capsys, eval_niah.main, *score)
    assert (tmp_path / "file").read_text() == "I am in the way."


# ---- what this machine does not have -------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("memdlm", "--memory-rank 100000000000000 --bases {run}"),
        ("memdlm", "--pretrain-batch 40000000000000"),
        ("memdlm", "--examples 400000000000000000 --bases {run}"),
        ("eval_niah", "--write-rank 100000000000000 --run {run}"),
        ("eval_niah", "--samples 10000000000000 --run {run}"),
    ],
)
def test_what_does_not_fit_into_memory_gets_one_line(tmp_path, capsys, program, flags):
    """No machine has petabytes. What an allocator says is no traceback."""
    usual = TINY if program == "memdlm" else ASKED
    typed = [*usual, "--out", tmp_path, *flags.format(run=finished()).split()]
    assert "memory" in refusal(capsys, PROGRAMS[program].main, *typed)


def test_a_device_that_is_absent_is_named(tmp_path, capsys):
    """No machine has both kinds of GPU: one of the two can always be asked for in vain."""
    device = ["--device", "mps" if torch.cuda.is_available() else "cuda"]
    for program, typed in USUAL.items():
        typed = typed.format(run=finished(), out=tmp_path / "out").split()
        assert " ".join(device) in refusal(capsys, PROGRAMS[program].main, *typed, *device)
    assert not (tmp_path / "out").exists()


# ---- the command line itself ---------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_backbone_without_full_scale_gets_one_line(capsys, monkeypatch, program):
    """Where the folder was deleted, or one of its packages is not installed."""
    for name in ("full_scale", *[name for name in sys.modules if name.startswith("full_scale.")]):
        monkeypatch.setitem(sys.modules, name, None)
    assert "full_scale" in refusal(capsys, PROGRAMS[program].main, "--backbone", "llada-moe")


@pytest.mark.parametrize(
    ("program", "namesake"),
    [("memdlm", "finetune"), ("sample", "samplers"), ("eval_niah", "benchmark")],
)
def test_backbone_hands_the_whole_command_line_over(monkeypatch, program, namesake):
    """--backbone, in either spelling, makes the core step aside before it reads another flag."""
    typed = []
    monkeypatch.setitem(sys.modules, "full_scale", SimpleNamespace(__path__=[]))
    stand_in = SimpleNamespace(run=typed.append)
    monkeypatch.setitem(sys.modules, f"full_scale.{namesake}", stand_in)
    for arguments in (["--backbone", "x", "--wings", "2"], ["--wings", "--backbone=x"]):
        PROGRAMS[program].main(arguments)
        assert typed.pop() == arguments


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_no_default_of_none(capsys, program):
    """--help ends with exit code 0. A flag without a default says in words what it does then."""
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program].main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "(default: None)" not in printed
    assert "(default: False)" not in printed
