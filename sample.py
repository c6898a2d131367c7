"""
sample.py: generation. Start from an answer of nothing but [MASK], predict every masked token,
commit the most confident, repeat until none is left. A prompt may be written into weights first.

    python sample.py --run runs/tiny --prompt "... Question: what does river hold? Answer:"
    python sample.py --backbone llada-moe --prompt "..."      see full_scale/

There is no remasking: a committed token is never looked at again. What some papers call
"low-confidence remasking" is this rule seen from the other side.

Reading list: commit by confidence, MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992, Sec. 2.4;
guidance for masked diffusion, Nie et al. 2024, arXiv 2410.18514; Gumbel noise, arXiv 2409.02908.

Glossary
  paper | name here | shape
  x_t   | canvas    | (B, P + R) the prompt and the answer, masked where not yet committed
  phi_2 | fast      | model.Fast, constant during a generation
  -     | blocks    | list of Block: stretches of the answer, decoded from left to right
  -     | opened    | (B, P + R) bool, where tokens may be committed now
  -     | windows   | (B * n, W) the prompts, each cut into n pieces (our writing rule)
  -     | surprise  | (B, n * W) -log p of each token, every fourth one of its window being masked
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
import memdlm
from data import Parser, pick_device, real, whole
from memdlm import Anchor, Memory, Stage
from model import Fast, Transformer, UserError

# ---- denoising (Sec. 2.1) --------------------------------------------------------------------


class Block(NamedTuple):
    """A stretch of the answer that is decoded before the next one."""

    start: int  # its places, counted from the end of the prompt: start, ..., stop - 1
    stop: int
    quotas: list[int]  # tokens to commit at each step


def commit_schedule(tokens: int, steps: int) -> list[int]:
    """Tokens to commit at each step, as even as whole numbers allow: 10 in 4 -> [3, 3, 2, 2]."""
    base, rest = divmod(tokens, steps)
    return [base + (i < rest) for i in range(steps)]


def plan_blocks(length: int, steps=None, block_length=None) -> list[Block]:
    """The blocks of an answer of `length` tokens, as in LLaDA's generate.py.

    steps: forward passes for the whole answer, shared evenly by the blocks (default: one a token).
    block_length: tokens of a block (default: the whole answer); the last one may be shorter.
    """
    size = min(block_length or length, length)
    starts = range(0, length, size)
    if steps is not None and not len(starts) <= steps <= length:
        raise UserError(f"--steps for {length} tokens must be {len(starts)} to {length}.")
    blocks = []
    shares = commit_schedule(steps, len(starts)) if steps else [size] * len(starts)
    for start, share in zip(starts, shares):
        stop = min(start + size, length)
        blocks.append(Block(start, stop, commit_schedule(stop - start, min(share, stop - start))))
    return blocks


def guided_logits(model, canvas, given, fast, cfg_scale: float, attention_mask, at) -> Tensor:
    """Logits (M, V) at the places `at` (B, T) bool, in float32.

    Classifier-free guidance: u + (cfg_scale + 1) * (c - u), where c are the ordinary logits and u
    those without the prompt: its tokens, `given` (B, T), are masked, its memory is left out.
    """

    def logits(ids: Tensor, memory: Fast | None) -> Tensor:
        h = model.run(model.embedding(ids), 0, None, attention_mask, memory)
        return model.head(h[at]).float()

    conditional = logits(canvas, fast)
    if cfg_scale == 0:
        return conditional
    unconditional = logits(memdlm.corrupt(canvas, given, model.config.mask_id), None)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def choose_tokens(logits: Tensor, temperature: float, generator, suppress) -> tuple:
    """A token for each row of logits (M, V), none of `suppress`, and its probability: (M,) each."""
    if not logits.isfinite().all():
        raise UserError("the model's predictions are not finite: look at its weights and settings.")
    never = torch.tensor(list(suppress), dtype=torch.long, device=logits.device)
    logits = logits.index_fill(1, never, -torch.inf)
    tokens = logits.argmax(-1)
    if temperature > 0:
        # Gumbel-max. In float32 the noise would be cut off, and sampling colder than asked for.
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        tokens = (logits.cpu().double() / temperature + gumbel).argmax(-1).to(logits.device)
    return tokens, logits.softmax(-1).gather(1, tokens[:, None])[:, 0]


def select(confidence: Tensor, quota: int, threshold: float | None = None) -> Tensor:
    """Sec. 2.1: which places to commit, (B, T) bool: the `quota` most confident of each row, and
    all above the threshold. confidence (B, T) is -1 where nothing may be committed."""
    order = confidence.argsort(dim=1, descending=True, stable=True)
    chosen = order.argsort(dim=1, stable=True) < quota  # rank 0 is the most confident
    if threshold is not None:
        chosen |= confidence > threshold
    return chosen & (confidence >= 0)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    blocks: list[Block],
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    threshold: float | None = None,
    fast: Fast | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    watch: Callable[[Tensor], None] | None = None,
    suppress: Sequence[int] = (),
    predict: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Sec. 2.1: prompts (B, P) -> answers (B, R), where R is the end of the last block.

    temperature: 0 takes the most probable token. threshold: commit all that are more probable than
    this at once; the answer may then take fewer passes. attention_mask: (B, P + R), or
    (1, 1, P + R, P + R). suppress: ids that are never chosen, as [MASK] is not.
    watch: is called with the canvas after each forward pass. predict: makes the logits in place of
    `guided_logits`, whose arguments it takes.
    """
    predict = predict or guided_logits
    mask_id, width = model.config.mask_id, prompts.shape[1]
    suppress = [mask_id, *suppress]
    canvas = torch.nn.functional.pad(prompts, (0, blocks[-1].stop), value=mask_id)
    place = torch.arange(canvas.shape[1], device=prompts.device) - width
    given = (place < 0).expand_as(canvas)
    for block in blocks:
        inside = (place >= block.start) & (place < block.stop)
        for quota in block.quotas:
            opened = (canvas == mask_id) & inside
            if not opened.any():
                break
            logits = predict(model, canvas, given, fast, cfg_scale, attention_mask, opened)
            tokens, probability = choose_tokens(logits, temperature, generator, suppress)
            canvas = commit(canvas, opened, tokens, probability, quota, threshold)
            if watch is not None:
                watch(canvas)
    return canvas[:, width:]


