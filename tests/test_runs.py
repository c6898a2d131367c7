"""
test_runs.py: what a run of `memdlm.py --tiny` writes, that nothing but its flags decides what comes
out, that no old weights get new settings, and that no evaluation sees an answer.
"""

import math
import random
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import running
import torch
from running import NAMES, SEVERAL, TINY, differing, finished, refusal, results, train, weights
from safetensors.torch import load_file

import data
import eval_niah
import memdlm
import sample
from model import UserError, load_checkpoint, read_json, save_checkpoint, write_json

# ---- what a run writes ---------------------------------------------------------------------------


def test_a_run_and_its_evaluation_write_all_their_files():
    """A base for each seed, three fine-tuned models and the records of each draw, results, table,
    pictures, an example; no half of a file."""
    run = finished()
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    pictures = {"frontier.png", "memory.png", "denoising.png", "exposure_bias.png", "loss.png"}
    wanted = {"config.json", "results.json", "table.md", "denoising.txt"} | pictures
    for seed in (0, 1):
        wanted.add(f"seed{seed}/base.safetensors")
        for draw in (0, 1):
            wanted.add(f"seed{seed}/draw{draw}.json")
            models = ("mdlm", "memdlm", "mdlm-0.0001")
            wanted |= {f"seed{seed}/draw{draw}/{name}.safetensors" for name in models}
    assert names == wanted
    for picture in pictures:
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), f"{picture} is no picture"


def test_results_have_a_record_for_each_cell():
    """Scores, exposure bias and losses of every draw of every seed, with the fields that tables and
    pictures read, and with where the numbers come from. Rows with a memory at inference are those
    of each seed's first draw."""
    found, rows = results(finished()), eval_niah.rows_of(read_json(finished() / "config.json"))
    assert {"device", "dtype", "torch", "threads"} <= found["machine"].keys()
    assert "mdlm-0.0001" in rows
    places = []  # seed, draw, row
    for seed, draw in ((0, 0), (0, 1), (1, 0), (1, 1)):
        there = [name for name, row in rows.items() if draw == 0 or not row.memory]
        places += [(seed, draw, name) for name in there]
    scores = [(r["seed"], r["draw"], r["method"]) for r in found["niah"]]
    assert scores == places
    assert {(r["task"], r["length"], r["n"]) for r in found["niah"]} == {("cwe", 64, 2)}
    for ratio in (1, 0.5):
        walks = eval_niah.matching(found["exposure_bias"], mask_ratio=ratio)
        assert [(r["seed"], r["draw"], r["method"]) for r in walks] == places
    for (seed, draw), logged in eval_niah.by_unit(found["loss"]).items():
        losses = [(r["method"], r["step"]) for r in logged]
        arms = ("mdlm", "memdlm", "mdlm-0.0001")
        assert losses == [(arm, step) for arm in arms for step in range(4)], (seed, draw)
    assert all(math.isfinite(record[key]) for record in found["loss"] for key in memdlm.LOSSES)


def test_results_name_every_setting_of_the_run():
    """Whoever reads results.json alone must know how its models were trained, and the evaluation
    must tell two runs apart that differ in one setting."""
    noted = results(finished())["config"]["run"]
    for name, value in read_json(finished() / "config.json").items():
        assert noted[name] == value, f"results.json says that --{name} was {noted[name]}"


def test_both_methods_start_from_one_base():
    """Before the first step the two models are one, and every loss is equal to the last bit."""
    losses = eval_niah.matching(results(finished())["loss"], seed=0, draw=0)
    first = [{**record, "method": "", "lr": 0} for record in eval_niah.matching(losses, step=0)]
    later = [record["train_without_memory"] for record in eval_niah.matching(losses, step=1)]
    assert first[0] == first[1] == first[2]
    assert len(set(later)) == 3


