"""
test_finetune.py: `memdlm.py --backbone` from end to end on toy checkpoints.
"""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import commands
import pytest
import torch
from backbones import SETTINGS, add_random_lora, toy_batch, toy_model
from commands import StoppedError, adapter_of, checkpoints, contents, refusal, results, run_python
from safetensors.torch import load_file, save_file
from test_processes import LAUNCH
from torch.autograd.graph import saved_tensors_hooks

from full_scale import backbone, finetune
from full_scale.adapters import load_adapter, save_adapter
from full_scale.checkpoints import add_outer_lora, count, linear_layers, load_llada
from full_scale.pairs import collate, read_data, split_pairs
from full_scale.tokenizer import load_tokenizer
from lab import tools, training, variants
from lab.tools import load_checkpoint, save_checkpoint, start
from lab.training import LOSSES, METHODS
from memdlm import Memory, generator_for

QUICK = "--steps 3 --lora-rank 4 --memory-rank 4 --lr 1e-3 --lora-alpha 8 --eval-examples 4".split()


def command(out: Path, *flags, kind: str = "llada-moe") -> list[str]:
    """The command line of a fine-tuning. Later flags win."""
    toys = checkpoints()
    named = ["--backbone", toys[kind], "--data", toys["data"], *QUICK, "--device", "cpu"]
    return [str(argument) for argument in (*named, *flags, "--out", out)]


def tune(out: Path, *flags, kind: str = "llada-moe") -> Path:
    """Fine-tunes a toy by the real command, in this process. Returns the run's folder."""
    start("memdlm", command(out, *flags, kind=kind))
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
    """It has the losses that the run ended with, on the held-out pair and on four of the others."""
    toys = checkpoints()
    model, tokenizer = load_llada(toys["llada-moe"]), load_tokenizer(toys["llada-moe"])
    load_adapter(model, tuned / "adapter")
    model.config.mask_id = tokenizer.mask
    memory = variants.memory_of(json.loads((tuned / "config.json").read_text()))
    train_set, held_out = split_pairs(read_data(str(toys["data"]), tokenizer, 4096)[0])
    to_batch, picked = partial(collate, device="cpu", eos=tokenizer.eos), train_set[::5]
    measured = [to_batch(picked[:2]), to_batch(picked[2:])]
    losses = training.measure_losses(model, measured, [to_batch(held_out)], memory, 0)
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
    rate_at, [share_at] = finetune.cosine_rate(2e-5, steps, warmup), schedule.lr_lambdas
    for step in range(steps):
        assert rate_at(step) == pytest.approx(2e-5 * share_at(step), abs=1e-12), f"step {step}"


CHANGE = [
    *("--method mdlm", "--batch 3", "--accumulate 2", "--seed 1", "--steps 2", "--plain"),
    *("--pads ignore", "--max-length 50", "--lr 1e-2", "--warmup 0.5", "--clip 0.01"),
    *("--lora-rank 8", "--lora-alpha 4", "--lora-dropout 0.5"),
    *("--dtype bfloat16", "--load-4bit", "--random-weights", "--memory-rank 8"),
    *("--memory-alpha 8", "--memory-lr 1", "--memory-clip 0.001", "--memory-fraction 1"),
    *("--memory-scope sample", "--memory-steps 3", "--memory-epochs 2", "--memory-loss kl"),
    *("--memory-strategy anchor_only", "--memory-targets newly_revealed", "--start-scale 3"),
    *("--memory-places ffn+attention", "--memory-form full"),
    *("--memory-clip 0.001 --memory-clip-by global",),
]
KEEP = "--save-every 1 --eval-every 1 --eval-examples 2 --checkpoint-activations --dtype float32"
ELSEWHERE = {*"--backbone --data --out --device --resume --epochs --shard --help".split()}


@pytest.mark.parametrize("flag", CHANGE)
def test_flags_that_change_the_training(tuned, tmp_path, flag):
    out = tune(tmp_path / "run", *flag.split())
    assert not commands.same_adapter(out, tuned)
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in adapter_of(out).values())


def test_flags_that_change_no_result(tuned, tmp_path):
    """What is recomputed, saved and measured leaves the adapter alone, bit for bit."""
    assert commands.same_adapter(tune(tmp_path / "run", *KEEP.split()), tuned)


def test_every_flag_is_tested(capsys):
    with pytest.raises(SystemExit):
        start("memdlm", ["--backbone", "llada-moe", "--help"])
    shown = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(shown) == set(re.findall(r"--\S+", " ".join([*CHANGE, KEEP]))) | ELSEWHERE


def test_checkpointed_activations_are_kept_less():
    """Few numbers wait for the backward pass. (That nothing else changes, KEEP shows.)"""
    kept, model = [[], []], add_random_lora(toy_model("llada-moe")).train()
    for numbers in kept:
        with saved_tensors_hooks(lambda t, to=numbers: to.append(t.numel()) or t, lambda t: t):
            METHODS["memdlm"](model, toy_batch()[0], Memory(rank=4), generator_for(0))
        finetune.checkpoint_activations(model)
    assert sum(kept[1]) < 0.5 * sum(kept[0])


