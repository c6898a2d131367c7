"""The three programs as a user meets them: what a run writes, that it survives kill -9, and what bad input gets.

One small run with two seeds is made once and read by most tests. The numbers of such a run mean nothing; that they are the
same again, or differ where a flag says so, does.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval_niah
import memdlm
import sample
from model import Config, Transformer, UserError, load_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SIZES = "--pretrain-steps 6 --pretrain-batch 8 --steps 3 --examples 8 --batch 4 --length 64 --save-every 2".split()
QUICK = ["--tiny", *SIZES, *"--samples 2 --lengths 64 --tasks mv".split()]
FULL = ["--tiny", *SIZES, *"--samples 2 --lengths 64 96 --seeds 2".split()]
METHODS = ["base", "mdlm", "memdlm_train", "memdlm_train_inference"]
PROMPT = "river holds 47. Question: what does river hold? Answer:"


# ---- helpers -------------------------------------------------------------------------------------------------------------


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


# ---- what a run writes -----------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_files(finished):
    """results.json, three pictures, one denoised example, and three checkpoints per seed; nothing half-written."""
    names = set(contents(finished))
    wanted = {"config.json", "results.json", "loss.png", "exposure_bias.png", "niah.png", "denoising.txt"}
    wanted |= {f"seed{seed}/{name}.safetensors" for seed in (0, 1) for name in ("base", "mdlm", "memdlm")}
    assert wanted <= names
    assert not [name for name in names if "partial" in name]
    for picture in ("loss.png", "exposure_bias.png", "niah.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")


def test_results_have_the_specified_form(finished):
    """The keys and records that others read, with every number finite."""
    results = read(finished)
    keys = {"config", "machine", "seconds", "peak_memory_gib", "niah", "exposure_bias", "loss"}
    assert keys <= results.keys()
    assert {"device", "dtype", "torch", "threads"} <= results["machine"].keys()
    assert results["seconds"].keys() >= {"base", "mdlm", "memdlm"}
    assert all(value > 0 for value in results["seconds"].values())
    assert 0 < results["peak_memory_gib"] < 100
    niah, exposure, loss = (results[key] for key in ("niah", "exposure_bias", "loss"))
    assert all(r.keys() == {"method", "task", "length", "n", "score", "ci95", "seed"} for r in niah)
    assert all(r.keys() == {"method", "mask_ratio", "static", "sequential", "ratio", "seed"} for r in exposure)
    specified = {"method", "step", "train_with_memory", "train_without_memory", "eval_without_memory", "seed"}
    assert all(specified <= r.keys() for r in loss)
    cells = [(m, task, length, seed) for seed in (0, 1) for length in (64, 96) for task in data.TASKS for m in METHODS]
    assert sorted((r["method"], r["task"], r["length"], r["seed"]) for r in niah) == sorted(cells)
    assert {r["method"] for r in exposure} == set(METHODS)
    assert {(r["method"], r["seed"]) for r in loss} == {(m, seed) for m in ("mdlm", "memdlm") for seed in (0, 1)}
    for record in niah:
        low, high = record["ci95"]
        assert 0 <= low <= record["score"] <= high <= 1
        assert low < high
        assert record["n"] == 2
    for record in exposure:
        assert 0 < record["mask_ratio"] <= 1
        assert min(record["static"], record["sequential"], record["ratio"]) > 0
    for method in ("mdlm", "memdlm"):
        steps = [r["step"] for r in only(loss, method=method, seed=0)]
        assert (steps[0], steps[-1]) == (0, 3)
        assert steps == sorted(set(steps))


def test_both_methods_start_from_one_base(finished):
    """Before the first step the two models are the same, so every logged loss is equal to the last bit."""
    for seed in (0, 1):
        first = [only(read(finished)["loss"], method=m, seed=seed, step=0)[0] for m in ("mdlm", "memdlm")]
        last = [only(read(finished)["loss"], method=m, seed=seed, step=3)[0] for m in ("mdlm", "memdlm")]
        assert {**first[0], "method": ""} == {**first[1], "method": ""}
        assert last[0]["train_without_memory"] != last[1]["train_without_memory"]


def test_exposure_bias_is_relative_to_the_loss_without_memory(finished):
    """ratio = sequential / static without memory, and with everything masked both states are the same."""
    records = only(read(finished)["exposure_bias"], seed=0)
    static = {(r["method"], r["mask_ratio"]): r["static"] for r in records}
    for r in records:
        plain = "memdlm_train" if r["method"] == "memdlm_train_inference" else r["method"]
        assert r["ratio"] == pytest.approx(r["sequential"] / static[plain, r["mask_ratio"]])
        if r["mask_ratio"] == 1:
            assert r["sequential"] == pytest.approx(r["static"])


def test_the_end_of_a_run_is_shown(finished):
    """The table with all four rows, the denoised example, time, memory and the skipped updates are printed."""
    printed = (finished / "printed.txt").read_text(encoding="utf-8")
    for title, _, _ in eval_niah.ROWS.values():
        assert f"| {title} |" in printed
    view = (finished / "denoising.txt").read_text(encoding="utf-8").strip()
    assert view in printed
    assert "Peak memory" in printed
    assert "skipped" in printed
    assert "step  0 | _ _" in view
    assert "expected|" in view


def test_seeds_are_independent_runs(finished, quick, tmp_path):
    """--seeds 2 holds exactly the numbers of the two single runs, weights included, wherever they were made."""
    together = read(finished)
    train(*FULL, "--seeds", 1, "--seed", 1, "--out", tmp_path)
    alone = read(tmp_path)
    for key in ("niah", "exposure_bias", "loss"):
        assert only(together[key], seed=1) == alone[key]
    for key in ("exposure_bias", "loss"):
        assert [{**record, "seed": 0} for record in alone[key]] != only(together[key], seed=0)
    assert only(together["niah"], seed=0, task="mv", length=64) == read(quick)["niah"]
    assert only(together["loss"], seed=0) == read(quick)["loss"]
    for folder, seed in ((quick, 0), (tmp_path, 1)):
        for name in ("base", "mdlm", "memdlm"):
            one, other = (load_file(out / f"seed{seed}" / f"{name}.safetensors") for out in (folder, finished))
            assert all(torch.equal(one[key], other[key]) for key in other), name


# ---- killed and resumed --------------------------------------------------------------------------------------------------

LONG = ["--tiny", *SIZES, *"--samples 1 --lengths 64 --tasks mv --pretrain-steps 60 --save-every 1".split()]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(*LONG, "--out", out)
    return out


def test_kill_9_at_any_moment_loses_nothing(uninterrupted, tmp_path):
    """Killed again and again while it trains, then resumed: the same weights, bit for bit, and the same results."""
    out, rng, killed = tmp_path / "run", random.Random(3), 0
    for name in ("base", "mdlm", "memdlm"):
        path = out / "seed0" / f"{name}.safetensors"
        process = start("memdlm.py", *LONG, "--device", "cpu", "--out", out, *(["--resume"] if killed else []))
        before, deadline = path.stat().st_mtime_ns if path.exists() else 0, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.stat().st_mtime_ns != before:
                time.sleep(rng.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0), errors
    assert killed >= 2
    train(*LONG, "--out", out, "--resume")
    assert same_weights(out, uninterrupted)
    assert numbers(read(out)) == numbers(read(uninterrupted))


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


def test_every_checkpoint_is_a_place_to_go_on_from(quick, tmp_path, monkeypatch):
    """Stopped after every single checkpoint until nothing is left to do: the result is that of one unbroken run."""
    arguments, stops = [*QUICK, "--save-every", 1, "--out", tmp_path / "run"], 0
    for _ in range(20):
        try:
            with monkeypatch.context() as patch:
                interrupt_after(patch, 1)
                train(*arguments, *(["--resume"] if stops else []))
            break
        except StoppedError:
            stops += 1
    assert stops == 6 + 3 + 3 - 1  # one checkpoint a step
    assert same_weights(tmp_path / "run", quick)
    assert numbers(read(tmp_path / "run")) == numbers(read(quick))


def test_a_half_written_checkpoint_beside_a_good_one_does_no_harm(quick, copied):
    """What a kill in the middle of saving leaves behind is never read, and overwritten by the next save."""
    for name in ("base", "mdlm", "memdlm"):
        good = (copied / "seed0" / f"{name}.safetensors").read_bytes()
        (copied / "seed0" / f"{name}.partial").write_bytes(good[: len(good) // 2])
    (copied / "seed0" / "memdlm.safetensors").unlink()
    (copied / "seed0" / "results.json").unlink()
    train(*QUICK, "--out", copied, "--resume")
    assert same_weights(copied, quick)
    assert numbers(read(copied)) == numbers(read(quick))


def test_a_failed_save_keeps_the_good_checkpoint(copied, monkeypatch):
    """A write that breaks off (no space left, say) leaves the old file as it was."""
    path = copied / "seed0" / "base.safetensors"
    before = path.read_bytes()

    def no_space(tensors, target, metadata):
        Path(target).write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.save_file", no_space)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(path, load_file(path), {"step": 1})
    assert path.read_bytes() == before


def test_resuming_a_finished_run_shows_it_again(quick, copied, capsys, pictures):
    """--resume after the end trains nothing and writes the same results, lost pictures included."""
    (copied / "results.json").unlink()
    before = contents(copied / "seed0")
    train(*QUICK, "--out", copied, "--resume")
    assert contents(copied / "seed0") == before
    assert numbers(read(copied)) == numbers(read(quick))
    assert (copied / "niah.png").exists()
    assert "Standard MDLM" in capsys.readouterr().out


def test_a_run_over_another_runs_folder_can_be_resumed(copied, tmp_path, monkeypatch):
    """A new run in an old folder, stopped early: the old run's checkpoints must not keep --resume from going on."""
    new = [*QUICK, "--pretrain-steps", 8, "--steps", 3]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        with pytest.raises(StoppedError):
            train(*new, "--out", copied)
    train(*new, "--out", copied, "--resume")
    train(*new, "--out", tmp_path / "fresh")
    assert same_weights(copied, tmp_path / "fresh")


