"""
test_sabotages.py: a teacher can rely on the tests. Each of ten faults turns the test red that is
named beside it, with a message that names the cause.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import ROOT, refusal

from data import guarded
from exercises import sabotages
from exercises.sabotages import SABOTAGES, sabotage
from model import UserError


def outcome(folder: Path, test: str) -> subprocess.CompletedProcess:
    """One test, run in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """All ten, some at a time."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SABOTAGES}
    for name, folder in folders.items():
        sabotage(name, folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tests = [SABOTAGES[name].test for name in SABOTAGES]
        return dict(zip(SABOTAGES, pool.map(outcome, folders.values(), tests)))


@pytest.mark.parametrize("name", SABOTAGES)
def test_each_fault_is_found_and_named(outcomes, name):
    """Red, for the test's own reason (and no import error or missing test), with the cause in the
    message. That the same test is green without the fault, the suite shows."""
    result = outcomes[name]
    assert result.returncode == 1, f"exit code {result.returncode}:\n{result.stdout[-2000:]}"
    assert f"FAILED {SABOTAGES[name].test}" in result.stdout
    said = [line for line in result.stdout.splitlines() if line.startswith("E ")]
    told = " ".join(line.removeprefix("E").strip() for line in said)
    assert SABOTAGES[name].message in told, f"the message does not name the cause:\n{told[:2000]}"


def test_a_fault_whose_place_has_moved_is_reported(tmp_path, monkeypatch):
    """And not silently left out, in a copy that has no fault."""
    assert len(SABOTAGES) == 10
    moved = SABOTAGES["prompt_masked"]._replace(edits=[("what is not there", "")])
    monkeypatch.setitem(SABOTAGES, "prompt_masked", moved)
    with pytest.raises(UserError, match=r"memdlm\.py has changed"):
        sabotage("prompt_masked", tmp_path / "copy")


def test_the_command_writes_a_copy_or_says_what_is_wrong(tmp_path, capsys):
    """The list without a name; a copy with one; and one line where a folder is not empty."""
    sabotages.run([])
    assert capsys.readouterr().out.count("found by tests/") == 10
    sabotages.run(["prompt_masked", "--out", str(tmp_path / "copy")])
    changed = (tmp_path / "copy" / "memdlm.py").read_text(encoding="utf-8")
    assert changed != (ROOT / "memdlm.py").read_text(encoding="utf-8")

    def main(arguments: list[str]) -> None:
        guarded(lambda: sabotages.run(arguments))

    again = refusal(capsys, main, "prompt_masked", "--out", tmp_path / "copy")
    assert "no empty folder" in again
    assert "itself" in refusal(capsys, main, "prompt_masked", "--out", ROOT / "assets" / "copy")
    assert "--out" in refusal(capsys, main, "prompt_masked")
