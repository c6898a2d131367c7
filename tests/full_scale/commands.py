"""
commands.py: what the tests of `--backbone` share: toy checkpoints with pairs to train on, programs
that are stopped or that must refuse, and what a run has left behind.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from backbones import SETTINGS, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from lab.tools import start

ROOT = Path(__file__).resolve().parents[2]
FOLDER = tempfile.TemporaryDirectory(prefix="memdlm-tests-")  # deleted when the session ends
PAIRS = [
    {"prompt": f"Who is number {i}?", "response": f" Mary {'went home. ' * (1 + i % 9)}{i}"}
    for i in range(20)
]


def jsonl(records: list[dict]) -> str:
    """One record a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


@functools.cache
def checkpoints() -> dict[str, Path]:
    """A checkpoint for each key of SETTINGS, and 20 pairs ("data"). Nobody writes into them."""
    root = Path(FOLDER.name)
    found = {kind: write_checkpoint(root / kind.replace(", ", "-"), kind) for kind in SETTINGS}
    found["data"] = root / "pairs.jsonl"
    found["data"].write_text(jsonl(PAIRS))
    return found


@functools.cache
def questions() -> Path:
    """A folder with questions about documents, in the forms of SQuAD 2.0 and of HotpotQA. Nobody
    writes into it."""
    folder, articles, records = Path(FOLDER.name) / "qa", [], []
    folder.mkdir()
    for i in range(40):
        paragraphs = []
        for j in range(4):
            asked = {"question": f"Who lives in house {i}.{j}?", "is_impossible": j == 3}
            asked["answers"] = [{"text": f"Ann{i}{j}"}, {"text": f"Miss Ann{i}{j}"}]
            context = f"House {i}.{j} is small. Ann{i}{j} lives in it."
            paragraphs.append({"context": context, "qas": [asked]})
        articles.append({"paragraphs": paragraphs})
        texts = [[f"Town {i}.{j}", ["It is old. ", f"King Bob{i}{j} built it."]] for j in range(3)]
        records.append({"question": f"Who built {i}.1?", "answer": f"Bob{i}1", "context": texts})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    (folder / "hotpotqa.json").write_text(json.dumps(records))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Name of every file in a folder and below -> what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(run: Path) -> dict:
    """results.json, read strictly: NaN and Infinity are not JSON."""
    return json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)


def adapter_of(run: Path) -> dict[str, Tensor]:
    """The adapter that a fine-tuning has written."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two fine-tunings ended in equal bits."""
    files = [run / "adapter" / "adapter_model.safetensors" for run in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes()


def refusal(program, arguments: list, capsys) -> str:
    """Runs a program that must refuse: exit code 2 and one line on stderr, which is returned.
    program: "memdlm", "sample", "eval_niah", or a function that takes the arguments."""
    main = partial(start, program) if isinstance(program, str) else program
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2, f"exit code {stop.value.code}, {said}"
    assert re.fullmatch(r"error: [^\n]+\n", said), f"not one line, but: {said}"
    return said


def run_python(*arguments) -> subprocess.CompletedProcess:
    """A Python program in a process of its own, without a GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    options = {"env": environment, "cwd": ROOT, "text": True, "capture_output": True}
    return subprocess.run(command, **options, timeout=200)


class StoppedError(Exception):
    """Stands for the power cut."""
