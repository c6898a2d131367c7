"""
test_report.py: tables and pictures of long evaluations. Intervals are those of the textbooks, a
score stands beside all that it takes to quote it, and what has no score is shown as missing.
"""

import pytest

from full_scale import report


def scored(task="niah_single_1", length=64, score=0.5, method="base") -> dict:
    """A row's record of one cell; without a score, memory ran out."""
    record = {"method": method, "task": task, "length": length, "seed": 3, "n": 4, "score": score}
    if score is None:
        return record | {"ci95": None, "scores": {}, "steps": None}
    scores = {"babilong": score, "harness": 1.0} if "babilong" in task else {"ruler": score}
    return record | {"ci95": [score / 2, 1.0], "scores": scores, "steps": 20.0}


def results(*records: dict, bias: list = (), failed: list = ()) -> dict:
    return {
        "config": {"memory": True, "write": "paper", "bias_steps": 2},
        "machine": {"device": "cpu", "dtype": "bfloat16"},
        "niah": list(records),
        "depths": [],
        "pairs": 5 if bias or failed else 0,
        "exposure_bias": list(bias),
        "failed": list(failed),
    }


def walked(method: str, mask_ratio: float) -> dict:
    losses = {"static": 2.0, "sequential": 3.0, "ratio": 1.5}
    return {"method": method, "mask_ratio": mask_ratio, "seed": 3, **losses}


@pytest.mark.parametrize(
    ("mean", "n", "interval"),
    [(0.5, 10, [0.23659, 0.76341]), (0.0, 10, [0, 0.27754]), (0.9, 100, [0.82563, 0.94477])],
)
def test_wilson_interval_equals_published_values(mean, n, interval):
    assert report.wilson_interval(mean, n) == pytest.approx(interval, abs=1e-4)


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
    """Depth 1, the haystack's end, is in the last bin, not in a sixth. Needles beside others, and
    tasks that have no depth, are in none."""
    place, answers = {"method": "base", "length": 64}, []
    for depth, score in ((0.0, 1.0), (0.8, 0.0), (1.0, 1.0)):
        for task in ("niah_single_1", "niah_multikey_2"):
            answers.append({**place, "task": task, "depth": depth, "scores": {"ruler": score}})
    answers.append({**place, "task": "ruler_vt", "depth": None, "scores": {"ruler": 1.0}})
    first = {**place, "depth": 0, "score": 1.0, "n": 1}
    assert report.depth_records(answers) == [first, {**place, "depth": 4, "score": 0.5, "n": 2}]


def test_pictures_show_what_was_measured_and_leave_out_what_was_not(tmp_path, monkeypatch):
    """Rows with a single point are drawn; without a score there is no curve. In the picture of a
    sweep, the row without a memory of the same checkpoint is a level line."""
    drawn, draw_panels = [], report.draw_panels
    methods = ("base", "memdlm_train", "memdlm_train_inference@0.9", "memdlm_train_inference@0.1")
    records = [scored(method=method, score=0.1 * i) for i, method in enumerate(methods)]
    records.append(scored(length=96, score=None, method="base_inference"))
    found = results(*records, bias=[walked(method, 1.0) for method in methods])
    found["depths"] = [{"method": "base", "length": 64, "depth": 4, "score": 0.5, "n": 2}]

    def watched(panels, path):
        drawn.extend([list(xs), list(ys)] for xs, ys, *_ in panels[0]["lines"])
        draw_panels(panels, path)

    monkeypatch.setattr(report, "draw_panels", watched)
    report.draw_pictures(found, tmp_path)
    assert drawn[-2:] == [[[0.1, 0.9], pytest.approx([0.3, 0.2])], [[0.1, 0.9], [0.1, 0.1]]]
    names = {"niah.png", "anchor_ratio.png", "depth.png", "exposure_bias.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    report.draw_pictures(results(scored(score=None)), tmp_path / "absent")