def test_a_new_run_over_an_old_one_is_a_new_run(copied, tmp_path):
    """Without --resume nothing of the old fine-tuning is taken over."""
    train(*QUICK, "--lr", "1e-2", "--out", copied)
    train(*QUICK, "--lr", "1e-2", "--out", tmp_path / "fresh")
    assert same_weights(copied, tmp_path / "fresh")
    assert numbers(read(copied)) == numbers(read(tmp_path / "fresh"))


# ---- the base, kept and taken over ---------------------------------------------------------------------------------------


def test_a_matching_base_is_kept_and_another_is_retrained(quick, copied):
    """The base is the longest part: kept to the byte if its settings match, trained anew if they do not."""
    path, mark = copied / "seed0" / "base.safetensors", (quick / "seed0" / "base.safetensors").read_bytes()
    before = path.stat().st_mtime_ns
    train(*QUICK, "--steps", 1, "--out", copied)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (before, mark)
    train(*QUICK, "--steps", 1, "--pretrain-steps", 7, "--out", copied)
    assert load_model(path)[1]["step"] == 7


def base_after(copied: Path, *arguments) -> torch.Tensor:
    args = memdlm.build_parser().parse_args([*QUICK, *map(str, arguments)])
    model, _ = memdlm.pretrain(args, 0, copied / "seed0", "cpu")
    return model.embedding.weight.detach()


