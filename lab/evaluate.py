"""
evaluate.py: `eval_niah.py --run`: scores the models of a run and measures their exposure bias, draw
by draw, then writes tables and pictures.
"""

import itertools
import math
import time
import zlib
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
from eval_niah import exposure_walk, mean_curve, scores_of
from lab import report, tools
from lab.ask import decoding_flags
from lab.pictures import canvas_text, draw_pictures, short_text
from lab.training import arms, checkpoint_path, open_run, tiny_pairs
from lab.variants import check_write_flags, memory_of, write_flags, write_of
from memdlm import Anchor, embed, generator_for, init_fast, inner_loop, make_stages, token_nll
from model import Transformer, UserError
from sample import choose_tokens, generate, guided_logits, plan_blocks, write_prompt

# ---- one draw: scores, exposure bias -------------------------------------------------------------


def score_cell(model, memory: bool, task: str, length: int, seed: int, draw: int, args) -> dict:
    """One row's mean score on one task at one length. memory: whether prompts are written."""
    key, how = data.split_seed(seed, f"test {draw}"), args.how if memory else None
    examples = data.make_examples(task, args.samples, length, key, wording=args.wording)
    decoding = args.steps, args.block_length, args.threshold
    scores = scores_of(model, examples, how, seed, *decoding)
    return {"task": task, "length": length, "n": len(scores), "score": float(np.mean(scores))}


def exposure_bias(
    models: dict, rows: dict[str, report.Row], seed: int, draw: int, args
) -> list[dict]:
    """The exposure bias of some rows on the tasks, all tasks together, one record a mask ratio."""
    curves, key = {}, data.split_seed(seed, f"test {draw}")
    for method, row in rows.items():
        model, walks = models[row.checkpoint], []
        for task in args.tasks:
            asked = args.samples, args.length, key
            examples = data.make_examples(task, *asked, wording=args.wording)
            batch = data.collate(examples, model.embedding.weight.device)
            noise, fast = generator_for(seed, "static masks", task), None
            order = torch.rand(batch.x0.shape, generator=noise).to(batch.x0.device)
            if row.memory:
                prompts = batch.x0[:, : len(examples[0].prompt)]
                fast = write_prompt(model, prompts, args.how, seed)
            walk = exposure_walk(model, *batch[:2], order, args.bias_steps, fast)
            walks.append(walk)
        curves[method] = mean_curve(walks)
    without = {row.checkpoint: method for method, row in rows.items() if not row.memory}
    return report.bias_records(
        curves, {name: without[row.checkpoint] for name, row in rows.items()}
    )


def measure_unit(args, config: dict, seed: int, draw: int, opened: dict[str, tuple]) -> dict:
    """All records of one draw of a seed. Prompts are written for its first draws alone."""
    results: dict[str, list] = {"niah": [], "exposure_bias": [], "loss": [], "training": []}
    models, where = {name: pair[0] for name, pair in opened.items()}, {"seed": seed, "draw": draw}
    for name, (_, meta) in opened.items():
        results["loss"] += meta["log"]
        if name != "base" or draw == 0:
            cost = {"seconds": meta["seconds"], "skipped_updates": meta["skipped"]}
            results["training"].append({**where, "name": name, **cost})
    writing = args.memory_lengths if draw < args.memory_draws else []
    rows = {name: row for name, row in report.rows_of(config).items() if writing or not row.memory}
    cells = itertools.product(args.lengths, args.tasks, rows)
    for length, task, name in tqdm(list(cells), f"seed {seed}, draw {draw}: scores", delay=2):
        row = rows[name]
        if not row.memory or length in writing:
            model = models[row.checkpoint]
            record = score_cell(model, row.memory, task, length, seed, draw, args)
            results["niah"].append({"method": name, **record, **where})
    biases = exposure_bias(models, rows, seed, draw, args)
    results["exposure_bias"] = [record | where for record in biases]
    return results