def test_accumulation_averages_over_micro_batches(monkeypatch):
    """Loss and gradient of --accumulate 2 are the means of two batches', each with random draws of
    its own. Where a loss is not finite, no gradient is: processes share gradients alone."""
    model, memory, apart = add_random_lora(toy_model("llada-moe")), Memory(rank=4), []
    args = finetune.build_parser().parse_args(["--backbone", "x", "--data", "x", *QUICK])
    objective = finetune.Objective(model, args)
    batches = [toy_batch(seed=seed)[0] for seed in (1, 2)]

    def two_losses():  # of step 3, whose micro-batches are numbers 6 and 7 of the run
        return finetune.micro_losses(objective, lambda number: batches[number - 6], 0, 3, 2)

    for batch, key in zip(batches, [(0, "fine-tune", 3), (0, "fine-tune", 3, 1)]):
        apart.append(METHODS["memdlm"](model, batch, memory, generator_for(*key)))
    theta = [p for p in model.parameters() if p.requires_grad]
    together = sum(two_losses())
    torch.testing.assert_close(together, sum(apart) / 2)
    expected = torch.autograd.grad(sum(apart) / 2, theta)
    torch.testing.assert_close(torch.autograd.grad(together, theta), expected)
    monkeypatch.setattr(finetune, "keyed_loss", lambda *rest: theta[0].sum() + math.inf)
    loss = next(two_losses())
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, theta[0])[0].isfinite().any()


def test_epochs_count_batches_where_steps_do_not(tmp_path):
    """19 pairs are 5 batches of 4, or 2 of 16; a last step or batch that is not full counts."""
    for flags, steps in (("--epochs 2 --batch 4 --accumulate 3", 4), ("--epochs 3 --batch 16", 6)):
        assert results(tune(tmp_path / flags, "--steps", 0, *flags.split()))["steps"] == steps


def test_random_weights_need_neither_weights_nor_tokenizer(tmp_path):
    """Nothing but a config.json. The text is then cut up by the tiny tokenizer."""
    (tmp_path / "sizes").mkdir()
    shutil.copy(checkpoints()["llada-moe"] / "config.json", tmp_path / "sizes")
    out = tune(tmp_path / "run", "--backbone", tmp_path / "sizes", "--random-weights")
    assert math.isfinite(results(out)["loss"][-1]["train_with_memory"])


LONGER = "--steps 5 --accumulate 2 --save-every 1 --lora-dropout 0.3 --eval-every 2".split()
STOPPED = [("llada-moe", "--checkpoint-activations"), ("llada", "--method mdlm")]
STOPPED += [("llada-moe", "--load-4bit"), ("llada2", "--dtype bfloat16")]


@pytest.mark.parametrize(("kind", "flags"), STOPPED)
def test_a_run_that_was_stopped_ends_in_equal_bits(tmp_path, kind, flags):
    """AdamW's state, the random draws and the log go on as if nothing had happened."""
    flags = [*LONGER, *flags.split()]
    whole = tune(tmp_path / "whole", *flags, kind=kind)
    saves = {"wraps": save_checkpoint, "side_effect": [mock.DEFAULT, mock.DEFAULT, StoppedError]}
    with mock.patch.object(tools, "save_checkpoint", **saves), pytest.raises(StoppedError):
        tune(tmp_path / "stopped", *flags, kind=kind)
    assert not (tmp_path / "stopped" / "adapter").exists()
    stopped = tune(tmp_path / "stopped", *flags, "--resume", kind=kind)
    assert commands.same_adapter(whole, stopped)
    assert results(stopped)["loss"] == results(whole)["loss"]
    assert [record["step"] for record in results(stopped)["loss"]] == [0, 2, 4, 5]
    again = tune(stopped, *flags, "--resume", kind=kind)  # nothing is left to do
    assert contents(again / "adapter") == contents(whole / "adapter")


def test_a_run_goes_on_only_as_it_was_started(tuned, tmp_path, capsys):
    """One line names what differs. Without --resume, no run is written over another one."""
    out = Path(shutil.copytree(tuned, tmp_path / "run"))
    before, moved = contents(out), shutil.copy(checkpoints()["data"], tmp_path / "pairs.jsonl")
    for flags, named in (
        ("--resume --lr 0.5", "--lr 0.001, not 0.5"),
        (f"--resume --data {moved}", f"not {moved}"),
        ("--method mdlm", "name another folder"),
    ):
        assert named in refusal("memdlm", command(out, *flags.split()), capsys)
    assert "name another folder" in refusal("memdlm", ["--tiny", "--out", out], capsys)
    assert contents(out) == before
    path = out / "memdlm.safetensors"
    tensors, meta = load_checkpoint(path)
    for name, value in (("processes", 8), ("pairs", 0)):
        save_checkpoint(path, tensors, {**meta, "identity": {**meta["identity"], name: value}})
        said = refusal("memdlm", command(out, "--resume"), capsys)
        assert f"was trained with {name} {value}" in said