def test_tiny_hands_its_folder_to_the_evaluation_once(tmp_path, monkeypatch):
    """`memdlm.py --tiny` ends with eval_niah.py on its finished run, and knows no more of
    evaluation than that."""
    run, evaluation = running.copy_of_finished(tmp_path), mock.Mock()
    evaluation.side_effect = lambda arguments: memdlm.open_run(run, 1, 1, "memdlm", "cpu")
    monkeypatch.setattr(eval_niah, "run", evaluation)
    memdlm.main([*TINY, *SEVERAL, "--out", str(run), "--resume"])
    evaluation.assert_called_once_with(["--run", str(run), "--device", "cpu"])


# ---- nothing but flags decides -------------------------------------------------------------------


def test_a_seed_alone_gives_the_bits_it_gave_beside_others(tmp_path):
    """Seed 1 by itself, with one draw, has the weights and scores of `--seeds 2 --draws 2`, in a
    process with another past; and they are not those of seed 0, or of the other draw."""
    torch.rand(3), random.random()  # whatever else draws must not matter
    train("--seed", 1, "--control-lr", "1e-4", "--out", tmp_path)
    assert not differing(weights(tmp_path, 1), weights(finished(), 1))
    assert differing(weights(finished(), 0), weights(finished(), 1)) == set(NAMES)
    assert differing(weights(finished(), 1, 0), weights(finished(), 1, 1)) == set(NAMES[1:])
    together, alone = results(finished()), running.evaluate(tmp_path, tmp_path)
    for key in ("niah", "exposure_bias", "loss", "frontier"):
        found = eval_niah.matching(together[key], seed=1, draw=0)
        assert found == alone[key], f"{key} differ"


def test_all_methods_of_a_draw_see_the_same_batches_and_masks(tmp_path, monkeypatch):
    """Only so is a difference between them one of the method; and another draw has others."""
    seen, draw_anchor = [], memdlm.draw_anchor

    def watched(maskable, generator):
        seen.append(draw_anchor(maskable, generator))
        return seen[-1]

    monkeypatch.setattr(memdlm, "draw_anchor", watched)
    flags = ["--control-lr", "1e-4", "--draws", 2, "--bases", finished()]
    train(*flags, "--out", tmp_path)
    runs = [seen[start : start + 3] for start in range(0, len(seen), 3)]  # three steps each
    assert len(runs) == 6
    for draw in (runs[:3], runs[3:]):
        for steps in zip(*draw):
            assert steps[0].masked.equal(steps[1].masked)
            assert steps[0].masked.equal(steps[2].masked)
    assert not runs[0][0].masked.equal(runs[3][0].masked)


