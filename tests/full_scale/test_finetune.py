"""
test_finetune.py: `memdlm.py --backbone` from end to end on toy checkpoints: what it writes, what
each flag does, a run that was stopped, two processes, and what it refuses.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from backbones import MOE, SETTINGS, add_random_lora, toy_batch, toy_model
from commands import (
    ROOT,
    StoppedError,
    adapter_of,
    checkpoints,
    contents,
    refusal,
    results,
    run_python,
    same_adapter,
)
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

import memdlm
from full_scale import finetune
from full_scale.adapters import load_adapter, save_adapter
from full_scale.checkpoints import add_outer_lora, count, linear_layers, load_llada
from full_scale.pairs import collate, read_data, split_pairs
from full_scale.tokenizer import load_tokenizer
from memdlm import LOSSES, METHODS, Memory, generator_for
from model import load_checkpoint, save_checkpoint

QUICK = "--steps 3 --lora-rank 4 --memory-rank 4 --lr 1e-3 --lora-alpha 8 --eval-examples 4".split()


def command(out: Path, *flags, kind: str = "llada-moe") -> list[str]:
    """The command line of a fine-tuning. Later flags win."""
    toys = checkpoints()
    named = ["--backbone", toys[kind], "--data", toys["data"], *QUICK, "--device", "cpu"]
    return [str(argument) for argument in (*named, *flags, "--out", out)]


def tune(out: Path, *flags, kind: str = "llada-moe") -> Path:
    """Fine-tunes a toy by the real command, in this process. Returns the run's folder."""
    memdlm.main(command(out, *flags, kind=kind))
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The run that the others are compared with. Nobody writes into it."""
    return tune(tmp_path_factory.mktemp("tuned") / "run")


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_writes_an_adapter_and_the_losses_and_no_backbone(tmp_path, capsys, kind):
    """Every matrix of the LoRA has left its start, by three steps of at most 0.001."""
    out = tune(tmp_path / "run", "--batch", 8, kind=kind)
    printed = capsys.readouterr().out
    model = load_llada(checkpoints()[kind])
    add_outer_lora(model, 4, 8.0, 0.05, generator_for(0, "lora"))
    save_adapter(model, tmp_path / "start" / "adapter", 4, 8.0, 0.05, "")
    start, end = adapter_of(tmp_path / "start"), adapter_of(out)
    assert start.keys() == end.keys()
    moved = {name: (part - end[name]).abs().max().item() for name, part in start.items()}
    assert max(moved.values()) < 0.01
    idle = [name for name, far in moved.items() if far == 0]
    assert all("experts" in name for name in idle)
    assert len(idle) < 0.25 * len(moved), "an expert may be idle, but not so many"
    layers = count(linear_layers(model).values())
    assert f"LoRA on {layers} of {layers} linear layers\n" in printed
    found = results(out)
    assert [record["step"] for record in found["loss"]] == [0, 3]
    first, last = found["loss"]
    assert all(last[name] != first[name] and 0 < last[name] < math.inf for name in LOSSES)
    assert found["pairs"] == {"train": 19, "held_out": 1}
    assert (found["steps"], found["skipped_updates"], found["processes"]) == (3, 0, 1)
    assert all("lora" in name or "bias" in name for name in load_file(out / "memdlm.safetensors"))
    files = {"config.json", "memdlm.safetensors", "results.json"}
    names = ("adapter_config.json", "adapter_model.safetensors", "training.json")
    assert contents(out).keys() == files | {f"adapter/{name}" for name in names}


def test_the_saved_adapter_is_the_model_that_was_trained(tuned):
    """Loaded onto the backbone, it has the losses that the run ended with, on the held-out pair and
    on four of the others, evenly picked."""
    toys = checkpoints()
    model, tokenizer = load_llada(toys["llada-moe"]), load_tokenizer(toys["llada-moe"])
    load_adapter(model, tuned / "adapter")
    model.config.mask_id = tokenizer.mask
    memory = memdlm.memory_of(json.loads((tuned / "config.json").read_text()))
    train_set, held_out = split_pairs(read_data(str(toys["data"]), tokenizer, 4096)[0])
    to_batch, picked = partial(collate, device="cpu", eos=tokenizer.eos), train_set[::5]
    measured = [to_batch(picked[:2]), to_batch(picked[2:])]
    losses = memdlm.measure_losses(model, measured, [to_batch(held_out)], memory, 0)
    assert losses == {name: results(tuned)["loss"][-1][name] for name in losses}


@pytest.mark.parametrize("method", ["mdlm", "memdlm"])
def test_fine_tuning_lowers_the_loss(tmp_path, method):
    """Forty quick steps on twenty pairs."""
    out = tune(tmp_path / "run", "--method", method, "--steps", 40, "--lr", 1e-2)
    first, last = results(out)["loss"]
    assert last["train_without_memory"] < 0.95 * first["train_without_memory"]


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.1), (37, 0.13), (7, 0.0), (5, 1.0), (1, 0.1)])
def test_the_learning_rate_is_that_of_the_published_trainer(steps, warmup):
    """transformers' cosine schedule, whose warm-up steps the Trainer rounds up."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * warmup), steps)
    rate_at = finetune.cosine_rate(2e-5, steps, warmup)
    for step in range(steps):
        assert rate_at(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12), f"step {step}"
        optimizer.step()
        schedule.step()


