"""
eval_niah.py: what the models of a run find in a haystack, and how far their denoising goes astray.

    python eval_niah.py --run runs/tiny                                    as `--tiny` ends
    python eval_niah.py --run runs/tiny --samples 256 --out runs/more      other settings
    python eval_niah.py --backbone llada-moe --memory --out runs/ruler     see full_scale/

Two measurements of four rows: Base, Standard MDLM, MemDLM (Train-Only), which answers without a
memory, and MemDLM (Train & Inference), for which each prompt is written into the weights first.
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

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import sample
from data import Parser, pick_device, whole
from memdlm import LOSSES, finite, generator_for, machine, open_run, peak_memory, read_config
from model import UserError, read_json, write_json, write_text, written_aside


class Row(NamedTuple):
    """A line of the tables."""

    title: str
    checkpoint: str
    memory: bool  # whether prompts are written into the weights


ROWS = {
    "base": Row("Base", "base", False),
    "mdlm": Row("Standard MDLM", "mdlm", False),
    "memdlm_train": Row("MemDLM (Train-Only)", "memdlm", False),
    "memdlm_train_inference": Row("MemDLM (Train & Inference)", "memdlm", True),
}


def title(method: str) -> str:
    """A row's name in tables and pictures."""
    return ROWS[method].title


def string_match_all(references: Sequence[str], prediction: str) -> float:
    """RULER's score: the share of the references found in the prediction, whatever their case."""
    found = [reference.lower() in prediction.lower() for reference in references]
    return float(np.mean(found))


# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval over independent seeds; infinite for one seed."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]  # beyond: a little too wide
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def score_cell(models: dict, method: str, task: str, length: int, seed: int, args) -> dict:
    """One row's mean score on one task at one length, 32 prompts at a time."""
    row, scores = ROWS[method], []
    model = models[row.checkpoint]
    examples = data.make_examples(task, args.samples, length, data.split_seed(seed, "test"))
    length_of_answer = len(examples[0].response)
    steps = args.steps and min(args.steps, length_of_answer)  # more than one a token there are none
    blocks = sample.plan_blocks(length_of_answer, steps, args.block_length)
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        prompts = torch.tensor([one.prompt for one in part], device=model.embedding.weight.device)
        numbers, fast = range(start, start + len(part)), None
        if row.memory:
            fast = sample.write_prompt(model, prompts, args.how, seed, numbers)
        ids = sample.generate(model, prompts, blocks, threshold=args.threshold, fast=fast)
        for example, answer in zip(part, ids.tolist()):
            scores.append(string_match_all(example.references, data.TINY.decode(answer)))
    record = {"method": method, "task": task, "length": length, "seed": seed, "n": len(scores)}
    return record | {"score": float(np.mean(scores))}


# ---- exposure bias (Sec. 2.2, Fig. 3) --------------------------------------------------------


def nll_at(model, canvas: Tensor, x0: Tensor, masked: Tensor, fast) -> tuple[Tensor, Tensor]:
    """The mean -log p(x0) of each row over its masked places (B,), and the logits (M, V) there."""
    logits = sample.guided_logits(model, canvas, masked, fast, 0.0, None, masked)
    nll = F.cross_entropy(logits, x0[masked], reduction="none")
    by_place = torch.zeros(masked.shape, device=nll.device).masked_scatter(masked, nll)
    return by_place.sum(1) / masked.sum(1), logits


@torch.no_grad()
def exposure_walk(model, x0, response, order, steps: int, fast) -> list[tuple]:
    """L_static and L_seq of each row on a denoising in `steps` steps: a list of (mask ratio,
    static (B,), sequential (B,)) at the mask ratios 1, 1 - 1/steps, ..., 1/steps.

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


def exposure_bias(models: dict, seed: int, args: argparse.Namespace) -> list[dict]:
    """The exposure bias of every row on the tasks, all tasks together, one record a mask ratio."""
    curves, bar = {}, tqdm(ROWS.items(), f"seed {seed}: exposure bias", delay=2)
    for method, row in bar:
        model, walks = models[row.checkpoint], []
        for task in args.tasks:
            key = data.split_seed(seed, "test")
            examples = data.make_examples(task, args.samples, args.length, key)
            batch = data.collate(examples, model.embedding.weight.device)
            noise, fast = generator_for(seed, "static masks", task), None
            order = torch.rand(batch.x0.shape, generator=noise).to(batch.x0.device)
            if row.memory:
                prompts = batch.x0[:, : len(examples[0].prompt)]
                fast = sample.write_prompt(model, prompts, args.how, seed)
            walk = exposure_walk(model, *batch[:2], order, args.bias_steps, fast)
            walks.append(walk)
        curves[method] = mean_curve(walks)
    plain = {method: "memdlm_train" if row.memory else method for method, row in ROWS.items()}
    return bias_records(curves, plain, seed)


def bias_records(curves: dict[str, list], plain: dict[str, str], seed: int) -> list[dict]:
    """R_EB of each method's curve. plain: the row of the same checkpoint without a memory, whose
    static loss is the denominator (as published)."""
    records = []
    for method, curve in curves.items():
        for (ratio, static, sequential), (_, base, _) in zip(curve, curves[plain[method]]):
            values = {"static": static, "sequential": sequential}
            values["ratio"] = sequential / base if base else math.nan
            record = {"method": method, "mask_ratio": ratio, "seed": seed}
            records.append(record | {key: finite(value) for key, value in values.items()})
    return records


# ---- tables ----------------------------------------------------------------------------------


def as_floats(values: Iterable[float | None]) -> np.ndarray:
    """Numbers. JSON's null becomes nan, which every mean and picture then shows."""
    return np.array(list(values), dtype=float)


