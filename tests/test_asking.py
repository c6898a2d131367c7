"""
test_asking.py: questions put to a run's models. Whatever stops an evaluation, it ends with the files of one that nothing has
stopped; an answer costs what its schedule says, and depends on its own question alone.
"""

import json
import random
import shutil
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from running import METHODS, StoppedError, contents, jsonl, lines_of, only, read, start
from slow import sharpened

import data
import eval_niah
import sample
from eval_niah import Cell, Predictions, Row
from memdlm import Memory, load_checkpoint
from model import save_checkpoint
from sample import Write

WORK = "--tasks mv qa1 --lengths 64 80 --samples 5".split()  # 4 groups of 5 questions for each row
GENUINE = eval_niah.METRICS["ruler"]


@pytest.fixture(scope="module", autouse=True)
def marked_by_letters():
    """Random models are never right. Marked by their letters, their scores differ wherever their answers do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            eval_niah.METRICS, "ruler", lambda question, text: float(np.mean([c in text for c in "abdeilmorst. 0123"]))
        )
        yield


@pytest.fixture(scope="module")
def lively(quick, tmp_path_factory) -> Path:
    """A run whose models are random, so that their answers differ from prompt to prompt. Nobody writes into it."""
    run = Path(shutil.copytree(quick, tmp_path_factory.mktemp("runs") / "lively"))
    for seed, name in enumerate(eval_niah.CHECKPOINTS):
        tensors, meta = load_checkpoint(run / "seed0" / f"{name}.safetensors")
        generator = torch.Generator().manual_seed(seed)
        noise = {key: 0.3 * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t for key, t in tensors.items()}
        save_checkpoint(run / "seed0" / f"{name}.safetensors", noise, meta)
    return run


@pytest.fixture(scope="module")
def bias(tmp_path_factory) -> list:
    """Flags that also measure the exposure bias, on two pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text(jsonl({"prompt": "who?", "response": " Mary went home."}, {"prompt": "what?", "response": " lamp"}))
    return ["--exposure-bias", "--data", path, "--bias-steps", 3]


def ask(run: Path, out: Path, *flags) -> None:
    eval_niah.main([str(argument) for argument in ("--run", run, "--out", out, "--device", "cpu", *flags)])


@pytest.fixture(scope="module")
def unbroken(lively, bias, tmp_path_factory) -> Path:
    """An evaluation that nothing stopped: 4 settings, 80 answers, 8 walks. Nobody writes into it."""
    out = tmp_path_factory.mktemp("eval") / "unbroken"
    torch.set_num_threads(1)
    ask(lively, out, *WORK, *bias)
    return out


@pytest.fixture
def begun(unbroken, tmp_path) -> Path:
    """A copy of this test's own."""
    return Path(shutil.copytree(unbroken, tmp_path / "begun"))


def answers_of(out: Path) -> dict[tuple, dict]:
    return {tuple(line[key] for key in eval_niah.KEY): line for line in lines_of(out) if "settings" not in line}


def final(out: Path) -> dict:
    """All files that an evaluation leaves, byte for byte but for those seconds."""
    return contents(out) | {"predictions.jsonl": lines_of(out)}


def test_answers_differ_where_they_should(unbroken):
    """Else what follows would see nothing: rows differ from each other, questions too, and no two scores of a cell agree."""
    texts = {key: line.get("prediction") for key, line in answers_of(unbroken).items() if key[1] != eval_niah.BIAS}
    assert len(texts) == 80
    assert len(set(texts.values())) > 70
    for cell in [("mv", 64), ("qa1", 80)]:
        scores = [record["score"] for record in read(unbroken)["niah"] if (record["task"], record["length"]) == cell]
        assert len(set(scores)) == len(scores) == 4


# ---- stopped and started again ---------------------------------------------------------------------------------------------


def stop_after(monkeypatch, lines: int, torn: bool) -> None:
    """Lets this many lines be appended and stops in place of the next: before it, or in the midst of it."""
    left, append = [lines], Predictions.append

    def stopping(self, records):
        for record in records:
            if not left[0]:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record)[: 50 * torn])
                raise StoppedError
            left[0] -= 1
            append(self, [record])

    monkeypatch.setattr(Predictions, "append", stopping)


