"""
test_backbone.py: `memdlm.py --backbone` from end to end, on checkpoints small enough for a test: fine-tuning, its files, what
each flag does, a run that was stopped, two processes.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import MOE, SETTINGS, add_random_lora, toy_batch, toy_model, write_checkpoint
from running import ROOT, StoppedError, contents, interrupt_after, jsonl, read
from safetensors.torch import load_file

import data
import eval_niah
import memdlm
import model as program
import sample
from memdlm import METHODS, Memory, Objective, generator_for
from model import Linear, adapter_tensors, add_outer_lora, count, linear_layers, load_adapter, load_llada

QUICK = "--steps 3 --lora-rank 4 --memory-rank 4 --lr 1e-3 --lora-alpha 8 --eval-examples 4 --device cpu".split()
PAIRS = [{"prompt": f"Who is number {i}?", "response": f" Mary {'went home. ' * (1 + i % 9)}{i}"} for i in range(20)]
THETA = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> dict[str, Path]:
    """kind -> a checkpoint's folder; "data" -> 20 pairs. Nobody writes into them."""
    root = tmp_path_factory.mktemp("toys")
    (root / "pairs.jsonl").write_text(jsonl(*PAIRS))
    return {kind: write_checkpoint(root / f"toy{i}", kind) for i, kind in enumerate(SETTINGS)} | {"data": root / "pairs.jsonl"}


@pytest.fixture(scope="session")
def tune(toys):
    """Fine-tunes a toy by the real command, in this process; later flags win. Returns the run's folder."""

    def run(out: Path, *flags, kind: str = "llada-moe") -> Path:
        arguments = ["--backbone", toys[kind], "--data", toys["data"], *QUICK, *flags, "--out", out]
        memdlm.main([str(argument) for argument in arguments])
        return out

    return run


@pytest.fixture(scope="session")
def tuned(tune, tmp_path_factory) -> Path:
    """The run that the others are compared with. Nobody writes into it."""
    return tune(tmp_path_factory.mktemp("tuned") / "run")


def theta(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / THETA)


def same_theta(one: Path, other: Path) -> bool:
    left, right = theta(one), theta(other)
    assert left.keys() == right.keys()
    return all(t.shape == right[name].shape and torch.equal(t, right[name]) for name, t in left.items())


def printed(capsys) -> str:
    return capsys.readouterr().out


# ---- one run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_fine_tuning_writes_an_adapter_and_logs_losses(tune, toys, tmp_path, capsys, kind):
    """Every matrix of the LoRA has left its start; the losses are there before and after, with and without memory; no file
    holds the backbone."""
    out = tune(tmp_path / "run", kind=kind)
    model = load_llada(toys[kind])
    add_outer_lora(model, 4, 64.0, 0.05, generator_for(0, "lora"))
    start, end = adapter_tensors(model), theta(out)
    assert start.keys() == end.keys()
    moved = [not torch.equal(part, end[name]) for name, (part, _) in start.items() if "experts" not in name]
    assert all(moved)
    assert all((part - end[name]).abs().max() < 0.01 for name, (part, _) in start.items())  # three steps of at most 0.001
    assert sum(bool(t.any()) for name, t in end.items() if "lora_B" in name) > 0.8 * len(end) / 2  # an expert may be idle
    results = read(out)
    assert [record["step"] for record in results["loss"]] == [0, 3]
    for record in results["loss"]:
        assert all(math.isfinite(record[key]) and record[key] > 0 for key in eval_niah.LOSSES)
    first, last = results["loss"]
    assert all(last[key] != first[key] for key in eval_niah.LOSSES)
    assert results["pairs"] == {"train": 19, "held_out": 1}
    assert (results["steps"], results["skipped_updates"], results["processes"]) == (3, 0, 1)
    layers = count(linear_layers(model).values())
    assert f"LoRA on {layers} of {layers} linear layers\n" in printed(capsys)
    assert all("lora" in name or "bias" in name for name in load_file(out / "memdlm.safetensors"))
    assert sorted(contents(out)) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "memdlm.safetensors",
        "results.json",
    ]


