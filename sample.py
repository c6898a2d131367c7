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
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import memdlm
from data import Batch
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
        h = model.run(model.embedding(ids), 0, None, attention_mask, memory, at)
        return model.head(h).float()

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


def denoising_states(model, prompt: Tensor, tokens: int, fast=None) -> list[list[int]]:
    """The answer to a prompt (1, P) before the first and after each step of its denoising, when a
    token is committed at a time."""
    canvases = []
    generate(model, prompt, plan_blocks(tokens), fast=fast, watch=canvases.append)
    states = [canvas[0, prompt.shape[1] :].tolist() for canvas in canvases]
    return [[model.config.mask_id] * tokens, *states]


# ---- writing the prompt into the weights (Sec. 4.5) ------------------------------------------


class Write(NamedTuple):
    """How a prompt is written. The defaults are the paper's."""

    memory: Memory = Memory()  # its scope plays no part: each prompt has a set of its own
    anchor_ratio: float = 0.2  # the chance that a prompt token is masked
    rule: Callable | None = None  # from which rows and states; None: paper_rule


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
    return prompts, [join_rows(stages) for stages in zip(*by_row)]


def join_rows(stages: tuple[Stage, ...]) -> Stage:
    """One stage of several rows, from a stage of each."""
    masked, scored, weight, following = list(zip(*stages))[:4]
    joined = [torch.cat(parts) for parts in (masked, scored, weight)]
    return Stage(*joined, None if following[0] is None else torch.cat(following))


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
    rows, stages = (write.rule or paper_rule)(model, prompts, write, generators)
    stages = [stage._replace(weight=torch.ones_like(stage.weight)) for stage in stages]
    batch = Batch(rows, torch.ones_like(rows, dtype=torch.bool), None)
    return memdlm.inner_loop(model, batch, stages, fasts[0].with_tensors(tensors), write.memory)[0]


if __name__ == "__main__":  # --run: lab/ask.py; --backbone: full_scale/samplers.py
    from lab.tools import start

    start("sample")