def test_stopped_at_ten_places_it_ends_as_if_nothing_had_stopped_it(lively, bias, unbroken, tmp_path, monkeypatch, pictures):
    """Between two groups, between the lines of one and within a line, as a power cut does: the same answers in the same order,
    the same results and tables, and the same pictures."""
    out, places = tmp_path / "eval", []
    for stop in range(99):
        try:
            with monkeypatch.context() as patch:
                stop_after(patch, 9, torn=stop % 2 == 1)
                ask(lively, out, *WORK, *bias)
            break
        except StoppedError:
            written = (out / "predictions.jsonl").read_bytes()
            assert written.endswith(b"\n") == (stop % 2 == 0)
            assert not (out / "results.json").exists()
            places.append(written.count(b"\n"))
    assert places == list(range(9, 91, 9)), "4 lines of settings come first: 9 and 54 end a group, the others cut one"
    assert final(out) == final(unbroken)
    assert {"niah.png", "lengths.png", "exposure_bias.png", "table.md", "results.json"} <= contents(out).keys()


def test_kill_9_loses_no_answer(lively, tmp_path, monkeypatch):
    """As a process, killed at random moments while it writes; what is left is done here."""
    monkeypatch.setitem(eval_niah.METRICS, "ruler", GENUINE)
    out, rng, path = tmp_path / "killed", random.Random(5), tmp_path / "killed" / "predictions.jsonl"
    for low, high in ((1, 30), (31, 60)):
        process = start("eval_niah.py", "--run", lively, "--out", out, "--device", "cpu", *WORK)
        lines, deadline = rng.randint(low, high), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= lines:
                time.sleep(rng.uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
    assert path.read_bytes().count(b"\n") < 84
    ask(lively, out, *WORK)
    ask(lively, tmp_path / "whole", *WORK)
    assert final(out) == final(tmp_path / "whole")


def test_what_is_there_is_not_asked_again(lively, bias, unbroken, begun, monkeypatch):
    """Once more over a finished folder: no model answers, and every file stays."""

    def asked(*arguments, **options):
        raise AssertionError("asked again")

    monkeypatch.setattr(sample, "generate", asked)
    monkeypatch.setattr(eval_niah, "exposure_walk", asked)
    (begun / "results.json").unlink()
    ask(lively, begun, *WORK, *bias)
    assert contents(begun) == contents(unbroken)


def test_a_line_that_was_cut_off_is_dropped_and_its_answer_made_again(lively, bias, unbroken, begun):
    path = begun / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    ask(lively, begun, *WORK, *bias)
    assert final(begun) == final(unbroken)


@pytest.mark.parametrize(
    "damage",
    [b"{oops\n", b"5\n", b"[]\n", b"{}\n", b'{"task": "mv"}\n', b'{"method": "base"\n', b"\xff\xfe\n", b"\n", b"\0\0\0\n"],
)
def test_a_damaged_line_is_named(lively, bias, begun, refused, damage):
    """Before any work, and it is left for the user to look at: nothing is lost."""
    path = begun / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:6], damage, *lines[6:]]))
    before = contents(begun)
    said = refused(eval_niah.main, "--run", lively, "--out", begun, "--device", "cpu", *WORK, *bias)
    assert f"{path}, line 7 is damaged" in said
    assert contents(begun) == before


