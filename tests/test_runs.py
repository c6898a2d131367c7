"""What a run of memdlm.py writes, that it survives kill -9 and starts from nothing but its flags, and that it never leaks."""

import math
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from running import (
    FULL,
    METHODS,
    QUICK,
    SIZES,
    StoppedError,
    contents,
    interrupt_after,
    numbers,
    only,
    read,
    same_weights,
    start,
    tensors,
    train,
)
from safetensors.torch import load_file

import data
import eval_niah
import memdlm
import sample
from model import Config, Transformer, UserError, load_model, save_checkpoint

# ---- what a run writes -----------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_files(finished):
    """results.json, four pictures, one denoised example, and three checkpoints per seed; nothing half-written."""
    names = set(contents(finished))
    pictures = {"loss.png", "exposure_bias.png", "niah.png", "lengths.png"}
    wanted = {"config.json", "results.json", "denoising.txt", *pictures}
    wanted |= {f"seed{seed}/{name}.safetensors" for seed in (0, 1) for name in ("base", "mdlm", "memdlm")}
    assert wanted <= names
    assert not [name for name in names if "partial" in name]
    for picture in pictures:
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
    assert all(r.keys() == {"method", "task", "length", "n", "score", "ci95", "scores", "steps", "seed"} for r in niah)
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
        assert record["scores"] == {"ruler": record["score"]}
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
    applied, _ = memdlm.train_step(model, optimizer, [loss], 1.0)
    assert applied == any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())


# ---- leak-free -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def talkative() -> Transformer:
    """Random weights of some size, so that answers vary from prompt to prompt, and with what was written."""
    model, generator = Transformer(Config(data.VOCAB_SIZE, data.MASK)).eval(), torch.Generator().manual_seed(0)
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

    def recorded(*arguments, **options):
        texts.append(plain(*arguments, **options))
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


PARSERS = {  # what is typed before --help -> the parser that must answer
    "memdlm.py": (memdlm, [], memdlm.build_parser("tiny")),
    "memdlm.py --backbone X": (memdlm, ["--backbone", "X"], memdlm.build_parser("backbone")),
    "sample.py": (sample, [], sample.build_parser()),
    "eval_niah.py": (eval_niah, [], eval_niah.build_parser()),
}


@pytest.mark.parametrize("program", PARSERS)
def test_every_flag_is_explained_and_tested(program):
    """Each flag has a help text, and its name occurs in these tests: no flag that nothing covers."""
    tested = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py")))
    for action in PARSERS[program][2]._actions:
        (*_, flag) = action.option_strings
        assert action.help, flag
        assert flag == "--help" or re.search(rf"{flag}(?![\w-])", tested), f"{flag} is not tested"


@pytest.mark.parametrize("program", PARSERS)
def test_help_lists_every_flag(program, capsys):
    """--help prints all flags with their defaults and exits with 0; with --backbone those of a real backbone."""
    module, typed, parser = PARSERS[program]
    with pytest.raises(SystemExit) as stop:
        module.main([*typed, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(action.option_strings[-1] in printed for action in parser._actions)


PAPER = {  # Sec. 4.1, and the ablations' default
    "--memory-steps": "2",
    "--memory-epochs": "1",
    "--memory-strategy": "consistent",
    "--memory-loss": "ce",
    "--memory-targets": "all",
    "--loss-norm": "token",
    "--memory-rank": "32",
    "--memory-alpha": "64",
    "--memory-lr": "0.1",
    "--memory-clip": "1.0",
    "--memory-scope": "batch",
    "--start-scale": "1.5",
    "--batch": "2",
    "--lr": "2e-5",
    "--warmup": "0.1",
    "--clip": "1.0",
    "--lora-rank": "32",
    "--lora-alpha": "64",
    "--lora-dropout": "0.05",
}


@pytest.mark.parametrize("dial", memdlm.PRESETS)
@pytest.mark.parametrize("flag", PAPER)
def test_help_names_the_papers_value(dial, flag):
    """In brackets, under both dials, also where --tiny's default is another."""
    (action,) = (action for action in memdlm.build_parser(dial)._actions if flag in action.option_strings)
    assert re.search(rf"\[{re.escape(PAPER[flag])}[],]", action.help), action.help


def test_a_real_backbones_defaults_are_the_papers(capsys):
    """--backbone without further flags is the published setting, as far as flags decide it."""
    defaults = vars(memdlm.build_parser("backbone").parse_args([]))
    for flag, value in PAPER.items():
        assert (
            defaults[flag.removeprefix("--").replace("-", "_")] == type(memdlm.Memory.lr)(value)
            if value[0].isdigit()
            else value
        )