def test_an_evaluation_stopped_between_draws_goes_on(tmp_path, monkeypatch, capsys):
    """What was measured of the first draw is kept, is not measured again, which is said, and the
    end is the same as without the stop. With other settings or weights nothing of it is used."""
    run, measured = running.copy_of_finished(tmp_path), []
    out, measure_unit = tmp_path / "eval", eval_niah.measure_unit

    def interrupted(args, config, seed, draw, models):
        if measured == [(0, 0)]:
            raise KeyboardInterrupt
        measured.append((seed, draw))
        return measure_unit(args, config, seed, draw, models)

    monkeypatch.setattr(eval_niah, "measure_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.evaluate(run, out)
    again = mock.Mock(side_effect=measure_unit)
    monkeypatch.setattr(eval_niah, "measure_unit", again)
    resumed = running.evaluate(run, out)
    assert [call.args[2:4] for call in again.call_args_list] == [(0, 1), (1, 0), (1, 1)]
    assert str(out / "seed0" / "draw0.json") in capsys.readouterr().out, "it should say so"
    for key in ("niah", "exposure_bias", "loss", "frontier", "headline"):
        assert resumed[key] == results(finished())[key], f"{key} differ"
    (out / "results.json").unlink()
    running.evaluate(run, out, "--samples", 3)
    assert again.call_count == 3 + 4
    shutil.copy(running.checkpoint(run, "memdlm", 1, 1), running.checkpoint(run, "memdlm", 1, 0))
    meta = load_checkpoint(running.checkpoint(finished(), "memdlm", 1, 0))[1]
    path = running.checkpoint(run, "memdlm", 1, 0)
    save_checkpoint(path, load_checkpoint(path)[0], meta)
    (out / "results.json").unlink()
    running.evaluate(run, out, "--samples", 3)
    assert again.call_count == 3 + 4 + 1, "the draw whose weights are others"


def test_a_run_stopped_anywhere_and_resumed_is_an_uninterrupted_run(tmp_path):
    """Stopped and resumed in the base and in both methods: bit for bit the weights and the log of
    the finished run; and on the way the state of AdamW, moments and step counts, of a run that is
    stopped at the same step for the first time."""
    often, name = tmp_path / "often", "seed0/draw0/memdlm.safetensors"
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


def test_kill_9_loses_nothing(tmp_path):
    """The real command, killed while it trains, leaves a folder from which --resume ends in the
    same bits; and the half of a file that such a kill may leave is never read."""
    first, flags = running.checkpoint(tmp_path, "mdlm"), ["--bases", finished(), "--save-every", 1]
    process = running.start("memdlm.py", *TINY, *flags, "--out", tmp_path)
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    first.with_name("memdlm.safetensors.partial").write_bytes(first.read_bytes()[:1000])
    train("--out", tmp_path, "--resume")
    assert not differing(weights(tmp_path), weights(finished()))


def test_a_finished_run_may_be_resumed_and_evaluated_again(tmp_path):
    """Nothing is trained, no checkpoint is touched, and the same numbers come out."""
    run = running.copy_of_finished(tmp_path)
    before, checkpoints = results(run), running.stamps(run / "seed0")
    train(*SEVERAL, "--out", run, "--resume")
    again = running.evaluate(run, run)
    assert running.stamps(run / "seed0") == checkpoints
    for key in ("config", "niah", "exposure_bias", "loss"):
        assert again[key] == before[key], f"{key} differ"


# ---- old weights never get new settings ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [("--seeds 2", "--resume"), ("--steps 9", "--resume"), ("--batch 4 --resume", "--batch 2")],
)
def test_an_occupied_folder_is_left_alone(tmp_path, capsys, flags, named):
    """A second run into the same --out is refused, whatever its flags, and told of --resume; and
    --resume goes on with the settings that are there, or not at all. Nothing is touched."""
    run = running.copy_of_finished(tmp_path)
    before = running.stamps(run)
    said = refusal(capsys, memdlm.main, *TINY, *SEVERAL, *flags.split(), "--out", run)
    assert named in said
    assert str(run) in said
    assert running.stamps(run) == before


def test_resume_with_any_other_setting_names_its_flag(tmp_path):
    """A run goes on with the settings that it was started with, or not at all: one for one, for
    every flag but those that decide no number."""
    flags = vars(memdlm.build_parser().parse_args(TINY))
    wanted = memdlm.settings(memdlm.build_parser().parse_args(TINY))
    assert flags.keys() - wanted.keys() == {"out", "resume", "bases", "save_every", "device"}
    memdlm.start_run(tmp_path, wanted, resume=False)
    memdlm.start_run(tmp_path, wanted, resume=True)
    for name in wanted.keys() - {"dial"}:
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
            memdlm.start_run(tmp_path, {**wanted, name: "another"}, resume=True)
        assert read_json(tmp_path / "config.json") == wanted, "a refused run changed its settings"


