"""
sample.py: generation. Start from a response of nothing but [MASK], predict every masked token, commit the most confident,
repeat until none is left. Optionally the prompt is first written into fast weights (Sec. 4.5).

    python sample.py --run runs/tiny --prompt "... river holds 47. ... Question: what does river hold? Answer:" [--memory]

There is no remasking here: a committed token is never looked at again. What some papers call "low-confidence remasking"
is this very rule, seen from the other side (the tokens not committed stay masked).

Reading list: MaskGIT, Chang et al. 2022, arXiv 2202.04200 (commit by confidence); LLaDA, arXiv 2502.09992, Sec. 2.4;
classifier-free guidance for MDLMs, Nie et al. 2024, arXiv 2410.18514; Gumbel noise in float64, arXiv 2409.02908.

Glossary
  paper         | name here      | shape
  x_t           | canvas         | (B, P + R) prompt, then the response, masked where not yet committed
  -             | masked         | (B, R) bool
  N steps       | steps          | int: forward passes per answer, spread over the blocks
  -             | block_length   | int: blocks are finished left to right
  -             | schedule       | (steps,) how many tokens each step commits
  phi_2         | fast           | model.Fast, constant over the whole generation
  -             | given          | (B, P + R) bool: the prompt, which guidance masks
  -             | open_, quota   | which positions may be committed now, and how many of them
  -             | windows        | (B * n, W): the prompt cut into n pieces, for our writing rule
  -             | surprise       | (B, n * W): -log p of each prompt token, given the rest of its window
(M masked positions, V vocabulary.)
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import Parser, guarded, pick_device, real, whole
from memdlm import (
    Memory,
    corrupt,
    draw_pre_anchor,
    generator_for,
    init_fast,
    inner_loop,
    masked_nll,
    memory_settings,
    memory_start,
    read_config,
)
from model import Fast, Transformer, UserError, load_model


def commit_schedule(tokens: int, steps: int) -> list[int]:
    """Tokens to commit per step, as even as whole numbers allow: 10 tokens in 4 steps -> [3, 3, 2, 2]."""
    base, rest = divmod(tokens, steps)
    return [base + (i < rest) for i in range(steps)]


def guided_logits(
    model: Transformer, canvas: Tensor, given: Tensor, fast: Fast | None, cfg_scale: float, attention_mask, at: Tensor
):
    """Logits (M, V) at the M positions `at` (B, T) bool. Guidance: u + (scale + 1)(c - u), u with every given token masked."""

    def logits(ids: Tensor) -> Tensor:
        h = model.run(model.embedding(ids), 0, model.config.layers, attention_mask, fast)
        return model.head(h[at]).float()

    conditional = logits(canvas)
    if cfg_scale == 0:
        return conditional
    unconditional = logits(corrupt(canvas, given))
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def choose_tokens(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token for each row of logits (M, V) and the model's probability of it: the confidence. [MASK] is never chosen."""
    logits = logits.index_fill(1, torch.tensor([data.MASK], device=logits.device), -torch.inf)
    probabilities = logits.softmax(-1)
    if temperature > 0:  # Gumbel-max in float64: in float32 the noise is truncated and sampling is colder than asked
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        tokens = (logits.cpu().double() / temperature + gumbel).argmax(-1).to(logits.device)
    else:
        tokens = logits.argmax(-1)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0]


def select(confidence: Tensor, quota: int, threshold: float | None) -> Tensor:
    """Which of the positions to commit: the `quota` most confident of each row, and all at or above `threshold`.

    confidence (B, R), -1 where nothing may be committed. Returns (B, R) bool.
    """
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)  # 0 = the most confident
    chosen = rank < quota
    if threshold is not None:
        chosen |= confidence >= threshold
    return chosen & (confidence >= 0)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    length: int,
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    threshold: float | None = None,
    fast: Fast | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """prompts (B, P) -> responses (B, length).

    steps: forward passes for the whole answer (default: one token each). block_length: default the whole answer.
    threshold: commit everything this probable at once; the answer may then take fewer passes than `steps`.
    attention_mask (B, P + length): 0 hides padding. watch: called with the canvas before the first and after each pass.
    """
    block_length = block_length or length
    sizes = [min(block_length, length - start) for start in range(0, length, block_length)]
    if steps is not None and steps < len(sizes):
        raise UserError(f"{length} tokens in blocks of {block_length} are {len(sizes)} blocks: --steps must be at least that.")
    shares = sizes if steps is None else commit_schedule(steps, len(sizes))  # forward passes for each block
    canvas = F.pad(prompts, (0, length), value=data.MASK)  # (B, P + R)
    given = torch.zeros_like(canvas, dtype=torch.bool)
    given[:, : prompts.shape[1]] = True
    if watch:
        watch(canvas)
    end = prompts.shape[1]
    for size, share in zip(sizes, shares):
        block = torch.zeros_like(given)
        block[:, end : end + size] = True
        end += size
        for quota in commit_schedule(size, min(share, size)):
            open_ = (canvas == data.MASK) & block
            if not open_.any():
                break
            logits = guided_logits(model, canvas, given, fast, cfg_scale, attention_mask, open_)
            tokens, probability = choose_tokens(logits, temperature, generator)
            confidence = torch.full(canvas.shape, -1.0, device=canvas.device).masked_scatter(open_, probability)
            proposal = canvas.masked_scatter(open_, tokens)
            canvas = torch.where(select(confidence, quota, threshold), proposal, canvas)
            if watch:
                watch(canvas)
    return canvas[:, prompts.shape[1] :]


