"""
test_processes.py: processes that torchrun starts, and that talk by gloo, share the questions of an
evaluation. (That they share a training, test_finetune.py shows.)
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, checkpoints, contents, refusal, run_python
from toys import ONE, answers_of, ask, command

from full_scale.processes import LAUNCHED

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ASKED = "--adapter {}/mdlm {}/memdlm --memory --steps 1 --lengths 760 800 --samples 3"
ASKED += " --tasks niah_single_1 babilong_qa6"

# Builds for some machines have no torch.distributed: from here on it says so and cannot be used.
WITHOUT_DISTRIBUTED = """
import json, sys, torch
del torch._C._c10d_init
sys.modules["torch._C._distributed_c10d"] = None
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    del sys.modules[name]
import full_scale.harness
from lab.tools import start
for program, *arguments in json.loads(sys.argv[1]):
    start(program, arguments)
"""


def said(out: Path) -> list[str]:
    """All answers, in no particular order."""
    return sorted(map(json.dumps, answers_of(out)))


def test_one_two_and_three_processes_give_equal_results(tmp_path):
    """Two are killed in the midst of it; three go on with what both had written, and all files but
    the order of the answers are those of one. One goes on with the parts of any number, too."""
    one, out = ask(tmp_path / "one", ASKED, draw=True), tmp_path / "more"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, *LAUNCH, "2", "eval_niah.py", *command(out, ASKED)]
    started = {"env": environment, "cwd": ROOT, "start_new_session": True}
    process = subprocess.Popen(program, **started, stderr=subprocess.DEVNULL)
    parts = out / "predictions.jsonl", out / "predictions.1.jsonl"
    while not all(path.exists() and path.read_bytes().count(b"scores") > 1 for path in parts):
        assert process.poll() is None, "it ended before both processes had written something"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = sum(path.read_bytes().count(b'"scores"') for path in parts)
    assert before < 48
    done = run_python(*LAUNCH, 3, "eval_niah.py", *command(out, ASKED))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1, "the first process alone prints"
    assert len(said(out)) == 4 * 4 * 3
    assert said(out) == said(one)
    files, wanted = contents(out), contents(one)
    assert files.keys() == wanted.keys()
    for name in ("results.json", "table.md"):
        assert files[name] == wanted[name]
    lines = (out / "predictions.jsonl").read_text().splitlines(True)
    settings = [line for line in lines if '"settings"' in line]
    answers = [line for line in lines if line not in settings]
    (out / "predictions.jsonl").write_text("".join(settings + answers[:10]))
    (out / "predictions.5.jsonl").write_text("".join(answers[10:40]) + answers[40][:40])
    (out / "predictions.2.jsonl").write_text("".join(answers[8:12]))
    ask(out, ASKED)
    assert said(out) == said(one)
    assert not list(out.glob("predictions.*.jsonl"))


def test_one_process_needs_no_other_and_no_torch_distributed(tmp_path, monkeypatch):
    """Every program runs without it, and where a cluster's scheduler has set a part of torchrun's
    variables by itself."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    toy, data = checkpoints()["llada"], checkpoints()["data"]
    known = ["--backbone", toy, "--device", "cpu"]
    told = [["memdlm", *known, "--data", data, "--steps", 1, "--out", tmp_path / "run"]]
    told += [["sample", *known, "--prompt", "Who?", "--length", 2, "--quiet"]]
    told += [["eval_niah", *command(tmp_path / "out", ONE)]]
    done = run_python("-c", WITHOUT_DISTRIBUTED, json.dumps(told, default=str))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 1
    assert (tmp_path / "out" / "table.md").exists()


@pytest.mark.parametrize("missing", [name for name in LAUNCHED if name != "WORLD_SIZE"])
def test_a_part_of_several_processes_is_refused(tmp_path, capsys, monkeypatch, missing):
    """WORLD_SIZE speaks of several: alone, each of them would write the same files."""
    for name in LAUNCHED:
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(missing)
    told = refusal("eval_niah", command(tmp_path / "out", ONE), capsys)
    assert f"WORLD_SIZE is 2, but {missing} is not set" in told