def test_the_saved_adapter_is_the_model_that_was_trained(tuned, toys):
    """Loaded onto the backbone, it has the losses that the run ended with."""
    model = load_llada(toys["llada-moe"])
    load_adapter(model, tuned / "adapter")
    args = memdlm.build_parser("backbone").parse_args([*QUICK, "--data", str(toys["data"])])
    tokenizer = data.load_tokenizer(toys["llada-moe"])
    model.config.mask_id = tokenizer.mask
    train, held_out = memdlm.read_backbone_pairs(args, tokenizer, "cpu").measured(4, 2)
    losses = eval_niah.measure_losses(model, train, held_out, memdlm.memory_settings(memdlm.settings(args)), 0)
    assert losses == {key: read(tuned)["loss"][-1][key] for key in losses}
    batch = data.collate(data.read_pairs(str(toys["data"]), tokenizer, 4096)[0][:1], "cpu", "learn", tokenizer.eos)
    order = torch.rand(batch.x0.shape, generator=generator_for(0))
    walk = eval_niah.exposure_walk(model, batch.x0, batch.maskable, order, 4, None)
    assert [ratio for ratio, _, _ in walk] == [1, 0.75, 0.5, 0.25]
    assert all(static.isfinite().all() and sequential.isfinite().all() for _, static, sequential in walk)


@pytest.mark.parametrize("method", ["mdlm", "memdlm"])
def test_fine_tuning_lowers_the_loss(tune, tmp_path, method):
    """Forty quick steps on twenty pairs."""
    out = tune(tmp_path / "run", "--method", method, "--steps", 40, "--lr", 1e-2)
    first, last = read(out)["loss"]
    assert last["train_without_memory"] < 0.95 * first["train_without_memory"]
    assert last["method"] == method


def test_a_run_is_the_same_again_whatever_the_process_did_before(tune, tuned, tmp_path):
    torch.rand(3)
    out = tune(tmp_path / "again")
    assert same_theta(out, tuned)
    assert read(out)["loss"] == read(tuned)["loss"]


# ---- flags ---------------------------------------------------------------------------------------------------------------

# What changes the adapter, and what leaves it alone to the bit.
CHANGE = [
    *("--method mdlm", "--batch 3", "--accumulate 2", "--seed 1", "--steps 2", "--pads ignore", "--plain", "--max-length 50"),
    *("--lr 1e-2", "--warmup 1", "--clip 0.01", "--loss-norm sequence", "--loss-norm batch"),
    *("--lora-rank 8", "--lora-alpha 4", "--lora-dropout 0.5", "--dtype bfloat16", "--load-4bit", "--random-weights"),
    *("--memory-rank 8", "--memory-alpha 8", "--memory-lr 1", "--memory-clip 0.001", "--memory-fraction 1"),
    *("--memory-scope sample", "--memory-steps 3", "--memory-epochs 2", "--memory-strategy anchor_only"),
    *("--memory-loss kl", "--memory-targets newly_revealed", "--start-scale 3"),
]
KEEP = ["--save-every 1", "--eval-every 1", "--eval-examples 2", "--checkpoint-activations", "--device auto", "--dtype float32"]
ELSEWHERE = {"--backbone", "--data", "--out", "--resume", "--epochs", "--help"}


@pytest.mark.parametrize("flag", CHANGE)
def test_flags_that_change_the_training(tune, tuned, tmp_path, flag):
    out = tune(tmp_path / "run", *flag.split())
    left, right = theta(out), theta(tuned)
    assert left.keys() == right.keys()
    assert any(t.shape != right[name].shape or not torch.equal(t, right[name]) for name, t in left.items())
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in left.values())


@pytest.mark.parametrize("flag", KEEP)
def test_flags_that_change_no_result(tune, tuned, tmp_path, flag):
    """Where activations are recomputed, when is saved and what is measured leave the adapter alone, bit for bit."""
    if flag.startswith("--device") and torch.cuda.is_available():
        flag = "--device cpu"
    assert same_theta(tune(tmp_path / "run", *flag.split()), tuned)


