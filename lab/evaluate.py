"""
evaluate.py: `eval_niah.py --run`, with which `memdlm.py --tiny` ends, too: what the models of a run
answer, how far their denoising goes astray, and what a memory takes up; then tables and pictures.
"""

import time
import zlib
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import memdlm
from eval_niah import exposure_walk, mean_curve, scores_of
from lab import report, tools
from lab.ask import decoding_flags
from lab.pictures import canvas_text, draw_pictures, median_view, short_text
from lab.training import SEVERAL, arms, checkpoint_path, open_run, tiny_pairs, workers
from lab.variants import check_write_flags, memory_of, write_flags, write_of
from memdlm import Anchor
from model import UserError
from sample import denoising_states, write_prompt

# ---- one model: scores, exposure bias, what its memory takes up ----------------------------------


def questions(task: str, length: int, seed: int, samples: int, wording: str) -> list[data.Example]:
    """The test questions of a seed: the same for all of its models."""
    return data.make_examples(task, samples, length, data.split_seed(seed, "test"), wording=wording)


def score_cell(model, write, task: str, length: int, seed: int, args, wording: str) -> dict:
    """A row's mean score on one task at one length, as a record. write: how prompts are written."""
    examples = questions(task, length, seed, args.samples, wording)
    scores = scores_of(model, examples, write, seed, args.steps, args.block_length, args.threshold)
    return {"task": task, "length": length, "n": len(scores), "score": sum(scores) / len(scores)}


def exposure_curve(model, write, seed: int, args, config: dict) -> list[tuple]:
    """A row's exposure bias at 1x, all tasks together: (mask ratio, static, sequential)."""
    walks = []
    for task in args.tasks:
        few = min(args.samples, 16)
        examples = questions(task, config["length"], seed, few, config["wording"])
        batch = data.collate(examples, model.embedding.weight.device)
        noise, fast = memdlm.generator_for(seed, "static masks", task), None
        order = torch.rand(batch.x0.shape, generator=noise).to(batch.x0.device)
        if write:
            fast = write_prompt(model, batch.x0[:, : len(examples[0].prompt)], write, seed)
        walks.append(exposure_walk(model, *batch[:2], order, args.bias_steps, fast))
    return mean_curve(walks)


def memory_views(model, config: dict, seed: int) -> list[dict]:
    """The inner loop on each pair of a fine-tuning set, t = 0.4: "nll", -log p of the masked
    "places" with phi_0, phi_1, ...; which are "noisy"; the "answer"; what a stage has "hidden"."""
    pairs, true_pairs = (tiny_pairs(config, seed, noise=one) for one in (config["noise"], 0.0))
    batch, memory = data.collate(pairs, model.embedding.weight.device), memory_of(config)
    generator = memdlm.generator_for(seed, "memory views")
    chance = torch.rand(batch.x0.shape, generator=generator).to(batch.x0.device)
    anchor = Anchor(torch.full_like(chance[:, 0], 0.4), (chance < 0.4) & batch.maskable)
    stages = memdlm.make_stages(anchor, batch.maskable, memory, generator)
    fast = memdlm.init_fast(model, memory, memory.sets(len(pairs)), generator)
    nll = memdlm.nll_by_stage(model, batch, anchor, stages, fast, memory)
    nll = [torch.zeros(chance.shape).masked_scatter(anchor.masked.cpu(), one.cpu()) for one in nll]
    views = []
    for row, (pair, true) in enumerate(zip(pairs, true_pairs)):
        answer = slice(len(pair.prompt), len(pair.prompt) + len(pair.response))  # without the pads
        places = anchor.masked[row, answer].nonzero()[:, 0].tolist()
        view = {"seed": seed, "places": places, "answer": [*map(short_text, pair.response)]}
        view["nll"] = [[round(one[row, answer][i].item(), 4) for i in places] for one in nll]
        view["noisy"] = [pair.response[i] != true.response[i] for i in places]
        views.append(view | {"hidden": [one.masked[row, answer].tolist() for one in stages]})
    return views


