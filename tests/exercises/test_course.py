"""
test_course.py: the seven steps. What is not written is never passed, what is written is what the
project's own tests run on, a fault is named, and a whole solution trains.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, train, weights
from safetensors.torch import load_file

import memdlm
import model
import sample
from exercises.plug import STEPS, load, written_functions
from lab.tools import read_json
from lab.training import checkpoint_path

HOMES = {"memdlm": memdlm, "model": model, "sample": sample}
STUDENT, README = ROOT / "exercises" / "student.py", ROOT / "exercises" / "README.md"
SOLUTION = Path(__file__).with_name("solution.py")


def python(*arguments) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def check(student: Path, *flags) -> subprocess.CompletedProcess:
    """The command of the README."""
    return python("-m", "pytest", "-p", "no:cacheprovider", f"--student={student}", *flags)


@pytest.mark.parametrize("flags", [[], ["-k", "step3"]], ids=str)
def test_an_untouched_file_has_seven_steps_not_written_and_none_passed(flags):
    """Just so by the command of the README, whose file stands behind a space."""
    for command in (["--student", "exercises/student.py"], [f"--student={STUDENT}"]):
        result = python("-m", "pytest", "-p", "no:cacheprovider", *command, *flags)
        steps = re.findall(r"^step (\d), .*: not written yet: ", result.stdout, re.M)
        assert steps == (["3"] if flags else list("1234567")), result.stdout
        assert " passed" not in result.stdout
        assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_file_has_each_function_with_its_signature():
    """Names, order and defaults of the project's own."""
    student = load(STUDENT)
    for step in STEPS.values():
        for name in step.functions:
            ours = inspect.signature(getattr(HOMES[step.home], name)).parameters
            theirs = inspect.signature(getattr(student, name)).parameters
            assert list(ours) == list(theirs), name
            assert [p.default for p in ours.values()] == [p.default for p in theirs.values()], name
            assert getattr(student, name).__doc__, f"{name} has no docstring"
    assert not written_functions(STUDENT)


def test_the_text_has_for_each_step_all_that_it_needs():
    """The paper's section, the functions, a trap, the command and a hint."""
    sections = re.split(r"^### Step (\d): ", README.read_text(encoding="utf-8"), flags=re.M)
    texts = dict(zip(map(int, sections[1::2]), sections[2::2]))
    assert list(texts) == list(STEPS)
    for number, text in texts.items():
        assert re.search(r"\*Secs?\. \d", text), number
        assert all(f"`{name}(" in text for name in STEPS[number].functions), number
        for part in ("minutes)", "**Trap.**", f"-k step{number}`", "<details><summary>Hint"):
            assert part in text, f"step {number} has no {part}"


def test_the_solution_passes_all_steps():
    """Seven lines that say so, and exit code 0."""
    result = check(SOLUTION)
    assert re.findall(r"^step (\d), .*: right, ", result.stdout, re.M) == list("1234567")
    assert result.returncode == 0, result.stdout[-3000:]


