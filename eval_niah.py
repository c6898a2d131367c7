"""
eval_niah.py: what fine-tuning has learnt, what it has kept, and how far denoising goes astray.

    python eval_niah.py --run runs/tiny                                    as `--tiny` ends
    python eval_niah.py --run runs/tiny --samples 64 --out runs/more       other settings
    python eval_niah.py --backbone llada-moe --memory --out runs/ruler     see full_scale/

Rows are models and ways of reading: Base, Standard MDLM and MemDLM answer without a memory (for
MemDLM that is Train-Only), or after each prompt was written into their weights (for MemDLM that is
Train & Inference). What is measured:
  score          RULER's: the share of the references that the answer contains (Tables 1 and 2)
  frontier       learnt: the training loss without a memory; kept: the score. A lower rate learns
                 less and keeps more, so methods are compared at equal learnt loss
  exposure bias  R_EB = L_seq / L_static (Sec. 2.2, Fig. 3): how much worse the true tokens are
                 predicted on states that the model has reached by its own denoising
No memory can leak an answer: it is written by a function that is given the prompt alone.

Reading list: RULER, arXiv 2404.06654; exposure bias, Ranzato et al. 2016, arXiv 1511.06732;
learning and forgetting with LoRA, Biderman et al. 2024, arXiv 2405.09673.

Glossary
  paper      | name here  | meaning
  L_static   | static     | mean NLL of true tokens at masked places, the others being true (Eq. 3)
  L_seq      | sequential | the same on the state that the model itself has reached (Eq. 4)
  R_EB       | ratio      | sequential / static of the checkpoint without a memory
  mask ratio | mask_ratio | share of the answer that is still masked, from 1 towards 0
  -          | unit       | (seed, draw): a base, and a fine-tuning set; intervals are over units
"""

import itertools
import math
import time
import zlib
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
from memdlm import (
    LOSSES,
    Anchor,
    arms,
    embed,
    finite,
    generator_for,
    init_fast,
    inner_loop,
    machine,
    make_stages,
    memory_of,
    open_run,
    peak_memory,
    read_config,
    tiny_pairs,
    token_nll,
    with_prefixes,
)
from model import UserError, read_json, write_json, write_text, written_aside


class Row(NamedTuple):
    """A line of the tables."""

    title: str
    checkpoint: str
    memory: bool  # whether prompts are written into the weights


# The rows of Table 1, and two controls: a memory for models that were not trained with one.
ROWS = {
    "base": Row("Base", "base", False),
    "mdlm": Row("Standard MDLM", "mdlm", False),
    "memdlm_train": Row("MemDLM (Train-Only)", "memdlm", False),
    "base_inference": Row("Base, memory at inference", "base", True),
    "mdlm_inference": Row("Standard MDLM, memory at inference", "mdlm", True),
    "memdlm_train_inference": Row("MemDLM (Train & Inference)", "memdlm", True),
}


def rows_of(config: dict) -> dict[str, Row]:
    """The rows of a run: ROWS, and Standard MDLM at the rates of its control."""
    controls = [name for name in arms(config) if name not in ("mdlm", "memdlm")]
    return ROWS | {name: Row(title(name), name, False) for name in controls}


def title(method: str) -> str:
    """A row's name in tables and pictures; "mdlm-0.0001" is Standard MDLM at another rate."""
    name, _, rate = method.partition("-")
    return ROWS[name].title + (f", rate {rate}" if rate else "")


def string_match_all(references: Sequence[str], prediction: str) -> float:
    """RULER's score (Tables 1 and 2): the share of the references that are in the prediction."""
    found = [reference.lower() in prediction.lower() for reference in references]
    return float(np.mean(found))


# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_QUANTILES += (2.160, 2.145)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval over the values; infinite for one."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]  # beyond: a little too wide
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def score_cell(model, memory: bool, task: str, length: int, seed: int, draw: int, args) -> dict:
    """One row's mean score on one task at one length, 32 prompts at a time. memory: whether each
    prompt is written into the weights first."""
    scores, key = [], data.split_seed(seed, f"test {draw}")
    examples = data.make_examples(task, args.samples, length, key, wording=args.wording)
    length_of_answer = len(examples[0].response)
    steps = args.steps and min(args.steps, length_of_answer)  # more than one a token there are none
    blocks = sample.plan_blocks(length_of_answer, steps, args.block_length)
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        prompts = torch.tensor([one.prompt for one in part], device=model.embedding.weight.device)
        numbers, fast = range(start, start + len(part)), None
        if memory:
            fast = sample.write_prompt(model, prompts, args.how, seed, numbers)
        ids = sample.generate(model, prompts, blocks, threshold=args.threshold, fast=fast)
        for example, answer in zip(part, ids.tolist()):
            scores.append(string_match_all(example.references, data.TINY.decode(answer)))
    return {"task": task, "length": length, "n": len(scores), "score": float(np.mean(scores))}


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


def exposure_bias(models: dict, rows: dict[str, Row], seed: int, draw: int, args) -> list[dict]:
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
                fast = sample.write_prompt(model, prompts, args.how, seed)
            walk = exposure_walk(model, *batch[:2], order, args.bias_steps, fast)
            walks.append(walk)
        curves[method] = mean_curve(walks)
    without = {row.checkpoint: method for method, row in rows.items() if not row.memory}
    return bias_records(curves, {name: without[row.checkpoint] for name, row in rows.items()})


def bias_records(curves: dict[str, list], plain: dict[str, str]) -> list[dict]:
    """R_EB (Sec. 2.2) of each method's curve. plain: the row of the same checkpoint without a
    memory, whose static loss is the denominator (as published)."""
    records = []
    for method, curve in curves.items():
        for (ratio, static, sequential), (_, base, _) in zip(curve, curves[plain[method]]):
            values = {"static": static, "sequential": sequential}
            values["ratio"] = sequential / base if base else math.nan
            record = {"method": method, "mask_ratio": ratio}
            records.append(record | {key: finite(value) for key, value in values.items()})
    return records


# ---- records of results.json -----------------------------------------------------------------


def as_floats(values: Iterable[float | None]) -> np.ndarray:
    """Numbers. JSON's null becomes nan, which every mean and picture then shows."""
    return np.array(list(values), dtype=float)


def distinct(records: list[dict], key: str) -> list:
    """The values of a field in their first order."""
    return distinct_values(record[key] for record in records)


def matching(records: list[dict], **where) -> list[dict]:
    """The records that have these values."""
    return [one for one in records if all(one[key] == value for key, value in where.items())]


def mean_of(records: list[dict], key: str) -> float:
    """The mean of a field, nan where there is nothing."""
    return float(as_floats(one[key] for one in records).mean()) if records else math.nan


def by_unit(records: list[dict]) -> dict[tuple, list[dict]]:
    """(seed, draw) -> its records. What has no draws, a real checkpoint, has draw 0 alone."""
    units: dict[tuple, list[dict]] = {}
    for one in records:
        units.setdefault((one["seed"], one.get("draw", 0)), []).append(one)
    return units


def unit_means(records: list[dict], key: str) -> dict[tuple, float]:
    """(seed, draw) -> the mean of a field over all that the unit has."""
    return {unit: mean_of(found, key) for unit, found in by_unit(records).items()}


# ---- the frontier: learnt against kept -------------------------------------------------------