CHANGE = [
    *("--method mdlm", "--batch 3", "--accumulate 2", "--seed 1", "--steps 2", "--plain"),
    *("--pads ignore", "--max-length 50", "--lr 1e-2", "--warmup 0.5", "--clip 0.01"),
    *("--loss-norm sequence", "--lora-rank 8", "--lora-alpha 4", "--lora-dropout 0.5"),
    *("--dtype bfloat16", "--load-4bit", "--random-weights", "--memory-rank 8"),
    *("--memory-alpha 8", "--memory-lr 1", "--memory-clip 0.001", "--memory-fraction 1"),
    *("--memory-scope sample", "--memory-steps 3", "--memory-epochs 2", "--memory-loss kl"),
    *("--memory-strategy anchor_only", "--memory-targets newly_revealed", "--start-scale 3"),
    *("--memory-places ffn+attention", "--memory-form full"),
    *("--memory-clip 0.001 --memory-clip-by global",),
]
KEEP = "--save-every 1 --eval-every 1 --eval-examples 2 --checkpoint-activations --dtype float32"
ELSEWHERE = {
    "--backbone",
    "--data",
    "--out",
    "--device",
    "--resume",
    "--epochs",
    "--shard",
    "--help",
}


@pytest.mark.parametrize("flag", CHANGE)
def test_flags_that_change_the_training(tuned, tmp_path, flag):
    out = tune(tmp_path / "run", *flag.split())
    assert not same_adapter(out, tuned)
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in adapter_of(out).values())


def test_flags_that_change_no_result(tuned, tmp_path):
    """Where activations are recomputed, when is saved and what is measured leave the adapter alone,
    bit for bit."""
    assert same_adapter(tune(tmp_path / "run", *KEEP.split()), tuned)


def test_every_flag_is_tested(capsys):
    with pytest.raises(SystemExit):
        memdlm.main(["--backbone", "llada-moe", "--help"])
    shown = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(shown) == set(re.findall(r"--\S+", " ".join([*CHANGE, KEEP]))) | ELSEWHERE


@pytest.mark.parametrize("program", ["memdlm", "sample", "eval_niah"])
def test_help_needs_neither_matplotlib_nor_weights(program):
    block = "import sys; sys.modules['matplotlib'] = None"
    done = run_python("-c", f"{block}; import {program}; {program}.main(['--backbone=x', '-h'])")
    assert done.returncode == 0, done.stderr
    assert "--random-weights" in done.stdout


def test_checkpointed_activations_are_kept_less():
    """Few numbers wait for the backward pass. (That nothing else changes, --checkpoint-activations
    among the flags of KEEP shows.)"""
    kept, model = [[], []], add_random_lora(toy_model("llada-moe")).train()
    for numbers in kept:
        with saved_tensors_hooks(lambda t, to=numbers: to.append(t.numel()) or t, lambda t: t):
            METHODS["memdlm"](model, toy_batch()[0], Memory(rank=4), generator_for(0))
        finetune.checkpoint_activations(model)
    assert sum(kept[1]) < 0.5 * sum(kept[0])