def test_activations_are_recomputed_only_where_asked(tune, tmp_path, monkeypatch):
    """--checkpoint-activations reaches the model."""
    calls, checkpoint = [], program.checkpoint
    monkeypatch.setattr(program, "checkpoint", lambda *a, **b: (calls.append(1), checkpoint(*a, **b))[1])
    tune(tmp_path / "kept", "--steps", 1)
    assert not calls
    tune(tmp_path / "recomputed", "--steps", 1, "--checkpoint-activations")
    assert calls


def test_accumulation_averages_over_micro_batches():
    """Loss and gradient of --accumulate 2 are the means of two batches', each with random draws of its own. (Adam and the
    clipping hide a wrong factor: it does not show in the adapter.)"""
    model, memory = add_random_lora(toy_model("llada-moe")), Memory(rank=4, alpha=8.0)
    batches = [toy_batch(seed=seed)[0] for seed in (1, 2)]
    fixed = {"seed": 0, "steps": 1, "lr": 0.0, "warmup": 0.0, "decay": 1.0, "clip": 1.0, "memory": memory, "draws": "d"}
    batch_at = lambda step, micro: batches[micro]  # noqa: E731
    phase = memdlm.Phase("memdlm", **fixed, batch_at=batch_at, log_at=None, identity={}, accumulate=2)
    apart = [METHODS["memdlm"](model, batch, memory, generator_for(0, "d", 3, *key)) for batch, key in zip(batches, ((), (1,)))]
    theta = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(apart) / 2, theta)
    together = sum(memdlm.micro_losses(Objective(model, phase), phase, 3))
    torch.testing.assert_close(together, sum(apart) / 2)
    torch.testing.assert_close(torch.autograd.grad(together, theta), expected)


def test_no_flag_is_left_untested():
    flags = {name for action in memdlm.build_parser("backbone")._actions for name in action.option_strings if name != "-h"}
    assert flags == {text.split()[0] for text in CHANGE + KEEP} | ELSEWHERE


def test_epochs_count_where_steps_do_not(tune, tmp_path):
    """--steps 0: 2 epochs of 19 pairs, 4 x 3 a step, are 4 steps (rounded up)."""
    out = tune(tmp_path / "run", "--steps", 0, "--epochs", 2, "--batch", 4, "--accumulate", 3)
    assert read(out)["steps"] == 4


def test_evaluation_comes_every_so_many_steps_on_so_many_pairs(tune, tmp_path, monkeypatch):
    """--eval-every 2: at steps 0, 2, and the last. --eval-examples 4: every fifth of 19 training pairs."""
    sizes = []

    def measure(model, train_set, held_out, memory, seed):
        sizes.append([sum(len(batch.x0) for batch in part) for part in (train_set, held_out)])
        return dict.fromkeys(eval_niah.LOSSES, 1.0)

    monkeypatch.setattr(eval_niah, "measure_losses", measure)
    out = tune(tmp_path / "run", "--eval-every", 2)
    assert [record["step"] for record in read(out)["loss"]] == [0, 2, 3]
    assert sizes == [[4, 1]] * 3


def test_pairs_that_are_too_long_are_left_out_and_counted(tune, toys, tmp_path, capsys):
    """--max-length counts prompt, template, response and EOS."""
    tokenizer = data.load_tokenizer(toys["llada-moe"])
    lengths = [len(tokenizer.encode_prompt(p["prompt"])) + len(tokenizer.encode(p["response"])) + 1 for p in PAIRS]
    longest = sorted(lengths)[11]
    kept = sum(length <= longest for length in lengths)
    out = tune(tmp_path / "run", "--max-length", longest)
    assert read(out)["pairs"] == {"train": kept - 1, "held_out": 1}
    assert f"{kept - 1} pairs to train on, 1 held out, {20 - kept} longer than {longest} tokens" in printed(capsys)


