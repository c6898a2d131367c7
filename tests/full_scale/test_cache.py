"""
test_cache.py: `--cache`. Exact at the first pass of each block; then what Fast-dLLM says: a window
of the canvas is computed, and its queries read keys and values that the first pass has kept. For
LLaDA2, whose finished blocks are final, that is no approximation.
"""

from unittest import mock

import pytest
import torch
from backbones import MASK, SETTINGS, add_random_lora, random_fast, toy_model
from commands import checkpoints, refusal
from test_samplers import ask, prompts_of
from torch import Tensor
from toys import ask as evaluate
from toys import command, predictions

import eval_niah
import sample
from full_scale.cache import VARIANTS, CachedLogits, cached
from full_scale.samplers import generate_editing, generate_llada2
from memdlm import Memory
from model import Attention, Config, Transformer, init_weights
from sample import generate, guided_logits, plan_blocks

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
        logits = self.predict(*arguments)
        self.calls.append((arguments[1], arguments[-1], logits))
        return logits


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
def test_the_first_pass_of_a_block_is_exact(kind, variant):
    """So blocks of one token, and answers in one pass a block, are those of the exact sampler."""
    model, prompts = model_of(kind), prompts_of(3, 9)
    for blocks in (plan_blocks(5, block_length=1), plan_blocks(6, steps=2, block_length=3)):
        exact = generate(model, prompts, blocks)
        assert torch.equal(cached(generate, variant)(model, prompts, blocks=blocks), exact)


@pytest.mark.parametrize("kind", FULL)
def test_padding_is_not_seen(kind):
    """Rows with padding in front answer as without it."""
    model, prompts = model_of(kind), prompts_of(2, 7)
    padded = torch.nn.functional.pad(prompts, (3, 0), value=0)
    seen = torch.ones(2, 16, dtype=torch.long)
    seen[:, :3] = 0
    decode = cached(generate, "dual")
    ours = decode(model, padded, blocks=plan_blocks(6, block_length=3), attention_mask=seen)
    assert torch.equal(ours, decode(model, prompts, blocks=plan_blocks(6, block_length=3)))


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


def test_the_editing_sampler_is_exact_with_a_cache_too():
    """Blocks before the one in work are never edited."""
    model, [prompt, _] = model_of("llada2"), prompts_of(2, 6)
    with torch.no_grad():
        model.output.weight.mul_(3.0)
    asked = {"length": 14, "edit_threshold": 0.1, "block_length": 4, "threshold": 0.3}
    exact, canvases = generate_editing(model, prompt[None], **asked), []
    edited = cached(generate_editing, "dual", 4)(
        model, prompt[None], **asked, watch=canvases.append
    )
    assert torch.equal(edited, exact)
    changed = [
        (one[:, : other.shape[1]] != other).sum() for one, other in zip(canvases[1:], canvases)
    ]
    assert sum(changed) > 14, "nothing was ever replaced: the test shows nothing"


def test_a_pass_costs_its_window():
    """Positions that a layer computes, pass by pass: 20 of prompt, blocks of 3 in an answer of 6.
    LLaDA2's grid of 4: everything once, then a block, then two blocks when the next one begins."""

    def costs(kind: str, decode) -> list[int]:
        model, seen = model_of(kind), []
        model.layers[0].register_forward_hook(lambda *call: seen.append(call))
        norm = model.layers[0].attention_norm
        norm.register_forward_hook(lambda module, x, y: seen.append(y.shape[1]))
        decode(model, prompts_of(1, 20))
        return seen

    def blocks(variant):
        plan = plan_blocks(6, block_length=3)
        return lambda model, prompts: cached(generate, variant)(model, prompts, blocks=plan)

    assert costs("llada", blocks("dual")) == [26, 3, 3, 26, 3, 3]
    assert costs("llada", blocks("prefix")) == [26, 6, 6, 26, 3, 3]
    grid = cached(generate_llada2, "dual", 4)
    plan = {"length": 8, "steps": 2, "block_length": 4}
    assert costs("llada2", lambda model, prompts: grid(model, prompts, **plan)) == [24, 4, 8, 4]


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
    """At 1 nothing is ever replaced: each line has fewer masks and the same tokens. At 0 every
    token that is not the most probable one any more is. The cache changes nothing of it."""
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
    named = refusal(eval_niah.main, command(tmp_path / "out", flags), capsys)
    assert "with cache 'dual', not None" in named


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--cache triple", "invalid choice: 'triple'"),
        ("--cache --cfg-scale 1", "--cache is not for --cfg-scale"),
        ("--edit-threshold 0.9", "--edit-threshold is for LLaDA2.1 alone"),
        ("--backbone {} --edit-threshold 0.9 --steps 2", "--steps is not for --edit-threshold"),
        ("--backbone {} --edit-threshold 0.9 --temperature 1", "--edit-threshold is greedy"),
        ("--backbone {} --edit-threshold 2", "--edit-threshold"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, named, capsys):
    base = ["--backbone", checkpoints()["llada-moe"], "--prompt", "Who?", "--device", "cpu"]
    arguments = [*base, *flags.replace("{}", str(checkpoints()["llada2"])).split()]
    assert named in refusal(sample.main, arguments, capsys)
