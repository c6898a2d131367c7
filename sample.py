"""
sample.py: generation. Start from a response of nothing but [MASK], predict every masked token, commit the most confident,
repeat until none is left. Optionally the prompt is first written into fast weights (Sec. 4.5).

    python sample.py --run runs/tiny --prompt "... river holds 47. ... Question: what does river hold? Answer:" [--memory]
    python sample.py --backbone llada-moe [--adapter DIR/adapter] --prompt "..." [--memory]

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
  -             | plan           | list of Block: which places a block has and how many tokens (quota) each step commits
  -             | offset         | (B, T) int: places counted from the end of each row's prompt
  phi_2         | fast           | model.Fast, constant over the whole generation
  -             | given          | (B, P + R) bool: the prompt, which guidance masks
  -             | open_          | (B, T) bool: which positions may be committed now
  -             | windows        | (B * n, W): the prompt cut into n pieces, for our writing rule
  -             | surprise       | (B, n * W): -log p of each prompt token, given the rest of its window
(M masked positions, V vocabulary.)
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import Parser, guarded, pick_device, real, whole
from memdlm import (
    STRATEGIES,
    Anchor,
    Memory,
    Stage,
    backbone_flags,
    backbone_tokenizer,
    corrupt,
    embed,
    generator_for,
    init_fast,
    inner_loop,
    load_backbone,
    make_states,
    masked_fraction,
    memory_settings,
    plain_flag,
    read_config,
    say,
    settings,
    token_nll,
)
from memdlm import build_parser as training_parser
from model import (
    Fast,
    Transformer,
    UserError,
    block_causal_mask,
    count,
    linear_layers,
    load_adapter,
    load_model,
    read_json,
)


def commit_schedule(tokens: int, steps: int) -> list[int]:
    """Tokens to commit per step, as even as whole numbers allow: 10 tokens in 4 steps -> [3, 3, 2, 2] (LLaDA)."""
    base, rest = divmod(tokens, steps)
    return [base + (i < rest) for i in range(steps)]


def rounded_schedule(tokens: int, steps: int) -> list[int]:
    """The same in dLLM: what is left * (1 - t' / t), rounded half to even; steps without a token are dropped.

    t falls from 1 to 0 in equal steps, so that is what is left / steps left; but dLLM computes it through alpha = 1 - t in
    float32, and one in five schedules has a half that this tips over.
    """
    quotas, one = [], np.float32(1)
    for left in range(steps, 0, -1):
        alpha, later = (one - np.float32(n / steps) for n in (left, left - 1))
        share = one - (one - later) / (one - alpha)
        quotas.append(int(np.round(np.float32(tokens - sum(quotas)) * share)))
    return [quota for quota in quotas if quota]


class Block(NamedTuple):
    """A stretch of the answer, decoded before the next one: places start .. stop from the end of the prompt."""

    start: int
    stop: int
    quotas: list[int]  # tokens to commit at each step


def cut_blocks(length: int, block_length: int) -> list[tuple[int, int]]:
    """Where the blocks of an answer begin and end; the last one may be shorter."""
    return [(start, min(start + block_length, length)) for start in range(0, length, block_length)]


def llada_plan(prompt: int, length: int, steps: int | None, block_length: int) -> list[Block]:
    """LLaDA's generate.py: `steps` passes for the whole answer, shared evenly by the blocks (default: one token each)."""
    blocks = cut_blocks(length, block_length)
    if steps is not None and steps < len(blocks):
        raise UserError(f"{length} tokens in blocks of {block_length} are {len(blocks)} blocks: --steps must be at least that.")
    shares = [length] * len(blocks) if steps is None else commit_schedule(steps, len(blocks))
    return [Block(a, b, commit_schedule(b - a, min(share, b - a))) for (a, b), share in zip(blocks, shares)]


def dllm_plan(prompt: int, length: int, steps: int | None, block_length: int) -> list[Block]:
    """dLLM's MDLMSampler, which the paper's evaluation uses: ceil(steps / blocks) passes for each block."""
    blocks = cut_blocks(length, block_length)
    share = -(-(steps or length) // len(blocks))
    return [Block(a, b, rounded_schedule(b - a, share)) for a, b in blocks]


def llada2_plan(prompt: int, length: int, steps: int | None, block_length: int) -> list[Block]:
    """LLaDA2.1's block sampler: blocks lie on a grid that starts with the prompt, and `steps` are those of *each* block."""
    first, stop = prompt // block_length, -(-(prompt + length) // block_length)
    quotas = commit_schedule(block_length, min(steps or block_length, length))
    return [Block(i * block_length - prompt, (i + 1) * block_length - prompt, quotas) for i in range(first, stop)]


PLANS = {"llada": llada_plan, "dllm": dllm_plan, "llada2": llada2_plan}


def guided_logits(
    model: Transformer, canvas: Tensor, given: Tensor, fast: Fast | None, cfg_scale: float, attention_mask, at: Tensor
):
    """Logits (M, V) at the M positions `at` (B, T) bool. Guidance: u + (scale + 1)(c - u), u with every given token masked."""

    def logits(ids: Tensor) -> Tensor:
        return model.head(model.read(model.embedding(ids), 0, at, attention_mask, fast)).float()

    conditional = logits(canvas)
    if cfg_scale == 0:
        return conditional
    unconditional = logits(corrupt(canvas, given, model.config.mask_id))
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def choose_tokens(
    logits: Tensor, temperature: float, generator: torch.Generator | None, suppress: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits (M, V) and the model's probability of it: the confidence. `suppress` are never chosen."""
    logits = logits.index_fill(1, torch.tensor(list(suppress), dtype=torch.long, device=logits.device), -torch.inf)
    probabilities = logits.softmax(-1)
    if temperature > 0:  # Gumbel-max in float64: in float32 the noise is truncated and sampling is colder than asked
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        tokens = (logits.cpu().double() / temperature + gumbel).argmax(-1).to(logits.device)
    else:
        tokens = logits.argmax(-1)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0]


def select(confidence: Tensor, quota: int, threshold: float | None) -> Tensor:
    """Which of the positions to commit: the `quota` most confident of each row, and all above `threshold`.

    confidence (B, R), -1 where nothing may be committed. Returns (B, R) bool.
    """
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)  # 0 = the most confident
    chosen = rank < quota
    if threshold is not None:
        chosen |= confidence > threshold
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
    plan: str = "llada",
    suppress: Sequence[int] | None = None,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """prompts (B, P) -> responses (B, length).

    steps: forward passes for the whole answer (default: one token each), or under the llada2 plan for each block.
    block_length: default the whole answer. plan: a key of PLANS.
    threshold: commit everything more probable than this at once; the answer may then take fewer passes than `steps`.
    suppress: tokens that are never chosen (default: [MASK] alone).
    attention_mask (B, P + length): 0 hides padding. prompt_lengths (B,): where rows differ, prompts are padded on the
    *right*, each answer follows its own prompt, and what lies behind it is hidden.
    watch: called with the canvas before the first and after each pass.
    """
    mask_id, device, (rows, width) = model.config.mask_id, prompts.device, prompts.shape
    if plan == "llada2" and (prompt_lengths is not None or attention_mask is not None):
        raise ValueError("LLaDA2's block grid is one for all rows: give it prompts of one length, without a mask")
    blocks = PLANS[plan](width, length, steps, block_length or length)
    total = width + max(length, blocks[-1].stop)
    lengths = torch.full((rows,), width, device=device) if prompt_lengths is None else prompt_lengths
    offset = torch.arange(total, device=device) - lengths[:, None]  # (B, T)
    given = offset < 0
    canvas = torch.where(given, F.pad(prompts, (0, total - width)), mask_id)
    if prompt_lengths is not None and attention_mask is None:
        attention_mask = offset < length
    if plan == "llada2":
        attention_mask = block_causal_mask(total, block_length or length, device)
    suppress = [mask_id] if suppress is None else suppress
    if watch:
        watch(canvas)
    for block in blocks:
        # Under block-causal attention nothing later is seen, so it need not be computed.
        seen = width + block.stop if plan == "llada2" else total
        visible = None if attention_mask is None else attention_mask[..., :seen]
        visible = visible[..., :seen, :] if plan == "llada2" else visible
        inside = (offset >= block.start) & (offset < block.stop) & ~given
        for quota in block.quotas:
            open_ = (canvas == mask_id) & inside
            if not open_.any():
                break
            logits = guided_logits(model, canvas[:, :seen], given[:, :seen], fast, cfg_scale, visible, open_[:, :seen])
            tokens, probability = choose_tokens(logits, temperature, generator, suppress)
            confidence = torch.full(canvas.shape, -1.0, device=device).masked_scatter(open_, probability)
            proposal = canvas.masked_scatter(open_, tokens)
            canvas = torch.where(select(confidence, quota, threshold), proposal, canvas)
            if watch:
                watch(canvas)
    return canvas.gather(1, lengths[:, None] + torch.arange(length, device=device))


# ---- writing the prompt into the weights (Sec. 4.5) ----------------------------------------------------------------------


class Write(NamedTuple):
    """How a prompt is written. Defaults: the paper's (window and share belong to our own rule)."""

    rule: str = "paper"  # a key of WRITE_RULES
    memory: Memory = Memory()  # its scope plays no part: each prompt has a set of its own
    passes: int = 1  # the stages are gone through this often
    anchor_ratio: float = 0.2  # of the paper's rule
    window: int = 96  # of our rule: the training length
    share: float = 0.3  # of our rule: how much of the windows is worth writing


def paper_rule(model: Transformer, prompts: Tensor, write: Write, generators: list) -> tuple[Tensor, list[Stage]]:
    """Sec. 4.5: each prompt token is masked with probability `anchor_ratio` (the anchor); then the states of training."""
    everywhere, by_row = torch.ones_like(prompts[:1], dtype=torch.bool), []
    for generator in generators:
        masked = torch.rand(everywhere.shape, generator=generator).to(prompts.device) < write.anchor_ratio
        anchor = Anchor(torch.full((1,), write.anchor_ratio, device=prompts.device), masked)
        by_row.append(STRATEGIES[write.memory.strategy](anchor, everywhere, write.memory, generator))
    joined = [[None if None in parts else torch.cat(parts) for parts in zip(*stages)] for stages in zip(*by_row)]
    return prompts, [Stage(*parts) for parts in joined]


def surprise_rule(model: Transformer, prompts: Tensor, write: Write, generators: list) -> tuple[Tensor, list[Stage]]:
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
    everywhere = torch.ones_like(windows, dtype=torch.bool)
    halves = [(chosen & part).view_as(windows) for part in (half, ~half)]
    return windows, [Stage(masked, None, masked_fraction(masked, everywhere)) for masked in halves]


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
        h = model.read(embed(model, rows, masked), 0, masked)
        nll.masked_scatter_(masked, token_nll(model, h, rows[masked]).to(nll.dtype))
    return nll


WRITE_RULES = {"paper": paper_rule, "surprise": surprise_rule}


def write_settings(config: dict) -> Write:
    """What a run's --write flags say."""
    alpha = config["write_rank"] * config["memory_alpha"] / config["memory_rank"]  # the same scale as in training
    memory = replace(memory_settings(config), lr=config["write_lr"], rank=config["write_rank"], alpha=alpha)
    return Write(config["write"], memory, config["write_passes"], config["anchor_ratio"], config["length"])


@torch.no_grad()
def write_prompt(model: Transformer, prompts: Tensor, write: Write, seed: int, numbers: Sequence[int] | None = None) -> Fast:
    """phi for prompts (B, P), phi_2 under the paper's rule: one set of fast weights per prompt, from nothing but the prompt.

    numbers: which prompt of its set each row is (default 0, 1, ...). A row's random draws depend on the seed and on its
    number alone, so that batch size and order change no result. The caller
    puts the model in eval mode (no LoRA dropout). Loss weights are 1 instead of 1/t (Sec. 4.5). Attention is full, also for
    LLaDA2, whose answers are then decoded under block-causal attention: so it is in the published code.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    memory, generators = write.memory, [generator_for(seed, "write", number) for number in numbers]
    sets = [init_fast(model, memory, 1, generator) for generator in generators]
    joined = {name: tuple(torch.cat([s.weights[name][i] for s in sets]) for i in (0, 1)) for name in sets[0].weights}
    rows, stages = WRITE_RULES[write.rule](model, prompts, write, generators)
    batch = data.Batch(rows, torch.ones_like(rows, dtype=torch.bool), None)
    states = make_states(model, batch, stages, memory)
    return inner_loop(model, batch, states * write.passes, Fast(joined, sets[0].scale), memory, weighted=False)[0]


# ---- for the eye -----------------------------------------------------------------------------------------------------------


def canvas_text(ids: list[int], tokenizer: data.Tokenizer = data.TINY) -> str:
    """Ids as text, with every [MASK] drawn as an underscore and other special tokens by their names."""
    special = {token: name for name, token in tokenizer.specials.items()} | {tokenizer.mask: " _"}
    return "".join(special.get(token) or tokenizer.decode([token]) for token in ids)


def denoising_view(model: Transformer, example: data.Example, fast: Fast | None = None) -> str:
    """The prompt, then the answer after every step of its denoising, then the answer that was expected."""
    prompt, lines = torch.tensor([example.prompt], device=next(model.parameters()).device), []
    watch = lambda canvas: lines.append(f"step {len(lines):2d} |{canvas_text(canvas[0, prompt.shape[1] :].tolist())}")  # noqa: E731
    generate(model, prompt, len(example.response), fast=fast, watch=watch)
    return "\n".join([data.TOKENIZER.decode(example.prompt).strip(), *lines, f"expected|{data.decode(example.response)}"])


def decoding_flags(flag: Callable) -> None:
    """How an answer is decoded, for sampling and for evaluating."""
    flag("--steps", type=whole(1), help="forward passes for the answer (default: one a token; LLaDA2: 32 a block)")
    flag("--block-length", type=whole(1), help="decode in blocks, left to right (default: one block; LLaDA2: 32 tokens)")
    flag("--schedule", choices=("llada", "dllm"), help="how steps share the tokens, where they do not divide (default: llada)")
    flag("--threshold", type=real(0, 1), help="commit every token more probable than this at once (LLaDA2: 0.95)")


def decoding(args: argparse.Namespace, architecture: str) -> dict:
    """What these flags mean to `generate`; for LLaDA2 the published evaluation's settings where nothing else is asked for."""
    options = {"steps": args.steps, "block_length": args.block_length, "threshold": args.threshold}
    if architecture != "llada2":
        return options | {"plan": args.schedule or "llada"}
    if args.schedule:
        raise UserError("--schedule is not for LLaDA2, which has a block sampler of its own.")
    defaults = {"steps": 32, "block_length": 32, "threshold": 0.95}
    return {key: defaults[key] if value is None else value for key, value in options.items()} | {"plan": "llada2"}


def build_parser() -> Parser:
    parser = Parser("Answers a prompt with a trained run's model, or with a real backbone.")
    flag = parser.add_argument
    flag("--run", help="folder of a finished --tiny run, e.g. runs/tiny")
    flag("--seed", type=whole(0), help="which of the run's seeds (default: its first); of all random draws")
    flag("--model", choices=("base", "mdlm", "memdlm"), default="memdlm", help="which of the run's models")
    backbone_flags(flag)
    plain_flag(flag)
    flag("--adapter", help="outer LoRA for --backbone, in PEFT's format: DIR/adapter of a fine-tuning")
    flag("--prompt", required=True, help="the text to answer; always ordinary text, never a special token")
    flag("--length", type=whole(1, 4096), default=16, help="tokens of the answer")
    decoding_flags(flag)
    flag("--temperature", type=real(0), default=0.0, help="0 takes the most probable token")
    flag("--cfg-scale", type=real(0), default=0.0, help="classifier-free guidance: u + (scale + 1)(c - u)")
    flag("--suppress", nargs="+", type=whole(0), default=[], help="token ids that are never chosen, besides [MASK]")
    flag("--memory", action="store_true", help="write the prompt into the weights first (Sec. 4.5)")
    flag("--quiet", action="store_true", help="print the answer alone, without the steps")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser


def load_run(args: argparse.Namespace, device: str) -> tuple[Transformer, data.Tokenizer, Write, int, int]:
    """Model, tokenizer, writing rule, seed and longest prompt of a --tiny run."""
    config = read_config(Path(args.run))
    seed = config["seed"] if args.seed is None else args.seed
    model, _ = load_model(Path(args.run) / f"seed{seed}" / f"{args.model}.safetensors", device)
    return model, data.TINY, write_settings(config), seed, config["max_length"]


def training_config(adapter: str | None) -> dict:
    """The settings that an adapter was trained with, if it lies in the folder of a fine-tuning; else the paper's."""
    folder = Path(adapter).parent if adapter else Path()
    if adapter and (folder / "config.json").exists() and read_json(folder / "config.json").get("dial") == "backbone":
        return read_config(folder, "backbone")
    return settings(training_parser("backbone").parse_args([]))


def real_write(adapter: str | None, **changed) -> Write:
    """How a real backbone writes prompts: the paper's rule, with the memory of its training. changed: the --write flags."""
    config = {"write": "paper", "write_passes": 1, "anchor_ratio": 0.2, **training_config(adapter)}
    config |= {"write_lr": config["memory_lr"], "write_rank": config["memory_rank"], "length": config["max_length"]}
    return write_settings(config | changed)


def add_adapter(model: Transformer, adapter: str | None) -> Transformer:
    """The model with that outer LoRA, in eval mode."""
    if adapter:
        load_adapter(model, Path(adapter))
        adapted = [layer for layer in linear_layers(model).values() if layer.lora_A is not None]
        say(f"LoRA on {count(adapted)} of {count(linear_layers(model).values())} linear layers, from {adapter}")
    return model.eval()


def load_real(args: argparse.Namespace, device: str) -> tuple[Transformer, data.Tokenizer, Write, int, int]:
    """The same of --backbone and --adapter."""
    tokenizer, write = backbone_tokenizer(args), real_write(args.adapter)
    model = add_adapter(load_backbone(args, tokenizer, device), args.adapter)
    if args.memory:
        say(f"the prompt is written with {write.memory}")
    return model, tokenizer, write, args.seed or 0, 1 << 20


def run(args: argparse.Namespace) -> None:
    if bool(args.run) == bool(args.backbone):
        raise UserError("say whose answer is wanted: --run DIR of a --tiny run, or --backbone NAME_OR_DIR.")
    if args.run and (args.adapter or args.random_weights or args.load_4bit or args.plain or args.dtype != "auto"):
        raise UserError("--adapter, --random-weights, --load-4bit, --plain and --dtype go with --backbone, not with --run.")
    with redirect_stdout(sys.stderr) if args.quiet else nullcontext():
        model, tokenizer, write, seed, longest = (load_run if args.run else load_real)(args, pick_device(args.device))
    ids, options = tokenizer.encode_prompt(args.prompt), decoding(args, model.config.architecture)
    if not ids or len(ids) > longest:
        raise UserError(f"--prompt has {len(ids)} tokens; it must have 1 to {longest}.")
    if wrong := [token for token in args.suppress if token >= model.config.vocab_size]:
        raise UserError(f"--suppress: {wrong[0]} is no token; the vocabulary has {model.config.vocab_size}.")
    if len({model.config.mask_id, *args.suppress}) == model.config.vocab_size:
        raise UserError("--suppress leaves no token to choose.")
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    fast = write_prompt(model, prompt, write, seed) if args.memory else None
    show = None if args.quiet else lambda canvas: print(canvas_text(canvas[0, len(ids) :].tolist(), tokenizer).strip())
    options |= {"temperature": args.temperature, "cfg_scale": args.cfg_scale, "fast": fast, "watch": show}
    options |= {"suppress": [model.config.mask_id, *args.suppress]}
    answer = generate(model, prompt, args.length, generator=generator_for(seed, "sample"), **options)
    print(tokenizer.decode(answer[0].tolist()).strip())


def main(arguments: list[str] | None = None) -> None:
    guarded(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
