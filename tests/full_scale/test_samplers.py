"""
test_samplers.py: dLLM's schedule, LLaDA2's block sampler with its block-causal attention, and
`sample.py --backbone` from end to end on toy checkpoints. (test_golden.py replays recorded traces.)
"""

import functools
import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from backbones import MASK, SETTINGS, VOCABULARY, add_random_lora, toy_model, write_checkpoint
from commands import FOLDER, checkpoints, refusal
from torch import Tensor

import memdlm
import sample
from full_scale.adapters import save_adapter
from full_scale.checkpoints import count, linear_layers
from full_scale.samplers import block_causal_mask, dllm_blocks, generate_llada2, rounded_schedule
from model import Transformer
from sample import plan_blocks, select

PROMPT = "Who is it?"  # 24 tokens with the chat template


@pytest.mark.parametrize(
    ("tokens", "steps", "quotas"),
    [(10, 4, [2, 3, 2, 3]), (8, 4, [2] * 4), (3, 5, [1, 1, 1]), (5, 2, [2, 3])],
)
def test_dllm_rounds_what_is_left_half_to_even(tokens, steps, quotas):
    """10 in 4 steps: 10 / 4 = 2.5 -> 2, 8 / 3 -> 3, 5 / 2 = 2.5 -> 2, 3. LLaDA has 3, 3, 2, 2."""
    assert rounded_schedule(tokens, steps) == quotas


def test_dllm_gives_each_block_the_share_of_steps_rounded_up():
    """Where steps do not divide, dLLM takes more than it was given, LLaDA does not; the short last
    block needs a pass for each token at most."""
    assert dllm_blocks(9, 3, 4) == [(0, 4, [4]), (4, 8, [4]), (8, 9, [1])]
    assert dllm_blocks(9, 4, 4) == [(0, 4, [2, 2]), (4, 8, [2, 2]), (8, 9, [1])]
    assert [len(block.quotas) for block in plan_blocks(9, 4, 4)] == [2, 1, 1]


@pytest.fixture
def model() -> Transformer:
    """A LLaDA2 that is sure of itself: with random weights every probability would be small."""
    model = toy_model("llada2")
    with torch.no_grad():
        model.output.weight.mul_(3.0)
    return model


def prompts_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(3))