@pytest.mark.parametrize("setting", [("--pretrain-batch", 4), ("--pretrain-lr", "1e-3"), ("--length", 80), ("--steps", 9)])
def test_every_pretraining_setting_decides_whether_a_base_fits(copied, setting):
    """Batch size, learning rate and length of the pretraining are part of what the base is; the fine-tuning is not."""
    same = torch.equal(base_after(copied), base_after(copied, *setting))
    assert same == (setting[0] == "--steps")


def test_changed_data_makes_a_new_base(copied, monkeypatch):
    """The generators are part of what the base is: with another filler it is not reused."""
    before = base_after(copied)
    monkeypatch.setattr(data, "FILLER", data.FILLER[::-1])
    assert not torch.equal(before, base_after(copied))


def test_bases_takes_over_a_finished_base(finished, quick, tmp_path):
    """--bases DIR: the same as pretraining here, without the work."""
    train(*QUICK, "--out", tmp_path / "own")
    assert same_weights(tmp_path / "own", quick)
    assert numbers(read(tmp_path / "own")) == numbers(read(quick))
    assert read(quick)["seconds"]["base"] == load_model(finished / "seed0" / "base.safetensors")[1]["seconds"]


def test_bases_refuses_what_does_not_fit(finished, copied, tmp_path, refused):
    """Another setting, an unfinished base, a missing one or a missing seed: refused before any work, nothing lost."""
    before = contents(copied)
    assert "pretrain_steps" in refused(
        memdlm.main, *QUICK, "--pretrain-steps", 7, "--bases", finished, "--out", copied
    ).replace("-", "_")
    assert "nowhere" in refused(memdlm.main, *QUICK, "--bases", tmp_path / "nowhere", "--out", copied)
    assert "seed5" in refused(memdlm.main, *QUICK, "--seed", 5, "--bases", finished, "--out", copied)
    unfinished = tmp_path / "unfinished" / "seed0" / "base.safetensors"
    loaded, meta = memdlm.load_checkpoint(finished / "seed0" / "base.safetensors")
    save_checkpoint(unfinished, loaded, {**meta, "done": False})
    assert "not finished" in refused(memdlm.main, *QUICK, "--bases", tmp_path / "unfinished", "--out", copied)
    assert contents(copied) == before


# ---- bad input ----------------------------------------------------------------------------------------------------------


def jsonl(*records) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


