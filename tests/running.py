"""Runs small enough for a test: one is made once per session and read by most. The numbers of such a run mean nothing; that
they are the same again, or differ where a flag says so, does. Loaded as a plugin by conftest.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import write_checkpoint
from safetensors.torch import load_file

import eval_niah
import memdlm
import sample
from model import Transformer, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SIZES = "--pretrain-steps 6 --pretrain-batch 8 --steps 3 --examples 8 --batch 4 --length 64 --save-every 2".split()
QUICK = ["--tiny", *SIZES, *"--samples 2 --lengths 64 --tasks mv".split()]
FULL = ["--tiny", *SIZES, *"--samples 2 --lengths 64 96 --seeds 2".split()]
METHODS = ["base", "mdlm", "memdlm_train", "memdlm_train_inference"]
PROMPT = "river holds 47. Question: what does river hold? Answer:"


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads; subprocesses below get one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Pictures take longer than all else in a run this small. They are drawn where a test asks for the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(eval_niah, "draw_pictures", lambda results, out: None)


@pytest.fixture
def pictures():
    """Nothing is kept from drawing."""


def start(program: str, *arguments) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(*arguments) -> None:
    memdlm.main([*map(str, arguments), "--device", "cpu"])


def tensors(folder: Path) -> dict:
    return {path.name: load_file(path) for path in sorted(folder.glob("seed*/*.safetensors"))}


def same_weights(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    assert len(left) == 3
    assert {name: t.keys() for name, t in left.items()} == {name: t.keys() for name, t in right.items()}
    return all(torch.equal(t, right[name][key]) for name, part in left.items() for key, t in part.items())


def read(folder: Path) -> dict:
    """results.json, strictly: NaN and Infinity are not JSON."""

    def refuse(constant: str):
        raise AssertionError(f"{folder}/results.json holds {constant}")

    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)


def numbers(results: dict) -> dict:
    """What must be the same again: everything but time and memory."""
    return {key: value for key, value in results.items() if key not in ("seconds", "peak_memory_gib")}


def contents(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def only(records: list[dict], **where) -> list[dict]:
    return [record for record in records if all(record[key] == value for key, value in where.items())]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The one run that most tests read: the real command, two seeds, all tasks, two lengths. Nobody writes into it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    process = start("memdlm.py", *FULL, "--out", out)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (out / "printed.txt").write_text(output, encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def quick(tmp_path_factory, finished) -> Path:
    """A run of one seed and one task on the finished run's base. Nobody writes into it."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    train(*QUICK, "--out", out, "--bases", finished)
    return out


@pytest.fixture
def copied(quick, tmp_path) -> Path:
    """A finished run of this test's own."""
    return Path(shutil.copytree(quick, tmp_path / "copied"))


@pytest.fixture
def refused(capsys):
    """Runs a program that must refuse: exit code 2 and one line "error: ..." on stderr, which is returned."""

    def run(main, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors
        return errors

    return run


class Counts:
    """What a computation asked of its models: the layer that each reading started from, 0 for a whole forward pass, and at how
    many positions each call of the head was made."""

    def __init__(self):
        self.reads: list[float] = []
        self.heads: list[int] = []

    def clear(self) -> None:
        self.reads.clear()
        self.heads.clear()


@pytest.fixture
def counted(monkeypatch) -> Counts:
    counts, read, head = Counts(), Transformer.read, Transformer.head

    def reading(self, h, start, *rest):
        counts.reads.append(start)
        return read(self, h, start, *rest)

    def looking(self, h):
        counts.heads.append(len(h))
        return head(self, h)

    monkeypatch.setattr(Transformer, "read", reading)
    monkeypatch.setattr(Transformer, "head", looking)
    return counts


def jsonl(*records) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


PAIR = {"prompt": "Question: who? Answer:", "response": " Mary."}


# ---- evaluations of a toy backbone -----------------------------------------------------------------------------------------

ESSAY = "A fox went out on a long night, and prayed to the moon for light. Dr. Who saw it! The road was long, and he sang. " * 3


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A folder with two toy backbones (toy, llada2), two fine-tunings of the first with strong adapters (mdlm, memdlm), pairs
    (pairs.jsonl) and a text (essay.txt). Nobody writes into it."""
    root = tmp_path_factory.mktemp("toy")
    write_checkpoint(root / "toy", "llada")
    write_checkpoint(root / "llada2", "llada2")
    (root / "essay.txt").write_text(ESSAY)
    (root / "pairs.jsonl").write_text(jsonl(*({"prompt": f"Who is {i}?", "response": " Mary" * (i + 1)} for i in range(5))))
    for method in ("mdlm", "memdlm"):
        flags = f"--steps 1 --lr 0.1 --lora-rank 4 --device cpu --method {method}".split()
        memdlm.main(["--backbone", str(root / "toy"), "--data", str(root / "pairs.jsonl"), "--out", str(root / method), *flags])
    return root


def toy_command(toy: Path, out: Path, flags: str, backbone: str = "toy") -> list[str]:
    """{} in the flags is the toys' folder."""
    return ["--backbone", f"{toy / backbone}", "--out", f"{out}", "--device", "cpu", *flags.replace("{}", str(toy)).split()]


@pytest.fixture
def ask_toy(toy, tmp_path):
    """Runs an evaluation of the toy into a folder of the test's own, and returns that folder."""

    def run(flags: str, out: str = "eval", backbone: str = "toy") -> Path:
        eval_niah.main(toy_command(toy, tmp_path / out, flags, backbone))
        return tmp_path / out

    return run


def lines_of(out: Path) -> list[dict]:
    """What predictions.jsonl says, but for the time that it took."""
    lines = map(json.loads, (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# ---- stopped, and asked ----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Stands for the power cut."""


def interrupt_after(monkeypatch, saves: int) -> None:
    """Lets the program write this many checkpoints and stops it in place of the next."""
    left = [saves]

    def save(path, tensors, meta):
        if not left[0]:
            raise StoppedError
        left[0] -= 1
        save_checkpoint(path, tensors, meta)

    monkeypatch.setattr(memdlm, "save_checkpoint", save)


def say(capsys, run: Path, *arguments) -> list[str]:
    capsys.readouterr()
    sample.main(["--run", str(run), "--prompt", PROMPT, *map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out.rstrip("\n").split("\n")
