"""
test_samplers.py: LLaDA2's block sampler, `sample.py --backbone` from end to end on toys, and
`--cache`: later passes of a block compute a window of the canvas, whose queries read keys and
values that the first pass has kept. (test_golden.py replays recorded schedules and traces.)
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
from backbones import (
    MASK,
    SETTINGS,
    VOCABULARY,
    add_random_lora,
    random_fast,
    toy_model,
    write_checkpoint,
)
from commands import FOLDER, checkpoints, refusal
from test_finetune import tune
from torch import Tensor
from toys import ONE, command, predictions
from toys import ask as evaluate

import sample
from full_scale import benchmark, samplers
from full_scale.adapters import save_adapter
from full_scale.cache import VARIANTS, CachedLogits, cached
from full_scale.checkpoints import count, linear_layers
from full_scale.samplers import generate_llada2
from full_scale.tokenizer import load_tokenizer
from lab.tools import start
from memdlm import Memory
from model import Attention, Config, Transformer, init_weights
from sample import generate, guided_logits, plan_blocks

PROMPT = "Who is it?"  # 24 tokens with the chat template


def prompts_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(3))


def test_block_answers_depend_neither_on_what_follows_nor_on_other_rows():
    """A longer answer begins with the shorter one. Rows finish their blocks at different passes
    where a threshold is set; each must still get its own answer."""
    model = toy_model("llada2")
    model.output.weight.data.mul_(3.0)  # with random weights every probability would be small
    prompts, options = prompts_of(4, 6), {"block_length": 4, "threshold": 0.4}
    together = generate_llada2(model, prompts, 18, **options)
    assert torch.equal(generate_llada2(model, prompts, 6, **options), together[:, :6])
    alone = [generate_llada2(model, row[None], 18, **options) for row in prompts]
    assert torch.equal(together, torch.cat(alone))


@functools.cache
def adapter_for(kind: str) -> Path:
    """The folder of a random adapter. Nobody writes into it."""
    folder = Path(FOLDER.name) / "adapters" / kind.replace(", ", "-")
    save_adapter(add_random_lora(toy_model(kind, torch.float32)), folder, 4, 8.0, 0.05, "toy")
    return folder


def ask(flags: str = "", kind: str = "llada-moe") -> tuple[list[str], list[Tensor]]:
    """Asks a toy by the real command: the printed lines, and the logits of every pass."""
    logits, printed, guided = [], io.StringIO(), sample.guided_logits

    def kept(*arguments) -> Tensor:
        logits.append(guided(*arguments))
        return logits[-1]

    named = ["--backbone", checkpoints()[kind], "--prompt", PROMPT, "--length", 6]
    with mock.patch.object(sample, "guided_logits", kept), redirect_stdout(printed):
        start("sample", [*named, "--device", "cpu", *flags.split()])
    return printed.getvalue().rstrip("\n").split("\n"), logits


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
    """Ten tokens in four steps: LLaDA commits 3 3 2 2, dLLM 2 3 2 3. Each step is printed."""
    ten = "--length 10 --steps 4"
    for schedule, left in (("", [7, 4, 2, 0, 0]), ("--schedule dllm", [8, 5, 3, 0, 0])):
        assert [line.count("_") for line in ask(f"{ten} {schedule}")[0]] == left
    assert [len(rows) for rows in ask("--block-length 3 --steps 2")[1]] == [3, 3]
    assert len(ask("--threshold 0")[1]) == 1
    assert ask("--quiet --memory")[0] == ask("--memory")[0][-1:]


def test_llada2_decodes_blocks_on_its_own_grid():
    """By default blocks of 32 from the prompt's start (8 places are left), and all above 0.95."""
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


@pytest.mark.parametrize("kind", ["llada", "llada-moe", "llada2"])
def test_what_follows_the_end_of_a_turn_is_no_part_of_an_answer(kind, tmp_path, monkeypatch):
    """ "yes", end of turn, " no" is "yes", be it printed or scored."""
    tokenizer = load_tokenizer(checkpoints()[kind])
    end = tokenizer.specials["<|role_end|>"]
    ids = torch.tensor([[*tokenizer.encode("yes"), end, *tokenizer.encode(" no")]])
    for module in (samplers, benchmark):
        monkeypatch.setattr(module, "sampler_for", lambda *_: lambda *_, **__: ids)
    printed, asked = ask("--quiet", kind)
    assert (printed, asked) == (["yes"], [])
    evaluate(tmp_path, f"{ONE} --backbone {checkpoints()[kind]}")
    assert predictions(tmp_path, "base") == ["yes"]