def test_block_causal_mask_shows_each_block_itself_and_what_lies_before():
    """Written out for seven positions in blocks of three."""
    expected = [[key // 3 <= query // 3 for key in range(7)] for query in range(7)]
    assert block_causal_mask(7, 3, torch.device("cpu"))[0, 0].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_the_block_sampler_equals_one_that_computes_everything(model, threshold):
    """Every pass once more by hand, over the whole canvas with the whole mask: greedy tokens, the
    most confident of the block up to the quota, and all above the threshold. Blocks lie on a grid
    that starts with the prompt; the last one is filled to its end, past the answer's."""
    prompts, canvases = prompts_of(2, 6), []
    answer = generate_llada2(model, prompts, 9, 2, 4, threshold, watch=canvases.append)
    canvas = torch.nn.functional.pad(prompts, (0, 10), value=MASK)
    mask, places, seen = block_causal_mask(16, 4, torch.device("cpu")), torch.arange(16), []
    for start, stop in ((6, 8), (8, 12), (12, 16)):
        while (canvas[:, start:stop] == MASK).any():
            logits = model(canvas, mask)
            logits[..., MASK] = -torch.inf
            confidence, tokens = logits.float().softmax(-1).max(-1)
            opened = (canvas == MASK) & (places >= start) & (places < stop)
            chosen = select(confidence.masked_fill(~opened, -1.0), 2, threshold)
            canvas = torch.where(chosen, tokens, canvas)
            seen.append(canvas[:, :stop])
    assert len(seen) == len(canvases)
    assert all(torch.equal(one, other) for one, other in zip(seen, canvases))
    assert torch.equal(canvas[:, 6:15], answer)


def test_block_answers_depend_neither_on_what_follows_nor_on_other_rows(model):
    """A longer answer begins with the shorter one. Rows finish their blocks at different passes
    where a threshold is set; each must still get its own answer."""
    prompts, options = prompts_of(4, 6), {"block_length": 4, "threshold": 0.4}
    together = generate_llada2(model, prompts, 18, **options)
    assert torch.equal(generate_llada2(model, prompts, 6, **options), together[:, :6])
    alone = [generate_llada2(model, row[None], 18, **options) for row in prompts]
    assert torch.equal(together, torch.cat(alone))


# ---- the command line ------------------------------------------------------------------------


@functools.cache
def adapter_for(kind: str) -> Path:
    """The folder of a random adapter. Nobody writes into it."""
    folder = Path(FOLDER.name) / "adapters" / kind.replace(", ", "-")
    save_adapter(add_random_lora(toy_model(kind, torch.float32)), folder, 4, 8.0, 0.05, "toy")
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The folder of a short fine-tuning. Nobody writes into it."""
    out, toys = tmp_path_factory.mktemp("tuned") / "run", checkpoints()
    flags = "--steps 2 --lora-rank 4 --memory-rank 7 --memory-lr 0.3 --device cpu".split()
    memdlm.main(["--backbone", toys["llada-moe"], "--data", toys["data"], *flags, "--out", out])
    return out


def ask(flags: str = "", kind: str = "llada-moe") -> tuple[list[str], list[Tensor]]:
    """Asks a toy by the real command, in this process. Returns the printed lines and the logits of
    every pass."""
    logits, printed, guided = [], io.StringIO(), sample.guided_logits

    def kept(*arguments) -> Tensor:
        logits.append(guided(*arguments))
        return logits[-1]

    named = [
        "--backbone",
        checkpoints()[kind],
        "--prompt",
        PROMPT,
        "--length",
        6,
        "--device",
        "cpu",
    ]
    with mock.patch.object(sample, "guided_logits", kept), redirect_stdout(printed):
        sample.main([*named, *flags.split()])
    return printed.getvalue().rstrip("\n").split("\n"), logits


def left(lines: list[str]) -> list[int]:
    """How many places were still masked, line by line."""
    return [line.count("_") for line in lines]


@pytest.mark.parametrize("kind", SETTINGS)
def test_adapter_and_memory_each_change_the_logits(kind):
    """And both at once differ from either."""
    adapter = f"--adapter {adapter_for(kind)}"
    first = [ask(flags, kind)[1][0] for flags in ("", adapter, "--memory", f"{adapter} --memory")]
    for i, logits in enumerate(first):
        assert logits.isfinite().all()
        assert all((logits - other).abs().max() > 1e-3 for other in first[:i])
    layers = count(linear_layers(toy_model(kind)).values())
    assert ask(adapter, kind)[0][0].startswith(f"LoRA on {layers} of {layers} linear layers")


def test_steps_blocks_thresholds_and_schedules_share_the_tokens():
    """Ten tokens in four steps: LLaDA commits 3 3 2 2, dLLM 2 3 2 3. Each step is printed, unless
    the answer alone is wanted."""
    ten = "--length 10 --steps 4"
    assert left(ask(ten)[0]) == left(ask(f"{ten} --schedule llada")[0]) == [7, 4, 2, 0, 0]
    assert left(ask(f"{ten} --schedule dllm")[0]) == [8, 5, 3, 0, 0]
    assert [len(rows) for rows in ask("--block-length 3 --steps 2")[1]] == [3, 3]
    assert len(ask("--threshold 0")[1]) == 1
    assert ask("--quiet --memory")[0] == ask("--memory")[0][-1:]


def test_llada2_decodes_blocks_on_its_own_grid():
    """Without other flags in blocks of 32 counted from the prompt's start, of which the prompt
    leaves 8 places, with everything above 0.95 at once."""
    usual, published = ask(kind="llada2")[1], "--steps 32 --block-length 32 --threshold 0.95"
    assert len(usual[0]) == 8
    assert len(ask("--threshold 0", "llada2")[1]) == 1 < len(usual) <= 8
    assert [len(rows) for rows in ask(published, "llada2")[1]] == [len(rows) for rows in usual]
    fine = ask("--block-length 4 --steps 2 --threshold 1", "llada2")[1]
    assert [len(rows) for rows in fine] == [4, 2, 4, 2]


@pytest.mark.parametrize("flag", ["--cfg-scale 1", "--plain", "--load-4bit", "--random-weights"])
def test_flags_change_the_logits(flag):
    plain, other = ask()[1][0], ask(flag)[1][0]
    assert other.isfinite().all()
    assert other.shape == plain.shape == (6, VOCABULARY)
    assert not torch.equal(plain, other)


def test_temperature_and_seed_draw_other_tokens_and_other_memories():
    hot = [ask(f"--temperature 5 --seed {seed}")[0][-1] for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert not torch.equal(ask("--memory --seed 0")[1][0], ask("--memory --seed 1")[1][0])


# ---- the settings that an adapter was trained with -------------------------------------------


def test_a_prompt_is_written_with_the_memory_of_the_training(tuned, tmp_path, monkeypatch):
    """They are in the adapter's folder, and go where it goes; an adapter without them, as PEFT
    writes one, gets the paper's."""
    moved = shutil.copytree(tuned / "adapter", tmp_path / "moved")
    monkeypatch.chdir(moved)
    for folder in (tuned / "adapter", moved, "."):
        lines, _ = ask(f"--adapter {folder} --memory")
        assert "Memory(rank=7, alpha=64.0, lr=0.3," in lines[1]
    (moved / "training.json").unlink()
    assert "Memory(rank=32, alpha=64.0, lr=0.1," in ask("--adapter . --memory")[0][1]


def test_an_adapter_of_another_training_is_refused(tuned, tmp_path, monkeypatch, capsys):
    """config.json and results.json would describe another adapter."""
    run = shutil.copytree(tuned, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"method": "mdlm"}))
    monkeypatch.chdir(run / "adapter")
    for folder in (run / "adapter", "."):
        flags = ["--backbone", checkpoints()["llada-moe"], "--adapter", folder, "--prompt", PROMPT]
        assert "method memdlm" in refusal(sample.main, flags, capsys)