def measure(args, config: dict, device: str, train, job: tuple[int, str]) -> dict:
    """All that is measured of a model, (seed, name), and kept in OUT/seed<S>/<name>.json: its row
    without a memory, and of --memory-models that with it. train(job), if given, trains it first."""
    (seed, name), run = job, Path(args.run)
    if train:
        train(job)
    model, meta = open_run(run, seed, name, device)

    def make() -> dict:
        cells, curves, plain = [], {}, report.PLAIN.get(name, name)
        rows = {plain: None}
        if name in args.memory_models:
            rows[report.WITH_MEMORY[name]] = write_of(args, config)
        for method, write in rows.items():
            for length in [max(args.lengths)] if write else args.lengths:
                for task in args.tasks:
                    cell = score_cell(model, write, task, length, seed, args, config["wording"])
                    cells.append({"method": method, **cell, "seed": seed})
            curves[method] = exposure_curve(model, write, seed, args, config)
        biases = report.bias_records(curves, dict.fromkeys(curves, plain))
        cost = {"name": name, "seconds": meta["seconds"], "skipped_updates": meta["skipped"]}
        found = {"niah": cells, "exposure_bias": [one | {"seed": seed} for one in biases]}
        found |= {"loss": meta["log"], "training": [{"seed": seed, **cost}]}
        return found | {"memory": memory_views(model, config, seed) if name == "base" else []}

    known = {"run": {key: config[key] for key in config if key not in SEVERAL}}
    known |= {"evaluation": tools.settings(args), "machine": tools.machine(device)}
    known |= {"weights": zlib.crc32(checkpoint_path(run, seed, name).read_bytes())}
    place = Path(args.out or args.run) / f"seed{seed}" / f"{name}.json"
    return {"job": job, **tools.kept(place, known, make), "peak": tools.peak_memory(device)}


def models_of(config: dict) -> list[tuple[int, str]]:
    """(seed, name) of all models of a run."""
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    return [(seed, name) for seed in seeds for name in ("base", *arms(config))]


# ---- single examples -----------------------------------------------------------------------------


def denoising_text(example: data.Example, states: list[list[int]]) -> str:
    """The question, five moments of the answer's denoising, and whether the answer is right."""
    right = "right" if states[-1] == example.response else "wrong"
    question = data.TINY.decode(example.prompt).rpartition("Question:")[2]
    lines = [f"The base of the first seed answers its first test question ({right}):"]
    lines += [f"  Question:{question}"]
    for i in (round(k * (len(states) - 1) / 4) for k in range(5)):
        lines.append(f"  step {i:2d} |{canvas_text(states[i])}")
    lines += [f"  it is   |{canvas_text(example.response)}"] if right == "wrong" else []
    return "\n".join(lines)


def first_look(args, config: dict, device: str) -> tuple[str, list, list[int]]:
    """A base's first answer and what the inner loop does to a pair, as text; states, and truth."""
    seed = config["seed"]
    model, _ = open_run(Path(args.run), seed, "base", device)
    example = questions("mv", config["length"], seed, args.samples, config["wording"])[0]
    prompt = torch.tensor([example.prompt], device=device)
    states = denoising_states(model, prompt, len(example.response))
    view, pairs = median_view(memory_views(model, config, seed)), config["examples"]
    text = denoising_text(example, states)
    text += f"\nThe inner loop on the median of {pairs} pairs: -log p of masked words, * noise"
    for name, nll in (("before", view["nll"][0]), ("after", view["nll"][-1])):
        shown = zip(nll, view["places"], view["noisy"])
        words = (f"{'*' if noisy else ''}{view['answer'][i]} {p:.2f}" for p, i, noisy in shown)
        text += f"\n  {name:6} |  {'   '.join(words)}"
    return text, states, example.response


# ---- command line --------------------------------------------------------------------------------


