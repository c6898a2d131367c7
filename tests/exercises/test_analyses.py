"""
test_analyses.py: the paper's analyses. Every variant is another memory, trained on the same batches
and masks; what is measured is not measured again; tables say what the records say.
"""

import math
import re
from unittest import mock

import pytest
import slow
import torch
from running import ROOT, copy_of_finished, finished, refusal, stamps, weights
from safetensors.torch import load_file
from slow import gradients, seeded
from teaching import TIGHT, assert_same
from test_course import python
from torch.nn.attention import SDPBackend, sdpa_kernel

import memdlm
from exercises import analyses
from exercises.analyses import FIGURES, VARIANTS, Line, measure, verdict
from exercises.methods import exact_method, pretraining_with_memory
from lab import tools, training
from lab.tools import guarded

TRAINED = [name for name, one in VARIANTS.items() if one.get("method") != "step0"]
TRAINED = [name for name in TRAINED if "anchor_ratio" not in VARIANTS[name]]


@pytest.mark.parametrize("name", TRAINED)
def test_every_variant_is_another_memory(name, tmp_path, monkeypatch):
    """A setting that is misspelt, or has no effect, would leave the run's own MemDLM."""
    run = finished()  # before anything is replaced
    losses = {**dict.fromkeys(training.LOSSES, 1.0), "overshoot": 0.0}
    monkeypatch.setattr(training, "measure_losses", mock.Mock(return_value=losses))
    monkeypatch.setattr(analyses, "score", mock.Mock(return_value={"1x": 0.5, "4x": 0.5}))
    monkeypatch.setattr(training, "METHODS", dict(training.METHODS))
    record = measure(run, tmp_path, (name, 0))
    assert (record["variant"], record["kept"]) == (name, {"1x": 0.5, "4x": 0.5})
    usual = weights(run)["memdlm"]
    [path] = tmp_path.rglob("memdlm.safetensors")
    ours = load_file(path)
    assert any(not torch.equal(ours[key], usual[key]) for key in usual), f"{name} changes nothing"
    trained = stamps(tmp_path)
    assert measure(run, tmp_path, (name, 0)) == record
    assert stamps(tmp_path) == trained, "what was measured is measured again"


def test_what_is_measured_belongs_to_the_weights_of_the_run(tmp_path, monkeypatch):
    """The same settings and other weights: nothing that was measured before is shown for them."""
    run, score = copy_of_finished(tmp_path), mock.Mock(return_value={"1x": 0.5, "4x": 0.5})
    monkeypatch.setattr(analyses, "score", score)
    path, other = (training.checkpoint_path(run, seed, "memdlm") for seed in (0, 1))
    for source, asked in ((path, 1), (path, 1), (other, 2)):
        tensors, (_, meta) = tools.load_checkpoint(source)[0], tools.load_checkpoint(path)
        tools.save_checkpoint(path, tensors, meta)
        measure(run, tmp_path / "out", ("memdlm", 0))
        assert score.call_count == asked


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_exact_gradient_is_that_through_the_inner_loop(model, batch, memory, epochs):
    """Eq. 10 without its approximation, against full forwards (slow.py)."""
    memory.scope, memory.epochs = "batch", epochs
    generator = seeded(4)
    anchor = memdlm.draw_anchor(batch.maskable, generator)
    stages = memdlm.make_stages(anchor, batch.maskable, memory, generator)
    fast = memdlm.init_fast(model, memory, 1, generator)
    with sdpa_kernel(SDPBackend.MATH):
        phi = slow.inner_loop(model, batch, stages, fast, memory, second_order=True)
        expected = slow.outer_loss(model, batch, anchor, slow.merge(model, phi, fast.scale))
        loss = exact_method(model, batch, memory, seeded(4))
        assert_same(loss, expected, "the loss")
        ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **TIGHT)


def test_pretraining_with_a_memory_is_pretraining_behind_an_inner_loop(model, batch, memory):
    """The same masks and the same mean: with a step size of 0 the losses are equal."""
    usual = training.METHODS["base"](model, batch, memory, seeded(4))
    loss = pretraining_with_memory(memory, model, batch, memory, seeded(4))
    assert loss < usual, "the inner loop has seen what is scored: that must help"
    memory.lr = 0.0
    assert_same(pretraining_with_memory(memory, model, batch, memory, seeded(4)), usual, "the loss")


