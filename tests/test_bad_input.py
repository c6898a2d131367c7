"""
test_bad_input.py: whatever a user gets wrong, each program says in one line that names the culprit,
exits with 2, and loses nothing.
"""

import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from running import ASKED, PROMPT, SEVERAL, TINY, copy_of_finished, finished, refusal, stamps
from safetensors import safe_open
from safetensors.torch import save_file

from lab.tools import guarded, save_tensors, start, write_text
from model import UserError

USUAL = {
    "memdlm": "--tiny --out {out}",
    "sample": "--run {run} --prompt x",
    "eval_niah": "--run {run} --out {out} --samples 1",
}
BAD_FLAGS = {  # beside the usual ones; the line names the last of them
    "memdlm": (
        "--wings 2; --pretrain-step 3; --steps; --steps 1.5; --steps -1; --steps ²; --steps --5; "
        "--pretrain-steps 0; --pretrain-batch 3; --pretrain-lr -1; --examples 3; --examples 6; "
        "--noise 2; --length 10; --wording odd; --stretch 0; --seeds 0; --control-lr nan; "
        "--lr 1e-3 --control-lr 1e-3; --control-lr 1e-4 1.0000001e-4; --control-lr 0; "
        "--batch 0; --seed -1; --seed 99999999999999999999; --device tpu; "
        "--save-every 0; --lr nan; --lr inf; --lr fast; --lr 1e-320; --warmup 1.1; --clip -1; "
        "--memory-rank 0; --memory-alpha nan; --memory-lr -1; --memory-clip -1; "
        "--memory-fraction 0; --memory-scope world; --memory-steps 0; --memory-epochs 0; "
        "--memory-strategy random; --memory-loss mse; --memory-targets none; "
        "--start-scale 0.5; --lora-rank 8; --samples 8; --data pairs.jsonl; --max-length 9"
    ),
    "sample": (
        "--model gpt; --length 0; --length 4097; --steps 0; --length 16 --steps 17; "
        "--length 16 --block-length 4 --steps 3; --block-length 0; --threshold 2; --seed x; "
        "--temperature -1; --temperature 1e-320; --cfg-scale nan; --mem; --write paper; "
        "--write-lr 1; --write-rank 4; --write-passes 2; --memory --write poem; "
        "--anchor-ratio 0.5; --memory --anchor-ratio 0.5"
    ),
    "eval_niah": (
        "--tasks; --tasks chess; --memory-models gpt; "
        "--lengths 10; --lengths 96 nine; --length 96; --samples 0; --bias-steps 1; --steps 0; "
        "--block-length 0; --threshold -1; --write poem; --write-rank 0; "
        "--write-lr inf; --anchor-ratio 0.5"
    ),
}
CASES = [
    ("memdlm", "", "--tiny"),
    ("memdlm", "--tiny now", "now"),
    ("memdlm", "--tiny --out {out} --resume", "{out}"),  # there is nothing to resume
    ("sample", "--prompt x", "--run"),
    ("sample", "--run {run}", "--prompt"),
    ("sample", "--run {out} --prompt x", "{out}"),
    ("sample", "--run {run} --prompt x --seed 7", "seed7"),
    ("eval_niah", "", "--run"),
    ("eval_niah", "--run {out}", "{out}"),
]
# No machine has both kinds of GPU: one of the two can always be asked for in vain.
ABSENT = "--device mps" if torch.cuda.is_available() else "--device cuda"
for program, table in BAD_FLAGS.items():
    CASES.append((program, f"{USUAL[program]} {ABSENT}", ABSENT))
    for flags in table.split("; "):
        CASES.append((program, f"{USUAL[program]} {flags}", re.findall("--[a-z-]+", flags)[-1]))


@pytest.mark.parametrize(("program", "typed", "named"), CASES)
def test_bad_flags_get_one_line(tmp_path, capsys, program, typed, named):
    """The line names the flag or the folder at fault, and no run or result is begun."""
    out = tmp_path / "out"
    typed, named = (text.format(run=finished(), out=out) for text in (typed, named))
    assert named in refusal(capsys, program, *typed.split())
    assert not list(out.glob("*.json"))


def assert_all_refuse(capsys, run, out, named: str) -> None:
    """To go on with a run, to ask its base and to score it: each is refused in one line."""
    again = ["--pretrain", "--resume"]
    assert named in refusal(capsys, "memdlm", *TINY, *SEVERAL, *again, "--out", run)
    ask = ["--run", run, "--model", "base", "--prompt", PROMPT]
    assert named in refusal(capsys, "sample", *ask)
    assert named in refusal(capsys, "eval_niah", "--run", run, *ASKED, "--out", out)