def build_parser() -> tools.Parser:
    parser = tools.Parser("Scores the models of a run. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a --tiny run, such as runs/tiny: all of its seeds")
    flag("--out", help="folder for results.json, tables and pictures; without it, that of --run")
    flag("--tasks", nargs="+", choices=data.TASKS, default=list(data.TASKS), help="what is asked")
    lengths = "tokens of an example; without it 1 and 4 times the run's --length"
    flag("--lengths", nargs="+", type=tools.whole(64, 8192), help=lengths)
    models, written = ("base", "mdlm", "memdlm"), "those that write the longest prompts, too"
    flag("--memory-models", nargs="*", choices=models, default=["memdlm"], help=written)
    flag("--samples", type=tools.whole(1), default=64, help="answers a task and length [500]")
    flag("--bias-steps", type=tools.whole(2), default=8, help="of the exposure bias [48, Fig. 3]")
    flag("--device", choices=tools.DEVICES, default="auto", help="where to compute")
    decoding_flags(flag)
    write_flags(flag)
    parser.set_defaults(threshold=0.95)  # half of the passes; scores within .01
    return parser


def parse(arguments: list[str]) -> tuple[Namespace, dict]:
    """The flags, with the lengths in place that were not named; and the run's settings."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    config = tools.read_config(Path(args.run))
    check_write_flags(parser, args, memory=True)
    args.lengths = args.lengths or [config["length"], 4 * config["length"]]
    for name in ("tasks", "lengths", "memory_models"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    out = Path(args.out or args.run)
    if out.resolve() != Path(args.run).resolve() and (out / "config.json").exists():
        raise UserError(f"--out {out} holds a run: name another folder.")
    path, own = out / "results.json", {"run": config, "evaluation": tools.settings(args)}
    if path.exists() and tools.read_json(path).get("config") != own:
        raise UserError(f"{path} has results of other settings: name another folder with --out.")
    return args, config


def work_through(each: Callable, do: Callable, args, config: dict, device: str) -> None:
    """do((seed, name)) -> `measure`'s record, for all models of a run; then what they come to:
    results.json, table.md, pictures, and a summary on the screen."""
    out, clock, records = Path(args.out or args.run), time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is refused before any work
    text, states, truth = first_look(args, config, device)
    print(f"{text}\n", flush=True)
    models, costs = models_of(config), {"base": 1, "memdlm": 5}  # of the others: 2
    jobs = sorted(models, key=lambda job: (*costs, job[1]).index(job[1]))
    total = sum(costs.get(name, 2) for _, name in jobs)
    with tqdm(total=total, desc="run", delay=2) as bar:
        for record in each(do, jobs):
            records.append(record)
            bar.update(costs.get(record["job"][1], 2))
    records.sort(key=lambda record: models.index(record["job"]))
    results = {"config": {"run": config, "evaluation": tools.settings(args)}}
    results["machine"] = records[0]["identity"]["machine"]
    for key in ("niah", "exposure_bias", "loss", "memory", "training"):
        results[key] = [one for record in records for one in record[key]]
    results["frontier"] = report.frontier_of(results, config)
    results["comparisons"] = report.comparisons(results["frontier"])
    tools.write_json(out / "results.json", results)
    tools.write_text(out / "table.md", report.report(results) + "\n")
    draw_pictures(results, states, truth, out)
    print(report.summary(results))
    seconds, peaks = time.monotonic() - clock, [record["peak"] for record in records]
    memory = report.number_text(None if None in peaks else max(peaks))
    print(f"{seconds:.0f} s, {memory} GiB in the largest process. In {out}/: table.md (tables),")
    print("result.png, memory.png, denoising.gif, loss.png, exposure_bias.png, results.json")


def run(arguments: list[str]) -> None:
    """Scores a run."""
    args, config = parse(arguments)
    device = tools.pick_device(args.device)
    for job in models_of(config):
        open_run(Path(args.run), *job, device)  # what is missing is found before any work
    with workers(device) as each:
        work_through(each, partial(measure, args, config, device, None), args, config, device)
