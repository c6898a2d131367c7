"""
eval_niah.py: how much of what a prompt hides a model finds, and how far its denoising goes astray.

    python eval_niah.py --run runs/tiny                                    as `--tiny` ends
    python eval_niah.py --run runs/tiny --samples 64 --out runs/more       other settings
    python eval_niah.py --backbone llada-moe --memory --out runs/ruler     see full_scale/

A model answers without a memory (MemDLM: Train-Only), or after each prompt was written into its
weights (MemDLM: Train & Inference). What is measured:
  score          RULER's: the share of the references that the answer contains (Tables 1 and 2)
  exposure bias  R_EB = L_seq / L_static (Sec. 2.2, Fig. 3): how much worse the true tokens are
                 predicted on states that the model has reached by its own denoising
No memory can leak an answer: it is written by a function that is given the prompt alone.

Reading list: RULER, arXiv 2404.06654; exposure bias, Ranzato et al. 2016, arXiv 1511.06732.

Glossary
  paper      | name here  | meaning
  L_static   | static     | mean NLL of true tokens at masked places, the others being true (Eq. 3)
  L_seq      | sequential | the same on the state that the model itself has reached (Eq. 4)
  R_EB       | ratio      | sequential / static of the checkpoint without a memory
  mask ratio | mask_ratio | share of the answer that is still masked, from 1 towards 0
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sample
from data import TINY, Example


def string_match_all(references: Sequence[str], prediction: str) -> float:
    """RULER's score (Tables 1 and 2): the share of the references that are in the prediction."""
    found = [reference.lower() in prediction.lower() for reference in references]
    return float(np.mean(found))


def scores_of(model, examples: list[Example], write, seed: int, steps, block_length, threshold):
    """The score of each example's answer, 32 prompts at a time. write: the sample.Write by which
    each prompt is first written into the weights, with draws from the seed and its number, or None.
    steps, block_length, threshold: as `sample.plan_blocks` and `sample.generate` have them."""
    scores, tokens = [], len(examples[0].response)
    steps = steps and min(steps, tokens)  # more than one a token there are none
    blocks = sample.plan_blocks(tokens, steps, block_length)
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        prompts = torch.tensor([one.prompt for one in part], device=model.embedding.weight.device)
        numbers, fast = range(start, start + len(part)), None
        if write:
            fast = sample.write_prompt(model, prompts, write, seed, numbers)
        answers = sample.generate(model, prompts, blocks, threshold=threshold, fast=fast).tolist()
        for example, answer in zip(part, answers):
            scores.append(string_match_all(example.references, TINY.decode(answer)))
    return scores


# ---- exposure bias (Sec. 2.2, Fig. 3) --------------------------------------------------------


def nll_at(model, canvas: Tensor, x0: Tensor, masked: Tensor, fast) -> tuple[Tensor, Tensor]:
    """The mean -log p(x0) of each row over its masked places (B,), and the logits (M, V) there."""
    logits = sample.guided_logits(model, canvas, masked, fast, 0.0, None, masked)
    nll = F.cross_entropy(logits, x0[masked], reduction="none")
    by_place = torch.zeros(masked.shape, device=nll.device).masked_scatter(masked, nll)
    return by_place.sum(1) / masked.sum(1), logits


@torch.no_grad()
def exposure_walk(model, x0, response, order, steps: int, fast) -> list[tuple]:
    """L_static (Eq. 3) and L_seq (Eq. 4) of each row on a denoising in `steps` steps (Fig. 3):
    (mask ratio, static (B,), sequential (B,)) at the mask ratios 1, 1 - 1/steps, ..., 1/steps.

    x0 (B, T); response (B, T) bool, the same number n of places in each row; order (B, T): random
    numbers that rank the places. The static mask has the first max(1, int(n * ratio)) of them, the
    same for all models. The walk starts all masked and commits down to the same counts.
    """
    n, mask_id = int(response[0].sum()), model.config.mask_id
    counts = [max(1, n * (steps - step) // steps) for step in range(steps + 1)]
    rank = order.masked_fill(~response, 2.0).argsort(dim=1).argsort(dim=1)
    canvas, curve = torch.where(response, mask_id, x0), []
    for step in range(steps):
        static = rank < counts[step]
        masked = (canvas == mask_id) & response
        static_nll, _ = nll_at(model, torch.where(static, mask_id, x0), x0, static, fast)
        sequential_nll, logits = nll_at(model, canvas, x0, masked, fast)
        curve.append((1 - step / steps, static_nll, sequential_nll))
        tokens, probability = sample.choose_tokens(logits, 0.0, None, [mask_id])
        quota = counts[step] - counts[step + 1]
        canvas = sample.commit(canvas, masked, tokens, probability, quota)
    return curve


def mean_curve(walks: Iterable[list]) -> list[tuple[float, float, float]]:
    """The means over all rows of several walks: (mask ratio, static, sequential)."""
    curve = []
    for parts in zip(*walks):
        ratio = parts[0][0]
        static = torch.cat([part[1] for part in parts]).mean().item()
        sequential = torch.cat([part[2] for part in parts]).mean().item()
        curve.append((ratio, static, sequential))
    return curve


def exposure_ratio(curve: list[tuple], plain: list[tuple]) -> list[float]:
    """R_EB (Sec. 2.2) at each mask ratio: L_seq over the static loss of the same checkpoint without
    a memory, whose curve is `plain` (as published)."""
    pairs = zip(curve, plain)
    return [sequential / base if base else math.nan for (_, _, sequential), (_, base, _) in pairs]


if __name__ == "__main__":  # --run: lab/evaluate.py; --backbone: full_scale/benchmark.py
    from lab.tools import start

    start("eval_niah")