def distinct(records: list[dict], key: str) -> list:
    """The values of a field in their first order."""
    return list(dict.fromkeys(record[key] for record in records))


def matching(records: list[dict], **where) -> list[dict]:
    """The records that have these values."""
    return [one for one in records if all(one[key] == value for key, value in where.items())]


def mean_of(records: list[dict], key: str) -> float:
    """The mean of a field, nan where there is nothing."""
    return float(as_floats(one[key] for one in records).mean()) if records else math.nan


def seed_means(records: list[dict], key: str) -> dict[int, float]:
    """Seed -> the mean of a field over all that the seed has."""
    return {seed: mean_of(matching(records, seed=seed), key) for seed in distinct(records, "seed")}


def number_text(value: float, digits: int = 2) -> str:
    """0.83, or "-" for nan."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def interval_text(values: Iterable[float]) -> str:
    """0.183 ± 0.081, the 95% t-interval over seeds; the value alone where there is one seed."""
    mean, half = t_interval(list(values))
    return number_text(mean, 3) + (f" ± {half:.3f}" if math.isfinite(half) else "")


def markdown(header: list, rows: list[list]) -> str:
    """A table, ready to paste."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def score_table(records: list[dict], title: Callable[[str], str] = title) -> str:
    """Tables 1 and 2: each row's score, the mean over seeds, by length and task; and over tasks."""
    tasks, lengths = distinct(records, "task"), distinct(records, "length")
    header = ["method", *(f"{task} {length}" for length in lengths for task in tasks)]
    header += [f"mean {length}" for length in lengths]
    rows = []
    for method in distinct(records, "method"):
        cells, means = [], []
        for length in lengths:
            found = matching(records, method=method, length=length)
            scores = [mean_of(matching(found, task=task), "score") for task in tasks]
            cells += map(number_text, scores)
            means.append(f"**{number_text(float(np.mean(scores)), 3)}**")
        rows.append([title(method), *cells, *means])
    return markdown(header, rows)


def difference_row(first: dict, method: str, second: dict, baseline: str) -> list[str]:
    """Row `method` of `first` minus row `baseline` of `second` at each length: the mean over tasks,
    paired by seed, with its 95% interval where there are several seeds."""
    cells = []
    for length in distinct(first["niah"], "length"):
        ours = seed_means(matching(first["niah"], method=method, length=length), "score")
        theirs = seed_means(matching(second["niah"], method=baseline, length=length), "score")
        gains = [score - theirs[seed] for seed, score in ours.items() if seed in theirs]
        mean, half = t_interval(gains) if gains else (math.nan, math.inf)
        interval = f" [{mean - half:+.3f}, {mean + half:+.3f}]" if math.isfinite(half) else ""
        cells.append(f"{mean:+.3f}{interval}" if math.isfinite(mean) else "-")
    return cells


def difference_table(results: dict) -> str:
    """The paper's two claims: Train-Only over Standard MDLM, Train & Inference over Train-Only."""
    there, rows = distinct(results["niah"], "method"), []
    for better, worse in (("memdlm_train", "mdlm"), ("memdlm_train_inference", "memdlm_train")):
        if better in there and worse in there:
            name = f"{title(better)} minus {title(worse)}"
            rows.append([name, *difference_row(results, better, results, worse)])
    header = ["difference, mean over tasks", *distinct(results["niah"], "length")]
    return markdown(header, rows) if rows else ""