def test_a_step_that_is_half_written_is_not_passed(tmp_path):
    """Step 1 lacks one of two functions, and its tests are skipped. What is not written is the
    project's own: step 6, which calls step 2's function by its bare name, is right without it."""
    last = "    return (weight[row] * nll).sum() / batch.maskable.sum()\n"
    text = SOLUTION.read_text(encoding="utf-8")
    assert text.count("def draw_anchor(") == text.count(last) == 1
    text = text.replace("def draw_anchor(", "def my_draw_anchor(")
    student = tmp_path / "student.py"
    student.write_text(text.replace(last, "    raise NotImplementedError\n"), encoding="utf-8")
    result = check(student, "-k", "step1 or step2 or step6 or step7")
    told = "not written yet: draw_anchor (is my_draw_anchor meant to be it?)"
    assert f"step 1, corrupt: {told}\n" in result.stdout
    assert "step 2, the masked loss: not written yet: denoising_loss\n" in result.stdout
    assert "step 6, the outer step: right" in result.stdout, result.stdout[-3000:]
    assert "step 7, commit by confidence: right" in result.stdout
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_function_in_the_file_is_the_one_that_is_tested(tmp_path):
    """A fault turns its step red, with the message that names it, and an exit code that says so. A
    function without a return is named, and not only by an error of whoever uses its result."""
    student = tmp_path / "student.py"
    student.write_text(
        "def select(confidence, quota, threshold=None):\n"
        "    order = confidence.argsort(dim=1, descending=True, stable=True)\n"
        "    return (order < quota) & (confidence >= 0)\n\n\n"
        "def commit_schedule(tokens, steps):\n"
        "    return [tokens // steps + (i < tokens % steps) for i in range(steps)]\n\n\n"
        "def denoising_loss(model, batch, anchor, h, start=0, fast=None):\n"
        "    h = model.run(h, start, None, batch.attention_mask, fast)\n"
    )
    result = check(student, "-k", "step2 or step7")
    assert "denoising_loss has returned None: is its `return` missing?" in result.stdout
    assert "are taken for ranks" in result.stdout
    assert re.search(r"^step 7, .*: \d+ of \d+ tests fail; begin with", result.stdout, re.M)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def select(:\n", "cannot read"),
        ("import no_such_package\n", "does not load: No module named 'no_such_package'"),
        ("\nx = 1 / 0\n", "does not load: division by zero (student.py, line 2)"),
        ("\nimport sys\n\nsys.exit(0)\n", "does not load: it calls sys.exit (student.py, line 4)"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_does_not_load_is_named_in_one_line(tmp_path, text, told):
    """By both programs."""
    student = tmp_path / "student.py"
    if text is not None:
        student.write_text(text)
    result = check(student)
    assert told in result.stderr
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    result = python("memdlm.py", "--tiny", "--student", student, "--out", tmp_path / "run")
    assert result.stderr.startswith("error: --student")
    assert result.stderr.count("\n") == 1
    assert (result.returncode, result.stdout) == (2, "")
    assert not (tmp_path / "run").exists()


def test_training_calls_the_students_functions(tmp_path):
    """Also those that the program has loaded under another name. A function that ends the program,
    or a file that is no program, leaves nothing that looks like a training."""
    text = "import sys\n\n\ndef train_step(model, optimizer, losses, clip):\n    sys.exit(0)\n"
    for name in ("student.py", "notes.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())  # as an editor of Windows
    refused = python("memdlm.py", *TINY, "--student", tmp_path / "notes.txt")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "notes.txt is no Python file" in refused.stderr
    flags = [*TINY, "--pretrain", "--student", tmp_path / "student.py", "--out", tmp_path / "run"]
    result = python("memdlm.py", *flags)
    told = "error: --student: train_step calls sys.exit."
    assert (result.returncode, result.stderr.strip()) == (2, told)
    told = "step 6, the outer step: not written yet: memdlm_loss (the project's own)"
    assert told in result.stdout
    assert "step 5, one inner step: not written yet" in result.stdout


# memdlm.py, whose evaluation asks one short question a task.
ONE_QUESTION = """
from lab import evaluate, tools
parser = evaluate.build_parser()
parser.set_defaults(samples=1, lengths=[64], memory_models=[])
evaluate.build_parser = lambda: parser
tools.start("memdlm")
"""


def test_the_solution_trains_and_its_run_knows_whose_code_it_was(tmp_path):
    """It starts from the base of another run, and is not continued with another file."""
    train("--out", tmp_path / "own")
    mine = [*TINY, "--student", SOLUTION, "--bases", tmp_path / "own", "--out", tmp_path / "mine"]
    result = python("-c", ONE_QUESTION, *mine)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^step \d, .*: yours$", result.stdout, re.M)) == 7
    assert read_json(tmp_path / "mine" / "results.json")["niah"]
    assert read_json(tmp_path / "mine" / "config.json")["student"].startswith("solution.py ")
    base = load_file(checkpoint_path(tmp_path / "mine", 0, "base"))
    for key, tensor in weights(tmp_path / "own")["base"].items():
        assert torch.equal(tensor, base[key]), "the base is not that of --bases"
    (tmp_path / "other.py").write_text("X = 1\n")
    again = [*TINY, "--student", tmp_path / "other.py", "--out", tmp_path / "mine", "--resume"]
    refused = python("memdlm.py", *again)
    assert "--student solution.py" in refused.stderr
    assert refused.returncode == 2