def test_a_run_of_an_earlier_version_is_read_but_not_continued(tmp_path, capsys):
    """Its settings do not name what came later. It is read with the values it was trained with, the
    defaults; to go on with it is refused before anything is touched."""
    run = running.copy_of_finished(tmp_path)
    config = read_json(run / "config.json")
    del config["memory_form"]
    write_json(run / "config.json", config)
    before = running.stamps(run)
    assert memdlm.memory_of(config).form == "lora"
    memdlm.open_run(run, 0, 0, "memdlm", "cpu")
    asked = [*TINY, *SEVERAL, "--out", run, "--resume"]
    assert "--memory-form None, not lora" in refusal(capsys, memdlm.main, *asked)
    assert running.stamps(run) == before


def test_resume_after_a_change_of_the_tasks_is_refused(tmp_path, capsys, monkeypatch):
    """What the generators produce is part of what a run is: with another filler in data.py, its
    fine-tuning set is not what it was."""
    running.train_until(6, "--out", tmp_path)
    monkeypatch.setattr(data, "FILLER", data.FILLER[::-1])
    assert "pairs" in refusal(capsys, memdlm.main, *TINY, "--out", tmp_path, "--resume")


@pytest.mark.parametrize("name", ["base", "memdlm"])
def test_a_checkpoint_of_other_settings_is_not_opened(tmp_path, capsys, name):
    """config.json says one thing and the checkpoint another: somebody has mixed two runs up. All
    three programs refuse, and name the setting."""
    run, changed = running.copy_of_finished(tmp_path), "length" if name == "base" else "lr"
    write_json(run / "config.json", {**read_json(run / "config.json"), changed: 65})
    ask = ["--run", run, "--model", name, "--prompt", running.PROMPT]
    assert changed in refusal(capsys, sample.main, *ask)
    assert changed in refusal(capsys, eval_niah.main, "--run", run, "--out", tmp_path / "eval")
    flags = [*SEVERAL, f"--{changed}", 65, "--out", run, "--resume"]
    assert changed in refusal(capsys, memdlm.main, *TINY, *flags)


def test_an_unfinished_run_is_neither_scored_nor_asked(tmp_path, capsys):
    """Stopped in either method, a run has a model that is not finished, and the programs say so
    before any work, instead of using what was saved on the way."""
    for step, name, flags in ((2, "mdlm", ["--bases", finished()]), (3, "memdlm", ["--resume"])):
        running.train_until(step, *flags, "--out", tmp_path / "run")
        ask = ["--run", tmp_path / "run", "--prompt", running.PROMPT, "--model", name]
        assert f"{name}.safetensors is not finished" in refusal(capsys, sample.main, *ask)
        score = ["--run", tmp_path / "run", "--tasks", "mv", "--out", tmp_path / "eval"]
        assert f"{name}.safetensors is not finished" in refusal(capsys, eval_niah.main, *score)
    assert not (tmp_path / "eval" / "results.json").exists()


def test_bases_takes_a_base_over_only_if_it_fits(tmp_path, capsys, monkeypatch):
    """--bases spares the longest part of a run: the same bits as without it. A base of another
    pretraining, or none, is refused, and nothing is trained on it."""
    with monkeypatch.context() as patch:
        patch.setattr(data, "pretraining_batch", None)  # so that nothing can be pretrained here
        train("--bases", finished(), "--out", tmp_path / "taken")
    assert not differing(weights(tmp_path / "taken"), weights(finished()))
    for setting, named in (("--pretrain-lr 0.5", "pretrain_lr"), ("--seed 5", "seed5")):
        out = tmp_path / named
        flags = [*setting.split(), "--bases", finished(), "--out", out]
        said = refusal(capsys, memdlm.main, *TINY, *flags)
        assert named in said
        assert not list(out.rglob("*dlm.safetensors"))


