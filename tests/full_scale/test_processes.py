"""
test_processes.py: processes that torchrun starts, and that talk by gloo, do what one does: they
share the questions of an evaluation, and with --shard the frozen weights of a training.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, adapter_of, checkpoints, contents, refusal, results, run_python
from toys import answers_of, ask, command

import memdlm

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ASKED = "--adapter {}/mdlm {}/memdlm --memory --steps 1 --lengths 760 800 --samples 3"
ASKED += " --tasks niah_single_1 babilong_qa6"


def asked_together(count: int, out: Path) -> subprocess.CompletedProcess:
    """The evaluation ASKED in `count` processes."""
    return run_python(*LAUNCH, count, "eval_niah.py", *command(out, ASKED))


def said(out: Path) -> list[str]:
    """All answers, in no particular order."""
    return sorted(map(json.dumps, answers_of(out)))


def test_one_two_and_three_processes_give_equal_results(tmp_path):
    """Two are killed in the midst of it; three go on with what both had written. Every question is
    answered once, all files but the order of the answers are those of one process, and no part is
    left behind."""
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
    done = asked_together(3, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1, "the first process alone prints"
    assert len(said(out)) == 4 * 4 * 3
    assert said(out) == said(one)
    files, wanted = contents(out), contents(one)
    assert files.keys() == wanted.keys()
    for name in ("results.json", "table.md"):
        assert files[name] == wanted[name]


def test_parts_of_a_larger_number_of_processes_are_taken_over_by_one(tmp_path):
    """Whoever starts again, the answers in parts are not asked again, and end in one file. A part's
    last line may be cut off."""
    out = ask(tmp_path / "out", ASKED)
    everything, lines = said(out), (out / "predictions.jsonl").read_text().splitlines(True)
    settings = [line for line in lines if '"settings"' in line]
    answers = [line for line in lines if line not in settings]
    (out / "predictions.jsonl").write_text("".join(settings + answers[:10]))
    (out / "predictions.5.jsonl").write_text("".join(answers[10:40]) + answers[40][:40])
    (out / "predictions.2.jsonl").write_text("".join(answers[8:12]))
    ask(out, ASKED)
    assert said(out) == everything
    assert not list(out.glob("predictions.*.jsonl"))


# What a process does in the test below before it trains: it notes what it holds of the weights.
HOLDS = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import memdlm
from full_scale import finetune
from full_scale.processes import processes

add_outer_lora = finetune.add_outer_lora

def weighed(model, **lora):
    own = sum(p.to_local().numel() for p in model.layers.parameters() if hasattr(p, "to_local"))
    whole = sum(p.numel() for p in model.layers.parameters())
    rank, _ = processes()
    Path(__file__).with_name(f"held.{{rank}}").write_text(f"{{own}} {{whole}}")
    add_outer_lora(model, **lora)

finetune.add_outer_lora = weighed
memdlm.main(sys.argv[1:])
"""


def test_weights_that_are_spread_train_as_whole_ones(tmp_path):
    """Two processes, each with half of every layer, give the adapter that one gives with two
    micro-batches; all the losses that are measured are equal, too."""
    toys = checkpoints()
    flags = ["--backbone", toys["llada-moe"], "--data", toys["data"], "--steps", 3, "--batch", 2]
    flags += ["--lora-rank", 4, "--memory-rank", 4, "--memory-scope", "sample", "--lr", 1e-4]
    flags += ["--device", "cpu", "--eval-every", 2, "--eval-examples", 4]
    one = tmp_path / "one"
    memdlm.main([*map(str, flags), "--accumulate", "2", "--out", str(one)])
    (tmp_path / "holds.py").write_text(HOLDS)
    flags += ["--shard", "--checkpoint-activations"]
    done = run_python(*LAUNCH, 2, tmp_path / "holds.py", *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    held = [path.read_text().split() for path in tmp_path.glob("held.*")]
    assert len(held) == 2
    for own, whole in held:
        assert 0.45 < int(own) / int(whole) < 0.55
    adapters = adapter_of(one), adapter_of(tmp_path / "two")
    torch.testing.assert_close(*adapters, rtol=0, atol=1e-6)
    for a, b in zip(results(one)["loss"], results(tmp_path / "two")["loss"], strict=True):
        expected = pytest.approx([a[name] for name in memdlm.LOSSES], rel=1e-5)
        assert [b[name] for name in memdlm.LOSSES] == expected


@pytest.mark.parametrize(
    ("flags", "named"),
    [("--shard", "start it by torchrun"), ("--shard --load-4bit", "--shard is for whole weights")],
)
def test_shard_without_effect_is_refused(tmp_path, capsys, flags, named):
    toys = checkpoints()
    arguments = ["--backbone", toys["llada"], "--data", toys["data"], "--out", tmp_path / "out"]
    assert named in refusal(memdlm.main, [*arguments, *flags.split()], capsys)
