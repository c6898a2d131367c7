"""Each flag changes what it says it changes, and nothing else."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from running import PAIR, QUICK, StoppedError, interrupt_after, jsonl, only, read, same_weights, say, train
from safetensors.torch import load_file

import data
import eval_niah
import memdlm

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
    ("--loss-norm sequence", set()),  # the padded answers are equally long, so that it is the average over tokens
    ("--memory-steps 1", INNER),
    ("--memory-steps 3 --start-scale 3", INNER),
    ("--memory-epochs 2", INNER),
    ("--memory-strategy pre_anchor_only", INNER),
    ("--memory-strategy anchor_only", INNER),
    ("--memory-strategy inconsistent", INNER),
    ("--memory-loss kl", INNER),
    ("--memory-loss reverse_kl", INNER),
    ("--memory-loss hidden_mse", INNER),
    ("--memory-loss hidden_cosine", INNER),
    ("--memory-targets newly_revealed", INNER),
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
    with mock.patch.object(eval_niah, "score_cells", return_value=[]):  # scores of a run this small say nothing
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


def test_the_loss_norm_matters_where_answers_differ_in_length(finished, tmp_path):
    """--pads ignore leaves each answer its own length; then averaging over rows is not averaging over tokens. ("batch" differs
    from "token" by a factor alone, which clipping would take away again.)"""
    flags = "--pads ignore --clip 0 --loss-norm"
    found = {norm: effect_of(finished, tmp_path / norm, f"{flags} {norm}") for norm in memdlm.NORMS}
    for key in BOTH:
        assert len({str(effect[key]) for effect in found.values()}) == 3, key


@pytest.fixture(scope="session")
def papers_effect(finished, tmp_path_factory) -> dict:
    return effect_of(finished, tmp_path_factory.mktemp("runs"), "--write paper")


VARIANTS = ["--memory-steps 1", "--memory-steps 3", "--memory-epochs 2", "--memory-loss kl", "--memory-targets newly_revealed"]


@pytest.mark.parametrize("flags", [*VARIANTS, *(f"--memory-strategy {name}" for name in memdlm.STRATEGIES)])
def test_every_variant_writes_prompts_by_the_papers_rule(finished, papers_effect, tmp_path, flags):
    """The inner loop's variants hold for training and for reading alike: with --write paper each run ends, in finite numbers,
    and only --memory-strategy consistent, the default, is what it was."""
    effect, usual = effect_of(finished, tmp_path, f"--write paper {flags}"), papers_effect
    assert all(math.isfinite(x) for pair in effect[INFERENCE] for x in pair)
    assert {key for key in effect if effect[key] != usual[key]} == (set() if flags.endswith(" consistent") else INNER)


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
        pairs = memdlm.tiny_pairs(args, 0, "cpu")
        assert (len(pairs.train), len(pairs.held_out)) == (19, 1)
        assert sorted(pairs.train + pairs.held_out) == sorted(data.read_jsonl(path, 4096))
        assert all(math.isfinite(r["eval_without_memory"]) for r in read(outs[-1])["loss"])
    assert not same_weights(*outs)


def test_one_pair_is_enough(finished, tmp_path):
    """A file with a single pair trains on it; there is nothing to hold out."""
    path = tmp_path / "one.jsonl"
    path.write_text(jsonl(PAIR))
    train(*QUICK, "--data", path, "--bases", finished, "--out", tmp_path / "run")
    assert read(tmp_path / "run")["niah"]