# ---- numbers that are not finite -----------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    """Bad steps in each phase: these updates alone are left out, and everything saved is finite."""
    bad = {"base": {1: math.nan, 3: -math.inf}, "mdlm": {0: math.inf}, "memdlm": {2: math.nan}}

    def spoilt(name: str):
        method, calls = memdlm.METHODS[name], iter(range(100))
        return lambda *arguments: method(*arguments) * bad[name].get(next(calls), 1)

    for name in bad:
        monkeypatch.setitem(memdlm.METHODS, name, spoilt(name))
    train("--out", tmp_path)
    for name, steps in bad.items():
        model, meta = memdlm.open_run(tmp_path, 0, 0, name, "cpu")
        assert meta["skipped"] == len(steps)
        assert all(p.isfinite().all() for p in model.parameters())


def test_an_inner_loop_that_overshoots_is_named(tmp_path, capsys):
    """With a step size far too large, the last inner step raises the loss that it descends, and the
    run says so; with a small one, none does, and nothing is said."""
    for rate, loud in (("100", True), ("0.01", False)):
        capsys.readouterr()
        flags = ["--memory-lr", rate, "--memory-clip", 0, "--bases", finished()]
        train(*flags, "--out", tmp_path / rate)
        assert ("lower --memory-lr" in capsys.readouterr().out) == loud
        log = load_checkpoint(running.checkpoint(tmp_path / rate, "memdlm"))[1]["log"]
        assert (log[-1]["overshoot"] > 0.1) == loud


# ---- no evaluation sees the answers --------------------------------------------------------------


def garbage(examples: list[data.Example]) -> list[data.Example]:
    """The same prompts and references with random answers of the same length."""
    rng = random.Random(0)
    return [e._replace(response=[rng.randrange(data.EOS) for _ in e.response]) for e in examples]


def spoil_answers(make, change, *arguments, **options) -> list[data.Example]:
    """What `make` makes, changed."""
    return change(make(*arguments, **options))


@pytest.mark.parametrize("rule", sample.WRITE_RULES)
def test_no_evaluation_sees_the_answers(make_model, monkeypatch, rule):
    """What a model says and what is written into its weights stay the same when every true answer
    is replaced by garbage. The exposure bias changes, for it scores the true tokens; but the
    memory under which it does so was made from the prompt alone."""
    memory = memdlm.Memory(rank=8, alpha=16.0, lr=1.0, fraction=0.5, scope="sample")
    asked = {"how": sample.Write(rule, memory, passes=2, window=64), "threshold": None}
    asked |= {"samples": 4, "tasks": ["mv"], "length": 64, "bias_steps": 2, "wording": "old"}
    args = SimpleNamespace(**asked, steps=None, block_length=None)
    models, make = dict.fromkeys(NAMES, make_model(torch.float32)), data.make_examples
    said, written, biases = [], [], []
    rows = {name: eval_niah.ROWS[name] for name in ("memdlm_train", "memdlm_train_inference")}
    monkeypatch.setattr(sample, "generate", running.recorded(sample.generate, said))
    monkeypatch.setattr(sample, "write_prompt", running.recorded(sample.write_prompt, written))
    for change in (list, garbage):
        spoilt = partial(spoil_answers, make, change)
        monkeypatch.setattr(data, "make_examples", spoilt)
        for row in ("memdlm_train", "memdlm_train_inference"):
            memory = eval_niah.ROWS[row].memory
            eval_niah.score_cell(models["memdlm"], memory, "mv", 64, 0, 0, args)
        biases.append(eval_niah.exposure_bias(models, rows, 0, 0, args))
    plain, with_memory, *replaced = said
    for one, other in zip(written[:2], written[2:]):  # of the scores, of the exposure bias
        same = all(part.equal(again) for part, again in zip(one.tensors(), other.tensors()))
        assert same, "an answer was written into the memory: other answers give other fast weights"
    assert plain.equal(replaced[0]), "an answer has leaked into the decoding"
    assert with_memory.equal(replaced[1]), "an answer has leaked into what is said with a memory"
    assert not plain.equal(with_memory), "the memory did nothing: this test would prove nothing"
    assert biases[0] != biases[1], "the tokens that are scored should differ"