def test_a_prompt_is_written_with_the_memory_of_the_training(tmp_path, monkeypatch, capsys):
    """Its settings go where the adapter goes; one without them, as of PEFT, gets the paper's. In a
    run's folder there may be no adapter but its own."""
    run = tune(tmp_path / "run", "--memory-rank", 7, "--memory-lr", 0.3)
    moved = shutil.copytree(run / "adapter", tmp_path / "moved")
    monkeypatch.chdir(moved)
    for folder in (run / "adapter", moved, "."):
        lines, _ = ask(f"--adapter {folder} --memory")
        assert "rank 7, alpha 64.0, lr 0.3," in lines[1]
    (moved / "training.json").unlink()
    assert "rank 32, alpha 64.0, lr 0.1," in ask("--adapter . --memory")[0][1]
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"method": "mdlm"}))
    monkeypatch.chdir(run / "adapter")
    for folder in (run / "adapter", "."):
        flags = ["--backbone", checkpoints()["llada-moe"], "--adapter", folder, "--prompt", PROMPT]
        assert "method memdlm" in refusal("sample", flags, capsys)


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
    assert named in refusal("sample", arguments, capsys)


FULL = ["tiny", "llada", "llada-moe", "llada-moe, rich"]  # those with full attention


def model_of(kind: str) -> Transformer:
    """A random model in float64, with an outer LoRA if it is a backbone."""
    if kind == "tiny":
        config = Config(vocab_size=MASK + 1, mask_id=MASK, hidden=32, heads=2, kv_heads=2, ffn=32)
        model = init_weights(Transformer(config).double(), torch.Generator().manual_seed(0))
        with torch.no_grad():
            for layer in model.layers:
                layer.canon.taps.normal_(generator=torch.Generator().manual_seed(1))
        return model.eval()
    return add_random_lora(toy_model(kind)).eval()


class Spy:
    """A predict= that keeps what it was asked and what it said."""

    def __init__(self, predict):
        self.predict, self.calls = predict, []

    def __call__(self, *arguments) -> Tensor:
        self.calls.append((arguments[1], arguments[-1], self.predict(*arguments)))
        return self.calls[-1][-1]


@torch.no_grad()
def stale_logits(model, before: Tensor, canvas: Tensor, window: slice, fast) -> Tensor:
    """What a pass over `canvas` says if every position outside of the window has the keys and
    values that it had in a pass over `before`: computed in full, (B, T, V)."""
    kept, attend = [], Attention.attend

    def keeping(self, q, k, v, *rest):
        kept.append((k, v))
        return attend(self, q, k, v, *rest)

    def mixing(self, q, k, v, *rest):
        k_old, v_old = (part.clone() for part in kept.pop(0))
        k_old[..., window, :], v_old[..., window, :] = k[..., window, :], v[..., window, :]
        return attend(self, q, k_old, v_old, *rest)

    with mock.patch.object(Attention, "attend", keeping):
        model(before, None, fast)
    with mock.patch.object(Attention, "attend", mixing):
        return model(canvas, None, fast)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FULL[1:])
def test_a_pass_reads_the_kept_keys_and_values_outside_its_window(kind, variant, memory):
    """Every pass of two blocks, once more in full, in float64."""
    model, prompts = model_of(kind), prompts_of(2, 7)
    fast = random_fast(model, Memory(rank=3), sets=2) if memory else None
    spy = Spy(CachedLogits(variant))
    generate(model, prompts, plan_blocks(6, block_length=3), fast=fast, predict=spy)
    assert len(spy.calls) == 6
    for number, (canvas, at, logits) in enumerate(spy.calls):
        block, place = divmod(number, 3)
        if place == 0:
            before, full = canvas, guided_logits(model, canvas, None, fast, 0.0, None, at)
        else:
            stop = 13 if variant == "prefix" else 10 + 3 * block
            window = slice(7 + 3 * block, stop)
            full = stale_logits(model, before, canvas, window, fast)[at].float()
        torch.testing.assert_close(logits, full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FULL)
def test_the_first_pass_of_a_block_is_exact_and_no_pass_sees_padding(kind, variant):
    """So blocks of one token, and answers in one pass a block, are those of the exact sampler; and
    rows with padding in front answer as without it."""
    model, prompts, decode = model_of(kind), prompts_of(2, 7), cached(generate, variant)
    for blocks in (plan_blocks(5, block_length=1), plan_blocks(6, steps=2, block_length=3)):
        exact = generate(model, prompts, blocks)
        assert torch.equal(decode(model, prompts, blocks=blocks), exact)
    padded, blocks = torch.nn.functional.pad(prompts, (3, 0), value=0), plan_blocks(6, None, 3)
    seen = (torch.arange(16) >= 3).long().expand(2, -1)
    ours = decode(model, padded, blocks=blocks, attention_mask=seen)
    assert torch.equal(ours, decode(model, prompts, blocks=blocks))


