"""
bench_backbone.py: the CPU seconds of a training step of a small LLaDA-MoE, on one thread, beside
those of the published code. (What this machine takes at real sizes, full_scale/bench.py measures.)

    python tests/full_scale/bench_backbone.py

A step is a forward and a backward pass without the optimizer, of 2 x 512 tokens, a quarter of them
response. The outer LoRA has rank 32 and dropout 0.05; one set of fast weights of rank 32 for the
batch is on the last 10% of layers (Sec. 4.1).
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Batch
from full_scale.checkpoints import add_outer_lora, random_llada
from full_scale.configs import BackboneConfig
from memdlm import METHODS, Memory

MIXTURE = {"moe_layers": tuple(range(16)), "experts": 16, "experts_per_token": 4, "expert_ffn": 128}
SIZES = {"hidden": 256, "layers": 16, "heads": 4, "kv_heads": 4, "head_dim": 64, "qk_norm": True}
SMALL = BackboneConfig(8192, 8191, architecture="llada-moe", **SIZES, **MIXTURE)
# CPU seconds of a step where a 2048^3 float32 product runs at 90 GFLOP/s: those of the published
# code, and what is asked of ours.
PUBLISHED, ASKED = {"mdlm": 2.8, "memdlm": 6.8}, {"mdlm": 1.7, "memdlm": 2.9}


def seconds(function: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the shortest of `repeats` runs, after one to warm up."""
    spent = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        spent.append(time.process_time() - start)
    return min(spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed [5]")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    model, a = random_llada(SMALL), torch.randn(2048, 2048)
    add_outer_lora(model, 32, 64.0, 0.05, torch.Generator().manual_seed(0))
    for name, p in model.train().named_parameters():
        if name.endswith("lora_B"):
            p.data.fill_(0.02)  # as after some training
    maskable = (torch.arange(512) >= 384).expand(2, 512)
    batch = Batch(torch.randint(0, 8000, (2, 512)), maskable, None)
    rate = 2 * 2048**3 / seconds(lambda: a @ a, repeats + 2) / 1e9
    print(f"small LLaDA-MoE, 2 x 512 (128 response), float32, 1 thread, {rate:.0f} GFLOP/s")
    print("| method | CPU s | at 90 GFLOP/s | published | asked | met |\n|---|---|---|---|---|---|")
    for method, asked in ASKED.items():

        def step(method=method) -> None:
            model.zero_grad()
            METHODS[method](model, batch, Memory(), torch.Generator().manual_seed(3)).backward()

        spent = seconds(step, repeats)
        scaled = spent * rate / 90
        met = "yes" if scaled <= asked else "NO"
        numbers = f"{spent:.2f} | {scaled:.2f} | {PUBLISHED[method]} | {asked} | {met}"
        print(f"| {method} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
