"""
night.py: the hours of the paper's tables, computed from what a pass costs.

    python tests/full_scale/night.py [--tflops 200] [--window-ms 12]

--tflops: what the GPU sustains in a pass. --window-ms: a pass over a block of up to 128 tokens with
--cache, which takes as long as reading the weights. full_scale/bench.py measures both.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from full_scale.babilong import BABILONG_PROTOCOLS
from full_scale.bench import flops
from full_scale.configs import llada_config

# table -> lengths, passes of each kind of answer, questions of each kind, rows
BABILONG = BABILONG_PROTOCOLS["harness"][1]
TABLE_1 = [128, 30, 120, *[BABILONG] * 5]  # needles, variables, common words, BABILong's five
# Table 3's tasks -> passes, questions (by LongBench's card)
LONGBENCH = {"triviaqa": (32, 200), "passage_retrieval_en": (32, 200)}
LONGBENCH |= {"passage_retrieval_zh": (32, 200), "multifieldqa_en": (64, 150)}
LONGBENCH |= {"multifieldqa_zh": (64, 200), "2wikimqa": (32, 200), "dureader": (128, 200)}
LONGBENCH |= {"multi_news": (512, 200), "trec": (64, 200), "samsum": (128, 200)}
LONGBENCH |= {"lcc": (64, 500), "repobench-p": (64, 500)}
TABLES = {
    "Table 1 (4K, 8K)": ((4096, 8192), TABLE_1, [500] * 8, 4),
    "Table 2 (16K, 32K)": ((16384, 32768), TABLE_1, [500] * 8, 4),
    "Table 3 (LongBench, 8K)": ((8192,), *zip(*LONGBENCH.values()), 3),
    "Fig. 5 (BABILong qa1, 1K to 32K)": (tuple(2**k for k in range(10, 16)), [BABILONG], [500], 3),
}
# LongAlpaca: 12,000 pairs, 5 epochs, 2 a batch; 2,048 tokens of a pair are a guess of the mean.
STEPS, LENGTH = 5 * 12_000 // 2, 2048


def pass_flops(length: int) -> float:
    """Of one forward pass: `flops` counts 4 N and 12 T D, the forward and the backward pass."""
    config = llada_config("llada-moe")
    attention = 12 * length * config.heads * config.head_dim * config.layers * length
    return (flops(config, 1, length) - attention) / 2 + attention / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tflops", type=float, default=200.0)
    parser.add_argument("--window-ms", type=float, default=12.0)
    args = parser.parse_args()
    print("| | passes | 1 GPU | 4 GPUs | 8 GPUs | 1 GPU, --cache | 4 | 8 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (lengths, passes, questions, rows) in TABLES.items():
        exact = cached = 0.0
        answers = rows * sum(questions)  # at each length
        count = rows * sum(one * n for one, n in zip(passes, questions, strict=True))
        for length in lengths:
            each = pass_flops(length) / args.tflops / 1e12
            exact += count * each
            cached += answers * each + (count - answers) * args.window_ms / 1000
        hours = [f"{s / 3600 / n:.1f} h" for s in (exact, cached) for n in (1, 4, 8)]
        print(f"| {name} | {count * len(lengths):,} | {' | '.join(hours)} |")
    step = flops(llada_config("llada-moe"), 2, LENGTH) / args.tflops / 1e12
    for name, times in (("Standard MDLM", 1.0), ("MemDLM, at most 1.7 times that", 1.7)):
        hours = [f"{STEPS * step * times / 3600 / n:.1f} h" for n in (1, 4, 8)]
        print(f"| fine-tuning, {name} | {STEPS:,} steps | {' | '.join(hours)} | | | |")


if __name__ == "__main__":
    main()