def two_micro_losses(batches: list, model) -> Iterator[torch.Tensor]:
    """What `micro_losses` yields for the two micro-batches of step 3."""
    args = finetune.build_parser().parse_args(["--backbone", "x", "--data", "x", *QUICK])
    objective = finetune.Objective(model, args)
    return finetune.micro_losses(objective, lambda number: batches[number - 6], 0, 3, 2)


def test_accumulation_averages_over_micro_batches():
    """Loss and gradient of --accumulate 2 are the means of two batches', each with random draws of
    its own. (Adam and the clipping hide a wrong factor: it does not show in the adapter.)"""
    model, memory, apart = add_random_lora(toy_model("llada-moe")), Memory(rank=4), []
    batches = [toy_batch(seed=seed)[0] for seed in (1, 2)]
    for batch, key in zip(batches, [(0, "fine-tune", 3), (0, "fine-tune", 3, 1)]):
        apart.append(METHODS["memdlm"](model, batch, memory, generator_for(*key)))
    theta = [p for p in model.parameters() if p.requires_grad]
    together = sum(two_micro_losses(batches, model))
    torch.testing.assert_close(together, sum(apart) / 2)
    expected = torch.autograd.grad(sum(apart) / 2, theta)
    torch.testing.assert_close(torch.autograd.grad(together, theta), expected)


def test_a_loss_that_is_not_finite_has_no_finite_gradient(monkeypatch):
    """Processes share gradients alone: this is how all of them learn to leave out the step."""
    model = add_random_lora(toy_model("llada"))
    some = next(p for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(finetune, "keyed_loss", lambda *rest: some.sum() + math.inf)
    loss = next(two_micro_losses([None, None], model))
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, some)[0].isfinite().any()


@pytest.mark.parametrize(
    ("flags", "steps"), [("--epochs 2 --batch 4 --accumulate 3", 4), ("--epochs 3 --batch 16", 6)]
)
def test_epochs_count_batches_where_steps_do_not(tmp_path, flags, steps):
    """19 pairs are 5 batches of 4, or 2 of 16; a last step or batch that is not full counts."""
    assert results(tune(tmp_path / "run", "--steps", 0, *flags.split()))["steps"] == steps


def test_four_bits_are_counted(tmp_path, capsys):
    """Every expert is one of the linear layers."""
    tune(tmp_path / "run", "--load-4bit")
    layers = 3 * (4 + 1 + 3 * MOE["num_experts"])
    assert f"NF4 on {layers} of {layers} linear layers\n" in capsys.readouterr().out


def test_random_weights_need_neither_weights_nor_tokenizer(tmp_path):
    """Nothing but a config.json. The text is then cut up by the tiny tokenizer."""
    (tmp_path / "sizes").mkdir()
    shutil.copy(checkpoints()["llada-moe"] / "config.json", tmp_path / "sizes")
    out = tune(tmp_path / "run", "--backbone", tmp_path / "sizes", "--random-weights")
    assert math.isfinite(results(out)["loss"][-1]["train_with_memory"])


# ---- stopped and taken up --------------------------------------------------------------------

LONGER = "--steps 5 --accumulate 2 --save-every 1 --lora-dropout 0.3 --eval-every 2".split()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llada-moe", "--checkpoint-activations"),
        ("llada", "--method mdlm"),
        ("llada-moe", "--load-4bit"),
        ("llada2", "--dtype bfloat16"),
    ],
)
def test_a_run_that_was_stopped_ends_in_equal_bits(tmp_path, kind, flags):
    """AdamW's state, the random draws and the log go on as if nothing had happened."""
    flags = [*LONGER, *flags.split()]
    whole = tune(tmp_path / "whole", *flags, kind=kind)
    saves = {"wraps": save_checkpoint, "side_effect": [mock.DEFAULT, mock.DEFAULT, StoppedError]}
    with mock.patch.object(memdlm, "save_checkpoint", **saves), pytest.raises(StoppedError):
        tune(tmp_path / "stopped", *flags, kind=kind)
    assert not (tmp_path / "stopped" / "adapter").exists()
    stopped = tune(tmp_path / "stopped", *flags, "--resume", kind=kind)
    assert same_adapter(whole, stopped)
    log = results(stopped)["loss"]
    assert log == results(whole)["loss"]
    assert [record["step"] for record in log] == [0, 2, 4, 5]
    again = tune(stopped, *flags, "--resume", kind=kind)  # nothing is left to do
    assert contents(again / "adapter") == contents(whole / "adapter")


