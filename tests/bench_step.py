"""
bench_step.py: what a MemDLM step costs beside an MDLM step, and beside the naive MemDLM step.

    python tests/bench_step.py [--repeats N]

A step here is forward and backward of the loss on fine-tuning data, all weights training, without
the optimizer. In units of one forward through all layers MDLM costs 3, and MemDLM 4 + 3s, where s
is the share of layers that is adapted; the header of memdlm.py counts them. Naive is three full
forwards with the head at every position, its inner backwards left to autograd.

The three take turns within one run, and a ratio is the median over the turns, so that a busy
machine slows all alike. Times are CPU time.
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
import memdlm
from memdlm import Memory
from model import Config, Transformer, init_weights


def naive_nll(model, batch, masked, fast):
    """-log p at the masked places (B, T), from every logit of the whole model."""
    logits = model(memdlm.corrupt(batch.x0, masked, data.MASK), batch.attention_mask, fast)
    return F.cross_entropy(logits.transpose(1, 2), batch.x0, reduction="none") * masked


def naive_loss(model, batch, anchor, stages, fast, memory):
    """memdlm_loss as one would first write it, for one set of fast weights per sample."""
    for stage in stages:
        fast = fast.with_tensors([part.detach().requires_grad_() for part in fast.tensors()])
        loss = naive_nll(model, batch, stage.masked, fast).sum(1) * stage.weight
        loss = loss / stage.masked.sum(1).clamp(min=1)  # (B,)
        grads = torch.autograd.grad(loss.sum(), fast.tensors())
        moved = []
        for part, grad, norm in zip(fast.tensors(), grads, memdlm.each_norm(grads)):
            moved.append(part - memory.lr * (memory.clip / (norm + 1e-12)).clamp(max=1) * grad)
        fast = fast.with_tensors(moved)
    by_row = naive_nll(model, batch, anchor.masked, fast).sum(1) / (anchor.t + 1e-6)
    return by_row.sum() / batch.maskable.sum()


def timed_step(model: Transformer, loss_of, *arguments) -> tuple[float, float]:
    """CPU milliseconds of forward and backward, and the loss."""
    model.zero_grad(set_to_none=True)
    clock = time.process_time()
    loss = loss_of(model, *arguments)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return 1000 * (time.process_time() - clock), loss.item()


def measure(model: Transformer, memory: Memory, rows: int, repeats: int) -> dict:
    """CPU milliseconds of each kind of step, `repeats` times in turn, each time on fresh noise."""
    examples = []
    for task in data.TASKS:
        examples += data.make_examples(task, rows // len(data.TASKS), 96, 0, 0.5)
    batch, times = data.collate(examples), {"mdlm": [], "memdlm": [], "naive": []}
    for repeat in range(repeats + 2):
        generator = memdlm.generator_for(0, "bench", repeat)
        anchor = memdlm.draw_anchor(batch.maskable, generator)
        stages = memdlm.two_stages(anchor, batch.maskable, memory, generator)
        fast = memdlm.init_fast(model, memory, rows, generator)
        memory_arguments = (batch, anchor, stages, fast, memory)
        steps = {
            "mdlm": timed_step(model, memdlm.mdlm_loss, batch, anchor),
            "memdlm": timed_step(model, memdlm.memdlm_loss, *memory_arguments),
            "naive": timed_step(model, naive_loss, *memory_arguments),
        }
        ours, naive = steps["memdlm"][1], steps["naive"][1]
        assert abs(naive - ours) < 1e-4 * abs(ours), f"two losses: {ours} and naive {naive}"
        for name, (milliseconds, _) in steps.items():
            if repeat >= 2:  # the first two turns warm up
                times[name].append(milliseconds)
    return times


def print_row(layers: int, adapted: int, times: dict) -> None:
    """A line of the table: medians of the times, and of the ratios within a turn."""
    ours, naive = (
        statistics.median(a / b for a, b in zip(times[name], times["mdlm"]))
        for name in ("memdlm", "naive")
    )
    bound = 1.25 * (4 + 3 * adapted / layers) / 3
    cells = [f"{adapted}/{layers}", *(f"{statistics.median(ms):.1f}" for ms in times.values())]
    cells += [f"{ours:.2f}", f"{bound:.2f}", "yes" if ours <= bound else "NO", f"{naive:.2f}"]
    print("|", " | ".join(cells), "|")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--repeats", type=int, default=50, help="how often each is timed [50]")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    model = init_weights(Transformer(Config(data.VOCAB_SIZE, data.MASK)), torch.Generator())
    layers = model.config.layers
    print(f"16 x 96, {layers} layers, float32, cpu, one thread, torch {torch.__version__}")
    print("| adapted share s | MDLM ms | MemDLM ms | naive ms | MemDLM / MDLM", end=" ")
    print("| bound 1.25 (4 + 3s) / 3 | met | naive / MDLM |\n" + "|---" * 8 + "|")
    for fraction in (0.5, 0.1):
        memory = Memory(rank=8, alpha=16.0, lr=1.0, fraction=fraction, scope="sample")
        times = measure(model.train(), memory, 16, repeats)
        print_row(layers, layers - memory.first_layer(layers), times)


if __name__ == "__main__":
    main()