@pytest.mark.parametrize("where", ["opening", "writing"])
def test_a_full_disk_loses_nothing(lively, unbroken, tmp_path, monkeypatch, refused, where):
    """One line, exit code 2; with room again the same command goes on, whatever half of a line was written."""
    out, left = tmp_path / "eval", [5]

    def no_room(path, mode="r", **options):
        file = open(path, mode, **options)  # noqa: SIM115
        left[0] -= mode == "a"
        if left[0] > 0 or mode != "a":
            return file
        write, error = file.write, OSError(28, "No space left on device")
        if where == "opening":
            raise error

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, text: str):
                write(text[: len(text) // 2])
                raise error

        return Full()

    with monkeypatch.context() as patch:
        patch.setattr(eval_niah, "open", no_room, raising=False)
        said = refused(eval_niah.main, "--run", lively, "--out", out, "--device", "cpu", *WORK)
    assert str(out / "predictions.jsonl") in said
    assert "No space left on device" in said
    assert (out / "predictions.jsonl").read_bytes().count(b"\n") in (4 + 3 * 5, 4 + 3 * 5 + 2)
    ask(lively, out, *WORK)
    assert {key: line for key, line in answers_of(unbroken).items() if key[1] != eval_niah.BIAS} == answers_of(out)
    assert read(out)["niah"] == read(unbroken)["niah"]


# ---- answers to other questions, or of other models -----------------------------------------------------------------------

# Other settings -> what the one line says of the first answers that differ.
OTHER = {
    "--steps 3": "Base with steps None, not 3",
    "--block-length 2": "Base with block_length None, not 2",
    "--schedule dllm": "Base with schedule None, not 'dllm'",
    "--threshold 0.5": "Base with threshold None, not 0.5",
    "--samples 6": "Base with samples 5, not 6",
    "--bias-steps 4": "Base with bias_steps 3, not 4",
    "--max-length 12": "Base with max_length 4096, not 12",
    "--data {}": "Base with data '",
    "--write-lr 0.7": "MemDLM (Train & Inference) with write lr 0.5, not 0.7",
    "--run {}": "MemDLM (Train-Only) with weights '",
}


@pytest.mark.parametrize("flags", OTHER)
def test_answers_made_with_other_settings_are_not_taken_for_these(lively, bias, begun, tmp_path, refused, flags):
    """Nor are they overwritten: one line names what differs, and every file stays as it was."""
    other, before = tmp_path / "other", contents(begun)
    if flags == "--run {}":
        shutil.copytree(lively, other)
        shutil.copy(other / "seed0" / "mdlm.safetensors", other / "seed0" / "memdlm.safetensors")
    else:
        other.write_text(jsonl({"prompt": "who?", "response": " Mary went out."}))
    arguments = ["--run", lively, "--out", begun, "--device", "cpu", *WORK, *bias, *flags.replace("{}", str(other)).split()]
    said = refused(eval_niah.main, *arguments)
    assert f"{begun} holds answers of {OTHER[flags]}" in said
    assert "name another --out" in said
    assert contents(begun) == before


def test_answers_without_settings_are_refused(lively, bias, begun, refused):
    """Nobody can tell any more what they depend on."""
    path = begun / "predictions.jsonl"
    path.write_text("".join(line for line in path.open() if '"settings"' not in line))
    before = contents(begun)
    assert "name another --out" in refused(eval_niah.main, "--run", lively, "--out", begun, "--device", "cpu", *WORK, *bias)
    assert contents(begun) == before


def test_settings_without_an_answer_bind_nobody(lively, tmp_path, refused):
    """A request that could not be met leaves no trace that would keep the corrected one from this folder."""
    out = tmp_path / "eval"
    said = refused(eval_niah.main, "--run", lively, "--out", out, "--device", "cpu", *FEW, "--block-length", 2, "--steps", 2)
    assert "--steps must be at least" in said
    ask(lively, out, *FEW, "--block-length", 2, "--steps", 8)
    assert {line["steps"] for line in answers_of(out).values()} == {8}


def test_other_tasks_and_lengths_join_what_is_there(lively, unbroken, tmp_path, bias):
    """A cell's answers do not depend on which cells come before it, or on whether it was asked in the same call."""
    out = tmp_path / "eval"
    for cells in ("--tasks qa1 --lengths 80", "--tasks qa1 mv --lengths 80 64"):
        ask(lively, out, *WORK, *bias, *cells.split())
    assert answers_of(out) == answers_of(unbroken)
    assert sorted(map(str, read(out)["niah"])) == sorted(map(str, read(unbroken)["niah"]))
    assert read(out)["exposure_bias"] == read(unbroken)["exposure_bias"]


# ---- batches, checkpoints, passes ------------------------------------------------------------------------------------------


@pytest.fixture(params=list(sample.WRITE_RULES))
def write(request) -> Write:
    return Write(request.param, Memory(rank=3, alpha=6.0, lr=0.5, fraction=0.5, scope="sample"), window=30)


def test_answers_do_not_depend_on_how_many_are_asked_together(make_model, monkeypatch, write):
    """In groups of up to 32, in pairs or one by one: the same texts and scores, with a memory and without."""
    model, found, same_shape = sharpened(make_model()), [], eval_niah.same_shape
    rows = [Row("memdlm_train", "memdlm", None), Row("memdlm_train_inference", "memdlm", write)]
    for most in (32, 2, 1):
        monkeypatch.setattr(eval_niah, "same_shape", lambda questions, _, most=most: same_shape(questions, most))
        cells, predictions = [eval_niah.small_cell(task, 64, 1, 5) for task in ("vt", "qa2")], Predictions()
        assert max(len(group) for cell in cells for group in cell.groups) == min(most, 5)
        assert eval_niah.evaluate(rows, cells, lambda seed, name: model, predictions) == set()
        found.append({key: record | {"seconds": 0} for key, record in predictions.done.items()})
    assert found[0] == found[1] == found[2]
    assert len({record["prediction"] for record in found[0].values()}) > 10
    example = data.make_examples("vt", 5, 64, data.split_seed(1, "test"))[3]  # none that anything was trained on
    asked = data.Question("vt", example.prompt, len(example.response), example.references)
    for row in rows:
        (text,), _ = eval_niah.answer(model, [asked], row.write, 1, [3])
        assert found[0][row.method, "vt", 64, 1, 3]["prediction"] == text


def test_show_prints_the_first_seeds_prompt(capsys):
    """One for each task and length, though every seed has questions of its own."""
    cells = [eval_niah.small_cell(task, 64, seed, 2) for seed in (4, 5) for task in ("mv", "qa1")]
    eval_niah.show_prompts(cells)
    printed = capsys.readouterr().out
    assert printed.count("---- ") == 2
    for cell in cells[:2]:
        assert f"\n{data.decode(cell.first.prompt)}\n" in printed
    assert printed.index("---- mv 64") < printed.index("---- qa1 64")


def test_groups_hold_questions_of_one_shape():
    """Each question once, none with a longer neighbour: what is answered together needs no padding."""
    rng = random.Random(0)
    shapes = [(rng.randrange(3, 6), rng.randrange(1, 3)) for _ in range(50)]
    questions = [data.Question("mv", [0] * prompt, tokens, ()) for prompt, tokens in shapes]
    for most in (1, 4, 32):
        groups = eval_niah.same_shape(questions, most)
        assert sorted(i for group in groups for i in group) == list(range(50))
        assert all(len({shapes[i] for i in group}) == 1 and len(group) <= most for group in groups)


def test_checkpoints_are_opened_one_after_the_other():
    """Each once, though two rows share one; the one before is gone by then, as there may be room for one alone; and none is
    opened for what is answered already."""
    opened, alive = [], []

    def open_model(seed: int, name: str) -> torch.nn.Module:
        assert all(reference() is None for reference in alive), "two models at once"
        model = torch.nn.Linear(1, 1)
        opened.append((seed, name))
        alive.append(weakref.ref(model))
        return model

    def answered(model, row: Row, indices: list[int]) -> list[dict]:
        return [{"scores": {"ruler": 1.0}, "steps": 1} for _ in indices]

    rows = [Row(method, name, None) for method, (_, name, _) in eval_niah.ROWS.items()]
    rows.append(Row("base_inference", "base", None))
    cells = [Cell(task, 64, seed, [[0, 1], [2]], answered) for seed in (0, 1) for task in ("vt", "mv")]
    predictions = Predictions()
    predictions.add(rows[1], cells[0], [0, 1, 2], answered(None, rows[1], [0, 1, 2]))
    predictions.add(rows[1], cells[1], [0, 1, 2], answered(None, rows[1], [0, 1, 2]))
    eval_niah.evaluate(rows, cells, open_model, predictions)
    assert opened == [(0, "base"), (0, "memdlm"), (1, "base"), (1, "mdlm"), (1, "memdlm")]
    assert len(predictions.done) == 5 * 4 * 3
    eval_niah.evaluate(rows, cells, open_model, predictions)
    assert len(opened) == 5


def test_an_answer_costs_a_pass_a_token_and_what_writing_costs(make_model, counted, write):
    """No pass more: the model reads n times for n tokens, and its head, which is the size of the vocabulary, is asked at the
    positions that are still masked. A written prompt costs the same once more for all questions of a group."""
    model, n, plain = make_model(), 11, Row("memdlm_train", "memdlm", None)
    cell = eval_niah.small_cell("mv", 64, 0, 3)
    (record,) = cell.ask(model, plain, [1])
    assert (counted.reads, counted.heads) == ([0] * n, list(range(n, 0, -1)))
    assert record["steps"] == n
    counted.clear()
    cell.ask(model, plain, [0, 1, 2])
    assert (counted.reads, counted.heads) == ([0] * n, list(range(3 * n, 0, -3)))
    counted.clear()
    sample.write_prompt(model, torch.tensor([cell.first.prompt]), write, 0)
    reads, heads = list(counted.reads), list(counted.heads)
    assert len([start for start in reads if start == 0]) == (4 if write.rule == "surprise" else 0)  # it looks before it writes
    assert len([start for start in reads if start > 0]) == 2  # one for each stage, in the upper layers alone
    counted.clear()
    cell.ask(model, Row("memdlm_train_inference", "memdlm", write), [0])
    assert (counted.reads, counted.heads) == (reads + [0] * n, heads + list(range(n, 0, -1)))


# ---- no room ---------------------------------------------------------------------------------------------------------------

FEW = "--tasks mv --lengths 64 80 --samples 2".split()
FULL = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    "a Mac": RuntimeError("MPS backend out of memory (MPS allocated: 17.94 GB)"),
    "Python": MemoryError(),
}


def no_room_for(monkeypatch, length: int, error: BaseException) -> None:
    """Prompts of more tokens than that find no room."""
    generate = sample.generate

    def generating(model, prompts, *rest, **options):
        if prompts.shape[1] > length:
            raise error
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(sample, "generate", generating)


@pytest.fixture(scope="module")
def few(lively, tmp_path_factory) -> Path:
    """The same questions where there was room for all of them."""
    out = tmp_path_factory.mktemp("eval") / "few"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_niah, "draw_pictures", lambda results, out: None)
        ask(lively, out, *FEW)
    return out


