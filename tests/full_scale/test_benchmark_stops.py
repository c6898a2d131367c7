"""
test_benchmark_stops.py: whatever stops a long evaluation, the same command ends with the files of
one that nothing has stopped; and no answer is taken for one of other weights or by other settings.
"""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from backbones import write_checkpoint
from commands import StoppedError, contents, questions, refusal, results
from toys import METHODS, ONE, answers_of, ask, command, final, lines_of, settings_of, toys

from full_scale import benchmark, samplers
from full_scale.predictions import Predictions
from lab.report import matching

ASKED = "--tasks niah_single_1 niah_single_2 --lengths 330 350 --samples 2 --steps 1"
WORK = (
    f"--adapter mdlm={{}}/mdlm memdlm={{}}/memdlm --memory --haystack {{}}/essay.txt {ASKED} "
    "--exposure-bias --data {}/few.jsonl --bias-steps 2"
)
EVERY = 12 + 32 + 8  # lines of settings, answers and walks, of 4 rows
WRITTEN = """rule paper, passes 1, anchor_ratio 0.2, window 4096, share 0.3, rank 32, alpha 64.0,
lr 0.1, clip 1.0, fraction 0.1, start_scale 1.5, scope batch, steps 2, epochs 1, loss ce,
strategy consistent, targets all, places ffn, form lora, clip_by tensor"""


@pytest.fixture(scope="module", autouse=True)
def marked_by_letters():
    """Random models are never right. Marked by their letters, scores differ where answers do."""

    def by_letters(question, text: str) -> float:
        return float(np.mean([letter in text for letter in "abdeilmorst. 0123"]))

    with mock.patch.dict(benchmark.METRICS, ruler=by_letters):
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """All of its answers differ, or tests would see nothing. Nobody writes into it."""
    out = ask(tmp_path_factory.mktemp("eval") / "unbroken", WORK, draw=True)
    said = {answer.get("prediction") for answer in answers_of(out)}
    assert (len(lines_of(out)), len(said - {None})) == (EVERY, 32)
    return out


def sorted_files(out: Path) -> dict:
    """All that an evaluation leaves, whatever the order in which its answers were given."""
    return contents(out) | {"predictions.jsonl": sorted(map(str, answers_of(out, seed=0)))}