@pytest.mark.parametrize("memory", [False, True])
def test_for_a_block_causal_model_every_pass_is_exact(memory):
    """LLaDA2's finished blocks see nothing of what follows. They are computed once, and once more
    with the last token that was committed in them."""
    model, prompts = model_of("llada2"), prompts_of(2, 6)
    fast = random_fast(model, Memory(rank=3), sets=2) if memory else None
    calls = []
    for predict in (guided_logits, CachedLogits(grid=4)):
        spy = Spy(predict)
        answer = generate_llada2(model, prompts, 14, 2, 4, fast=fast, predict=spy)
        calls.append([*spy.calls, (answer, answer, torch.zeros(1))])
    for (canvas, _, exact), (ours, _, logits) in zip(*calls, strict=True):
        assert torch.equal(canvas, ours)
        torch.testing.assert_close(logits, exact, rtol=0, atol=1e-6)


def test_a_pass_costs_its_window():
    """Positions that a layer computes, pass by pass: 20 of prompt, blocks of 3 in an answer of 6.
    LLaDA2's grid of 4: everything once, then a block, then two blocks when the next one begins."""

    def costs(kind: str, decode, **plan) -> list[int]:
        model, seen = model_of(kind), []
        norm = model.layers[0].attention_norm
        norm.register_forward_hook(lambda module, x, y: seen.append(y.shape[1]))
        decode(model, prompts_of(1, 20), **plan)
        return seen

    blocks = plan_blocks(6, block_length=3)
    assert costs("llada", cached(generate, "dual"), blocks=blocks) == [26, 3, 3, 26, 3, 3]
    assert costs("llada", cached(generate, "prefix"), blocks=blocks) == [26, 6, 6, 26, 3, 3]
    grid = cached(generate_llada2, "dual", 4)
    assert costs("llada2", grid, length=8, steps=2, block_length=4) == [24, 4, 8, 4]


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_command_takes_a_cache_with_adapter_and_memory(kind):
    """And without the flag, nothing of it is ever touched."""
    flags = "--length 12 --block-length 4 --threshold 1 --memory"
    with mock.patch.object(CachedLogits, "__call__", side_effect=AssertionError):
        exact, _ = ask(flags, kind)
    for variant in ("", *VARIANTS):
        lines, full = ask(f"{flags} --cache {variant}", kind)
        assert len(lines) == len(exact)
        assert full == []
        if kind == "llada2":
            assert lines == exact


def test_the_command_edits_below_its_threshold():
    """At 1 nothing is replaced; at 0 every token that is not the most probable one any more is.
    The cache changes nothing of it: blocks before the one in work are never edited."""
    flags = "--length 12 --block-length 4 --threshold 1 --edit-threshold"
    never, often = (ask(f"{flags} {threshold}", "llada2")[0] for threshold in (1, 0))
    assert never[-1] != often[-1]
    assert len(often) > len(never)
    assert ask(f"{flags} 0 --cache", "llada2")[0] == often


def test_an_evaluation_with_a_cache_is_another_one(tmp_path, capsys):
    """Its answers differ, and are not taken for those of the exact sampler."""
    flags = "--tasks niah_single_1 --lengths 330 --samples 1 --steps 4"
    exact, out = evaluate(tmp_path / "exact", flags), evaluate(tmp_path / "out", f"{flags} --cache")
    assert predictions(exact, "base") != predictions(out, "base")
    named = refusal("eval_niah", command(tmp_path / "out", flags), capsys)
    assert "with cache 'dual', not None" in named


CACHE_REFUSED = [
    ("--cache triple", "invalid choice: 'triple'"),
    ("--cache --cfg-scale 1", "--cache is not for --cfg-scale"),
    ("--edit-threshold 0.9", "--edit-threshold is for LLaDA2.1 alone"),
    ("--backbone {} --edit-threshold 0.9 --steps 2", "--steps is not for --edit-threshold"),
    ("--backbone {} --edit-threshold 0.9 --temperature 1", "--edit-threshold is greedy"),
    ("--backbone {} --edit-threshold 2", "--edit-threshold"),
]


@pytest.mark.parametrize(("flags", "named"), CACHE_REFUSED)
def test_what_does_not_go_together_is_one_line(flags, named, capsys):
    base = ["--backbone", checkpoints()["llada-moe"], "--prompt", "Who?", "--device", "cpu"]
    arguments = [*base, *flags.replace("{}", str(checkpoints()["llada2"])).split()]
    assert named in refusal("sample", arguments, capsys)