def measure_run(args, config: dict, identity: dict, opened: dict[tuple, dict]) -> dict:
    """The results of all seeds and draws. Each draw's are kept in a file once they are there."""
    results: dict[str, list] = {"niah": [], "exposure_bias": [], "loss": [], "training": []}
    for (seed, draw), models in opened.items():
        path = Path(args.out or args.run) / f"seed{seed}" / f"draw{draw}.json"
        files = [checkpoint_path(Path(args.run), seed, draw, name) for name in models]
        known = identity | {"weights": [zlib.crc32(file.read_bytes()) for file in files]}
        measured = tools.kept(path, known, partial(measure_unit, args, config, seed, draw, models))
        for name, records in results.items():
            records += measured[name]
    return results


def open_models(args, config: dict, device: str) -> dict[tuple, dict[str, tuple]]:
    """(seed, draw) -> name -> model and meta. All are opened before any is measured, so that one
    that is missing or not finished is found at once."""
    opened = {}
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        for draw in range(config["draws"]):
            names = ("base", *arms(config))
            found = {name: open_run(Path(args.run), seed, draw, name, device) for name in names}
            opened[seed, draw] = found
    return opened


# ---- single examples -----------------------------------------------------------------------------


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


@torch.no_grad()
def memory_view(model, config: dict, seed: int, pair: data.Example, true_pair) -> dict:
    """What the inner loop does to a training pair whose whole answer is masked: "nll", the NLL of
    its tokens with phi_0, phi_1, ...; "tokens"; and which of them are "noisy"."""
    batch = data.collate([pair], model.embedding.weight.device)
    generator, memory = generator_for(seed, "memory view"), memory_of(config)
    everything = Anchor(torch.ones(1, device=batch.x0.device), batch.maskable)
    stages = make_stages(everything, batch.maskable, memory, generator) * memory.epochs
    memory = replace(memory, epochs=1)
    phi_0, places = init_fast(model, memory, 1, generator), everything.masked
    curves = []
    for done in range(len(stages) + 1):
        fast = inner_loop(model, batch, stages[:done], phi_0, memory)[0] if done else phi_0
        h = model.run(embed(model, batch.x0, places), 0, None, batch.attention_mask, fast)
        curves.append(token_nll(model, h[places], batch.x0[places]).tolist())
    tokens = [short_text(token) for token in pair.response]
    noisy = [ours != true for ours, true in zip(pair.response, true_pair.response)]
    return {"tokens": tokens, "noisy": noisy, "nll": curves}


def nll_of_true_words(view: dict) -> float:
    """How badly the base predicts the words that are not noise, summed; infinite where none is."""
    known = [nll for nll, noisy in zip(view["nll"][0], view["noisy"]) if not noisy]
    return sum(known) if any(view["noisy"]) else math.inf


def views_of(args, config: dict, opened: dict[str, tuple]) -> dict:
    """What the pictures of single examples show, and the base's denoising as text: the memory of a
    training pair, and MemDLM's answers to a longer question without and with its prompt written."""
    seed, where = config["seed"], data.split_seed(config["seed"], "test 0")
    base, model = opened["base"][0], opened["memdlm"][0]
    asked = {"seed": where, "wording": args.wording}
    short, long = (data.make_examples("mv", 1, args.length * n, **asked)[0] for n in (1, 2))
    prompt = torch.tensor([long.prompt], device=model.embedding.weight.device)
    fast = write_prompt(model, prompt, args.how, seed)
    states = {"MemDLM, without a memory": denoising_states(model, long)}
    states["MemDLM, prompt written into the weights"] = denoising_states(model, long, fast)
    text = denoising_view(short, denoising_states(base, short))
    pairs = zip(*(tiny_pairs(config, seed, 0, noise) for noise in (config["noise"], 0.0)))
    memories = [memory_view(base, config, seed, *pair) for pair in pairs]
    memory = min(memories, key=nll_of_true_words)  # the plainest example, not the average one
    return {"memory": memory, "states": states, "true": long.response, "text": text}


