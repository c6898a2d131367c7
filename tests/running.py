"""
running.py: runs small enough for a test. One is made in a session, and most tests read it. Its
numbers mean nothing; that they are the same again, or differ where a flag says so, does.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

import data
import memdlm
from lab import ask, evaluate, tiny, tools, training
from lab.training import checkpoint_path

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--tiny --pretrain-steps 4 --pretrain-batch 4 --steps 3 --examples 4 --batch 2 --length 64 "
    "--stretch 1 --seeds 1 --control-lr --save-every 2 --device cpu"
).split()
SEVERAL = "--seeds 2 --control-lr 1e-4".split()  # of the run that most tests read
ASKED = "--samples 2 --lengths 64 --tasks cwe --bias-steps 2 --write-passes 1".split()
ASKED += "--memory-models base mdlm memdlm".split()
NAMES = ("base", "mdlm", "memdlm")
PROMPT = "river holds 47. Question: what does river hold? Answer:"


def train(*arguments) -> None:
    """The training of `memdlm.py --tiny` with TINY's settings; a later flag replaces an earlier.
    Bases are made, unless --bases says where they are. Losses are measured on 4 examples: measuring
    64 would be most of the work of so short a run."""
    measure_losses = training.measure_losses

    def measure_four(model, train_set: list, held_out: list, *rest, repeats: int) -> dict:
        parts = [train_set[0], held_out[0]]
        few = [[data.Batch(part.x0[:4], part.maskable[:4], None)] for part in parts]
        return measure_losses(model, *few, *rest)

    def train_alone(each, do: partial, args, config: dict, device: str) -> None:
        *_, train_one = do.args
        for job in evaluate.models_of(config):
            train_one(job)

    bases = [] if "--bases" in arguments else ["--pretrain"]
    losses = mock.patch.object(training, "measure_losses", measure_four)
    alone = {"work_through": train_alone, "parse": lambda arguments: (None, None)}
    with losses, mock.patch.multiple(evaluate, **alone):
        tiny.run([*TINY, *bases, *map(str, arguments)])


def evaluated(run: Path, out: Path, *arguments, pictures: bool = False) -> dict:
    """eval_niah.py on a run: its results. Drawing takes longer than all the rest together."""
    draw = evaluate.draw_pictures if pictures else mock.Mock()
    with mock.patch.object(evaluate, "draw_pictures", draw):
        evaluate.run(["--run", str(run), "--out", str(out), *ASKED, *map(str, arguments)])
    return results(out)


def say(capsys, run: Path, *arguments) -> list[str]:
    """What sample.py prints, line by line; the last line is the answer."""
    capsys.readouterr()
    ask.run(["--run", str(run), "--prompt", PROMPT, "--device", "cpu", *map(str, arguments)])
    return capsys.readouterr().out.removesuffix("\n").split("\n")


def refusal(capsys, program, *arguments) -> str:
    """The one line on stderr of a program that must refuse before it trains, with exit code 2.
    program: "memdlm", "sample", "eval_niah", or a function that takes the arguments."""
    main = partial(tools.start, program) if isinstance(program, str) else program
    trained = mock.Mock(side_effect=AssertionError("it went on to train, and should have refused"))
    capsys.readouterr()
    with mock.patch.object(memdlm, "train_step", trained), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2, f"exit code {stop.value.code} instead of 2"
    assert re.fullmatch(r"error: [^\n]+\n", said), f"not one line, but: {said}"
    return said


def recorded(function, calls: list):
    """The same function, which also appends what it returns to `calls`."""

    def call(*arguments, **options):
        calls.append(function(*arguments, **options))
        return calls[-1]

    return call


def start(*arguments) -> subprocess.Popen:
    """Python in a process of its own, without a GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def train_until(step: int, *arguments) -> None:
    """Trains, and is interrupted when so many steps are taken and the next is not saved yet."""
    taken, train_step = [], memdlm.train_step

    def interrupted(*arguments):
        taken.append(train_step(*arguments))
        if len(taken) > step:
            raise KeyboardInterrupt
        return taken[-1]

    with mock.patch.object(memdlm, "train_step", interrupted), pytest.raises(KeyboardInterrupt):
        train(*arguments)


FOLDER = tempfile.TemporaryDirectory(prefix="memdlm-tests-")  # deleted when the session ends


@functools.cache
def finished() -> Path:
    """The run that most tests read, two seeds with a control. Nobody writes to it."""
    out = Path(FOLDER.name) / "finished"
    train(*SEVERAL, "--out", out)
    evaluated(out, out, pictures=True)
    return out


def copy_of_finished(tmp_path: Path) -> Path:
    """The finished run in a folder of the test's own."""
    return Path(shutil.copytree(finished(), tmp_path / "copied"))


def results(run: Path) -> dict:
    """results.json, read strictly: NaN and Infinity are not JSON."""
    return json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)


def weights(run: Path, seed: int = 0) -> dict:
    """The tensors of a seed's checkpoints: {"base": {"model.embedding.weight": ...}, ...}."""
    return {name: load_file(checkpoint_path(run, seed, name)) for name in NAMES}


def differing(one: dict, other: dict) -> set[str]:
    """The checkpoints in which two results of `weights` do not have equal bits."""
    found = set()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        if any(not tensor.equal(other[name][key]) for key, tensor in tensors.items()):
            found.add(name)
    return found


def stamps(folder: Path) -> dict:
    """What tells whether anything in a folder has been touched: each file's time and size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