@pytest.mark.parametrize("device", FULL)
def test_a_length_without_room_is_left_open_and_filled_in_later(lively, few, tmp_path, monkeypatch, device):
    """The other lengths are asked all the same; table and results say "out of memory" there and no score; started again with
    room, the evaluation ends as one that always had it."""
    out = tmp_path / "eval"
    with monkeypatch.context() as patch:
        no_room_for(patch, 60, FULL[device])
        ask(lively, out, *FEW)
    lines = [line for line in (out / "table.md").read_text(encoding="utf-8").splitlines() if "| mv |" in line]
    assert ["out of memory" in line for line in lines] == [False] * 4 + [True] * 4
    whole, lacking = read(few)["niah"], read(out)["niah"]
    assert only(lacking, length=64) == only(whole, length=64)
    assert all((r["score"], r["n"], r["failed"]) == (None, 0, "out of memory") for r in only(lacking, length=80))
    ask(lively, out, *FEW)
    assert answers_of(out) == answers_of(few)
    assert {**final(out), "predictions.jsonl": 0} == {**final(few), "predictions.jsonl": 0}


def test_a_cell_that_is_half_asked_has_no_score(lively, tmp_path, monkeypatch):
    """Whoever found room is no fair sample: what was answered is kept and counted, and enters no mean."""
    generate, left = sample.generate, [6]

    def generating(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(*arguments, **options)

    monkeypatch.setattr(sample, "generate", generating)
    monkeypatch.setattr(eval_niah, "same_shape", lambda questions, most: [[i] for i in range(len(questions))])
    ask(lively, tmp_path, *"--tasks mv --lengths 64 --samples 4".split())
    found = {record["method"]: record for record in read(tmp_path)["niah"]}
    assert [found[method]["n"] for method in METHODS] == [4, 2, 0, 0]
    assert [found[method]["score"] is None for method in METHODS] == [False, True, True, True]
    assert "| Standard MDLM | - | **-** |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_rows_without_room_for_a_memory_leave_the_others_alone(lively, bias, unbroken, tmp_path, monkeypatch, pictures):
    """Writing needs gradients, so that this row may be the only one to fail: in the scores and in the exposure bias. Tables and
    pictures show the rest."""

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sample, "write_prompt", full)
    ask(lively, tmp_path, *WORK, *bias)
    found, whole = read(tmp_path), read(unbroken)
    for method in METHODS[:3]:
        assert only(found["niah"], method=method) == only(whole["niah"], method=method)
    assert all(record["failed"] == "out of memory" for record in only(found["niah"], method=METHODS[3]))
    assert found["exposure_bias"] == [record for record in whole["exposure_bias"] if record["method"] != METHODS[3]]
    assert {"niah.png", "lengths.png", "exposure_bias.png"} <= contents(tmp_path).keys()
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| MemDLM (Train & Inference) | out of memory | - | - |" in table
    assert "nan" not in table