# ---- command line --------------------------------------------------------------------------------


def build_parser() -> tools.Parser:
    parser = tools.Parser("Scores the models of a run. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a --tiny run, such as runs/tiny: all of its seeds")
    flag("--out", help="folder for results.json, tables and pictures; without it, that of --run")
    flag("--tasks", nargs="+", choices=data.TASKS, default=list(data.TASKS), help="what is asked")
    lengths = "tokens of an example; without it 1, 2, 4 and 6 times the run's --length"
    flag("--lengths", nargs="+", type=tools.whole(64, 8192), help=lengths)
    written = "those of --lengths at which prompts are also written; without it 4 times"
    flag("--memory-lengths", nargs="*", type=tools.whole(64, 8192), help=written)
    first = "how many draws of each seed have rows with a memory at inference"
    flag("--memory-draws", type=tools.whole(0), default=1, help=first)
    flag(
        "--samples", type=tools.whole(1), default=16, help="examples for each task and length [500]"
    )
    flag(
        "--bias-steps",
        type=tools.whole(2),
        default=8,
        help="steps of the exposure bias [48, Fig. 3]",
    )
    flag("--device", choices=tools.DEVICES, default="auto", help="where to compute")
    decoding_flags(flag)
    write_flags(flag)
    parser.set_defaults(threshold=0.95)  # half of the passes; scores within .01
    return parser


def choose_cells(args, base: int) -> None:
    """Puts the lengths in place that were not named, and takes out what is named twice. Prompts are
    written where answers are asked for, or not at all."""
    args.lengths = args.lengths or [base * times for times in (1, 2, 4, 6)]
    if args.memory_lengths is None:
        args.memory_lengths = [4 * base] if 4 * base in args.lengths else []
    elif not set(args.memory_lengths) <= set(args.lengths):
        raise UserError("--memory-lengths must be among --lengths.")
    for name in ("tasks", "lengths", "memory_lengths"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))


def run(arguments: list[str]) -> None:
    """Scores a run."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    config, device = tools.read_config(Path(args.run)), tools.pick_device(args.device)
    choose_cells(args, config["length"])
    check_write_flags(parser, args, memory=True)
    out, how = Path(args.out or args.run), write_of(args, config)
    elsewhere = ("run", "out", "device")
    own = {name: value for name, value in vars(args).items() if name not in elsewhere}
    wanted, path = {"run": config, "evaluation": own}, out / "results.json"
    if path.exists() and tools.read_json(path).get("config") != wanted:
        raise UserError(f"{path} has results of other settings: name another folder with --out.")
    args.how, args.length, args.wording = how, config["length"], config["wording"]
    clock = time.monotonic()
    opened = open_models(args, config, device)
    views = views_of(args, config, opened[config["seed"], 0])
    tools.write_text(
        out / "denoising.txt", views["text"] + "\n"
    )  # fails early where OUT cannot be written
    alone = {"run": {name: config[name] for name in config if name not in ("seeds", "draws")}}
    identity = alone | {"evaluation": own, "machine": tools.machine(device)}
    results = {"config": wanted, "machine": tools.machine(device)}
    results |= measure_run(args, config, identity, opened)
    results["frontier"] = report.frontier_of(results, config)
    results["headline"] = report.headline_of(results["frontier"])
    results |= {"evaluation_seconds": time.monotonic() - clock}
    results |= {"peak_memory_gib": tools.peak_memory(device)}
    tools.write_json(path, results)
    tools.write_text(out / "table.md", report.report(results) + "\n")
    draw_pictures(results, views, out)
    training = sum(one["seconds"] for one in results["training"])
    print(
        f"The base model denoises a test example:\n\n{views['text']}\n\n{report.report(results)}\n"
    )
    print(f"training {training:.0f} s, evaluation {results['evaluation_seconds']:.0f} s, ", end="")
    print(f"{report.number_text(results['peak_memory_gib'])} GiB; written to {out}/")