def frontier_of(results: dict, config: dict) -> list[dict]:
    """What each fine-tuning has learnt, the training loss without a memory, and what it has kept of
    the base (Fig. 5), its scores: {"method", "lr", "draw", "seed", "learnt", "kept": {"1x": score,
    ...}}. The base is Standard MDLM at rate 0."""
    points, scores = [], by_unit(results["niah"])
    for (seed, draw), logged in by_unit(results["loss"]).items():
        # Of the base, the loss is what Standard MDLM's log says before its first step.
        ends = [("base", "mdlm", 0.0, matching(logged, method="mdlm")[0])]
        for name, (method, rate) in arms(config).items():
            row = "memdlm_train" if name == "memdlm" else name
            ends.append((row, method, rate, matching(logged, method=name)[-1]))
        for row, method, rate, loss in ends:
            scored, kept = matching(scores[seed, draw], method=row), {}
            for length in distinct(scored, "length"):
                times = f"{length / config['length']:g}x"
                kept[times] = mean_of(matching(scored, length=length), "score")
            point = {"method": method, "lr": rate, "draw": draw, "seed": seed}
            points.append(point | {"learnt": loss["train_without_memory"], "kept": kept})
    return points


def at_equal(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x on the straight lines between points (x, y); beyond them that of the nearest."""
    xs, ys = zip(*sorted(points))
    return float(np.interp(x, xs, ys))


def gains_at_equal_loss(points: list[dict], times: str) -> dict[tuple, float]:
    """(seed, draw) -> MemDLM's score minus that of Standard MDLM where it has learnt as much. A
    unit with a loss that is no number is left out."""
    gains = {}
    for unit, found in by_unit(points).items():
        standard = [(one["learnt"], one["kept"][times]) for one in matching(found, method="mdlm")]
        [ours] = matching(found, method="memdlm")
        if None not in (ours["learnt"], *(learnt for learnt, _ in standard)):
            gains[unit] = ours["kept"][times] - at_equal(standard, ours["learnt"])
    return gains


def headline_of(points: list[dict], times: str = "4x") -> dict | None:
    """The one comparison that was chosen beforehand: Train-Only minus Standard MDLM at equal learnt
    loss. Its interval is over draws; the verdict goes by the means of bases, since draws of one
    base are not independent. None where there is no score at that length, or no loss."""
    gains = gains_at_equal_loss(points, times) if times in points[0]["kept"] else {}
    if not gains:
        return None
    mean, half = t_interval(list(gains.values()))
    interval = [mean - half, mean + half] if math.isfinite(half) else None
    bases: dict[int, list[float]] = {}
    for (seed, _), gain in gains.items():
        bases.setdefault(seed, []).append(gain)
    by_base = [float(np.mean(found)) for found in bases.values()]
    text = f"MemDLM (Train-Only) minus Standard MDLM at equal learnt loss, {times}: "
    text += difference_text(list(gains.values()))
    text += f", {len(gains)} of {len(by_unit(points))} draws; by base "
    text += f"{difference_text(by_base)}, n = {len(by_base)}: {verdict_on(by_base)}."
    return {"difference": mean, "ci95": interval, "n": len(gains), "text": text}


def verdict_on(gains: list[float]) -> str:
    """What the 95% interval of the gains of independent bases allows to say."""
    mean, half = t_interval(gains)
    if not math.isfinite(half):
        return "one base decides nothing"
    if mean - half > 0:
        return "the memory is more than a lower rate"
    return "a lower rate does better" if mean + half < 0 else "no difference is shown"


# ---- tables ----------------------------------------------------------------------------------


def number_text(value: float, digits: int = 2) -> str:
    """0.83, or "-" for nan."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def interval_text(values: Iterable[float]) -> str:
    """0.183 ± 0.081, the 95% t-interval over units; the value alone where there is one."""
    mean, half = t_interval(list(values))
    return number_text(mean, 3) + (f" ± {half:.3f}" if math.isfinite(half) else "")


def difference_text(values: Sequence[float]) -> str:
    """+0.183 [+0.102, +0.264], a mean difference and its 95% t-interval over units."""
    mean, half = t_interval(values) if values else (math.nan, math.inf)
    interval = f" [{mean - half:+.3f}, {mean + half:+.3f}]" if math.isfinite(half) else ""
    return f"{mean:+.3f}{interval}" if math.isfinite(mean) else "-"


def markdown(header: list, rows: list[list]) -> str:
    """A table, ready to paste."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def score_table(records: list[dict], title: Callable[[str], str] = title) -> str:
    """Tables 1 and 2: each row's score, the mean over units, by length and task; and over tasks."""
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


def differences(records: list[dict], better: str, worse: str, length: int) -> dict[tuple, float]:
    """(seed, draw) -> row `better` minus row `worse`, the mean over tasks, where both are there."""
    ours = unit_means(matching(records, method=better, length=length), "score")
    theirs = unit_means(matching(records, method=worse, length=length), "score")
    return {unit: score - theirs[unit] for unit, score in ours.items() if unit in theirs}


# The paper's claims at equal rate; what a memory at inference gains on each model; and whether it
# gains more on the model that was trained with one: pairs of rows, or of pairs of rows.
GAINS = [("base_inference", "base"), ("mdlm_inference", "mdlm")]
GAINS += [("memdlm_train_inference", "memdlm_train")]
DIFFERENCES = [("memdlm_train", "mdlm"), *GAINS]


def difference_table(results: dict) -> str:
    """Differences of rows at each length, paired by unit, with their 95% intervals."""
    records, rows = results["niah"], []
    lengths, there = distinct(records, "length"), distinct(records, "method")
    for better, worse in DIFFERENCES:
        if better in there and worse in there:
            pairs = [differences(records, better, worse, length) for length in lengths]
            cells = [difference_text(list(found.values())) for found in pairs]
            rows.append([f"{title(better)} minus {title(worse)}", *cells])
    ours = GAINS[-1]
    for other in GAINS[:-1]:
        if {*ours, *other} <= set(there):
            cells = []
            for length in lengths:
                gains = [differences(records, *pair, length) for pair in (ours, other)]
                cells.append(difference_text([gains[0][u] - gains[1][u] for u in gains[0]]))
            rows.append([f"gain by writing: {title(ours[1])} minus {title(other[1])}", *cells])
    header = ["difference, mean over tasks", *lengths]
    return markdown(header, rows) if rows else ""


def frontier_table(points: list[dict]) -> str:
    """Learnt and kept by method and rate; then their difference at equal learnt loss."""
    lengths, rows = list(points[0]["kept"]), []
    order = dict.fromkeys((one["method"], one["lr"]) for one in points)
    for method, rate in sorted(order, key=lambda pair: (pair[0] == "memdlm", -pair[1])):
        found = matching(points, method=method, lr=rate)
        cells = [interval_text(as_floats(one["learnt"] for one in found))]
        cells += [interval_text(one["kept"][times] for one in found) for times in lengths]
        name = f"{title('memdlm_train' if method == 'memdlm' else method)}, rate {rate:g}"
        rows.append([name if rate else title("base"), *cells])
    gains = [list(gains_at_equal_loss(points, times).values()) for times in lengths]
    rows.append(["difference at equal learnt loss", "", *map(difference_text, gains)])
    return markdown(["frontier", "learnt (training loss)", *(f"kept {x}" for x in lengths)], rows)


def interval_table(header: list, records: list[dict], keys: Sequence[str], title) -> str:
    """The mean of some fields for each row, with 95% t-intervals over units."""
    rows = []
    for method in distinct(records, "method"):
        found = matching(records, method=method)
        cells = [interval_text(unit_means(found, key).values()) for key in keys]
        rows.append([title(method), *cells])
    return markdown(header, rows)


def exposure_table(records: list[dict], title: Callable[[str], str] = title) -> str:
    """Means over the mask ratios below 1, where the two states differ. As a ratio R_EB rewards a
    bad static loss: the gap beside it does not."""
    later = []
    for one in records:
        static, sequential = as_floats([one["static"], one["sequential"]])
        if one["mask_ratio"] < 1:
            later.append(one | {"gap": sequential - static})
    header = ["exposure bias", "L_static", "L_seq", "L_seq - L_static", "R_EB"]
    return interval_table(header, later, ("static", "sequential", "gap", "ratio"), title)


def is_standard(method: str) -> bool:
    """Whether a row is Standard MDLM without a memory, at any rate: the base has rate 0."""
    return method in ("base", "mdlm") or method.startswith("mdlm-")


def sequential_at_equal_static(records: list[dict]) -> str:
    """L_seq of MemDLM minus that of Standard MDLM where its static loss is the same, interpolated
    over the rates: which method is hurt less by its own mistakes?"""
    later, gains = [one for one in records if one["mask_ratio"] < 1], []
    for found in by_unit(later).values():
        means = {}
        for method in distinct(found, "method"):
            rows = matching(found, method=method)
            means[method] = mean_of(rows, "static"), mean_of(rows, "sequential")
        static, sequential = means["memdlm_train"]
        standard = [pair for method, pair in means.items() if is_standard(method)]
        gains.append(sequential - at_equal(standard, static))
    return f"L_seq, Train-Only minus Standard MDLM at equal L_static: {difference_text(gains)}"


def report(results: dict) -> str:
    """All tables of a run, as markdown. Intervals are 95% t-intervals over seeds and draws."""
    where = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    seeds, units = distinct(results["niah"], "seed"), by_unit(results["niah"])
    n, rule = results["niah"][0]["n"], results["config"]["evaluation"]["write"]
    head = f"Seeds {seeds}, {len(units)} draws, {n} examples a cell; {where}; "
    head += f"prompts are written by {rule}, for the first draws of a seed alone."
    tables = [head, difference_table(results)]
    for length in distinct(results["niah"], "length"):
        tables.append(score_table(matching(results["niah"], length=length)))
    tables.append(exposure_table(results["exposure_bias"]))
    tables.append(sequential_at_equal_static(results["exposure_bias"]))
    header = ["last step", "train, with memory (leaks)", "train, without", "held out, without"]
    final = matching(results["loss"], step=max(distinct(results["loss"], "step")))
    tables += [interval_table(header, final, LOSSES, str), frontier_table(results["frontier"])]
    if results["headline"]:
        tables.append("**" + results["headline"]["text"] + "**")
    return "\n\n".join(tables)


# ---- pictures --------------------------------------------------------------------------------

COLOURS = {"base": "tab:gray", "mdlm": "tab:red", "memdlm": "tab:blue"}
COLOURS |= {"memdlm_train": "tab:blue", "memdlm_train_inference": "tab:green"}
COLOURS |= {"base_inference": "black", "mdlm_inference": "tab:orange"}


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
    """The distinct values of x, sorted, and the mean of y over units at each."""
    places = sorted(distinct(records, x))
    return places, [mean_of(matching(records, **{x: place}), y) for place in places]


def draw_losses(records: list[dict], path: Path) -> None:
    """Left: the losses over the steps (Fig. 4). Right: held-out NLL by t, before and after."""
    left, right = [], []
    for method in ("mdlm", "memdlm"):
        found, colour = matching(records, method=method), COLOURS.get(method)
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


def draw_frontier(points: list[dict], path: Path) -> None:
    """Learnt against kept, a curve through the rates of each method, both from the base on. Means
    and 95% t-intervals over units; thin lines are single units. Kept: at 4x, or at the longest."""
    points = [one | {"learnt": as_floats([one["learnt"]])[0]} for one in points]
    longest = max(points[0]["kept"], key=lambda times: float(times[:-1]))
    times = "4x" if "4x" in points[0]["kept"] else longest
    figure, [[axis]] = new_figure(1, 1, 6.5, 4.6)
    names = {"mdlm": "Standard MDLM", "memdlm": "MemDLM (Train-Only)"}
    for method, name in names.items():
        chosen = [one for one in points if one["method"] == method or one["lr"] == 0]
        for found in by_unit(chosen).values():
            line = sorted((one["learnt"], one["kept"][times]) for one in found)
            axis.plot(*zip(*line), color=COLOURS[method], alpha=0.2, linewidth=0.8)
        means = []
        for rate in sorted(distinct(chosen, "lr")):
            found = matching(chosen, lr=rate)
            x = t_interval([one["learnt"] for one in found])
            y = t_interval([one["kept"][times] for one in found])
            means.append((x[0], y[0], finite(x[1]) or 0, finite(y[1]) or 0))
            if rate:
                note = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 8}
                axis.annotate(f"{rate:g}", (x[0], y[0]), **note, color=COLOURS[method])
        xs, ys, wide, high = zip(*means)
        style = {"marker": "o", "capsize": 3, "color": COLOURS[method], "label": name}
        axis.errorbar(xs, ys, xerr=wide, yerr=high, **style)
    base = matching(points, lr=0)
    x, y = mean_of(base, "learnt"), float(np.mean([one["kept"][times] for one in base]))
    axis.annotate("base", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axis.set(xlabel="training loss without memory (to the left: more is learnt)")
    axis.set(ylabel=f"score at {times} the base's length (up: more is kept)")
    axis.legend(fontsize=8)
    save_picture(figure, path)


def short_text(token: int) -> str:
    """A token as it stands in a picture."""
    return sample.canvas_text([token]).replace("<|endoftext|>", "EOS").strip()


@torch.no_grad()
def memory_view(model, config: dict, seed: int, pair: data.Example, true_pair) -> dict:
    """What the inner loop does to a training pair whose whole answer is masked: "nll", the NLL of
    its tokens with phi_0, phi_1, ...; "tokens"; and which of them are "noisy"."""
    batch = data.collate([pair], model.embedding.weight.device)
    generator, memory = generator_for(seed, "memory view"), memory_of(config)
    everything = Anchor(torch.ones(1, device=batch.x0.device), batch.maskable)
    stages = make_stages(everything, batch.maskable, memory, generator)
    stages = with_prefixes(model, batch, stages, memory)
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


def draw_memory(view: dict, path: Path) -> None:
    """The NLL of each token before the inner loop and after each of its stages."""
    places, stages = np.arange(len(view["tokens"])), len(view["nll"]) - 1
    figure, [[axis]] = new_figure(1, 1, max(7.5, 0.62 * len(places)), 3.6)
    names = ["before the inner loop", *(f"after stage {k}" for k in range(1, stages + 1))]
    names[-1] += ": what the outer step sees"
    width = 0.8 / len(names)
    for k, (name, nll) in enumerate(zip(names, view["nll"])):
        shade = str(0.8 * (1 - k / stages))  # from light gray to black
        axis.bar(places + (k - stages / 2) * width, nll, width, label=name, color=shade)
    axis.set_xticks(places, view["tokens"], rotation=45)
    for label, noisy in zip(axis.get_xticklabels(), view["noisy"]):
        label.set_color("tab:red" if noisy else "black")
    axis.set(ylabel="-log p of the token", title="The answer of one training pair (red: noise)")
    axis.legend(fontsize=8)
    save_picture(figure, path)


def draw_denoising(views: dict[str, list], expected: list[int], path: Path) -> None:
    """Panels side by side: steps down, places across. In each cell stands the token that is there
    (white) or is proposed, with its confidence as colour; what the step commits is framed."""
    steps, places = len(expected), len(expected)
    figure, [axes] = new_figure(1, len(views), 0.75 * places * len(views), 0.36 * steps + 1.2)
    for axis, (name, states) in zip(axes, views.items()):
        grid = [[math.nan] * places for _ in range(steps + 1)]  # the last row: the true answer
        for row, state in enumerate([*states, None]):
            for column in range(places):
                token, style = expected[column], {}
                if state is not None:
                    token = state.proposal[column]
                    if state.before[column] == data.MASK:
                        grid[row][column] = state.confidence[column]
                        style["color"] = "white" if state.confidence[column] > 0.7 else "black"
                    if state.committed[column]:
                        style["bbox"] = {"edgecolor": "tab:red", "facecolor": "none"}
                text = short_text(token)
                axis.text(column, row, text, ha="center", va="center", fontsize=8, **style)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        axis.set_yticks(range(steps + 1), [*range(1, steps + 1), "true"])
        axis.set(title=name, ylabel="step", xticks=[])
    figure.colorbar(image, ax=axes.tolist(), label="confidence")
    save_picture(figure, path)


# ---- command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser("Scores the models of a run. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a --tiny run, such as runs/tiny: all of its seeds")
    flag("--out", help="folder for results.json, tables and pictures; without it, that of --run")
    flag("--tasks", nargs="+", choices=data.TASKS, default=list(data.TASKS), help="what is asked")
    lengths = "tokens of an example; without it 1, 2, 4 and 6 times the run's --length"
    flag("--lengths", nargs="+", type=whole(64, 8192), help=lengths)
    written = "those of --lengths at which prompts are also written; without it 4 times"
    flag("--memory-lengths", nargs="*", type=whole(64, 8192), help=written)
    first = "the first so many draws of each seed have the rows with a memory at inference"
    flag("--memory-draws", type=whole(0), default=1, help=first)
    flag("--samples", type=whole(1), default=16, help="examples for each task and length [500]")
    flag("--bias-steps", type=whole(2), default=8, help="steps of the exposure bias [48, Fig. 3]")
    flag("--device", choices=data.DEVICES, default="auto", help="where to compute")
    sample.decoding_flags(flag)
    sample.write_flags(flag)
    parser.set_defaults(threshold=0.95)  # half of the passes, and the same scores within .01
    return parser


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
    rows = {name: row for name, row in rows_of(config).items() if writing or not row.memory}
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


def digest_of(opened: dict[str, tuple]) -> int:
    """A number that differs for other weights."""
    digest = 0
    for model, _ in opened.values():
        for p in model.parameters():
            digest = zlib.crc32(p.detach().cpu().numpy().tobytes(), digest)
    return digest


def measure_run(args, config: dict, identity: dict, opened: dict[tuple, dict]) -> dict:
    """The results of all seeds and draws of a run. Each draw's are kept in a file as soon as they
    are there: an evaluation that was stopped goes on where it was."""
    results: dict[str, list] = {"niah": [], "exposure_bias": [], "loss": [], "training": []}
    for (seed, draw), models in opened.items():
        path = Path(args.out or args.run) / f"seed{seed}" / f"draw{draw}.json"
        measured = read_json(path) if path.exists() else {}
        known = identity | {"weights": digest_of(models)}
        if measured.get("identity") == known:
            print(f"seed {seed}, draw {draw}: taken from {path}; delete it to measure again")
        else:
            measured = {"identity": known, **measure_unit(args, config, seed, draw, models)}
            write_json(path, measured)
        for name, records in results.items():
            records += measured[name]
    return results


def views_of(args, config: dict, opened: dict[str, tuple]) -> dict:
    """What the pictures of single examples show, and the base's denoising as text: the memory of a
    training pair, and MemDLM's answers to a longer question without and with its prompt written."""
    seed, where = config["seed"], data.split_seed(config["seed"], "test 0")
    base, model = opened["base"][0], opened["memdlm"][0]
    asked = {"seed": where, "wording": args.wording}
    short, long = (data.make_examples("mv", 1, args.length * n, **asked)[0] for n in (1, 2))
    prompt = torch.tensor([long.prompt], device=model.embedding.weight.device)
    fast = sample.write_prompt(model, prompt, args.how, seed)
    states = {"MemDLM, without a memory": sample.denoising_states(model, long)}
    states["MemDLM, prompt written into the weights"] = sample.denoising_states(model, long, fast)
    text = sample.denoising_view(short, sample.denoising_states(base, short))
    pairs = zip(*(tiny_pairs(config, seed, 0, noise) for noise in (config["noise"], 0.0)))
    memories = [memory_view(base, config, seed, *pair) for pair in pairs]
    memory = min(memories, key=nll_of_true_words)  # the plainest example, not the average one
    return {"memory": memory, "states": states, "true": long.response, "text": text}


def draw_pictures(results: dict, views: dict, out: Path) -> None:
    """All pictures of a run."""
    draw_memory(views["memory"], out / "memory.png")
    draw_denoising(views["states"], views["true"], out / "denoising.png")
    shown = ("base", "mdlm", "memdlm_train", "memdlm_train_inference")
    bias = [one for one in results["exposure_bias"] if one["method"] in shown]
    draw_exposure(bias, out / "exposure_bias.png")
    draw_losses(results["loss"], out / "loss.png")
    draw_frontier(results["frontier"], out / "frontier.png")


def choose_lengths(args, base: int) -> None:
    """Puts the lengths in place that were not named; prompts are written where answers are asked
    for, or not at all."""
    lengths = args.lengths or [base * times for times in (1, 2, 4, 6)]
    if args.memory_lengths is None:
        args.memory_lengths = [4 * base] if 4 * base in lengths else []
    elif not set(args.memory_lengths) <= set(lengths):
        raise UserError("--memory-lengths must be among --lengths.")
    args.lengths, args.memory_lengths = map(distinct_values, (lengths, args.memory_lengths))


def distinct_values(values: Iterable) -> list:
    """Each value once, in their first order."""
    return list(dict.fromkeys(values))


def run(arguments: list[str]) -> None:
    """Scores a run."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    config, device = read_config(Path(args.run)), pick_device(args.device)
    choose_lengths(args, config["length"])
    args.tasks = distinct_values(args.tasks)
    out, how = Path(args.out or args.run), sample.write_of(parser, args, config)
    elsewhere = ("run", "out", "device")
    own = {name: value for name, value in vars(args).items() if name not in elsewhere}
    wanted, path = {"run": config, "evaluation": own}, out / "results.json"
    if path.exists() and read_json(path).get("config") != wanted:
        raise UserError(f"{path} has results of other settings: name another folder with --out.")
    args.how, args.length, args.wording = how, config["length"], config["wording"]
    clock = time.monotonic()
    opened = open_models(args, config, device)
    views = views_of(args, config, opened[config["seed"], 0])
    write_text(out / "denoising.txt", views["text"] + "\n")  # and so OUT can be written
    alone = {"run": {name: config[name] for name in config if name not in ("seeds", "draws")}}
    identity = alone | {"evaluation": own, "machine": machine(device)}
    results = {"config": wanted, "machine": machine(device)}
    results |= measure_run(args, config, identity, opened)
    results["frontier"] = frontier_of(results, config)
    results["headline"] = headline_of(results["frontier"])
    results |= {"evaluation_seconds": time.monotonic() - clock}
    results |= {"peak_memory_gib": peak_memory(device)}
    write_json(path, results)
    write_text(out / "table.md", report(results) + "\n")
    draw_pictures(results, views, out)
    training = sum(one["seconds"] for one in results["training"])
    print(f"The base model denoises a test example:\n\n{views['text']}\n\n{report(results)}\n")
    print(f"training {training:.0f} s, evaluation {results['evaluation_seconds']:.0f} s, ", end="")
    print(f"{results['peak_memory_gib']:.2f} GiB; written to {out}/")


def main(arguments: list[str] | None = None) -> None:
    data.start(run, "benchmark", arguments)


if __name__ == "__main__":
    main()
