"""
test_report.py: tables and pictures of long evaluations, and the page of measurements (bench.py,
whose small sizes .ci/run measures). What has no score is shown as missing.
"""

import json
from pathlib import Path
from unittest import mock

import lm_eval
import night
import pytest
import torch
from backbones import toy_model
from commands import refusal
from night import pass_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from full_scale import bench, experts, report
from full_scale.benchmark import TABLE_1
from full_scale.drafts import Style
from full_scale.prompts import make_draft
from lab.tools import guarded


def scored(task="niah_single_1", length=64, score=0.5, method="base", full=1.0) -> dict:
    """A row's record of one cell; without a score, memory ran out."""
    record = {"method": method, "task": task, "length": length, "seed": 3, "n": 4, "score": score}
    if score is None:
        return record | {"ci95": None, "scores": {}, "steps": None, "full": None}
    scores = {"babilong": score, "harness": 1.0} if "babilong" in task else {"ruler": score}
    return record | {"ci95": [score / 2, 1.0], "scores": scores, "steps": 20.0, "full": full}


def results(*records: dict) -> dict:
    config = {"memory": True, "write": "paper"}
    found = {"config": config, "machine": {"device": "cpu", "dtype": "bfloat16"}, "pairs": 0}
    found |= {"depths": [], "exposure_bias": [], "left_out": []}
    return found | {"niah": records}


def test_wilson_interval_equals_published_values():
    for mean, n, *interval in ((0.5, 10, 0.23659, 0.76341), (0.0, 10, 0, 0.27754)):
        assert report.wilson_interval(mean, n) == pytest.approx(interval, abs=1e-4)
    assert report.wilson_interval(0.9, 100) == pytest.approx([0.82563, 0.94477], abs=1e-4)


def test_babilong_has_a_mean_of_its_own_and_counts_once_in_the_mean_of_all():
    """A task without a score leaves both means open."""
    scores = {"babilong_qa1": 0.5, "babilong_qa2": 0.25, "ruler_vt": 0.0}
    records = [scored(task, 64, score) for task, score in scores.items()]
    records += [scored(task, 96, None if task == "babilong_qa2" else 1.0) for task in scores]
    text = report.report(results(*records))
    assert "| BABILong, mean of qa1 qa2 | 64 | 96 |\n" in text
    assert "\n| Base | 0.375 | - |" in text
    assert "\n| Base | 0.50 | 0.25 | 0.00 | 1.00 | - | 1.00 | **0.250** | " in text
    assert report.babilong_table(records[:1]) == "", "a single task is its own mean"


def test_needles_are_counted_by_depth_in_five_bins():
    """Depth 1 is in the last bin, not in a sixth; needles beside others are in none."""
    place, answers = {"method": "base", "length": 64}, []
    for depth, score in ((0.0, 1.0), (0.8, 0.0), (1.0, 1.0)):
        for task in ("niah_single_1", "niah_multikey_2"):
            answers.append({**place, "task": task, "depth": depth, "scores": {"ruler": score}})
    answers.append({**place, "task": "ruler_vt", "depth": None, "scores": {"ruler": 1.0}})
    first = {**place, "depth": 0, "score": 1.0, "n": 1}
    assert report.depth_records(answers) == [first, {**place, "depth": 4, "score": 0.5, "n": 2}]


def test_picture_of_a_sweep_has_a_level_line(tmp_path, monkeypatch):
    """It is the row without a memory of the same checkpoint. Without a score there is no curve."""
    drawn, draw_panels = [], report.draw_panels
    methods = ("base", "memdlm_train", "memdlm_train_inference@0.9", "memdlm_train_inference@0.1")
    records = [scored(method=method, score=0.1 * i) for i, method in enumerate(methods)]
    records.append(scored(length=96, score=None, method="base_inference"))

    def watched(panels, path):
        drawn.extend([list(xs), list(ys)] for xs, ys, *_ in panels[0]["lines"])
        draw_panels(panels, path)

    monkeypatch.setattr(report, "draw_panels", watched)
    report.draw_pictures(results(*records), tmp_path)
    assert drawn[-2:] == [[[0.1, 0.9], pytest.approx([0.3, 0.2])], [[0.1, 0.9], [0.1, 0.1]]]
    assert {path.name for path in tmp_path.iterdir()} == {"niah.png", "anchor_ratio.png"}
    report.draw_pictures(results(scored(score=None)), tmp_path / "absent")


