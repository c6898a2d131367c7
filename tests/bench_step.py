"""
bench_step.py: what a MemDLM step costs beside an MDLM step, and beside the naive MemDLM step.

    python tests/bench_step.py [--repeats N] [--batch B] [--threads N]

A step here is forward and backward of the loss on real fine-tuning data, all weights training, without the optimizer. The
counts behind the bound, in units of one forward through all layers (a backward costs two), s = adapted share of layers:

    MDLM                 1 + 2                                                            = 3
    MemDLM, stage 1      1 + s      x_tpre: forward; backward through the suffix to the fast weights alone, one unit
    MemDLM, stage 2      1 + s      the anchor: likewise
    MemDLM, outer step   s + 2      the anchor's prefix is there already                  sum = 4 + 3s

Naive is three full forwards with the head at every position, its inner backwards left to autograd. The sides take turns
within one run, and the ratio is the median over the turns, so that a busy machine slows both alike. Times are CPU time.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from memdlm import (
    Memory,
    chain,
    corrupt,
    draw_anchor,
    draw_pre_anchor,
    first_adapted_layer,
    generator_for,
    init_fast,
    mdlm_loss,
    memdlm_loss,
    sgd,
)
from model import Config, Fast, Transformer, init_weights


def naive_loss(model, batch, anchor, pre_masked, fast, memory):
    """memdlm_loss as one would first write it: every state through the whole model, every logit computed."""

    def token_nll(masked, phi):
        logits = model(corrupt(batch.x0, masked, data.MASK), batch.attention_mask, phi)  # (B, T, V)
        return F.cross_entropy(logits.transpose(1, 2), batch.x0, reduction="none") * masked  # (B, T)

    maskable = batch.maskable.sum(1)
    for masked in (pre_masked, anchor.masked):
        leaves = [p.detach().requires_grad_() for pair in fast.weights.values() for p in pair]
        fast = Fast(dict(zip(fast.weights, zip(leaves[::2], leaves[1::2]))), fast.scale)
        count = masked.sum(1)
        loss = token_nll(masked, fast).sum(1) / (count / maskable + 1e-6) / count.clamp(min=1)  # (B,): one set per sample
        grads = torch.autograd.grad(loss.sum(), leaves)
        leaves = [sgd(p, g, loss.detach(), memory) for p, g in zip(leaves, grads)]
        fast = Fast(dict(zip(fast.weights, zip(leaves[::2], leaves[1::2]))), fast.scale)
    return (token_nll(anchor.masked, fast).sum(1) / (anchor.t + 1e-6)).sum() / maskable.sum()


def measure(model: Transformer, memory: Memory, rows: int, repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of each side, `repeats` times in turn, on fresh noise each time."""
    examples = [e for task in data.TASKS for e in data.make_examples(task, rows // len(data.TASKS), 96, 0, 0.5)]
    batch, times = data.collate(examples), {"mdlm": [], "memdlm": [], "naive": []}
    for repeat in range(-2, repeats):
        generator = generator_for(0, "bench", repeat + 2)
        anchor = draw_anchor(batch.maskable, generator)
        pre_masked = draw_pre_anchor(anchor.masked, batch.maskable, memory.start_scale, generator)
        fast, stages = init_fast(model, memory, rows, generator), chain([pre_masked, anchor.masked], batch.maskable)
        sides = {
            "mdlm": lambda: mdlm_loss(model, batch, anchor),  # noqa: B023
            "memdlm": lambda: memdlm_loss(model, batch, anchor, stages, fast, memory)[0],  # noqa: B023
            "naive": lambda: naive_loss(model, batch, anchor, pre_masked, fast, memory),  # noqa: B023
        }
        values = {}
        for name, side in sides.items():
            model.zero_grad(set_to_none=True)
            clock = time.process_time()
            loss = side()
            loss.backward()
            if repeat >= 0:  # the first two turns warm up
                times[name].append(1000 * (time.process_time() - clock))
            values[name] = loss.item()
        assert abs(values["naive"] - values["memdlm"]) < 1e-4 * abs(values["memdlm"]), values
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="how often each side is timed [50]")
    parser.add_argument("--batch", type=int, default=16, help="examples per step, a multiple of 4 [16]")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch; waiting ones count as CPU time, so more than 1 wants an idle machine [1]",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = init_weights(Transformer(Config(data.VOCAB_SIZE, data.MASK)), torch.Generator().manual_seed(0)).train()
    layers = model.config.layers
    print(f"batch {args.batch} x 96, {layers} layers, float32, cpu, {args.threads} threads, torch {torch.__version__}")
    print("| adapted share s | MDLM ms | MemDLM ms | naive ms | MemDLM / MDLM | bound 1.1 (4 + 3s) / 3 | met | naive / MDLM |")
    print("|---|---|---|---|---|---|---|---|")
    for fraction in (0.5, 0.1):
        memory = Memory(rank=8, alpha=16.0, lr=1.0, fraction=fraction, scope="sample")
        adapted = layers - first_adapted_layer(layers, fraction)
        times = measure(model, memory, args.batch, args.repeats)
        plain, ours, naive = (statistics.median(values) for values in times.values())
        ratio, other = (statistics.median(a / b for a, b in zip(times[name], times["mdlm"])) for name in ("memdlm", "naive"))
        bound = 1.1 * (4 + 3 * adapted / layers) / 3
        cells = [f"{adapted}/{layers}", *(f"{ms:.1f}" for ms in (plain, ours, naive)), f"{ratio:.2f}", f"{bound:.2f}"]
        print("|", " | ".join([*cells, "yes" if ratio <= bound else "NO", f"{other:.2f}"]), "|")


if __name__ == "__main__":
    main()