PAIR = {"prompt": "Question: who? Answer:", "response": " Mary."}
BAD_ARGUMENTS = {
    "no --tiny": ("", "--tiny"),
    "unknown flag": ("--tiny --wings 2", "--wings"),
    "abbreviated flag": ("--tiny --pretrain-step 3", "--pretrain-step"),
    "stray word": ("--tiny now", "now"),
    "flag without a value": ("--tiny --steps", "--steps"),
    "unknown task": ("--tiny --tasks mv chess", "chess"),
    "no task": ("--tiny --tasks", "--tasks"),
    "unknown pads": ("--tiny --pads maybe", "--pads"),
    "unknown scope": ("--tiny --memory-scope world", "--memory-scope"),
    "unknown write rule": ("--tiny --write poem", "--write"),
    "no samples": ("--tiny --samples 0", "--samples"),
    "no steps": ("--tiny --steps 0", "--steps"),
    "no pretraining": ("--tiny --pretrain-steps 0", "--pretrain-steps"),
    "half a step": ("--tiny --steps 1.5", "--steps"),
    "too few examples": ("--tiny --examples 3", "--examples"),
    "too small a pretraining batch": ("--tiny --pretrain-batch 3", "--pretrain-batch"),
    "empty batch": ("--tiny --batch 0", "--batch"),
    "no seeds": ("--tiny --seeds 0", "--seeds"),
    "negative seed": ("--tiny --seed -1", "--seed"),
    "enormous seed": ("--tiny --seed 99999999999999999999999", "--seed"),
    "lr not a number": ("--tiny --lr nan", "--lr"),
    "lr infinite": ("--tiny --lr inf", "--lr"),
    "lr negative": ("--tiny --lr -1", "--lr"),
    "lr a word": ("--tiny --lr fast", "--lr"),
    "too much noise": ("--tiny --noise 2", "--noise"),
    "too short": ("--tiny --length 10", "--length"),
    "too long": ("--tiny --lengths 96 100000", "--lengths"),
    "dropout of everything": ("--tiny --lora-dropout 1", "--lora-dropout"),
    "memory without rank": ("--tiny --memory-rank 0", "--memory-rank"),
    "memory nowhere": ("--tiny --memory-fraction 0", "--memory-fraction"),
    "pre-anchor before the anchor": ("--tiny --start-scale 0.5", "--start-scale"),
    "superscript digit": ("--tiny --steps ²", "--steps"),
    "two minus signs": ("--tiny --steps --5", "--steps"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_get_one_line_and_lose_nothing(copied, refused, name):
    """One line that names the flag, exit code 2, and the run that is there keeps every byte."""
    arguments, named = BAD_ARGUMENTS[name]
    before = contents(copied)
    assert named in refused(memdlm.main, "--out", copied, *arguments.split())
    assert contents(copied) == before


BAD_DATA = {
    "not JSON": (jsonl(PAIR, "{oops"), "line 2"),
    "missing key": (jsonl(PAIR, PAIR, {"prompt": "a"}), "line 3"),
    "not a string": (jsonl({"prompt": "a", "response": 4}), "line 1"),
    "empty response": (jsonl(PAIR, {"prompt": "a", "response": ""}), "line 2"),
    "over the limit": (jsonl({"prompt": "x" * 100, "response": "b"}), "--max-length 50"),
    "no pairs": ("\n", "no examples"),
    "missing file": (None, "pairs.jsonl"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_any_work(copied, tmp_path, refused, name):
    """The whole file is checked first: no base is trained for it, and the run that is there keeps every byte."""
    content, named = BAD_DATA[name]
    path, fresh = tmp_path / "pairs.jsonl", tmp_path / "fresh"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    before = contents(copied)
    for out in (copied, fresh):
        message = refused(memdlm.main, *QUICK, "--max-length", 50, "--data", path, "--out", out)
        assert named in message
        assert str(path) in message
    assert contents(copied) == before
    assert not list(fresh.rglob("*.safetensors"))


def foreign_checkpoint(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("I am not a checkpoint.\nReally not.\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "other safetensors":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "other metadata":
        save_file({"weight": torch.zeros(3)}, path, {"json": "[1, 2]"})
    elif kind == "other tensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({"model.embedding.weight": torch.zeros(3)}, path, metadata)


@pytest.mark.parametrize("kind", ["text", "empty", "cut short", "other safetensors", "other metadata", "other tensors"])
def test_a_foreign_checkpoint_is_named(copied, refused, tmp_path, kind):
    """Whatever lies under a checkpoint's name: one line with that name from each program, and nothing is overwritten."""
    path = copied / "seed0" / "base.safetensors"
    foreign_checkpoint(path, kind)
    before = contents(copied)
    assert "base.safetensors" in refused(memdlm.main, *QUICK, "--out", copied)
    assert "base.safetensors" in refused(sample.main, "--run", copied, "--model", "base", "--prompt", PROMPT)
    assert "base.safetensors" in refused(eval_niah.main, "--run", copied, "--out", tmp_path / "eval")
    assert contents(copied) == before


def test_an_output_that_cannot_be_written_is_named_before_any_work(quick, tmp_path, refused):
    """A folder that cannot exist (under a regular file) is found out at the start."""
    (tmp_path / "file").write_text("I am in the way.")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        began = time.monotonic()
        assert str(out) in refused(memdlm.main, *QUICK, "--pretrain-steps", 100000, "--out", out)
        assert str(out) in refused(eval_niah.main, "--run", quick, "--out", out)
        assert time.monotonic() - began < 5
    assert (tmp_path / "file").read_text() == "I am in the way."


def test_resume_needs_a_run(tmp_path, refused):
    """--resume in an empty or missing folder is an error, not a new run."""
    for out in (tmp_path, tmp_path / "missing"):
        assert str(out) in refused(memdlm.main, *QUICK, "--out", out, "--resume")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}"])
def test_a_foreign_config_is_refused(tmp_path, refused, content):
    """A config.json that no run has written: one line from each program."""
    (tmp_path / "config.json").write_text(content)
    refused(memdlm.main, *QUICK, "--out", tmp_path, "--resume")
    refused(sample.main, "--run", tmp_path, "--prompt", PROMPT)
    refused(eval_niah.main, "--run", tmp_path, "--out", tmp_path / "eval")


@pytest.mark.parametrize(
    "flag", ["--steps 5", "--lr 0.5", "--memory-scope batch", "--tasks mv vt", "--seeds 2", "--write paper"]
)
def test_resume_with_another_setting_names_the_flag(copied, refused, flag):
    """A run goes on with the settings it was started with, or not at all."""
    before = contents(copied)
    message = refused(memdlm.main, *QUICK, *flag.split(), "--out", copied, "--resume")
    assert flag.split()[0] in message
    assert contents(copied) == before


def test_resume_with_changed_data_is_refused(finished, copied, tmp_path, refused):
    """The same --data path with other pairs in it is not the run that was started."""
    path, arguments = tmp_path / "pairs.jsonl", [*QUICK, "--data", tmp_path / "pairs.jsonl", "--out", copied]
    path.write_text(jsonl(*[{"prompt": f"{i}?", "response": f" {i}."} for i in range(10)]))
    train(*arguments)
    (copied / "seed0" / "results.json").unlink()
    path.write_text(jsonl(*[{"prompt": f"{i}?", "response": f" {9 - i}."} for i in range(10)]))
    assert "--resume" in refused(memdlm.main, *arguments, "--resume")


def test_an_absent_device_is_named(quick, tmp_path, refused):
    """No machine has both kinds of GPU, so one of the two can always be asked for in vain."""
    absent = "mps" if torch.cuda.is_available() else "cuda"
    assert f"--device {absent}" in refused(memdlm.main, *QUICK, "--device", absent, "--out", tmp_path / "run")
    assert f"--device {absent}" in refused(sample.main, "--run", quick, "--prompt", PROMPT, "--device", absent)
    assert f"--device {absent}" in refused(eval_niah.main, "--run", quick, "--out", tmp_path / "eval", "--device", absent)
    assert not list(tmp_path.iterdir())


def test_the_real_commands_refuse_in_one_line(tmp_path):
    """The same as a process: nothing but the one line on stderr, nothing on stdout."""
    commands = [
        start("memdlm.py", "--tiny", "--out", tmp_path / "run", "--samples", 0),
        start("sample.py", "--run", tmp_path / "none", "--prompt", PROMPT),
    ]
    for process in commands:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors


# ---- sample.py -----------------------------------------------------------------------------------------------------------


def say(capsys, run: Path, *arguments) -> list[str]:
    capsys.readouterr()
    sample.main(["--run", str(run), "--prompt", PROMPT, *map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out.rstrip("\n").split("\n")


def test_sample_shows_each_step_and_the_answer(quick, capsys):
    """One line before the first and after each pass, one mask fewer in each, then the answer; --quiet leaves the answer."""
    lines = say(capsys, quick, "--length", 6)
    assert [line.count("_") for line in lines[:-1]] == [6, 5, 4, 3, 2, 1, 0]
    assert say(capsys, quick, "--length", 6, "--quiet") == lines[-1:]


def test_sample_steps_and_blocks(quick, capsys):
    """--steps 2 commits half each time; blocks are finished from left to right; --threshold 0 commits all at once."""
    assert [line.count("_") for line in say(capsys, quick, "--length", 8, "--steps", 2)[:-1]] == [8, 4, 0]
    lines = say(capsys, quick, "--length", 8, "--block-length", 4)[:-1]
    assert all(line.endswith(" _ _ _ _") for line in lines[:5])
    assert lines[4].count("_") == 4
    assert [line.count("_") for line in say(capsys, quick, "--length", 8, "--threshold", 0)[:-1]] == [8, 0]


def test_sample_is_reproducible_and_its_flags_matter(quick, finished, capsys):
    """The same words for the same flags; temperature, guidance, memory, model and seed each lead elsewhere."""
    plain = say(capsys, quick, "--length", 12)
    assert say(capsys, quick, "--length", 12) == plain
    hot = say(capsys, quick, "--length", 12, "--temperature", 3)
    assert hot != plain
    assert say(capsys, quick, "--length", 12, "--temperature", 3) == hot
    assert say(capsys, quick, "--length", 12, "--model", "base") != plain
    assert say(capsys, finished, "--length", 12, "--seed", 1) != say(capsys, finished, "--length", 12, "--seed", 0)
    for flags in (["--memory"], ["--cfg-scale", 1.5]):
        assert len(say(capsys, quick, "--length", 12, *flags)) == len(plain)


def test_a_typed_mask_in_a_prompt_stays_text(quick, capsys, monkeypatch):
    """ "<|mask|>" in --prompt reaches the model as bytes: the only masks in its input are the answer's."""
    seen, generate = [], sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda model, prompts, *a, **k: seen.append(prompts) or generate(model, prompts, *a, **k)
    )
    sample.main(["--run", str(quick), "--prompt", "<|mask|> <|endoftext|>", "--length", "4", "--memory", "--quiet"])
    assert data.TOKENIZER.decode(seen[0][0].tolist()) == " <|mask|> <|endoftext|>"
    assert seen[0].max() < data.EOS


BAD_SAMPLES = {
    "no run": ("--run {tmp} --prompt x", "{tmp}"),
    "no prompt flag": ("--run {run}", "--prompt"),
    "no run flag": ("--prompt x", "--run"),
    "missing seed": ("--run {run} --prompt x --seed 7", "seed7"),
    "unknown model": ("--run {run} --prompt x --model gpt", "--model"),
    "no tokens": ("--run {run} --prompt x --length 0", "--length"),
    "too many tokens": ("--run {run} --prompt x --length 513", "--length"),
    "fewer steps than blocks": ("--run {run} --prompt x --length 16 --block-length 4 --steps 3", "--steps"),
    "no block": ("--run {run} --prompt x --block-length 0", "--block-length"),
    "cold": ("--run {run} --prompt x --temperature -1", "--temperature"),
    "guidance nan": ("--run {run} --prompt x --cfg-scale nan", "--cfg-scale"),
    "threshold over one": ("--run {run} --prompt x --threshold 2", "--threshold"),
    "abbreviated": ("--run {run} --prompt x --mem", "--mem"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_requests_to_sample_get_one_line(quick, tmp_path, refused, name):
    """The line names the flag or the folder at fault."""
    arguments, named = (text.format(run=quick, tmp=tmp_path) for text in BAD_SAMPLES[name])
    assert named in refused(sample.main, *arguments.split())


@pytest.mark.parametrize(("prompt", "count"), [("", 0), ("x" * 4097, 4098), ("é" * 2049, 4099)])
def test_a_prompt_that_is_empty_or_too_long_is_refused(quick, refused, prompt, count):
    """The limit is the run's --max-length, in tokens; the message says how many there are."""
    assert str(count) in refused(sample.main, "--run", quick, "--prompt", prompt)


# ---- eval_niah.py --------------------------------------------------------------------------------------------------------


def test_eval_scores_a_run_at_other_lengths(finished, tmp_path, capsys, pictures):
    """Both seeds, the asked tasks and lengths, all four rows; the run itself is left as it was."""
    before, out = contents(finished), tmp_path / "eval"
    arguments = "--tasks vt babi --lengths 80 --samples 3 --device cpu".split()
    eval_niah.main(["--run", str(finished), "--out", str(out), *arguments])
    records = read(out)["niah"]
    cells = [(m, task, 80, 3, seed) for m in METHODS for task in ("vt", "babi") for seed in (0, 1)]
    assert sorted((r["method"], r["task"], r["length"], r["n"], r["seed"]) for r in records) == sorted(cells)
    assert (out / "niah.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "MemDLM (Train & Inference)" in table
    assert table.strip() in capsys.readouterr().out
    assert contents(finished) == before


def test_eval_repeats_the_runs_own_scores(finished, tmp_path):
    """With the run's tasks, lengths and samples the scores of its results.json come out again."""
    eval_niah.main(["--run", str(finished), "--out", str(tmp_path / "eval"), "--device", "cpu"])
    assert read(tmp_path / "eval")["niah"] == read(finished)["niah"]


def test_eval_can_write_the_prompt_otherwise(quick, tmp_path):
    """The five --write flags of an evaluation replace the run's; rows without a memory keep their scores."""
    other = "--write paper --write-lr 3 --write-rank 2 --write-passes 1 --anchor-ratio 0.9".split()
    eval_niah.main(["--run", str(quick), "--out", str(tmp_path), "--tasks", "mv", "--device", "cpu", *other])
    found = read(tmp_path)
    assert found["config"]["write"] == "paper"
    assert [found["config"][key] for key in ("write_lr", "write_rank", "write_passes", "anchor_ratio")] == [3, 2, 1, 0.9]
    for method in METHODS[:3]:
        assert only(found["niah"], method=method) == only(read(quick)["niah"], method=method)


def test_eval_compares_two_runs_seed_by_seed(finished, quick, tmp_path, capsys, refused):
    """--compare RUN:METHOD RUN:METHOD: the paired difference by length, worked out here again, and what each has learnt."""
    better = Path(shutil.copytree(finished, tmp_path / "better"))
    results = read(better)
    for record in results["niah"]:
        record["score"] = 0.75 if record["seed"] else 0.5
    (better / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    eval_niah.main(["--compare", f"{better}:memdlm_train", f"{finished}:mdlm"])
    printed = capsys.readouterr().out
    plain = {seed: only(read(finished)["niah"], method="mdlm", length=64, seed=seed) for seed in (0, 1)}
    gains = [score - sum(r["score"] for r in plain[seed]) / len(plain[seed]) for seed, score in ((0, 0.5), (1, 0.75))]
    assert f"{sum(gains) / 2:+.3f}" in printed
    assert "training loss without memory" in printed
    assert "--compare" in refused(eval_niah.main, "--compare", f"{finished}:gpt", f"{finished}:mdlm")
    assert "none" in refused(eval_niah.main, "--compare", f"{tmp_path / 'none'}:mdlm", f"{finished}:mdlm")
    assert "--run" in refused(eval_niah.main, "--out", tmp_path / "eval")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--lengths 10", "--lengths"),
        ("--lengths 96 nine", "--lengths"),
        ("--tasks chess", "chess"),
        ("--samples 0", "--samples"),
        ("--length 96", "--length"),
        ("--run {tmp}", "{tmp}"),
    ],
)
def test_bad_requests_to_eval_get_one_line(quick, tmp_path, refused, arguments, named):
    """Refused before anything is written."""
    out = tmp_path / "eval"
    assert named.format(tmp=tmp_path) in refused(
        eval_niah.main, "--run", quick, "--out", out, *arguments.format(tmp=tmp_path).split()
    )
    assert not out.exists()


def test_eval_of_an_unfinished_run_loses_no_earlier_table(copied, tmp_path, refused):
    """A checkpoint is missing: one line, and the results of an earlier evaluation in --out stay."""
    out = tmp_path / "eval"
    eval_niah.main(["--run", str(copied), "--out", str(out), "--tasks", "mv", "--device", "cpu"])
    before = contents(out)
    (copied / "seed0" / "memdlm.safetensors").unlink()
    assert "memdlm.safetensors" in refused(eval_niah.main, "--run", copied, "--out", out, "--tasks", "mv")
    assert contents(out) == before


def test_eval_does_not_overwrite_the_run(copied):
    """--out the run's own folder: whatever happens, results.json keeps the run's losses and exposure bias."""
    before = read(copied)
    with pytest.raises(SystemExit) as stop:
        eval_niah.main(["--run", str(copied), "--out", str(copied), "--tasks", "mv", "--device", "cpu"])
    assert stop.value.code == 2
    assert read(copied) == before


# ---- what each flag changes ----------------------------------------------------------------------------------------------

MDLM, MEMDLM, INFERENCE = "Standard MDLM's weights", "MemDLM's weights", "reading with memory"
BOTH = {MDLM, MEMDLM, INFERENCE}
INNER = {MEMDLM, INFERENCE}
EFFECTS = [
    ("--noise 0", BOTH),
    ("--pads ignore", BOTH),
    ("--batch 2", BOTH),
    ("--examples 4", BOTH),
    ("--steps 4", BOTH),
    ("--lr 1e-2", BOTH),
    ("--warmup 1", BOTH),
    ("--clip 0.0001", BOTH),
    ("--lora-rank 4", BOTH),
    ("--memory-rank 4 --memory-alpha 8", INNER),
    ("--memory-alpha 64", INNER),
    ("--memory-lr 0.1", INNER),
    ("--memory-clip 0.001", INNER),
    ("--memory-fraction 1", INNER),
    ("--memory-scope batch", INNER),
    ("--start-scale 3", INNER),
    ("--write paper", {INFERENCE}),
    ("--write-lr 0.1", {INFERENCE}),
    ("--write-rank 4", {INFERENCE}),
    ("--write-passes 1", {INFERENCE}),
    ("--save-every 1", set()),
    ("--anchor-ratio 0.9", set()),  # without --write paper there is no such anchor
]


OF_THE_TASKS = ("--noise", "--examples")  # the other flags are tried on a few short pairs, which is much faster


def effect_of(finished: Path, out: Path, flags: str) -> dict:
    """One seed without pictures -> the two fine-tunings' losses, and what the exposure bias says with memory."""
    arguments = [*QUICK, "--steps", "2", *flags.split(), "--bases", str(finished), "--out", str(out)]
    if not flags.startswith(OF_THE_TASKS):
        out.mkdir(parents=True, exist_ok=True)
        pairs = [{"prompt": f"{i}{i}. Who? Answer:", "response": " Mary went home." * (1 + i % 3)} for i in range(10)]
        (out / "pairs.jsonl").write_text(jsonl(*pairs))
        arguments += ["--data", str(out / "pairs.jsonl")]
    result = memdlm.run_seed(memdlm.build_parser().parse_args(arguments), 0, "cpu")
    last = max(record["step"] for record in result["loss"])
    final = {m: only(result["loss"], method=m, step=last)[0]["train_without_memory"] for m in ("mdlm", "memdlm")}
    reading = [(r["static"], r["sequential"]) for r in only(result["exposure_bias"], method="memdlm_train_inference")]
    return {MDLM: final["mdlm"], MEMDLM: final["memdlm"], INFERENCE: reading}


@pytest.fixture(scope="session")
def usual_effects(finished, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("runs")
    return {own: effect_of(finished, out / str(own), "" if own else "--noise 0.5") for own in (True, False)}


@pytest.mark.parametrize(("flags", "changed"), EFFECTS, ids=[flags for flags, _ in EFFECTS])
def test_each_flag_changes_what_it_says_and_nothing_else(finished, usual_effects, tmp_path, flags, changed):
    """Settings of the inner loop leave Standard MDLM alone, those of the writing leave all weights alone, and so on."""
    effect, usual = effect_of(finished, tmp_path, flags), usual_effects[not flags.startswith(OF_THE_TASKS)]
    assert {key for key in effect if effect[key] != usual[key]} == changed


def test_the_anchor_ratio_belongs_to_the_papers_rule(finished, tmp_path):
    """With --write paper the share of the prompt that is masked decides what is written."""
    one, other = (effect_of(finished, tmp_path / r, f"--write paper --anchor-ratio {r}") for r in ("0.1", "0.9"))
    assert one[INFERENCE] != other[INFERENCE]
    assert one[MEMDLM] == other[MEMDLM]


def test_a_memory_clip_of_zero_switches_clipping_off(finished, tmp_path):
    """0 is no clipping (and not a clip to nothing): the same as a clip that no gradient reaches."""
    off, high, low = (effect_of(finished, tmp_path / c, f"--memory-clip {c}") for c in ("0", "1e9", "0.001"))
    assert off == high
    assert off != low


LORA = "--lora-rank 4 --lora-alpha 8 --lora-dropout 0.1".split()


def test_an_outer_lora_trains_nothing_else(finished, tmp_path, capsys):
    """--lora-rank: the backbone stays the base's, bit for bit; the LoRA's B leaves zero; sample.py can load the result."""
    out = tmp_path / "run"
    train(*QUICK, *LORA, "--bases", finished, "--out", out)
    base = load_file(out / "seed0" / "base.safetensors")
    for name in ("mdlm", "memdlm"):
        tuned = load_file(out / "seed0" / f"{name}.safetensors")
        assert all(torch.equal(tuned[key], value) for key, value in base.items())
        added = {key: value for key, value in tuned.items() if key not in base}
        assert added
        assert all("lora" in key and 4 in value.shape for key, value in added.items())
        assert all(value.abs().max() > 0 for value in added.values())
    assert say(capsys, out, "--length", 3, "--quiet")


def test_a_run_with_dropout_is_reproducible_and_resumable(finished, tmp_path, monkeypatch):
    """Dropout draws random numbers too: they must come from the seed and the step, not from the process's past."""
    arguments = [*QUICK, *LORA, "--lora-dropout", 0.5, "--save-every", 1, "--bases", finished]
    for name in ("one", "two"):
        torch.rand(int(name == "two"))  # whatever happened before in this process
        train(*arguments, "--out", tmp_path / name)
    assert same_weights(tmp_path / "one", tmp_path / "two")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(StoppedError):
            train(*arguments, "--out", tmp_path / "stopped")
    train(*arguments, "--out", tmp_path / "stopped", "--resume")
    assert same_weights(tmp_path / "one", tmp_path / "stopped")


def test_the_outer_loras_settings_matter(finished, tmp_path):
    """--lora-alpha and --lora-dropout reach the model."""
    flags = ("--lora-dropout 0", "--lora-dropout 0.9", "--lora-dropout 0 --lora-alpha 1")
    found = [effect_of(finished, tmp_path / str(i), f"--lora-rank 4 {extra}")[MDLM] for i, extra in enumerate(flags)]
    assert len(set(found)) == 3


def test_own_data_replaces_the_fine_tuning_set(finished, tmp_path):
    """--data: trained on 19 of 20 pairs, measured on the one held out; another file leads to other weights."""
    outs = []
    for name, answer in (("a", " Mary."), ("b", " John went home.")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(jsonl(*[{"prompt": f"{i}. Who? Answer:", "response": answer * (1 + i % 2)} for i in range(20)]))
        outs.append(tmp_path / name)
        train(*QUICK, "--data", path, "--bases", finished, "--out", outs[-1])
        args = memdlm.build_parser().parse_args([*QUICK, "--data", str(path)])
        kept, held_out = memdlm.fine_tuning_data(args, 0)
        assert (len(kept), len(held_out)) == (19, 1)
        assert sorted(kept + held_out) == sorted(data.read_jsonl(path, 4096))
        assert all(math.isfinite(r["eval_without_memory"]) for r in read(outs[-1])["loss"])
    assert not same_weights(*outs)


def test_one_pair_is_enough(finished, tmp_path):
    """A file with a single pair trains on it; there is nothing to hold out."""
    path = tmp_path / "one.jsonl"
    path.write_text(jsonl(PAIR))
    train(*QUICK, "--data", path, "--bases", finished, "--out", tmp_path / "run")
    assert read(tmp_path / "run")["niah"]


# ---- numbers that are not finite -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_skipped_counted_and_shown(tmp_path, monkeypatch, capsys):
    """Bad steps in each phase: those updates alone are left out, the summary counts them, everything saved is finite."""
    bad = {"base": {1: math.nan, 4: -math.inf}, "mdlm": {0: math.inf}, "memdlm": {2: math.nan}}

    def spoil(name: str):
        method, calls = memdlm.METHODS[name], []

        def spoilt(*arguments):
            calls.append(name)
            return method(*arguments) * bad[name].get(len(calls) - 1, 1)

        monkeypatch.setitem(memdlm.METHODS, name, spoilt)

    for name in bad:
        spoil(name)
    train(*QUICK, "--out", tmp_path)
    assert str({"base": 2, "mdlm": 1, "memdlm": 1}) in capsys.readouterr().out
    assert all(t.isfinite().all() for part in tensors(tmp_path).values() for t in part.values())
    assert read(tmp_path)["niah"]


def test_an_absurd_learning_rate_never_saves_what_is_not_finite(finished, tmp_path, capsys):
    """After such a step every loss is nan or infinite: all later updates are skipped, and results.json stays JSON."""
    train(*QUICK, "--lr", "1e30", "--bases", finished, "--out", tmp_path)
    assert all(t.isfinite().all() for part in tensors(tmp_path).values() for t in part.values())
    assert re.search(r"skipped.*'mdlm': [1-9]", capsys.readouterr().out)
    assert read(tmp_path)["loss"]


def test_an_inner_loss_that_is_not_finite_leaves_the_memory_alone(finished):
    """--memory-lr 1e30 blows the memory up in stage 1; stage 2 and the outer step then do nothing, and say so."""
    model, _ = load_model(finished / "seed0" / "base.safetensors")
    batch = data.collate(data.make_examples("mv", 4, 64, 0))
    memory = memdlm.Memory(rank=4, lr=1e30, clip=0.0, scope="sample")
    loss = memdlm.memory_method(model, batch, memory, memdlm.generator_for(0))
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    applied = memdlm.train_step(model, optimizer, loss, 1.0)
    assert applied == any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())


# ---- leak-free -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def talkative() -> Transformer:
    """Random weights of some size, so that answers vary from prompt to prompt, and with what was written."""
    model, generator = Transformer(Config(data.VOCAB_SIZE)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3, generator=generator)
    return model


def garbage(examples: list[data.Example]) -> list[data.Example]:
    rng = random.Random(0)
    return [e._replace(response=[rng.randrange(data.EOS) for _ in e.response]) for e in examples]


def scored_by_letters(examples: list[data.Example]) -> list[data.Example]:
    """References that even nonsense contains now and then: the score becomes a function of the whole answer."""
    return [e._replace(references=tuple("abcdefghijklmnop .=0123456789")) for e in examples]


@pytest.mark.parametrize("rule", sample.WRITE_RULES)
def test_no_evaluation_sees_the_answers(talkative, monkeypatch, rule):
    """Scores of all four rows stay the same when every answer is replaced by garbage of its length (references kept)."""
    write = sample.Write(rule, memdlm.Memory(rank=8, alpha=16.0, lr=1.0, fraction=0.5, scope="sample"), passes=2, window=64)
    models, make, texts = {"base": talkative, "mdlm": talkative, "memdlm": talkative}, data.make_examples, []
    plain = eval_niah.answer

    def recorded(*arguments):
        texts.append(plain(*arguments))
        return texts[-1]

    monkeypatch.setattr(eval_niah, "answer", recorded)
    records = []
    for change in (scored_by_letters, lambda examples: garbage(scored_by_letters(examples))):
        monkeypatch.setattr(data, "make_examples", lambda *a, change=change: change(make(*a)))
        records.append(eval_niah.score_cells(models, ["mv", "vt"], [64, 96], 6, 0, write))
    assert records[0] == records[1]
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    without, with_memory = (only(records[0], method=m) for m in METHODS[2:])
    assert [r["score"] for r in without] != [r["score"] for r in with_memory]  # or memory did nothing here at all
    assert len({r["score"] for r in records[0]}) > 4


@pytest.mark.parametrize("rule", sample.WRITE_RULES)
def test_exposure_bias_writes_the_prompt_alone(talkative, monkeypatch, rule):
    """The memory under which true tokens are scored is the same when these tokens are replaced by garbage."""
    write = sample.Write(rule, memdlm.Memory(rank=8, alpha=16.0, lr=1.0, fraction=0.5, scope="sample"), passes=2, window=64)
    make, write_prompt, written = data.make_examples, sample.write_prompt, []
    monkeypatch.setattr(sample, "write_prompt", lambda *a, **k: written.append(write_prompt(*a, **k)) or written[-1])
    records = []
    for change in (list, garbage):
        monkeypatch.setattr(data, "make_examples", lambda *a, change=change: change(make(*a)))
        records.append(eval_niah.exposure_bias({"memdlm": talkative}, ["mv"], 64, 4, 0, write, steps=2))
    one, other = (fast.weights for fast in written)
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name]))
    assert any(B.abs().max() > 0 for _, B in one.values())
    assert records[0] != records[1]  # the tokens that are scored did change


# ---- the command line itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [memdlm, sample, eval_niah])
def test_every_flag_is_explained_and_tested(module):
    """Each flag has a help text, and its name occurs in these tests: no flag that nothing covers."""
    tested = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py")))
    for action in module.build_parser()._actions:
        (*_, flag) = action.option_strings
        assert action.help, flag
        assert flag == "--help" or re.search(rf"{flag}(?![\w-])", tested), f"{flag} is not tested"


@pytest.mark.parametrize("module", [memdlm, sample, eval_niah])
def test_help_lists_every_flag(module, capsys):
    """--help prints all flags with their defaults and exits with 0."""
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(action.option_strings[-1] in printed for action in module.build_parser()._actions)
