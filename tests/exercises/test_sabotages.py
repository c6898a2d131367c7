"""
test_sabotages.py: a teacher can rely on the tests. Each of ten faults turns the test red that is
named beside it, with a message that names the cause.
"""

import os
import subprocess
import sys

import pytest
from running import ROOT, refusal

from exercises import sabotages
from exercises.sabotages import SABOTAGES, sabotage
from lab.tools import guarded


@pytest.mark.parametrize("name", SABOTAGES)
def test_each_fault_is_found_and_named(tmp_path, name):
    """Red, for the test's own reason (and no import error or missing test), with the cause in the
    message. That the same test is green without the fault, the suite shows."""
    sabotage(name, tmp_path / "copy")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SABOTAGES[name].test]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path / "copy", "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command, **options)
    assert result.returncode == 1, f"exit code {result.returncode}:\n{result.stdout[-2000:]}"
    assert f"FAILED {SABOTAGES[name].test}" in result.stdout
    said = [line for line in result.stdout.splitlines() if line.startswith("E ")]
    told = " ".join(line.removeprefix("E").strip() for line in said)
    assert SABOTAGES[name].message in told, f"the message does not name the cause:\n{told[:2000]}"


def test_the_command_writes_a_copy_or_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    """One line where a folder is not empty, or where the place of a fault has moved."""
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
    moved = SABOTAGES["prompt_masked"]._replace(edits=[("what is not there", "")])
    monkeypatch.setitem(SABOTAGES, "prompt_masked", moved)
    said = refusal(capsys, main, "prompt_masked", "--out", tmp_path / "other")
    assert "memdlm.py has changed" in said