# ---- writing the prompt into the weights (Sec. 4.5) ----------------------------------------------------------------------


class Write(NamedTuple):
    """How a prompt is written. Defaults: the paper's (window and share belong to our own rule)."""

    rule: str = "paper"  # a key of WRITE_RULES
    memory: Memory = Memory()  # its scope plays no part: each prompt has a set of its own
    passes: int = 1  # the stages are gone through this often
    anchor_ratio: float = 0.2  # of the paper's rule
    window: int = 96  # of our rule: the training length
    share: float = 0.3  # of our rule: how much of the windows is worth writing


def paper_rule(model: Transformer, prompts: Tensor, write: Write, generators: list) -> tuple[Tensor, list[Tensor]]:
    """Sec. 4.5: each prompt token is masked with probability 0.2 (the anchor); stage 1 on its pre-anchor, stage 2 on itself."""
    everywhere = torch.ones_like(prompts[:1], dtype=torch.bool)
    stages = []
    for generator in generators:
        anchor = torch.rand(everywhere.shape, generator=generator).to(prompts.device) < write.anchor_ratio
        stages.append((draw_pre_anchor(anchor, everywhere, write.memory.start_scale, generator), anchor))
    return prompts, [torch.cat(stage) for stage in zip(*stages)]


def surprise_rule(model: Transformer, prompts: Tensor, write: Write, generators: list) -> tuple[Tensor, list[Tensor]]:
    """Ours, not the paper's: write what the model could not have guessed, in windows as long as it was trained on.

    The prompt is cut into windows; each token is scored under one of four complementary masks; the most surprising share
    is written, in two complementary halves.
    """
    windows = cut_windows(prompts, write.window)  # (B * n, W)
    surprise = token_surprise(model, windows).view(len(prompts), -1)  # (B, n * W)
    rank = surprise.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    chosen = rank < write.share * surprise.shape[1]
    half = torch.stack([torch.rand(surprise.shape[1], generator=generator) < 0.5 for generator in generators]).to(
        prompts.device
    )
    return windows, [(chosen & half).view_as(windows), (chosen & ~half).view_as(windows)]