def test_a_run_goes_on_only_as_it_was_started(tuned, tmp_path, capsys):
    """Another setting, other pairs, another number of processes: one line that names it, and
    nothing is lost. Without --resume, no run is written over another one."""
    out = Path(shutil.copytree(tuned, tmp_path / "run"))
    before, moved = contents(out), shutil.copy(checkpoints()["data"], tmp_path / "pairs.jsonl")
    for flags, named in (
        ("--resume --lr 0.5", "--lr 0.001, not 0.5"),
        (f"--resume --data {moved}", f"not {moved}"),
        ("--method mdlm", "name another folder"),
    ):
        assert named in refusal(memdlm.main, command(out, *flags.split()), capsys)
    assert "name another folder" in refusal(memdlm.main, ["--tiny", "--out", out], capsys)
    assert contents(out) == before
    path = out / "memdlm.safetensors"
    tensors, meta = load_checkpoint(path)
    for name, value in (("processes", 8), ("pairs", 0)):
        save_checkpoint(path, tensors, {**meta, "identity": {**meta["identity"], name: value}})
        said = refusal(memdlm.main, command(out, "--resume"), capsys)
        assert f"was trained with {name} {value}" in said


# ---- more than one process -------------------------------------------------------------------

# Every file is written aside and renamed; the second process must not even try.
LONELY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import memdlm
if os.environ["RANK"] == "1":
    def forbidden(*paths):
        raise AssertionError(f"the second process writes {{paths}}")
    os.replace = forbidden
memdlm.main()
"""


def test_two_processes_take_the_steps_of_one_with_all_batches(tmp_path):
    """torchrun with two gloo processes of two micro-batches gives the adapter that one process
    gives with four, from the same draws. Adam divides by the gradient's size, which is why a bit
    may become 1e-6."""
    flags = ["--memory-scope", "sample", "--lr", "1e-4"]
    one = tune(tmp_path / "one", "--accumulate", 4, *flags)
    (tmp_path / "lonely.py").write_text(LONELY)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = command(tmp_path / "two", "--accumulate", 2, *flags)
    done = run_python(*launch, tmp_path / "lonely.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear layers") == 1, "the first process alone prints"
    assert "Warning" not in done.stderr
    adapters = adapter_of(one), adapter_of(tmp_path / "two")
    torch.testing.assert_close(*adapters, rtol=0, atol=1e-6)
    assert results(tmp_path / "two")["processes"] == 2
    for a, b in zip(results(one)["loss"], results(tmp_path / "two")["loss"]):
        expected = pytest.approx([a[name] for name in LOSSES], rel=1e-4)
        assert [b[name] for name in LOSSES] == expected


REFUSED = [
    ("--data {}/absent.jsonl", "cannot read --data"),
    ("--max-length 3", "none of 20 pairs has at most 3 tokens"),
    ("--noise 0.1", "unrecognized arguments: --noise"),
    ("--steps 3 --epochs 2", "--epochs has no effect"),
    ("--resume", "there is no run in"),
    ("--backbone llada-9b --random-weights", "llada-9b is neither llada-8b"),
    ("--memory-rank 1000000000000", "out of memory"),
    ("--lora-rank 100000000000000000", "out of memory"),
]


@pytest.mark.parametrize(("flags", "named"), REFUSED)
def test_what_cannot_be_tuned_is_one_line(tmp_path, capsys, flags, named):
    arguments = command(tmp_path / "run", *flags.replace("{}", str(tmp_path)).split())
    assert named in refusal(memdlm.main, arguments, capsys)
    assert not (tmp_path / "run" / "adapter").exists()


def test_four_bits_without_bitsandbytes_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = command(tmp_path / "run", "--load-4bit")
    assert "pip install bitsandbytes" in refusal(memdlm.main, arguments, capsys)
