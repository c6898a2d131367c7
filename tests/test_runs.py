"""
test_runs.py: what a run of `memdlm.py --tiny` writes, that nothing but its flags decides what comes
out, that no old weights get new settings, and that no evaluation sees an answer.
"""

import math
import random
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import running
import torch
from running import (
    ASKED,
    NAMES,
    SEVERAL,
    TINY,
    differing,
    finished,
    refusal,
    results,
    train,
    weights,
)
from safetensors.torch import load_file

import data
import memdlm
import sample
from lab import evaluate, report, tiny, tools, training, variants
from lab.tools import load_checkpoint, read_json, save_checkpoint, write_json
from lab.training import checkpoint_path
from model import Fast, UserError


def test_a_run_and_its_evaluation_write_all_their_files():
    """A model and its record of each seed and name, results, table, pictures; no half of a file."""
    run = finished()
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    pictures = {"result.png", "memory.png", "denoising.png", "exposure_bias.png", "loss.png"}
    wanted = {"config.json", "results.json", "table.md", "denoising.gif"} | pictures
    for seed, name in evaluate.models_of(read_json(run / "config.json")):
        wanted |= {f"seed{seed}/{name}.safetensors", f"seed{seed}/{name}.json"}
    assert names == wanted
    for picture in pictures:
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), f"{picture} is no picture"
    assert (run / "denoising.gif").read_bytes().startswith(b"GIF8")


def test_results_have_a_record_for_each_cell():
    """Scores, exposure bias and losses of every model of every seed, every setting of the run, and
    where the numbers come from. Before the first step all models of a seed have equal losses, to
    the last bit."""
    found, config = results(finished()), read_json(finished() / "config.json")
    assert {"device", "dtype", "torch", "threads"} <= found["machine"].keys()
    assert found["config"]["run"] == config
    rows = ["base", "base_inference", "mdlm", "mdlm_inference", "mdlm-0.0001", "memdlm_train"]
    rows.append("memdlm_train_inference")
    places = [(seed, row) for seed in (0, 1) for row in rows]
    assert [(r["seed"], r["method"]) for r in found["niah"]] == places
    assert {(r["task"], r["length"], r["n"]) for r in found["niah"]} == {("cwe", 64, 2)}
    for ratio in (1, 0.5):
        walks = report.matching(found["exposure_bias"], mask_ratio=ratio)
        assert [(r["seed"], r["method"]) for r in walks] == places
    assert [(one["seed"], one["name"]) for one in found["training"]] == evaluate.models_of(config)
    for seed in (0, 1):
        logged = report.matching(found["loss"], seed=seed)
        losses = [(r["method"], r["step"]) for r in logged]
        arms = ("mdlm", "mdlm-0.0001", "memdlm")
        assert losses == [(arm, step) for arm in arms for step in range(4)], seed
        first = [{**one, "method": "", "lr": 0} for one in report.matching(logged, step=0)]
        assert first[0] == first[1] == first[2]
        later = {one["train_without_memory"] for one in report.matching(logged, step=1)}
        assert len(later) == 3
    assert all(math.isfinite(record[key]) for record in found["loss"] for key in training.LOSSES)


def test_a_seed_alone_gives_the_bits_it_gave_beside_others(tmp_path):
    """Seed 1 by itself has the weights and scores of `--seeds 2`, in a process with another past;
    and they are not those of seed 0."""
    torch.rand(3), random.random()  # whatever else draws must not matter
    train("--seed", 1, "--control-lr", "1e-4", "--out", tmp_path)
    assert not differing(weights(tmp_path, 1), weights(finished(), 1))
    assert differing(weights(finished(), 0), weights(finished(), 1)) == set(NAMES)
    together, alone = results(finished()), running.evaluated(tmp_path, tmp_path)
    for key in ("niah", "exposure_bias", "loss", "frontier"):
        found = report.matching(together[key], seed=1)
        assert found == alone[key], f"{key} differ"