@pytest.mark.parametrize("kind", ["llada", "llada-moe"])
def test_work_is_counted_as_torch_counts_it(kind):
    """Of the forward pass through all layers, attention included."""
    model = toy_model(kind, torch.float32)
    counter = FlopCounterMode(display=False)
    looped = mock.patch.object(experts, "kernel_fits", return_value=False)
    with torch.no_grad(), counter, looped, sdpa_kernel(SDPBackend.MATH):  # all is counted then
        model.run(model.embedding(torch.zeros(1, 40, dtype=torch.long)))
    with mock.patch("night.llada_config", return_value=model.config):
        assert pass_flops(40) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Nothing is measured twice; ratios stand in the end."""
    names = ["m, mdlm, 2 x 8", "m, memdlm, 2 x 8", "m, 8 tokens after 9 --cache"]
    names.append("m, 8 tokens after 9")
    todos = [mock.Mock(return_value={"s": spent}) for spent in (2.0, 3.0, 0.5, 10.0)]
    monkeypatch.setattr(bench, "cases", lambda prompts: zip(names, todos))
    flags = ["--out", str(tmp_path), "--prompts", "9"]
    bench.run([*flags, "--minutes", "0"])
    assert "4 cases are left" in capsys.readouterr().out
    todos[1].side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        bench.run(flags)
    todos[1].side_effect = None
    bench.run(flags)
    bench.run(flags)
    assert [todo.call_count for todo in todos] == [1, 2, 1, 1]
    table = (tmp_path / "table.md").read_text()
    assert "1.50 of mdlm's time" in table
    assert "20.0 times as fast" in table


def test_no_room_is_a_line_and_another_machine_is_refused(tmp_path, monkeypatch, capsys):
    no_room = RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
    monkeypatch.setattr(bench, "cases", lambda prompts: [("large", mock.Mock(side_effect=no_room))])
    bench.run(["--out", str(tmp_path)])
    assert "| large | - | - | - | - | out of memory |" in capsys.readouterr().out
    path = tmp_path / "bench.json"
    known = json.loads(path.read_text())
    known["machine"]["device"] = "another"
    path.write_text(json.dumps(known))

    def main(arguments):
        guarded(lambda: bench.run(arguments))

    assert "was measured on another machine" in refusal(main, ["--out", tmp_path], capsys)
    path.write_text("{oops")
    assert "cannot read" in refusal(main, ["--out", tmp_path], capsys)
    known["machine"] = bench.tools.machine(bench.DEVICE, str(bench.DTYPE).removeprefix("torch."))
    for records in ("x", None, [{}], [{"case": 5}], [{"case": "large", "s": "x"}], [5]):
        path.write_text(json.dumps(known | {"records": records}))
        assert "is damaged: delete it" in refusal(main, ["--out", tmp_path], capsys)


@pytest.mark.parametrize("name", ["table.md", "results.json", "config.json", "predictions.jsonl"])
def test_results_of_another_program_are_not_written_over(tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    said = refusal(
        lambda arguments: guarded(lambda: bench.run(arguments)), ["--out", tmp_path], capsys
    )
    assert "name another folder" in said
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_hours_are_counted_for_the_answers_that_the_tables_take():
    """By the harness's rules, as the manual's commands ask them."""
    style = Style(lambda text, prefix: (text + prefix).split(), protocol="harness")
    assert [make_draft(task, 0, 4096, 0, style).tokens for task in TABLE_1] == night.TABLE_1
    folder = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    for task, (passes, _) in night.LONGBENCH.items():
        assert f"max_gen_toks: {passes}\n" in (folder / f"{task}.yaml").read_text()