def test_longalpaca_is_the_same_as_pairs_joined_by_a_blank_line(tune, tmp_path):
    """instruction, blank line, input -> output."""
    records = [{"instruction": f"Who is {i}?", "input": "Think." * (i % 2), "output": f"Mary {i}"} for i in range(8)]
    joined = [{"prompt": f"Who is {i}?" + "\n\nThink." * (i % 2), "response": f"Mary {i}"} for i in range(8)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "pairs.jsonl").write_text(jsonl(*joined))
    outs = [tune(tmp_path / name[:5], "--data", tmp_path / name) for name in ("alpaca.json", "pairs.jsonl")]
    assert same_theta(*outs)


def test_four_bits_are_counted_and_nothing_may_be_left_out(tune, tmp_path, capsys, monkeypatch):
    """ "NF4 on N of N linear layers", experts included; a layer that was passed over stops the program."""
    out = tune(tmp_path / "run", "--load-4bit", "--dtype", "bfloat16")
    layers = count(linear_layers(toy_model("llada-moe")).values())
    assert f"NF4 on {layers} of {layers} linear layers\n" in printed(capsys)
    assert read(out)["machine"]["dtype"] == "bfloat16"
    assert layers == 3 * (4 + 1 + 3 * MOE["num_experts"])
    quantize = Linear.quantize
    skip = lambda layer, weight: None if layer.stack else quantize(layer, weight)  # noqa: E731
    monkeypatch.setattr(Linear, "quantize", skip)
    with pytest.raises(SystemExit):
        tune(tmp_path / "other", "--load-4bit")
    assert f"on {layers - 72} of {layers} linear layers: layers.0.mlp.experts" in capsys.readouterr().err


def test_random_weights_need_neither_weights_nor_tokenizer(tmp_path, toys):
    """--random-weights with nothing but a config.json; the text is then cut up by the tiny tokenizer."""
    (tmp_path / "sizes").mkdir()
    shutil.copy(toys["llada-moe"] / "config.json", tmp_path / "sizes")
    arguments = [
        "--backbone",
        tmp_path / "sizes",
        "--random-weights",
        "--data",
        toys["data"],
        *QUICK,
        "--out",
        tmp_path / "run",
    ]
    memdlm.main([str(argument) for argument in arguments])
    assert math.isfinite(read(tmp_path / "run")["loss"][-1]["train_with_memory"])


# ---- stopped and taken up ------------------------------------------------------------------------------------------------

LONGER = "--steps 5 --accumulate 2 --save-every 1 --lora-dropout 0.3 --eval-every 2".split()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llada-moe", "--method memdlm"),
        ("llada", "--method mdlm"),
        ("llada-moe", "--load-4bit"),
        ("llada2", "--dtype bfloat16"),
    ],
)
def test_a_run_that_was_stopped_ends_in_equal_bits(tune, tmp_path, monkeypatch, kind, flags):
    """--resume after a kill: the optimizer's state, the random draws and the log go on as if nothing had happened."""
    whole = tune(tmp_path / "whole", *LONGER, *flags.split(), kind=kind)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(StoppedError):
            tune(tmp_path / "stopped", *LONGER, *flags.split(), kind=kind)
    assert not (tmp_path / "stopped" / "adapter").exists()
    stopped = tune(tmp_path / "stopped", *LONGER, *flags.split(), "--resume", kind=kind)
    assert same_theta(whole, stopped)
    assert read(whole)["loss"] == read(stopped)["loss"]
    again = contents(tune(stopped, *LONGER, *flags.split(), "--resume", kind=kind) / "adapter")  # nothing is left to do
    assert again == contents(whole / "adapter")


