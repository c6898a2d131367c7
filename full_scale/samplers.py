"""
samplers.py: `sample.py --backbone`, and three ways of decoding that real checkpoints have besides
LLaDA's own, which is `plan_blocks` and `generate` of sample.py.

dLLM's MDLMSampler, with which the paper's scores were made, shares the tokens between the steps
in another way. LLaDA2 decodes on a grid of blocks and under block-causal attention: a block sees
itself and what stands before it, so that nothing behind it has to be computed. LLaDA2.1 may also
replace tokens of its block that it has committed before (`--edit-threshold`).

Reading list: LLaDA, arXiv 2502.09992, Sec. 2.4; github.com/ZHZisZZ/dllm; LLaDA2.0, 2512.15745.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial

import numpy as np
import torch
from torch import Tensor

from full_scale import backbone
from full_scale.cache import UNCACHED, VARIANTS, cached
from lab.ask import answer_flags, answer_prompt, decoding_flags
from lab.tools import Parser, pick_device, real, whole
from lab.variants import memory_of
from model import UserError
from sample import (
    Block,
    Write,
    choose_tokens,
    commit,
    commit_schedule,
    generate,
    guided_logits,
    plan_blocks,
)

# ---- dLLM's schedule -------------------------------------------------------------------------


def rounded_schedule(tokens: int, steps: int) -> list[int]:
    """Tokens to commit at each step as dLLM has them: what is left / steps left, rounded half to
    even. Steps without a token are dropped: 10 tokens in 4 steps -> [2, 3, 2, 3].

    dLLM computes that quotient as 1 - (1 - t') / (1 - t) in float32, where t and t' are the shares
    of steps done before and after. One in five schedules has a half that this tips over.
    """
    one, left, quotas = np.float32(1), tokens, []
    for steps_left in range(steps, 0, -1):
        before = one - np.float32(steps_left / steps)
        after = one - np.float32((steps_left - 1) / steps)
        share = one - (one - after) / (one - before)
        quota = int(np.round(np.float32(left) * share))
        left -= quota
        if quota:
            quotas.append(quota)
    return quotas


def dllm_blocks(length: int, steps=None, block_length=None) -> list[Block]:
    """The counterpart of `plan_blocks`: each block gets ceil(steps / blocks) steps."""
    size = min(block_length or length, length)
    starts = range(0, length, size)
    if steps is not None and steps > length:
        raise UserError(f"--steps for {length} tokens must be at most {length}.")
    share, blocks = -(-(steps or length) // len(starts)), []
    for start in starts:
        stop = min(start + size, length)
        blocks.append(Block(start, stop, rounded_schedule(stop - start, share)))
    return blocks


SCHEDULES = {"llada": plan_blocks, "dllm": dllm_blocks}

UNGUIDED = "is not for LLaDA2, whose block sampler has no guidance."
GREEDY = "is greedy and reads one prompt: no --temperature or cfg."

# ---- LLaDA2's block sampler ------------------------------------------------------------------


def block_causal_mask(length: int, block: int, device: torch.device) -> Tensor:
    """(1, 1, T, T) bool: a position sees its own block and the earlier ones."""
    number = torch.arange(length, device=device) // block
    return (number[:, None] >= number)[None, None]


def generate_llada2(
    model, prompts: Tensor, length: int, steps=None, block_length=None, threshold=None, **options
) -> Tensor:
    """prompts (B, P) -> answers (B, length), as LLaDA2 is evaluated.

    Blocks lie on a grid that starts with the prompt, and the last one is decoded to its end, past
    the answer's. steps: those of *each* block. Where nothing is said, 32 steps, blocks of 32 tokens
    and a threshold of 0.95, as published. options: the others of `generate`.
    """
    if options.get("cfg_scale"):
        raise UserError(f"--cfg-scale {UNGUIDED}")
    size = block_length or 32
    quotas = commit_schedule(size, min(steps or 32, size, length))
    options["threshold"] = 0.95 if threshold is None else threshold
    width, canvas = prompts.shape[1], prompts
    for start in range(width // size * size, width + length, size):
        seen = start + size
        mask = block_causal_mask(seen, size, prompts.device)
        block = Block(0, seen - canvas.shape[1], quotas)  # the first may begin inside the prompt
        filled = generate(model, canvas, [block], attention_mask=mask, **options)
        canvas = torch.cat([canvas, filled], dim=1)
    return canvas[:, width : width + length]


def fill_and_edit(canvas, block, given, logits, mask: int, quota, threshold, edit_threshold):
    """The canvas (1, T) after a pass of LLaDA2.1. block, given (1, T) bool: the block's places, and
    the prompt's; logits (M, V) of the block's. [MASK] may be chosen, too."""
    tokens, probability = choose_tokens(logits, 0.0, None, ())
    proposal = canvas.masked_scatter(block, tokens)
    sure = torch.zeros(canvas.shape, device=canvas.device).masked_scatter(block, probability)
    opened = block & (canvas == mask)
    edited = block & ~opened & ~given & (sure > edit_threshold)
    filled = commit(canvas, opened, proposal[opened], sure[opened], quota, threshold)
    return torch.where(edited, proposal, filled)


@torch.no_grad()
def generate_editing(
    model,
    prompts: Tensor,
    length: int,
    edit_threshold: float = 0.9,
    block_length: int = 32,
    threshold: float | None = None,
    quota: int = 1,
    post_steps: int = 16,
    eos: int | None = None,
    fast=None,
    watch: Callable[[Tensor], None] | None = None,
    predict: Callable[..., Tensor] | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """LLaDA2.1: prompt (1, P) -> answer (1, length), on the grid of `generate_llada2`. A pass fills
    masked places of the block, the `quota` most probable and all above the threshold [0.95], and
    replaces tokens that it committed before, where another is more probable than edit_threshold.

    post_steps: passes at most over a block that is full. eos: an answer that holds it ends with
    its block. temperature and cfg_scale must be 0, generator is not used: it is greedy.
    """
    if temperature or cfg_scale or len(prompts) > 1:
        raise UserError(f"--edit-threshold {GREEDY}")
    mask, width, canvas = model.config.mask_id, prompts.shape[1], prompts
    thresholds = (0.95 if threshold is None else threshold, edit_threshold)
    for start in range(width // block_length * block_length, width + length, block_length):
        stop, full_passes = start + block_length, 0
        canvas = torch.nn.functional.pad(canvas, (0, stop - canvas.shape[1]), value=mask)
        place = torch.arange(stop, device=canvas.device)[None]
        block, given = place >= start, place < width
        sees = block_causal_mask(stop, block_length, canvas.device)
        # A pass fills a place at least, or [MASK] itself is predicted: then masks may be left.
        for _ in range(block_length + post_steps):
            before, full = canvas, not (canvas[block] == mask).any()
            full_passes += full
            if full_passes > post_steps:
                break
            logits = (predict or guided_logits)(model, canvas, given, fast, 0.0, sees, block)
            canvas = fill_and_edit(canvas, block, given, logits, mask, quota, *thresholds)
            if watch is not None:
                watch(canvas)
            if full and torch.equal(before, canvas):
                break
        answer = canvas[:, width:]
        if eos is not None and (answer == eos).any() and not (answer == mask).any():
            break
    rest = max(0, length - answer.shape[1])
    answer = torch.nn.functional.pad(answer, (0, rest), value=mask if eos is None else eos)
    return answer[:, :length]


# ---- command line ----------------------------------------------------------------------------


def sampler_flags(flag: Callable) -> None:
    """What a real backbone's decoding has besides `sample.decoding_flags`."""
    flag("--schedule", choices=SCHEDULES, help="whose rounding of steps; without it, llada's")
    edit = "LLaDA2.1: replace a committed token by one more probable than this [0.9]"
    flag("--edit-threshold", type=real(0, 1), help=edit)
    text = "reuse keys and values within a block: fast; exact for LLaDA2, else approximate [off]"
    flag("--cache", nargs="?", const=VARIANTS[0], choices=VARIANTS, help=text)


def sampler_for(args: Namespace, architecture: str, length: int, eos: int) -> Callable[..., Tensor]:
    """answer(model, prompts (B, P), **options of `generate`) -> (B, length), as the flags of
    `decoding_flags` and `sampler_flags` say. Faults in them show at once."""
    size = args.block_length or 32
    if architecture != "llada2":
        if args.edit_threshold is not None:
            raise UserError("--edit-threshold is for LLaDA2.1 alone.")
        plan = SCHEDULES[args.schedule or "llada"]
        sampler = partial(generate, blocks=plan(length, args.steps, args.block_length))
        return cached(sampler, args.cache) if args.cache else sampler
    if args.schedule:
        raise UserError("--schedule is not for LLaDA2, which has a block sampler of its own.")
    if (args.steps or 1) > size:
        raise UserError(f"--steps counts the passes of a block of {size} here: lower it.")
    sampler = partial(generate_llada2, length=length, block_length=size, steps=args.steps)
    if args.edit_threshold is not None:
        if args.steps:
            raise UserError("--steps is not for --edit-threshold, which fills a token a pass.")
        known = {"length": length, "block_length": size, "eos": eos}
        sampler = partial(generate_editing, edit_threshold=args.edit_threshold, **known)
    return cached(sampler, args.cache, grid=size) if args.cache else sampler


def check_choice(args: Namespace, architecture: str) -> None:
    """Refuses, before weights are read, ways of choosing tokens that a sampler does not have."""
    if args.edit_threshold is not None and (args.temperature or args.cfg_scale):
        raise UserError(f"--edit-threshold {GREEDY}")
    if args.cfg_scale and architecture == "llada2":
        raise UserError(f"--cfg-scale {UNGUIDED}")
    if args.cfg_scale and args.cache:
        raise UserError(f"--cache {UNCACHED}")


def run(arguments: list[str]) -> None:
    """`sample.py --backbone`."""
    parser = Parser("Answers a prompt with a real backbone.")
    flag = parser.add_argument
    backbone.backbone_flags(flag)
    flag("--adapter", help="outer LoRA in PEFT's format: DIR/adapter of a fine-tuning")
    flag("--plain", action="store_true", help="the prompt as it is, without the chat template")
    flag("--seed", type=whole(0), default=0, help="of all random draws")
    answer_flags(flag)
    decoding_flags(flag)
    sampler_flags(flag)
    args = parser.parse_args(arguments)
    device, tokenizer = pick_device(args.device), backbone.backbone_tokenizer(args, args.plain)
    architecture = backbone.architecture_of(args)
    answer = sampler_for(args, architecture, args.length, tokenizer.eos)
    check_choice(args, architecture)
    if not tokenizer.encode_prompt(args.prompt):
        raise UserError("--prompt is empty.")
    trained = backbone.trained_with(args.adapter)
    write = Write(memory_of(trained))
    backbone.check_fit(args, tokenizer, args.adapter)
    with redirect_stdout(sys.stderr) if args.quiet else nullcontext():
        model = backbone.add_adapter(backbone.load_backbone(args, tokenizer, device), args.adapter)
        if args.memory:
            known = backbone.write_settings(write, trained).items()
            print(
                "the prompt is written with", ", ".join(f"{name} {value}" for name, value in known)
            )
    answer_prompt(args, model, tokenizer, write if args.memory else None, args.seed, answer)