def test_other_errors_are_not_taken_for_a_lack_of_room(lively, tmp_path, monkeypatch):
    """A fault of the program must show as one."""
    no_room_for(monkeypatch, 60, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ask(lively, tmp_path, *FEW)


# ---- exposure bias over a user's pairs -------------------------------------------------------------------------------------


def test_walks_are_averaged_over_pairs_and_divided_by_the_loss_without_memory():
    """Two pairs, two steps; each row's static loss is its own, the denominator is that of its checkpoint without memory. A
    loss that is not a number makes a hole, not a crash."""
    walks = {"memdlm_train": [[2.0, 3.0], [4.0, 9.0]], "memdlm_train_inference": [[1.0, 6.0], [None, 3.0]]}

    def walk(model, row: Row, indices: list[int]) -> list[dict]:
        (i,) = indices
        return [
            {
                "walk": [
                    [ratio, *(None if x is None else x + i for x in walks[row.method][j])] for j, ratio in ((0, 1.0), (1, 0.5))
                ]
            }
        ]

    rows = [Row("memdlm_train", "memdlm", None), Row("memdlm_train_inference", "memdlm", Write())]
    cell, predictions = Cell(eval_niah.BIAS, 0, 7, [[0], [1]], walk), Predictions()
    eval_niah.evaluate(rows, [cell], lambda *place: torch.nn.Linear(1, 1), predictions)
    records = eval_niah.summarize_bias(rows, cell, predictions, set())
    values = [(r["method"], r["mask_ratio"], r["static"], r["sequential"], r["ratio"], r["seed"]) for r in records]
    assert values == [
        ("memdlm_train", 1.0, 2.5, 3.5, 3.5 / 2.5, 7),
        ("memdlm_train", 0.5, 4.5, 9.5, 9.5 / 4.5, 7),
        ("memdlm_train_inference", 1.0, 1.5, 6.5, 6.5 / 2.5, 7),
        ("memdlm_train_inference", 0.5, None, 3.5, 3.5 / 4.5, 7),
    ]
    lost = {("memdlm_train", eval_niah.BIAS, 0, 7)}
    assert eval_niah.summarize_bias(rows, cell, predictions, lost) == [], "without its denominator a row says nothing"


def test_all_rows_share_the_static_masks_of_a_pair(make_model, monkeypatch):
    """L_static compares models on the same states: the masks go by seed and pair, not by row or by what came before."""
    model, orders, walk = make_model(torch.float32), [], eval_niah.exposure_walk
    monkeypatch.setattr(
        eval_niah, "exposure_walk", lambda m, x0, r, order, *rest: orders.append(order) or walk(m, x0, r, order, *rest)
    )
    pairs = [data.encode_pair({"prompt": f"who {i}?", "response": " Mary went home"}, "here") for i in range(3)]
    write = Write("paper", Memory(rank=3, alpha=6.0, lr=1.0, fraction=0.5, scope="sample"))
    cell, other = (eval_niah.bias_cell(pairs, seed, 3, data.EOS) for seed in (0, 1))
    plain = [cell.ask(model, Row(method, "memdlm", None), [1]) for method in ("mdlm", "memdlm_train")]
    numbers, write_prompt = [], sample.write_prompt
    monkeypatch.setattr(sample, "write_prompt", lambda *given: numbers.append(given[3:]) or write_prompt(*given))
    written = cell.ask(model, Row("memdlm_train_inference", "memdlm", write), [1])
    cell.ask(model, Row("base", "base", None), [2])
    other.ask(model, Row("base", "base", None), [1])
    assert plain[0] == plain[1]
    assert numbers == [(0, [1])], "a memory's draws go by seed and pair, too"
    assert all(a[1] != b[1] for a, b in zip(plain[0][0]["walk"], written[0]["walk"])), "the memory changes no loss"
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[4])
