"""
bench_cache.py: what --cache costs in answers: how many stay the same, and how the score changes.

    python tests/full_scale/bench_cache.py --run runs/tiny

The same questions are answered by the exact sampler and by both variants of the cache, a token a
pass, in one block and in blocks of 4. Scores are compared question by question; their 95% interval
is over the questions.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from eval_niah import string_match_all
from full_scale.cache import VARIANTS, cached
from lab.evaluate import questions
from lab.report import t_interval
from lab.tools import read_config
from lab.training import open_run
from sample import generate, plan_blocks


def compare(run: Path, name: str, size: int, samples: int) -> dict[str, list]:
    """Sampler -> of each question, whether a model answers it as the exact sampler does, and the
    score: held-out questions of all tasks, one, two and four times as long as pretraining's. The
    answer is decoded in blocks of `size`."""
    config, found = read_config(run), {kind: [] for kind in ("exact", *VARIANTS)}
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    for seed, times, task in product(seeds, (1, 2, 4), data.TASKS):
        model, _ = open_run(run, seed, name, "cpu")
        examples = questions(task, times * config["length"], seed, samples, config["wording"])
        prompts, tokens = torch.tensor([one.prompt for one in examples]), examples[0].response
        blocks = plan_blocks(len(tokens), block_length=size)
        exact = generate(model, prompts, blocks=blocks).tolist()
        for kind, records in found.items():
            sampler = generate if kind == "exact" else cached(generate, kind)
            answers = sampler(model, prompts, blocks=blocks).tolist()
            for example, answer, same in zip(examples, answers, exact):
                score = string_match_all(example.references, data.TINY.decode(answer))
                records.append((answer == same, score))
    return found


def print_table(run: Path, samples: int) -> None:
    """Of the models of a run, all questions together."""
    print("| model | block | cache | same answer | score without | with | difference |")
    print("|---|---|---|---|---|---|---|")
    for name, size in product(("base", "mdlm", "memdlm"), (4, 64)):
        found = compare(run, name, size, samples)
        without = [score for _, score in found.pop("exact")]
        for kind, records in found.items():
            share, score = (sum(values) / len(records) for values in zip(*records))
            mean, half = t_interval([b - a for a, (_, b) in zip(without, records)])
            scores = f"{sum(without) / len(without):.3f} | {score:.3f}"
            difference = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
            same, block = f"{share:.1%} of {len(records)}", size if size < 64 else "all"
            print(f"| {name} | {block} | {kind} | {same} | {scores} | {difference} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--run", type=Path, required=True, help="folder of a --tiny run")
    parser.add_argument("--samples", type=int, default=16, help="questions a cell")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        print_table(args.run, args.samples)


if __name__ == "__main__":
    main()
