"""
bench_cache.py: what --cache costs in answers: how many stay the same, and how the score changes.

    python tests/full_scale/bench_cache.py --run runs/tiny       a model that has learnt to answer
    python tests/full_scale/bench_cache.py --backbone FOLDER     a checkpoint, on random prompts

The same questions are answered by the exact sampler and by both variants of the cache, a token a
pass, in one block and in blocks of 4. Scores are compared question by question; their 95% interval
is over the questions.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from eval_niah import string_match_all, t_interval
from full_scale.cache import VARIANTS, cached
from full_scale.checkpoints import load_llada
from memdlm import open_run, read_config
from sample import generate, plan_blocks


def questions_of(config: dict, draw: int, samples: int) -> list[data.Example]:
    """Held-out questions of all tasks, one, two and four times as long as the model's training."""
    key, found = data.split_seed(config["seed"], f"test {draw}"), []
    for times in (1, 2, 4):
        for task in data.TASKS:
            asked = task, samples, times * config["length"], key
            found.append(data.make_examples(*asked, wording=config["wording"]))
    return found


def answers_to(model, prompts: torch.Tensor, tokens: int, size: int) -> dict[str, list]:
    """Sampler -> the answers (B, tokens)."""
    blocks, found = plan_blocks(tokens, block_length=min(size, tokens)), {}
    for name in ("exact", *VARIANTS):
        sampler = generate if name == "exact" else cached(generate, name)
        found[name] = sampler(model, prompts, blocks=blocks).tolist()
    return found


def compare_run(run: Path, samples: int) -> None:
    """A table for the models of a run, all questions together."""
    config = read_config(run)
    print("| model | block | cache | same answer | score without | with | difference |")
    print("|---|---|---|---|---|---|---|")
    for name in ("base", "mdlm", "memdlm"):
        for size in (4, 64):
            same, scores = {}, {}
            for draw in range(config["draws"] if name != "base" else 1):
                model, _ = open_run(run, config["seed"], draw, name, "cpu")
                for examples in questions_of(config, draw, samples):
                    prompts = torch.tensor([one.prompt for one in examples])
                    said = answers_to(model, prompts, len(examples[0].response), size)
                    for kind, answers in said.items():
                        for example, answer, exact in zip(examples, answers, said["exact"]):
                            text = data.TINY.decode(answer)
                            score = string_match_all(example.references, text)
                            scores.setdefault(kind, []).append(score)
                            same.setdefault(kind, []).append(answer == exact)
            for kind in VARIANTS:
                differences = [a - b for a, b in zip(scores[kind], scores["exact"])]
                mean, half = t_interval(differences)
                parts = (sum(scores[one]) / len(differences) for one in ("exact", kind))
                shown = " | ".join(f"{part:.3f}" for part in parts)
                shown += f" | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
                share = sum(same[kind]) / len(same[kind])
                block = f"{size}" if size < 64 else "all"
                print(
                    f"| {name} | {block} | {kind} | {share:.1%} of {len(differences)} | {shown} |"
                )


def compare_checkpoint(folder: str, samples: int) -> None:
    """How many tokens stay the same where a model answers random prompts."""
    model, generator = load_llada(folder).double(), torch.Generator().manual_seed(0)
    model.config.mask_id = model.config.mask_id or 196  # as in the records
    top = min(model.config.mask_id, model.config.vocab_size) - 16
    prompts = torch.randint(0, top, (samples, 64), generator=generator)
    for size in (4, 64):
        said = answers_to(model, prompts, 16, size)
        exact = torch.tensor(said["exact"])
        for kind in VARIANTS:
            ours = torch.tensor(said[kind])
            tokens, whole = (ours == exact).double().mean(), (ours == exact).all(1).double().mean()
            block = f"blocks of {size}" if size < 64 else "one block"
            print(f"{folder}, {block}, {kind}: {tokens:.1%} of tokens, {whole:.1%} of answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--run", type=Path, help="folder of a --tiny run")
    parser.add_argument("--backbone", nargs="+", default=[], help="folders of small checkpoints")
    parser.add_argument("--samples", type=int, default=32, help="questions a cell, or prompts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for folder in args.backbone:
            compare_checkpoint(folder, args.samples)
        if args.run:
            compare_run(args.run, args.samples)


if __name__ == "__main__":
    main()