def interval_table(header: list, records: list[dict], keys: Sequence[str], title) -> str:
    """The mean of some fields for each row, with 95% t-intervals over seeds."""
    rows = []
    for method in distinct(records, "method"):
        found = matching(records, method=method)
        cells = [interval_text(seed_means(found, key).values()) for key in keys]
        rows.append([title(method), *cells])
    return markdown(header, rows)


def exposure_table(records: list[dict], title: Callable[[str], str] = title) -> str:
    """Means over the mask ratios below 1, where the two states differ."""
    later = [one for one in records if one["mask_ratio"] < 1]
    header = ["exposure bias", "L_static", "L_seq", "R_EB"]
    return interval_table(header, later, ("static", "sequential", "ratio"), title)


def report(results: dict) -> str:
    """All tables of a run, as markdown. Intervals are 95% t-intervals over seeds."""
    where = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    seeds, n = distinct(results["niah"], "seed"), results["niah"][0]["n"]
    rule = results["config"]["evaluation"]["write"]
    head = f"Seeds {seeds}, {n} examples a cell; {where}; prompts are written by {rule}."
    tables = [head, score_table(results["niah"]), difference_table(results)]
    tables.append(exposure_table(results["exposure_bias"]))
    header = ["last step", "train, with memory (leaks)", "train, without", "held out, without"]
    final = matching(results["loss"], step=max(distinct(results["loss"], "step")))
    return "\n\n".join([*tables, interval_table(header, final, LOSSES, str)])


# ---- pictures --------------------------------------------------------------------------------

COLOURS = {"base": "tab:gray", "mdlm": "tab:red", "memdlm": "tab:blue"}
COLOURS |= {"memdlm_train": "tab:blue", "memdlm_train_inference": "tab:green"}