def commit(canvas, opened, tokens, probability, quota: int, threshold=None) -> Tensor:
    """The canvas (B, T) with the most confident of the M tokens, proposed at `opened`, in it."""
    confidence = torch.full(canvas.shape, -1.0, device=canvas.device)
    confidence = confidence.masked_scatter(opened, probability)
    proposal = canvas.masked_scatter(opened, tokens)
    return torch.where(select(confidence, quota, threshold), proposal, canvas)


# ---- writing the prompt into the weights (Sec. 4.5) ------------------------------------------


class Write(NamedTuple):
    """How a prompt is written. The defaults are the paper's."""

    rule: str = "paper"  # a key of WRITE_RULES
    memory: Memory = Memory()  # its scope plays no part: each prompt has a set of its own
    passes: int = 1  # passes through the stages; multiplies memory.epochs
    anchor_ratio: float = 0.2  # of the paper's rule: the chance that a prompt token is masked
    window: int = 96  # of our rule: tokens of a window, the length of the model's training
    share: float = 0.3  # of our rule: how much of the prompt is worth writing


def paper_rule(model, prompts: Tensor, write: Write, generators: list) -> tuple[Tensor, list]:
    """Sec. 4.5: an anchor masks each prompt token with chance `anchor_ratio` (Fig. 8); then the two
    stages of training. Returns the rows that are read, here the prompts (B, P), and the stages."""
    everywhere = torch.ones_like(prompts[:1], dtype=torch.bool)
    ratio = torch.full((1,), write.anchor_ratio, device=prompts.device)
    by_row = []
    for generator in generators:  # each row draws for itself
        chance = torch.rand(everywhere.shape, generator=generator).to(prompts.device)
        anchor = Anchor(ratio, chance < write.anchor_ratio)
        by_row.append(memdlm.make_stages(anchor, everywhere, write.memory, generator))
    stages = [zip(*rows) for rows in zip(*by_row)]  # each stage's fields, one tensor a row
    joined = [[None if f[0] is None else torch.cat(f) for f in fields] for fields in stages]
    return prompts, [Stage(*fields) for fields in joined]


def surprise_rule(model, prompts: Tensor, write: Write, generators: list) -> tuple[Tensor, list]:
    """Ours, not the paper's: write what the model could not have guessed, in windows as long as the
    examples it was trained on. Each token is scored with a quarter of its window masked, and the
    most surprising share of the prompt is written in two complementary halves."""
    windows = cut_windows(prompts, write.window)  # (B * n, W)
    surprise = token_surprise(model, windows).view(len(prompts), -1)  # (B, n * W)
    order = surprise.argsort(dim=1, descending=True, stable=True)
    chosen = order.argsort(dim=1, stable=True) < write.share * surprise.shape[1]
    coins = [torch.rand(surprise.shape[1], generator=generator) for generator in generators]
    half = (torch.stack(coins) < 0.5).to(prompts.device)
    everywhere = torch.ones_like(windows, dtype=torch.bool)
    masks = [(chosen & half).view_as(windows), (chosen & ~half).view_as(windows)]
    return windows, [memdlm.chain([mask], everywhere)[0] for mask in masks]