def test_all_methods_see_the_same_batches_and_masks(tmp_path, monkeypatch):
    """Only so is a difference between them one of the method; and another seed has others."""
    seen = []
    monkeypatch.setattr(memdlm, "draw_anchor", running.recorded(memdlm.draw_anchor, seen))
    train(*SEVERAL, "--bases", finished(), "--out", tmp_path)
    runs = [seen[start : start + 3] for start in range(0, len(seen), 3)]  # three steps each
    assert len(runs) == 6
    for seed in (runs[:3], runs[3:]):
        for steps in zip(*seed):
            assert steps[0].masked.equal(steps[1].masked)
            assert steps[0].masked.equal(steps[2].masked)
    assert not runs[0][0].masked.equal(runs[3][0].masked)


def test_an_evaluation_stopped_between_models_goes_on(tmp_path, monkeypatch):
    """What was measured of some models is kept and is not measured again, and the end is the same
    as without the stop. With other settings or weights nothing of it is used."""
    run, config = running.copy_of_finished(tmp_path), read_json(finished() / "config.json")
    out, score_cell, asked = tmp_path / "eval", evaluate.score_cell, []

    def interrupted(model, *rest):
        asked.append(rest)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return score_cell(model, *rest)

    monkeypatch.setattr(evaluate, "score_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.evaluated(run, out)
    kept = len(list(out.rglob("*.json")))
    assert 0 < kept < len(evaluate.models_of(config))
    again = mock.Mock(side_effect=score_cell)
    monkeypatch.setattr(evaluate, "score_cell", again)
    resumed = running.evaluated(run, out)
    cells = len(resumed["niah"])
    assert cells - 4 <= again.call_count < cells
    for key in ("niah", "exposure_bias", "loss", "frontier", "comparisons", "memory"):
        assert resumed[key] == results(finished())[key], f"{key} differ"
    (out / "results.json").unlink()
    again.reset_mock()
    running.evaluated(run, out, "--samples", 3)
    assert again.call_count == cells
    path, other = (checkpoint_path(run, seed, "mdlm-0.0001") for seed in (0, 1))
    save_checkpoint(path, load_checkpoint(other)[0], load_checkpoint(path)[1])
    (out / "results.json").unlink()
    running.evaluated(run, out, "--samples", 3)
    assert again.call_count == cells + 1, "the model whose weights are others"


def test_a_run_stopped_anywhere_and_resumed_is_an_uninterrupted_run(tmp_path):
    """Bit for bit the weights and the log of the finished run; and on the way the state of AdamW,
    moments and step counts, of a run that is stopped at the same step for the first time."""
    often, name = tmp_path / "often", "seed0/memdlm.safetensors"
    for i, step in enumerate((0, 3, 2, 3, 1)):  # one step is lost each time; of 4 + 3 + 3, 9 stay
        resume = ["--resume"] if i else []
        running.train_until(step, "--save-every", 1, "--out", often, *resume)
    running.train_until(5, "--bases", finished(), "--out", tmp_path / "once")
    states = [load_file(tmp_path / run / name) for run in ("once", "often")]
    moments = {key.rpartition("/")[2] for key in states[0] if key.startswith("adam.")}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
    assert not differing({name: states[0]}, {name: states[1]})
    train("--out", often, "--resume")
    assert not differing(weights(often), weights(finished()))
    logs = [load_checkpoint(run / name)[1]["log"] for run in (often, finished())]
    assert logs[0] == logs[1], "a loss was logged twice, or not at all"


def test_what_is_resumed_lies_in_memory_and_not_in_its_file(tmp_path, model):
    """safetensors maps files. Windows replaces none that is mapped, so that --resume could not save
    again; here its bytes are overwritten under the state of AdamW."""
    path, theta = tmp_path / "memdlm.safetensors", model.output.weight
    one, other = (torch.optim.AdamW([theta]) for _ in range(2))
    theta.square().sum().backward()
    one.step()
    training.save_state(path, model, one, {"step": 1, "config": {}, "identity": {}}, False)
    training.load_state(path, model, other, {})
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(other.state[theta]["exp_avg"], one.state[theta]["exp_avg"])


def test_kill_9_loses_nothing(tmp_path):
    """The real command, killed while it trains, leaves a folder from which --resume ends in the
    bits of a run that was not; and the half of a file that such a kill may leave is never read."""
    run, flags = tmp_path / "killed", ["--pretrain-steps", 30, "--save-every", 1]
    first = checkpoint_path(run, 0, "base")
    process = running.start("memdlm.py", *TINY, "--pretrain", *flags, "--out", run)
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    running_still = process.poll() is None
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert running_still, errors
    first.with_name("base.safetensors.partial").write_bytes(first.read_bytes()[:1000])
    assert not load_checkpoint(first)[1]["done"]
    train(*flags, "--out", run, "--resume")
    train(*flags, "--out", tmp_path / "whole")
    assert not differing(weights(run), weights(tmp_path / "whole"))


def test_a_finished_run_may_be_resumed_and_evaluated_again(tmp_path):
    """Nothing is trained and no checkpoint is touched, and the same numbers come out."""
    run = running.copy_of_finished(tmp_path)
    before = running.stamps(run / "seed0")
    train(*SEVERAL, "--out", run, "--resume")
    again = running.evaluated(run, run)
    assert running.stamps(run / "seed0") == before
    for key in ("config", "niah", "exposure_bias", "loss"):
        assert again[key] == results(finished())[key], f"{key} differ"


def test_an_occupied_folder_is_left_alone(tmp_path, capsys):
    """A second run into the same --out is refused, whatever its flags, and told of --resume; and
    --resume goes on with the settings that are there, or not at all. Nothing is touched."""
    run = running.copy_of_finished(tmp_path)
    before = running.stamps(run)
    for flags, named in (
        ("--seeds 2", "--resume"),
        ("--steps 9", "--resume"),
        ("--batch 4 --resume", "--batch 2"),
    ):
        said = refusal(capsys, "memdlm", *TINY, *SEVERAL, *flags.split(), "--out", run)
        assert named in said
        assert str(run) in said
    assert running.stamps(run) == before


def test_resume_with_any_other_setting_names_its_flag(tmp_path):
    """One for one, for every flag but those that decide no number."""
    flags = vars(tiny.build_parser().parse_args(TINY))
    wanted = tools.settings(tiny.build_parser().parse_args(TINY))
    decide_nothing = {"out", "resume", "bases", "save_every", "device"}
    assert flags.keys() - wanted.keys() == decide_nothing
    tools.start_run(tmp_path, wanted, resume=False)
    tools.start_run(tmp_path, wanted, resume=True)
    for name in wanted.keys() - {"dial"}:
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
            tools.start_run(tmp_path, {**wanted, name: "another"}, resume=True)
        assert read_json(tmp_path / "config.json") == wanted, "a refused run changed its settings"


def test_a_run_of_an_earlier_version_is_read_but_not_continued(tmp_path, capsys):
    """What its settings do not name is read as the default; to go on with it is refused at once."""
    run = running.copy_of_finished(tmp_path)
    config = read_json(run / "config.json")
    del config["memory_form"]
    write_json(run / "config.json", config)
    before = running.stamps(run)
    assert variants.memory_of(config).kind is Fast
    training.open_run(run, 0, "memdlm", "cpu")
    asked = [*TINY, *SEVERAL, "--out", run, "--resume"]
    assert "--memory-form None, not lora" in refusal(capsys, "memdlm", *asked)
    assert running.stamps(run) == before


def test_resume_after_a_change_of_the_tasks_is_refused(tmp_path, capsys, monkeypatch):
    """With another filler in data.py, the fine-tuning set is not what it was."""
    running.train_until(6, "--out", tmp_path)
    monkeypatch.setattr(data, "FILLER", data.FILLER[::-1])
    again = ["--out", tmp_path, "--pretrain", "--resume"]
    assert "pairs" in refusal(capsys, "memdlm", *TINY, *again)


@pytest.mark.parametrize("name", ["base", "memdlm"])
def test_a_checkpoint_of_other_settings_is_not_opened(tmp_path, capsys, name):
    """Somebody has mixed two runs up: all three programs refuse, and name the setting."""
    run, changed = running.copy_of_finished(tmp_path), "length" if name == "base" else "lr"
    write_json(run / "config.json", {**read_json(run / "config.json"), changed: 65})
    ask = ["--run", run, "--model", name, "--prompt", running.PROMPT]
    assert changed in refusal(capsys, "sample", *ask)
    assert changed in refusal(capsys, "eval_niah", "--run", run, "--out", tmp_path / "eval")
    flags = [*SEVERAL, f"--{changed}", 65, "--out", run, "--pretrain", "--resume"]
    assert changed in refusal(capsys, "memdlm", *TINY, *flags)


def test_an_unfinished_run_is_neither_scored_nor_asked(tmp_path, capsys):
    """Stopped in either method: the programs say so before any work."""
    for step, name, flags in ((2, "mdlm", []), (3, "memdlm", ["--resume"])):
        running.train_until(step, "--bases", finished(), *flags, "--out", tmp_path / "run")
        ask = ["--run", tmp_path / "run", "--prompt", running.PROMPT, "--model", name]
        assert f"{name}.safetensors is not finished" in refusal(capsys, "sample", *ask)
        score = ["--run", tmp_path / "run", "--tasks", "mv", "--out", tmp_path / "eval"]
        assert f"{name}.safetensors is not finished" in refusal(capsys, "eval_niah", *score)
    assert not (tmp_path / "eval" / "results.json").exists()


def test_bases_takes_a_base_over_only_if_it_fits(tmp_path, capsys, monkeypatch):
    """The same bits as without it; a base of another pretraining, or none, is refused, and
    --pretrain is named, which makes one. Beside --pretrain, --bases would have no effect."""
    with monkeypatch.context() as patch:
        patch.setattr(data, "pretraining_batch", None)  # so that nothing can be pretrained here
        train("--bases", finished(), "--out", tmp_path / "taken")
    assert not differing(weights(tmp_path / "taken"), weights(finished()))
    for setting, named in (("--pretrain-lr 0.5", "pretrain_lr"), ("--seed 5", "seed 5")):
        out = tmp_path / named
        flags = [*setting.split(), "--bases", finished(), "--out", out]
        said = refusal(capsys, "memdlm", *TINY, *flags)
        assert named in said
        assert "add --pretrain" in said
        assert not list(out.rglob("*.safetensors"))
    assert "--bases" in refusal(capsys, "memdlm", *TINY, "--pretrain", "--bases", finished())


@pytest.mark.parametrize("seed", range(5))
def test_a_shipped_base_is_that_of_todays_defaults_and_answers(seed):
    """A stale one cannot hide: after a change of the tasks, of the model or of the settings it no
    longer fits, or it answers worse. (32 questions at 1x; the five have .98 of 256 in the mean.)"""
    config = tools.settings(tiny.build_parser().parse_args(["--tiny"]))
    path = checkpoint_path(training.SHIPPED, seed, "base")
    training.find_base(config, training.SHIPPED, seed)
    model, meta = tools.load_model(path)
    assert (meta["step"], meta["skipped"]) == (config["pretrain_steps"], 0)
    asked = SimpleNamespace(samples=8, steps=None, block_length=None, threshold=0.95)
    cells = [evaluate.score_cell(model, None, task, 96, seed, asked, "old") for task in data.TASKS]
    assert sum(cell["score"] for cell in cells) / len(cells) > 0.9


def test_processes_end_in_the_results_of_one(tmp_path):
    """Two processes share the models of a run; every number is that of one process."""
    out = tmp_path / "out"
    asked = ["--run", str(finished()), "--out", str(out), *ASKED]
    two = "import torch; torch.set_num_threads(2); from lab import evaluate; "
    two += f"evaluate.draw_pictures = print; evaluate.run({asked})"
    process = running.start("-c", two)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for key in ("niah", "exposure_bias", "loss", "frontier", "memory"):
        assert results(out)[key] == results(finished())[key], f"{key} differ"


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    """Bad steps in each phase: these updates alone are left out, and everything saved is finite."""
    bad = {"base": {1: math.nan, 3: -math.inf}, "mdlm": {0: math.inf}, "memdlm": {2: math.nan}}

    def spoilt(name: str):
        method, calls = training.METHODS[name], iter(range(100))
        return lambda *arguments: method(*arguments) * bad[name].get(next(calls), 1)

    for name in bad:
        monkeypatch.setitem(training.METHODS, name, spoilt(name))
    train("--out", tmp_path)
    running.evaluated(tmp_path, tmp_path)
    assert "memdlm of seed 0: 1 updates skipped" in (tmp_path / "table.md").read_text()
    for name, steps in bad.items():
        model, meta = training.open_run(tmp_path, 0, name, "cpu")
        assert meta["skipped"] == len(steps)
        assert all(p.isfinite().all() for p in model.parameters())


def test_an_inner_loop_that_overshoots_is_named(tmp_path, capsys):
    """Where the last inner step often raises the loss that it descends; else nothing is said."""
    for rate, loud in (("100", True), ("0.01", False)):
        capsys.readouterr()
        flags = ["--memory-lr", rate, "--memory-clip", 0, "--bases", finished()]
        train(*flags, "--out", tmp_path / rate)
        assert ("lower --memory-lr" in capsys.readouterr().err) == loud
        log = load_checkpoint(checkpoint_path(tmp_path / rate, 0, "memdlm"))[1]["log"]
        assert (log[-1]["overshoot"] > 0.1) == loud


def garbage(examples: list[data.Example]) -> list[data.Example]:
    """The same prompts and references with random answers of the same length."""
    rng = random.Random(0)
    return [e._replace(response=[rng.randrange(data.EOS) for _ in e.response]) for e in examples]


@pytest.mark.parametrize("rule", variants.WRITE_RULES)
def test_no_evaluation_sees_the_answers(make_model, monkeypatch, rule):
    """What a model says and what is written into its weights stay the same when every true answer
    is replaced by garbage. The exposure bias changes, for it scores the true tokens."""
    memory = memdlm.Memory(rank=8, alpha=16.0, lr=1.0, fraction=0.5, scope="sample")
    write, model = (
        variants.write_with(memory, rule, 2, 0.2, 64, None, None),
        make_model(torch.float32),
    )
    args = SimpleNamespace(samples=4, tasks=["mv"], bias_steps=2, threshold=None, steps=None)
    args.block_length, config, make = None, {"length": 64, "wording": "old"}, data.make_examples
    said, written, biases = [], [], []
    monkeypatch.setattr(sample, "generate", running.recorded(sample.generate, said))
    monkeypatch.setattr(memdlm, "inner_loop", running.recorded(memdlm.inner_loop, written))
    for change in (list, garbage):

        def spoilt(*arguments, change=change, **options) -> list[data.Example]:
            return change(make(*arguments, **options))

        monkeypatch.setattr(data, "make_examples", spoilt)
        for how in (None, write):
            evaluate.score_cell(model, how, "mv", 64, 0, args, "old")
        biases.append(evaluate.exposure_curve(model, write, 0, args, config))
    plain, with_memory, *replaced = said
    assert len(written) == 4, "of the scores and the exposure bias, with either answers"
    for (one, _), (other, _) in zip(written[:2], written[2:]):
        same = all(part.equal(again) for part, again in zip(one.tensors(), other.tensors()))
        assert same, "an answer was written into the memory: other answers give other fast weights"
    assert plain.equal(replaced[0]), "an answer has leaked into the decoding"
    assert with_memory.equal(replaced[1]), "an answer has leaked into what is said with a memory"
    assert not plain.equal(with_memory), "the memory did nothing: this test would prove nothing"
    assert biases[0] != biases[1], "the tokens that are scored should differ"