@pytest.mark.parametrize("kind", ["text", "cut short", "no metadata", "other", "other tensors"])
def test_a_checkpoint_that_is_none_is_named(tmp_path, capsys, kind):
    """Each program names the file that has something else under its name, and overwrites nothing:
    text, the half of a file, what another program has written, and the tensors of another model."""
    run = copy_of_finished(tmp_path)
    (run / "results.json").unlink()
    path = run / "seed0/base.safetensors"
    content = {"text": b"I am not a checkpoint.", "cut short": path.read_bytes()[:-5000]}
    with safe_open(path, "pt") as file:
        metadata = {"no metadata": {}, "other": {"json": "[1]"}, "other tensors": file.metadata()}
    if kind in content:
        path.write_bytes(content[kind])
    else:
        save_file({"model.other.weight": torch.zeros(3)}, path, metadata[kind])
    before = stamps(run / "seed0")
    assert_all_refuse(capsys, run, tmp_path / "eval", "base.safetensors")
    assert stamps(run / "seed0") == before


CONFIGS = ["", "{", "[]", '"text"', "{}", '{"dial": "backbone"}']
CONFIGS.append('{"dial": "tiny", "seed": 0, "start_scale": 1, "wording": "old", "control_lr": []}')


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_that_no_tiny_run_has_written_is_refused(tmp_path, capsys, content):
    """One line from each program, which names the folder."""
    (tmp_path / "config.json").write_text(content)
    assert_all_refuse(capsys, tmp_path, tmp_path / "eval", str(tmp_path))


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, capsys):
    """A folder cannot lie under a regular file."""
    (tmp_path / "file").write_text("I am in the way.")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(out) in refusal(capsys, "memdlm", *TINY, "--bases", finished(), "--out", out)
        score = ["--run", finished(), *ASKED, "--out", out]
        assert str(out) in refusal(capsys, "eval_niah", *score)
    assert (tmp_path / "file").read_text() == "I am in the way."


TOO_LARGE = [
    ("memdlm", [*TINY, "--memory-rank", 10**14, "--bases", "{run}"]),
    ("memdlm", [*TINY, "--pretrain-batch", 4 * 10**13, "--pretrain"]),
    ("memdlm", [*TINY, "--examples", 4 * 10**17, "--bases", "{run}"]),
    ("eval_niah", [*ASKED, "--write-rank", 10**14, "--run", "{run}"]),
    ("eval_niah", [*ASKED, "--samples", 10**13, "--run", "{run}"]),
]


@pytest.mark.parametrize(("program", "flags"), TOO_LARGE)
def test_what_does_not_fit_into_memory_gets_one_line(tmp_path, capsys, program, flags):
    """No machine has petabytes. What an allocator says is no traceback."""
    flags = [str(flag).format(run=finished()) for flag in flags]
    assert "memory" in refusal(capsys, program, *flags, "--out", tmp_path)


@pytest.mark.parametrize("program", USUAL)
def test_help_ends_well_and_shows_no_default_of_none(capsys, program):
    """A flag without a default says in words what it does then."""
    with pytest.raises(SystemExit) as stop:
        start(program, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "(default: " in printed
    assert not re.search(r"\(default: (None|False)\)", printed)


@pytest.mark.parametrize("program", USUAL)
def test_backbone_without_full_scale_gets_one_line(capsys, monkeypatch, program):
    """Where the folder was deleted, or emptied but for what Python has cached there: no package to
    install would help."""
    names = ["full_scale", *[name for name in sys.modules if name.startswith("full_scale.")]]
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    said = "needs the folder full_scale/, which is not here"
    assert said in refusal(capsys, program, "--backbone", "llada-moe")
    for name in names[1:]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "full_scale", SimpleNamespace(__path__=[], __spec__=None))
    assert said in refusal(capsys, program, "--backbone", "llada-moe")


NO_ROOM = [
    RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
    OSError(12, "Cannot allocate memory"),
    UserError("a cannot be read here: Cannot allocate memory (os error 12)."),
    MemoryError("Cannot allocate memory (os error 12)"),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda error: type(error).__name__)
def test_the_kernels_own_words_for_a_lack_of_memory_are_known(capsys, error):
    """So says a file of weights that is larger than `ulimit -v` allows, by way of several
    libraries."""

    def run() -> None:
        raise error

    said = refusal(capsys, lambda arguments: guarded(run))
    assert said.startswith("error: out of memory (")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_can_be_read_by_those_whom_the_umask_lets(tmp_path, umask):
    """Checkpoints and adapters, too, whose library makes files for their owner alone."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "text")
        save_tensors(tmp_path / "tensors", {"one": torch.ones(1)}, {})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


DOORS = [("memdlm", "finetune"), ("sample", "samplers"), ("eval_niah", "benchmark")]


@pytest.mark.parametrize(("program", "namesake"), DOORS)
def test_backbone_hands_the_whole_command_line_over(monkeypatch, program, namesake):
    """--backbone, in either spelling, makes the core step aside before it reads another flag."""
    typed = []
    monkeypatch.setitem(sys.modules, "full_scale", SimpleNamespace(__path__=[]))
    stand_in = SimpleNamespace(run=typed.append)
    monkeypatch.setitem(sys.modules, f"full_scale.{namesake}", stand_in)
    for arguments in (["--backbone", "x", "--wings", "2"], ["--wings", "--backbone=x"]):
        start(program, arguments)
        assert typed.pop() == arguments