def new_figure(rows: int, columns: int, width: float, height: float):
    """A figure and its axes (rows, columns). Drawing is imported here: training does without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save_picture(figure, path: Path) -> None:
    """Writes a PNG file."""
    import matplotlib.pyplot as plt

    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)


def draw_panels(panels: list[dict], path: Path) -> None:
    """Panels side by side; each is {"lines": [(xs, ys, style, label)], and what axes can set}."""
    figure, [axes] = new_figure(1, len(panels), max(6, 4.2 * len(panels)), 4)
    for axis, panel in zip(axes, panels):
        for xs, ys, style, label in panel.pop("lines"):
            axis.plot(xs, ys, **style, label=label)
        axis.set(**panel)
        axis.legend(fontsize=7)
    save_picture(figure, path)


def mean_by(records: list[dict], x: str, y: str) -> tuple[list, list]:
    """The distinct values of x, sorted, and the mean of y over seeds at each."""
    places = sorted(distinct(records, x))
    return places, [mean_of(matching(records, **{x: place}), y) for place in places]


def draw_losses(records: list[dict], path: Path) -> None:
    """Left: the losses over the steps (Fig. 4). Right: held-out NLL by t, before and after."""
    left, right = [], []
    for method in distinct(records, "method"):
        found, colour = matching(records, method=method), COLOURS[method]
        for key, dashes in zip(LOSSES, (":", "-", "--")):
            style = {"color": colour, "linestyle": dashes}
            left.append((*mean_by(found, "step", key), style, f"{method}: {key}"))
        for step, dashes in ((0, ":"), (max(distinct(found, "step")), "-")):
            bins = [as_floats(one["eval_by_t"]) for one in matching(found, step=step)]
            centres = (np.arange(len(bins[0])) + 0.5) / len(bins[0])
            style = {"color": colour, "linestyle": dashes, "marker": "o"}
            right.append((centres, np.mean(bins, axis=0), style, f"{method}, step {step}"))
    losses = {"xlabel": "fine-tuning step", "ylabel": "MDLM loss; with memory it leaks"}
    by_t = {"xlabel": "noise level t", "ylabel": "held-out NLL per masked token"}
    draw_panels([{"lines": left, **losses}, {"lines": right, **by_t}], path)


def draw_exposure(records: list[dict], path: Path, title=title, colours=COLOURS) -> None:
    """Left: R_EB over the denoising, as in Fig. 3. Right: the two losses that it is made of."""
    left, right = [], []
    for method in distinct(records, "method"):
        found, style = matching(records, method=method), {"color": colours.get(method)}
        left.append((*mean_by(found, "mask_ratio", "ratio"), style, title(method)))
        for key, dashes in (("sequential", "-"), ("static", ":")):
            dashed = {**style, "linestyle": dashes}
            label = f"{title(method)}: {key}"
            right.append((*mean_by(found, "mask_ratio", key), dashed, label))
    common = {"xlabel": "mask ratio (denoising runs to the right)", "yscale": "log", "xlim": (1, 0)}
    bias = {"lines": left, "ylabel": "R_EB = L_seq / L_static (1 is ideal)", **common}
    draw_panels([bias, {"lines": right, "ylabel": "NLL of the true tokens", **common}], path)


def draw_scores(records: list[dict], path: Path, title=title, colours=COLOURS) -> None:
    """The score over the length, one panel for each task."""
    panels = []
    for task in distinct(records, "task"):
        lines, found = [], matching(records, task=task)
        for method in distinct(found, "method"):
            points = mean_by(matching(found, method=method), "length", "score")
            lines.append((*points, {"color": colours.get(method), "marker": "o"}, title(method)))
        labels = {"title": task, "xlabel": "length in tokens", "ylabel": "score"}
        panels.append({"lines": lines, "ylim": (-0.03, 1.03), **labels})
    draw_panels(panels, path)


# ---- command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser("Scores the models of a run. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a --tiny run, such as runs/tiny: all of its seeds")
    flag("--out", help="folder for results.json, tables and pictures; without it, that of --run")
    flag("--tasks", nargs="+", choices=data.TASKS, default=list(data.TASKS), help="what is asked")
    lengths = "tokens of an example; without it 1, 2 and 4 times the run's --length"
    flag("--lengths", nargs="+", type=whole(64, 8192), help=lengths)
    flag("--samples", type=whole(1), default=64, help="examples for each task and length [500]")
    flag("--bias-steps", type=whole(2), default=8, help="steps of the exposure bias [48, Fig. 3]")
    flag("--device", choices=data.DEVICES, default="auto", help="where to compute")
    sample.decoding_flags(flag)
    sample.write_flags(flag)
    return parser


def measure_run(args: argparse.Namespace, config: dict, device: str) -> dict:
    """The results of all seeds of a run."""
    results, clock = {"niah": [], "exposure_bias": [], "loss": [], "training": []}, time.monotonic()
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        models = {}
        for name in ("base", "mdlm", "memdlm"):
            models[name], meta = open_run(Path(args.run), seed, name, device)
            results["loss"] += meta["log"]
            cost = {"seconds": meta["seconds"], "skipped_updates": meta["skipped"]}
            results["training"].append({"seed": seed, "name": name, **cost})
        cells = [(n, task, method) for n in args.lengths for task in args.tasks for method in ROWS]
        for length, task, method in tqdm(cells, f"seed {seed}: scores", delay=2):
            results["niah"].append(score_cell(models, method, task, length, seed, args))
        results["exposure_bias"] += exposure_bias(models, seed, args)
    return results | {"evaluation_seconds": time.monotonic() - clock}


def run(arguments: list[str]) -> None:
    """Scores a run."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    config, device = read_config(Path(args.run)), pick_device(args.device)
    args.lengths = args.lengths or [config["length"] * times for times in (1, 2, 4)]
    args.tasks, args.lengths = list(dict.fromkeys(args.tasks)), list(dict.fromkeys(args.lengths))
    out, how = Path(args.out or args.run), sample.write_of(parser, args, config)
    elsewhere = ("run", "out", "device")
    own = {name: value for name, value in vars(args).items() if name not in elsewhere}
    wanted, path = {"run": config, "evaluation": own}, out / "results.json"
    if path.exists() and read_json(path).get("config") != wanted:
        raise UserError(f"{path} has results of other settings: name another folder with --out.")
    key = data.split_seed(config["seed"], "test")
    base, _ = open_run(Path(args.run), config["seed"], "base", device)
    view = sample.denoising_view(base, data.make_examples("mv", 1, config["length"], key)[0])
    write_text(out / "denoising.txt", view + "\n")  # which also shows that OUT can be written
    args.how, args.length = how, config["length"]
    results = {"config": wanted, "machine": machine(device), **measure_run(args, config, device)}
    results |= {"peak_memory_gib": peak_memory(device)}
    write_json(path, results)
    write_text(out / "table.md", report(results) + "\n")
    draw_scores(results["niah"], out / "niah.png")
    draw_exposure(results["exposure_bias"], out / "exposure_bias.png")
    draw_losses(results["loss"], out / "loss.png")
    times = ", ".join(f"{one['name']} {one['seconds']:.0f} s" for one in results["training"])
    print(f"{report(results)}\n\nThe base model denoises a test example:\n\n{view}\n")
    print(f"{times}, evaluation {results['evaluation_seconds']:.0f} s; written to {out}/")


def main(arguments: list[str] | None = None) -> None:
    data.start(run, "benchmark", arguments)


if __name__ == "__main__":
    main()