def test_stopped_at_many_places_it_ends_as_if_nothing_stopped_it(unbroken, tmp_path):
    """Between two lines and within one, as a power cut does."""
    out, append, appended = tmp_path / "eval", Predictions.append, []

    def stopping(self, record):
        if len(appended) == 7 * (stop + 1):
            with open(self.path, "a") as file:
                file.write(json.dumps(record)[: 50 * (stop % 2)])
            raise StoppedError
        appended.append(record)
        append(self, record)

    for stop in range(EVERY // 7):
        with mock.patch.object(Predictions, "append", stopping), pytest.raises(StoppedError):
            ask(out, WORK)
        written = (out / "predictions.jsonl").read_bytes()
        assert written.endswith(b"\n") == (stop % 2 == 0)
        assert written.count(b"\n") == 7 * (stop + 1)
        assert not (out / "results.json").exists()
    ask(out, WORK, draw=True)
    assert final(out) == final(unbroken)


@pytest.mark.parametrize("damage", [b"{oops", b"5", b"[]", b'{"task": "x"}', b"\xff\xfe", b""])
def test_damaged_line_is_named_and_left_as_it_is(unbroken, tmp_path, capsys, damage):
    lines = (unbroken / "predictions.jsonl").read_bytes().split(b"\n")
    path, damaged = tmp_path / "predictions.jsonl", b"\n".join([*lines[:6], damage, *lines[6:]])
    path.write_bytes(damaged)
    assert f"{path}, line 7 is damaged" in refusal("eval_niah", command(tmp_path, WORK), capsys)
    assert contents(tmp_path) == {"predictions.jsonl": damaged}


def test_full_disk_loses_nothing(unbroken, tmp_path, capsys):
    """One line, exit code 2; with room again the same command goes on."""
    out = tmp_path / "eval"
    room = [mock.DEFAULT] * 20 + [OSError(28, "No space left on device")]
    with mock.patch("full_scale.predictions.open", wraps=open, side_effect=room, create=True):
        assert "cannot write" in refusal("eval_niah", command(out, WORK), capsys)
    assert len(lines_of(out)) == 20
    assert final(ask(out, WORK, draw=True)) == final(unbroken)


OTHER = {
    "--steps 2": "Base to niah_single_1 with steps 1, not 2",
    "--block-length 200": "block_length None, not 200",
    "--threshold 0.5": "threshold None, not 0.5",
    "--protocol harness": "protocol 'original', not 'harness'",
    "--chat --lengths 440": "chat ",
    "--dtype bfloat16": "dtype 'float32', not 'bfloat16'",
    "--load-4bit": "dtype 'float32', not 'float32, NF4'",
    "--random-weights": "random_weights ",
    "--haystack {}/essay.json": "Base to niah_single_2 with haystack '",
    "--data {}/pairs.jsonl": "Base to exposure bias with data '",
    "--bias-steps 4": "bias_steps 2, not 4",
    "--max-length 16": "max_length 4096, not 16",
    "--write-lr 0.7": "MemDLM (Train & Inference) to niah_single_1 with write lr 0.1, not 0.7",
    "--adapter mdlm={tmp}/bare memdlm={}/memdlm": "Standard MDLM to niah_single_1 with adapter_",
    "--backbone {tmp}/other": "backbone '",
}


@pytest.mark.parametrize("flags", OTHER)
def test_answers_by_other_settings_are_refused_and_kept(unbroken, tmp_path, capsys, flags):
    """One line names what differs, before a model is loaded."""
    write_checkpoint(tmp_path / "other", "llada")
    no_record = shutil.ignore_patterns("training.json")  # it would say that MemDLM trained it
    shutil.copytree(toys() / "memdlm", tmp_path / "bare", ignore=no_record)
    out = Path(shutil.copytree(unbroken, tmp_path / "begun"))
    more = flags.replace("{tmp}", str(tmp_path))
    said = refusal("eval_niah", command(out, f"{WORK} {more}"), capsys)
    assert f"{out} holds answers of " in said
    assert OTHER[flags] in said
    assert "name another --out" in said
    assert contents(out) == contents(unbroken)


def test_files_that_were_replaced_are_noticed(tmp_path, capsys):
    """Weights of the same name and size, and questions; but no file that is not read."""
    own = write_checkpoint(tmp_path / "own", "llada")
    out = ask(tmp_path / "weights", f"{ONE} --backbone {own}")
    write_checkpoint(own, "llada", seed=1)
    said = refusal("eval_niah", command(out, f"{ONE} --backbone {own}"), capsys)
    assert "with model.safetensors '" in said
    write_checkpoint(own, "llada")
    (own / "generation_config.json").write_text('{"eos_token_id": [523]}')
    said = refusal("eval_niah", command(out, f"{ONE} --backbone {own}"), capsys)
    assert "with ends [521, 524], not [521, 523, 524]" in said
    story = "1 Mary moved to the {0}.\n2 Where is Mary? \t{0}\t1\n"
    for name in ("en-10k/qa1", "en-10k/qa2", "shuffled-10k/qa1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}_train.txt").write_text(3 * story.format("office"))
    flags = f"{ONE} --babi {tmp_path} --lengths 900 --tasks babilong_qa1"
    out = ask(tmp_path / "eval", flags)
    (tmp_path / "shuffled-10k" / "qa1_train.txt").write_text(3 * story.format("garden"))
    ask(out, f"{flags} babilong_qa2")
    (tmp_path / "en-10k" / "qa1_train.txt").write_text(3 * story.format("garden"))
    assert "Base to babilong_qa1 with babi '" in refusal("eval_niah", command(out, flags), capsys)
    folder = shutil.copytree(questions(), tmp_path / "qa")
    flags = f"{ONE} --lengths 1000 --tasks ruler_qa_1 --qa {folder}"
    ask(out, flags)
    text = (folder / "squad.json").read_text()
    (folder / "squad.json").write_text(text.replace("lives", "dwells"))
    assert "Base to ruler_qa_1 with qa '" in refusal("eval_niah", command(out, flags), capsys)


def test_settings_of_writing_have_the_names_of_earlier_versions(tmp_path):
    """What an earlier version began must go on: all names and the paper's values stay. Our own rule
    has become another one since, which its settings say."""
    found = settings_of(ask(tmp_path, f"{ONE} --memory"))["base_inference"]
    texts = [f"{name} {found[name]}" for name in found if name.startswith("write ")]
    assert sorted(texts) == sorted(f"write {text}" for text in re.split(r",\s", WRITTEN))
    ours = settings_of(ask(tmp_path / "ours", f"{ONE} --memory --write surprise"))
    assert ours["base_inference"]["write most passes"] == "2 a window, 1 over a single one"


def test_other_seeds_tasks_lengths_and_rows_join_what_is_there(unbroken, tmp_path):
    """An answer does not depend on what came before it, or on what else the call asks."""
    out = tmp_path / "eval"
    ask(out, WORK.replace("niah_single_1 niah_single_2", "niah_single_2"))
    ask(out, f"{ONE} --seed 1")
    assert {one["seed"] for one in results(out)["niah"]} == {1}
    ask(out, WORK.replace("--lengths 330 350", "--lengths 350"))
    ask(out, WORK, draw=True)
    assert answers_of(out, seed=1) != []
    assert sorted_files(out) == sorted_files(unbroken)


FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_length_without_room_is_left_open_and_filled_later(unbroken, tmp_path, monkeypatch):
    """The other length is asked all the same; with room again, all ends as without a failure."""
    out, generate = tmp_path / "eval", samplers.generate

    def failing(model, prompt, *rest, **options):
        if prompt.shape[1] > 330 - 128:
            raise FULL
        return generate(model, prompt, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(samplers, "generate", failing)
        ask(out, WORK)
    whole, lacking = results(unbroken)["niah"], results(out)["niah"]
    assert matching(lacking, length=330) == matching(whole, length=330)
    assert len(matching(lacking, length=350, score=None, n=0)) == 8
    assert (out / "table.md").read_text().count("out of memory") == 8
    assert sorted_files(ask(out, WORK, draw=True)) == sorted_files(unbroken)


def test_cell_that_is_half_asked_has_no_score(tmp_path, monkeypatch):
    """Whoever found room is no fair sample: answers are kept and counted, and enter no mean. But
    no other error is taken for a lack of room: a fault of the program must show as one."""
    some = mock.Mock(wraps=samplers.generate, side_effect=3 * [mock.DEFAULT] + [FULL])
    monkeypatch.setattr(samplers, "generate", some)
    found = results(ask(tmp_path, f"{ONE} --adapter {{}}/mdlm --samples 2"))["niah"]
    assert [record["n"] for record in found] == [2, 1]
    assert [record["score"] is None for record in found] == [False, True]
    assert "| Standard MDLM | - | **-** |" in (tmp_path / "table.md").read_text()
    some.side_effect = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ask(tmp_path / "other", ONE)


def test_rows_without_room_for_a_memory_leave_the_others_alone(unbroken, tmp_path, monkeypatch):
    """Writing needs gradients, so that its row may be the only one to fail."""
    monkeypatch.setattr(benchmark, "write_prompt", mock.Mock(side_effect=FULL))
    found, whole = results(ask(tmp_path, WORK, draw=True)), results(unbroken)
    for method in METHODS[:3]:
        for part in ("niah", "exposure_bias"):
            assert matching(found[part], method=method) == matching(whole[part], method=method)
    assert {record["score"] for record in matching(found["niah"], method=METHODS[3])} == {None}
    assert matching(found["exposure_bias"], method=METHODS[3]) == []
    assert {"niah.png", "exposure_bias.png"} <= contents(tmp_path).keys()
    table = (tmp_path / "table.md").read_text()
    assert "| MemDLM (Train & Inference) | out of memory | - | - |" in table
    assert "nan" not in table