def test_a_run_goes_on_only_as_it_was_started(tuned, toys, tmp_path, refused):
    """Another setting, other data, another number of processes: one line that names it, and nothing is lost."""
    out = Path(shutil.copytree(tuned, tmp_path / "run"))
    before = contents(out)
    base = ["--backbone", toys["llada-moe"], "--data", toys["data"], *QUICK, "--out", out, "--resume"]
    assert "--lr 0.001, not 0.5" in refused(memdlm.main, *base, "--lr", 0.5)
    moved = Path(shutil.copy(toys["data"], tmp_path / "pairs.jsonl"))
    assert "--data" in refused(memdlm.main, *base, "--data", moved)
    tensors, meta = memdlm.load_checkpoint(out / "memdlm.safetensors")
    meta["identity"]["processes"] = 8
    memdlm.save_checkpoint(out / "memdlm.safetensors", tensors, meta)
    assert "it was saved by 8 processes" in refused(memdlm.main, *base)
    meta["identity"] |= {"processes": 1, "data": 0}
    memdlm.save_checkpoint(out / "memdlm.safetensors", tensors, meta)
    assert "the data has changed" in refused(memdlm.main, *base)
    assert before.items() - contents(out).items() == {("memdlm.safetensors", before["memdlm.safetensors"])}


# ---- more than one process -----------------------------------------------------------------------------------------------

# Everything is written aside and renamed; the second process must not even try.
LONELY = """
import os, sys
sys.path.insert(0, {root!r})
import memdlm
if os.environ["RANK"] == "1":
    def forbidden(*paths):
        raise AssertionError(f"rank 1 writes {{paths}}")
    os.replace = forbidden
memdlm.main()
"""


def test_two_processes_take_the_steps_of_one_with_both_batches(tune, toys, tmp_path):
    """torchrun with two gloo processes: the same adapter as --accumulate 2 in one, from the same draws; the first process
    alone measures and writes. Adam divides by the gradient's size, which is why a bit may become 1e-6."""
    flags = ["--memory-scope", "sample", "--lr", "1e-4"]
    one = tune(tmp_path / "one", "--accumulate", 2, *flags)
    (tmp_path / "lonely.py").write_text(LONELY.format(root=str(ROOT)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--backbone", toys["llada-moe"], "--data", toys["data"], *QUICK, *flags, "--out", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, tmp_path / "lonely.py", *arguments]
    done = subprocess.run([str(c) for c in command], env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear layers") == 1
    assert "Warning" not in done.stderr
    left, right = theta(one), theta(tmp_path / "two")
    assert left.keys() == right.keys()
    for name, t in left.items():
        torch.testing.assert_close(right[name], t, rtol=0, atol=1e-6)
    assert read(tmp_path / "two")["processes"] == 2
    for a, b in zip(read(one)["loss"], read(tmp_path / "two")["loss"]):
        assert [b[key] for key in eval_niah.LOSSES] == pytest.approx([a[key] for key in eval_niah.LOSSES], rel=1e-4)


def test_epochs_count_batches_not_pairs(tune, tmp_path):
    """19 pairs in batches of 16 are two batches: three epochs are six steps, also where the last batch is short."""
    out = tune(tmp_path, "--steps", 0, "--epochs", 3, "--batch", 16)
    assert read(out)["steps"] == 6


def test_a_run_is_not_written_over_another_one(tuned, tune, tmp_path, capsys):
    """Neither over another method's nor over a --tiny run's: adapter, results and config would be lost."""
    out = shutil.copytree(tuned, tmp_path / "run")
    before = contents(out)
    with pytest.raises(SystemExit) as stop:
        tune(out, "--method", "mdlm")
    assert stop.value.code == 2
    assert "name another folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memdlm.main(["--tiny", "--out", str(out)])
    assert contents(out) == before


def test_a_prompt_is_written_with_the_memory_that_the_adapter_was_trained_with(tuned, toys, capsys):
    """sample.py reads it from the run beside the adapter, and says so."""
    arguments = ["--backbone", toys["llada-moe"], "--adapter", tuned / "adapter", "--prompt", "Who?", "--memory", "--quiet"]
    sample.main([str(argument) for argument in [*arguments, "--length", 2]])
    assert "Memory(rank=4," in capsys.readouterr().err