def cut_windows(prompts: Tensor, window: int) -> Tensor:
    """(B, P) -> (B * n, W): n windows of equal length W <= window that cover the prompt."""
    length = prompts.shape[1]
    count = -(-length // window)
    width = -(-length // count)
    starts = [min(i * width, length - width) for i in range(count)]
    windows = [prompts[:, start : start + width] for start in starts]
    return torch.stack(windows, dim=1).flatten(0, 1)


def token_surprise(model: Transformer, rows: Tensor, folds: int = 4) -> Tensor:
    """-log p of each token (B, W), predicted while every fourth token, it among them, is masked."""
    nll = torch.zeros(rows.shape, device=rows.device)
    for fold in range(folds):
        masked = torch.arange(rows.shape[1], device=rows.device) % folds == fold
        masked = masked.expand(rows.shape)
        h = model.run(memdlm.embed(model, rows, masked))[masked]
        nll.masked_scatter_(masked, memdlm.token_nll(model, h, rows[masked]).to(nll.dtype))
    return nll


WRITE_RULES = {"paper": paper_rule, "surprise": surprise_rule}


@torch.no_grad()
def write_prompt(model, prompts: Tensor, write: Write, seed: int, numbers=()) -> Fast:
    """phi_K for prompts (B, P), one set for each, made from nothing but the prompt.

    numbers: which prompt of its set each row is (default: 0, 1, ...). Its random draws depend on
    the seed and on this number, so that batch size and order change no answer. The weight of the
    loss is 1 instead of 1/t (Sec. 4.5). The caller puts the model in eval mode.
    """
    numbers = numbers or range(len(prompts))
    generators = [memdlm.generator_for(seed, "write", number) for number in numbers]
    fasts = [memdlm.init_fast(model, write.memory, 1, generator) for generator in generators]
    tensors = [torch.cat(parts) for parts in zip(*(fast.tensors() for fast in fasts))]
    rows, stages = WRITE_RULES[write.rule](model, prompts, write, generators)
    stages = [stage._replace(weight=torch.ones_like(stage.weight)) for stage in stages]
    batch = data.Batch(rows, torch.ones_like(rows, dtype=torch.bool), None)
    stages = memdlm.with_prefixes(model, batch, stages, write.memory) * write.passes
    return memdlm.inner_loop(model, batch, stages, fasts[0].with_tensors(tensors), write.memory)[0]


def canvas_text(ids: list[int], tokenizer=data.TINY) -> str:
    """Ids as text, with an underscore for [MASK], and other special tokens by their names."""
    names = {token: name for name, token in tokenizer.specials.items()}
    names[tokenizer.mask] = " _"
    return "".join(names.get(token) or tokenizer.decode([token]) for token in ids)


class Step(NamedTuple):
    """One step of a denoising, as it is shown: for each place of the answer ..."""

    before: list[int]  # the token there, or [MASK]
    proposal: list[int]  # the same with the most probable token in place of [MASK]
    confidence: list[float]  # its probability, 1 where it was committed before
    committed: list[bool]  # whether this step commits it


@torch.no_grad()
def denoising_states(model: Transformer, example: data.Example, fast=None) -> list[Step]:
    """The denoising of an example's answer, a token a step."""
    prompt = torch.tensor([example.prompt], device=model.embedding.weight.device)
    width, canvases = prompt.shape[1], []
    generate(model, prompt, plan_blocks(len(example.response)), fast=fast, watch=canvases.append)
    masks = torch.full_like(canvases[0][:, width:], model.config.mask_id)
    canvases.insert(0, torch.cat([prompt, masks], dim=1))
    steps = []
    for before, after in pairwise(canvases):
        # One more forward: `generate` tells what it commits, not what else it would have proposed.
        opened, confidence = before == model.config.mask_id, torch.ones(before.shape)
        logits = guided_logits(model, before, opened, fast, 0.0, None, opened)
        tokens, probability = choose_tokens(logits, 0.0, None, [model.config.mask_id])
        confidence[opened.cpu()] = probability.cpu()
        parts = (before, before.masked_scatter(opened, tokens), confidence, after != before)
        steps.append(Step(*(part[0, width:].tolist() for part in parts)))
    return steps


def denoising_view(example: data.Example, steps: list[Step]) -> str:
    """The prompt, the answer after each step of its denoising, and the answer expected."""
    lines = [data.TINY.decode(example.prompt).strip()]
    answers = [step.before for step in steps[1:]] + [steps[-1].proposal]
    lines += [f"step {i:2d} |{canvas_text(ids)}" for i, ids in enumerate(answers, 1)]
    return "\n".join([*lines, f"expected|{data.TINY.decode(example.response)}"])


# ---- command line ----------------------------------------------------------------------------


def decoding_flags(flag: Callable) -> None:
    """How an answer is decoded."""
    flag("--steps", type=whole(1), help="forward passes for the answer; without it, one a token")
    flag("--block-length", type=whole(1), help="decode in blocks of so many tokens; else in one")
    flag("--threshold", type=real(0, 1), help="commit all tokens more probable than this at once")


def answer_flags(flag: Callable) -> None:
    """What is asked, and how a token is chosen."""
    flag("--prompt", required=True, help="the text to answer; it never becomes a special token")
    flag("--length", type=whole(1, 4096), default=16, help="tokens of the answer")
    flag("--temperature", type=real(0), default=0.0, help="0 takes the most probable token")
    flag("--cfg-scale", type=real(0, 1e6), default=0.0, help="guidance: u + (scale + 1) (c - u)")
    flag("--memory", action="store_true", help="write the prompt into the weights (Sec. 4.5)")
    flag("--quiet", action="store_true", help="print the answer alone, without the steps")
    flag("--device", choices=data.DEVICES, default="auto", help="where to compute")


def write_flags(flag: Callable) -> None:
    """How a prompt is written into the weights. The paper's values stand in brackets."""
    flag("--write", choices=WRITE_RULES, default="surprise", help="rule [paper, Sec. 4.5]")
    flag("--write-lr", type=real(0), default=0.5, help="its step size [0.1, Sec. 4.5]")
    flag("--write-rank", type=whole(1), default=32, help="rank of its fast weights [32, Sec. 4.1]")
    flag("--write-passes", type=whole(1), default=8, help="passes through its stages [1, Sec. 4.5]")
    flag("--anchor-ratio", type=real(0.01, 1), default=0.2, help="of rule paper [0.2, Sec. 4.5]")


def write_of(parser: Parser, args: argparse.Namespace, config: dict) -> Write:
    """The `Write` that these flags mean. alpha / rank stays that of training, whose settings are
    `config`."""
    if args.write != "paper":
        parser.refuse(args, ["anchor_ratio"], "needs --write paper")
    memory = memdlm.memory_of(config)
    alpha = args.write_rank * memory.alpha / memory.rank
    memory = replace(memory, lr=args.write_lr, rank=args.write_rank, alpha=alpha)
    return Write(args.write, memory, args.write_passes, args.anchor_ratio, config["length"])


def answer_prompt(args, model, tokenizer, write: Write | None, seed: int, answer) -> None:
    """Prints the answer to --prompt and, unless --quiet, the way to it.
    answer(model, prompt (1, P), **options) -> (1, R): `generate`, or another sampler."""
    ids = tokenizer.encode_prompt(args.prompt)
    if not ids:
        raise UserError("--prompt is empty.")
    prompt = torch.tensor([ids], device=model.embedding.weight.device)

    def show(canvas: Tensor) -> None:
        if not args.quiet:
            print(canvas_text(canvas[0, len(ids) :].tolist(), tokenizer).strip())

    options = {"fast": write_prompt(model, prompt, write, seed) if write else None, "watch": show}
    options |= {"generator": memdlm.generator_for(seed, "sample"), "threshold": args.threshold}
    options |= {"temperature": args.temperature, "cfg_scale": args.cfg_scale}
    print(tokenizer.decode(answer(model, prompt, **options)[0].tolist()).strip())


def build_parser() -> Parser:
    parser = Parser("Answers a prompt with a model of a run. --backbone NAME --help lists others.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a --tiny run, such as runs/tiny")
    names = ("base", "mdlm", "memdlm")
    flag("--model", choices=names, default="memdlm", help="which of its models")
    flag("--seed", type=whole(0), help="which of its seeds; without it, the first")
    flag("--draw", type=whole(0), default=0, help="which of its fine-tuning sets")
    answer_flags(flag)
    decoding_flags(flag)
    write_flags(flag)
    return parser


def run(arguments: list[str]) -> None:
    """Answers with a model of a --tiny run."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    config = memdlm.read_config(Path(args.run))
    seed = config["seed"] if args.seed is None else args.seed
    if not args.memory:
        names = ("write", "write_lr", "write_rank", "write_passes", "anchor_ratio")
        parser.refuse(args, names, "says how a memory is written: add --memory")
    write = write_of(parser, args, config) if args.memory else None
    device = pick_device(args.device)
    model, _ = memdlm.open_run(Path(args.run), seed, args.draw, args.model, device)
    blocks = plan_blocks(args.length, args.steps, args.block_length)

    def answer(model: Transformer, prompt: Tensor, **options) -> Tensor:
        return generate(model, prompt, blocks, **options)

    answer_prompt(args, model, data.TINY, write, seed, answer)


def main(arguments: list[str] | None = None) -> None:
    data.start(run, "samplers", arguments)


if __name__ == "__main__":
    main()