# ---- bad input -------------------------------------------------------------------------------

REFUSED = [
    ("--adapter {}/absent", "adapter_config.json is missing"),
    ("--adapter {}/llada", "does not fit this backbone"),
    ("--backbone {}/llada2 --schedule dllm", "--schedule is not for LLaDA2"),
    ("--backbone {}/llada2 --cfg-scale 1", "--cfg-scale is not for LLaDA2"),
    ("--backbone {}/llada2 --block-length 4 --steps 5", "--steps counts the passes of a block"),
    ("--schedule dllm --length 3 --steps 10000000", "--steps for 3 tokens"),
    ("--length 6 --block-length 2 --steps 2", "--steps for 6 tokens"),
    ("--prompt= --plain", "--prompt is empty"),
    ("--backbone {}/mask", "[MASK] is 525 in the tokenizer, 7 in config.json"),
    ("--run {}", "unrecognized arguments: --run"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of things that do not go together with a LLaDA-MoE."""
    root = tmp_path_factory.mktemp("broken")
    (root / "llada2").symlink_to(checkpoints()["llada2"])
    (root / "llada").symlink_to(adapter_for("llada"))
    write_checkpoint(root / "mask", "llada", mask_token_id=7)
    return root


@pytest.mark.parametrize(("flags", "named"), REFUSED)
def test_what_cannot_be_answered_is_one_line(broken, capsys, flags, named):
    base = ["--backbone", checkpoints()["llada-moe"], "--prompt", PROMPT, "--device", "cpu"]
    arguments = [*base, *flags.replace("{}", str(broken)).split()]
    assert named in refusal(sample.main, arguments, capsys)