def cut_windows(prompts: Tensor, window: int) -> Tensor:
    """(B, P) -> (B * n, W) with n = ceil(P / window) and W = ceil(P / n); the last window may overlap the one before it."""
    length = prompts.shape[1]
    count = -(-length // window)
    width = -(-length // count)
    starts = [min(i * width, length - width) for i in range(count)]
    return torch.stack([prompts[:, start : start + width] for start in starts], dim=1).flatten(0, 1)


def token_surprise(model: Transformer, rows: Tensor, folds: int = 4) -> Tensor:
    """-log p of every token (B, W), each predicted with a quarter of the row masked: every fourth token, from `fold` on."""
    nll = torch.zeros(rows.shape, device=rows.device)
    for fold in range(folds):
        masked = (torch.arange(rows.shape[1], device=rows.device) % folds == fold).expand(rows.shape)
        h = model.run(model.embedding(corrupt(rows, masked)), 0, model.config.layers)
        nll.masked_scatter_(masked, masked_nll(model, h, rows, masked).to(nll.dtype))
    return nll


WRITE_RULES = {"paper": paper_rule, "surprise": surprise_rule}


def write_settings(config: dict) -> Write:
    """What a run's --write flags say."""
    alpha = config["write_rank"] * config["memory_alpha"] / config["memory_rank"]  # the same scale as in training
    memory = replace(memory_settings(config), lr=config["write_lr"], rank=config["write_rank"], alpha=alpha)
    return Write(config["write"], memory, config["write_passes"], config["anchor_ratio"], config["length"])


@torch.no_grad()
def write_prompt(model: Transformer, prompts: Tensor, write: Write, seed: int, first_row: int = 0) -> Fast:
    """phi for prompts (B, P), phi_2 under the paper's rule: one set of fast weights per prompt, from nothing but the prompt.

    Row i's random draws depend on (seed, first_row + i) alone, so that the batch size changes no result. The caller
    puts the model in eval mode (no LoRA dropout). Loss weights are 1 instead of 1/t (Sec. 4.5).
    """
    memory, generators = write.memory, [generator_for(seed, "write", first_row + i) for i in range(len(prompts))]
    sets = [init_fast(model, memory, 1, generator) for generator in generators]
    joined = {name: tuple(torch.cat([s.weights[name][i] for s in sets]) for i in (0, 1)) for name in sets[0].weights}
    rows, stages = WRITE_RULES[write.rule](model, prompts, write, generators)
    batch = data.Batch(rows, torch.ones_like(rows, dtype=torch.bool), None)
    cut = memory_start(model, memory)
    states = [(masked, model.run(model.embedding(corrupt(rows, masked)), 0, cut)) for masked in stages]
    return inner_loop(model, batch, states * write.passes, Fast(joined, sets[0].scale), memory, weighted=False)[0]


# ---- for the eye -----------------------------------------------------------------------------------------------------------


def canvas_text(ids: list[int]) -> str:
    """Ids as text, with every [MASK] drawn as an underscore."""
    return "".join(" _" if token == data.MASK else data.TOKENIZER.decode([token]) for token in ids)


def denoising_view(model: Transformer, example: data.Example, fast: Fast | None = None) -> str:
    """The prompt, then the answer after every step of its denoising, then the answer that was expected."""
    prompt, lines = torch.tensor([example.prompt], device=next(model.parameters()).device), []
    watch = lambda canvas: lines.append(f"step {len(lines):2d} |{canvas_text(canvas[0, prompt.shape[1] :].tolist())}")  # noqa: E731
    generate(model, prompt, len(example.response), fast=fast, watch=watch)
    return "\n".join([data.TOKENIZER.decode(example.prompt).strip(), *lines, f"expected|{data.decode(example.response)}"])


def build_parser() -> Parser:
    parser = Parser("Answers a prompt with a trained run's model.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a finished run, e.g. runs/tiny")
    flag("--seed", type=whole(0), help="which of the run's seeds (default: its first)")
    flag("--model", choices=("base", "mdlm", "memdlm"), default="memdlm", help="which of its models")
    flag("--prompt", required=True, help="the text to answer; always ordinary text, never a special token")
    flag("--length", type=whole(1, 512), default=16, help="tokens of the answer")
    flag("--steps", type=whole(1), help="forward passes for the answer (default: one a token)")
    flag("--block-length", type=whole(1), help="decode in blocks of this many tokens, left to right (default: one block)")
    flag("--temperature", type=real(0), default=0.0, help="0 takes the most probable token")
    flag("--cfg-scale", type=real(0), default=0.0, help="classifier-free guidance: u + (scale + 1)(c - u)")
    flag("--threshold", type=real(0, 1), help="commit every token at least this probable at once")
    flag("--memory", action="store_true", help="write the prompt into the weights first (Sec. 4.5)")
    flag("--quiet", action="store_true", help="print the answer alone, without the steps")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser


def run(args: argparse.Namespace) -> None:
    config = read_config(Path(args.run))
    seed = config["seed"] if args.seed is None else args.seed
    model, _ = load_model(Path(args.run) / f"seed{seed}" / f"{args.model}.safetensors", pick_device(args.device))
    ids = data.encode_text(args.prompt)
    if not ids or len(ids) > config["max_length"]:
        raise UserError(f"--prompt has {len(ids)} tokens; it must have 1 to {config['max_length']}.")
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    fast = write_prompt(model, prompt, write_settings(config), seed) if args.memory else None
    show = None if args.quiet else lambda canvas: print(canvas_text(canvas[0, len(ids) :].tolist()).strip())
    answer = generate(
        model,
        prompt,
        args.length,
        args.steps,
        args.block_length,
        args.temperature,
        args.cfg_scale,
        args.threshold,
        fast,
        generator=generator_for(seed, "sample"),
        watch=show,
    )
    print(data.decode(answer[0].tolist()).strip())


def main(arguments: list[str] | None = None) -> None:
    guarded(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
