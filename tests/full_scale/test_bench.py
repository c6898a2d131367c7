"""
test_bench.py: the page of measurements: what counts as work, and that a stop loses nothing.
(.ci/run measures the small sizes.)
"""

import json
from unittest import mock

import pytest
import torch
from backbones import toy_model
from commands import refusal
from night import pass_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import guarded
from full_scale import bench, experts


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


def fake_cases(measured: list):
    """Three cases that only note that they were measured."""

    def case(name: str, spent: float):
        measured.append(name)
        return {"s": spent, "flops": None}

    def cases(prompts):
        yield "m, mdlm, 2 x 8", lambda: case("mdlm", 2.0)
        yield "m, memdlm, 2 x 8", lambda: case("memdlm", 3.0)
        yield "m, 8 tokens after 9 --cache", lambda: case("cache", 0.5)
        yield "m, 8 tokens after 9", lambda: case("exact", 10.0)

    return cases


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Each line is there as soon as it is measured; nothing is measured twice; ratios stand in the
    end."""
    measured = []
    monkeypatch.setattr(bench, "cases", fake_cases(measured))
    flags = ["--out", str(tmp_path), "--prompts", "9"]
    bench.run([*flags, "--minutes", "0"])
    assert measured == []
    assert "4 cases are left" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measured", mock.Mock(side_effect=[{"s": 2.0}, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            bench.run(flags)
    bench.run(flags)
    assert measured == ["memdlm", "cache", "exact"]
    bench.run(flags)
    assert len(measured) == 3
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
