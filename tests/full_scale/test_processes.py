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

from commands import ROOT, contents, run_python
from toys import answers_of, ask, command

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ASKED = "--adapter {}/mdlm {}/memdlm --memory --steps 1 --lengths 760 800 --samples 3"
ASKED += " --tasks niah_single_1 babilong_qa6"


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