CHANGED = {
    "a tensor in the middle": lambda name, tensor: tensor + ("layers.1.mlp.gate.weight" in name),
    "all tensors": lambda name, tensor: 1.5 * tensor,
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("large", [1, 1 << 28], ids=["sampled", "whole"])
def test_a_run_does_not_go_on_with_other_weights(tmp_path, capsys, monkeypatch, change, large):
    """An adapter that was begun on one backbone and went on upon another would belong to neither.
    Large files are compared by a share of each tensor. It shows before the weights are read."""
    monkeypatch.setattr(backbone, "LARGE", large)
    monkeypatch.setattr(backbone, "load_llada", mock.Mock(side_effect=StoppedError))
    toy = Path(shutil.copytree(checkpoints()["llada-moe"], tmp_path / "toy"))
    flags = ["--backbone", toy]
    with pytest.raises(StoppedError):
        tune(tmp_path / "run", *flags)
    with pytest.raises(StoppedError):  # the same backbone may go on
        tune(tmp_path / "run", *flags, "--resume")
    path = toy / "model.safetensors"
    changed = {name: CHANGED[change](name, tensor) for name, tensor in load_file(path).items()}
    save_file(changed, path, {"format": "pt"})
    said = refusal("memdlm", command(tmp_path / "run", *flags, "--resume"), capsys)
    assert f"model.safetensors of {toy} is not the one that the run" in said


def test_a_step_at_rate_0_is_said(tmp_path, capsys):
    """The published schedule begins at rate 0: a run of one step trains nothing."""
    tune(tmp_path / "one", "--steps", 1)
    assert "rate 0 and trains nothing" in capsys.readouterr().out
    tune(tmp_path / "trained", "--steps", 1, "--warmup", 0)
    assert "trains nothing" not in capsys.readouterr().out


# Each process notes its share of the layers' weights. Every file of a run is written aside and
# renamed; the second process must not even try.
OBSERVED = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from full_scale import finetune
from lab.tools import start
add_outer_lora, rank = finetune.add_outer_lora, os.environ["RANK"]
def observed(model, **lora):
    weights = list(model.layers.parameters())
    own = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in weights)
    share = own / sum(p.numel() for p in weights)
    Path(__file__).with_name(f"share.{rank}").write_text(str(share))
    add_outer_lora(model, **lora)
def forbidden(*paths):
    raise AssertionError(f"the second process writes {paths}")
finetune.add_outer_lora = observed
if rank == "1":
    os.replace = forbidden
start("memdlm")
"""


@pytest.mark.parametrize("flags", ["", "--shard --checkpoint-activations"])
def test_two_processes_take_the_steps_of_one_with_all_batches(tmp_path, flags):
    """Two of two micro-batches give the adapter and the losses that one gives with four; with
    --shard each holds half of every layer. (Adam makes 1e-6 of a bit.)"""
    alike = ["--memory-scope", "sample", "--lr", "1e-4", "--eval-every", 2]
    one, two = tune(tmp_path / "one", "--accumulate", 4, *alike), tmp_path / "two"
    (tmp_path / "observed.py").write_text(OBSERVED)
    arguments = command(two, "--accumulate", 2, *alike, *flags.split())
    done = run_python(*LAUNCH, 2, tmp_path / "observed.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear layers") == 1, "the first process alone prints"
    assert "Warning" not in done.stderr
    shares = [float(path.read_text()) for path in tmp_path.glob("share.*")]
    assert shares == pytest.approx([0.5, 0.5] if flags else [1, 1], abs=0.05)
    torch.testing.assert_close(adapter_of(one), adapter_of(two), rtol=0, atol=1e-6)
    assert results(two)["processes"] == 2
    for a, b in zip(results(one)["loss"], results(two)["loss"], strict=True):
        expected = pytest.approx([a[name] for name in LOSSES], rel=1e-5)
        assert [b[name] for name in LOSSES] == expected


REFUSED = [
    ("--shard", "start it by torchrun"),
    ("--shard --load-4bit", "--shard is for whole weights"),
    ("--backbone llada-moe --data {}/absent.jsonl", "cannot read --data"),
    ("--max-length 3", "none of 20 pairs has at most 3 tokens"),
    ("--noise 0.1", "unrecognized arguments: --noise"),
    ("--steps 3 --epochs 2", "--epochs has no effect"),
    ("--resume", "there is no run in"),
    ("--backbone llada-9b --random-weights", "llada-9b is neither llada-8b"),
    ("--lora-rank 100000000000000000", "out of memory"),
    ("--memory-steps 1001", "1001 is not from 1 to 1000"),
]


@pytest.mark.parametrize(("flags", "named"), REFUSED)
def test_what_cannot_be_tuned_is_one_line(tmp_path, capsys, flags, named):
    arguments = command(tmp_path / "run", *flags.replace("{}", str(tmp_path)).split())
    assert named in refusal("memdlm", arguments, capsys)
    assert not (tmp_path / "run" / "adapter").exists()


def test_four_bits_without_bitsandbytes_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = command(tmp_path / "run", "--load-4bit")
    assert "pip install bitsandbytes" in refusal("memdlm", arguments, capsys)