def line(name: str, paper: float, *values: float) -> Line:
    return Line(name, paper, {"4x minus default": list(values)})


def test_the_sentence_says_what_the_intervals_allow():
    """As in the paper, against it, or not told apart; without a paper, better or worse. (Student's
    t for two values is 12.7: the interval of 0.18 and 0.22 is 0.20 ± 0.25.)"""
    lines = [line("a", -0.1, -0.21, -0.19), line("b", -0.1, 0.19, 0.21), line("c", 0.1, 0.18, 0.22)]
    told = "As in the paper: a. Against it: b. Not told apart from zero: 1."
    assert verdict(lines) == f"3 differences from the default. {told}"
    own = [line("a", math.nan, -0.21, -0.19), line("b", math.nan, 0.2)]
    assert verdict(own) == "Clear differences from the default: a is worse."


def test_the_command_measures_once_and_draws(tmp_path):
    """A table with a sentence, and a picture; started again, nothing is measured."""
    asked = ["exercises/analyses.py", "fig9", "--run", finished()]
    asked += ["--out", tmp_path / "out"]
    first = python(*asked)
    assert first.returncode == 0, first.stderr
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == {"fig9.md", "config.json", "fig9.png"}
    text = (tmp_path / "out" / "fig9.md").read_text(encoding="utf-8")
    assert first.stdout.strip() == text.strip()
    assert "n = 2 bases" in text
    assert text.count("| inconsistent | -0.080 |") == 1
    assert "1 differences from the default. As in the paper: " in text
    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert len(records) == 2 * 5
    assert python(*asked).stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in records} == records


def test_a_ratio_writes_the_prompts_by_the_papers_rule(tmp_path, monkeypatch):
    """Fig. 8 trains nothing: the run's own MemDLM answers, with another anchor ratio each time."""
    run, asked = finished(), mock.Mock(return_value={"1x": 0.5, "4x": 0.5})
    monkeypatch.setattr(analyses, "score", asked)
    for name in FIGURES["fig8"]["variants"]:
        measure(run, tmp_path, (name, 1))
    hows = [call.args[-1] for call in asked.call_args_list]
    assert [how.anchor_ratio for how in hows] == [0.2, 0.4, 0.6, 0.8]
    assert {(how.rule, how.memory.lr, how.memory.epochs) for how in hows} == {(None, 0.1, 1)}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    def main(arguments: list[str]) -> None:
        guarded(lambda: analyses.run(arguments))

    assert "invalid choice" in refusal(capsys, main, "fig1")
    assert "there is no run" in refusal(capsys, main, "fig6", "--run", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    other = ["fig6", "--run", finished(), "--out", tmp_path]
    assert "of another run" in refusal(capsys, main, *other)
    monkeypatch.setattr(tools, "read_config", mock.Mock(return_value={"student": "anna.py 1"}))
    assert "was trained by anna.py" in refusal(capsys, main, *other)
    monkeypatch.setitem(VARIANTS, "wrong", {"change": {"memory_stepps": 3}})
    assert "memory_stepps, which is no setting" in refusal(capsys, main, *other)


def test_the_readmes_table_is_what_the_command_has_written():
    """As they stand in the record of the run: the paper's difference, ours and its interval."""
    tables = []
    for path in (ROOT / "assets" / "analyses" / "analyses.md", ROOT / "exercises" / "README.md"):
        lines = path.read_text(encoding="utf-8").splitlines()
        tables.append([[cell.strip() for cell in line.split("|")[1:-1]] for line in lines])
    written, shown = {}, {}
    for cells in tables[0]:
        if len(cells) == 8 and cells[0] in VARIANTS:
            written[cells[0]] = [re.sub(r"\b0\.", ".", cells[i]) for i in (1, 6)]
    for cells in tables[1]:
        if len(cells) == 4 and cells[1] in VARIANTS:
            shown[cells[1]] = cells[2:]
    assert shown == written
    assert set(shown) == set(VARIANTS) - {"memory from step 0"}
