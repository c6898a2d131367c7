"""
report.py: what a run's records say: statistics over seeds and draws, and tables.

  frontier       learnt: the training loss without a memory; kept: the score. A lower rate learns
                 less and keeps more, so methods are compared at equal learnt loss
  unit           (seed, draw): a base, and a fine-tuning set; intervals are over units

Reading list: learning and forgetting with LoRA, Biderman et al. 2024, arXiv 2405.09673.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from eval_niah import exposure_ratio
from lab.tools import finite
from lab.training import LOSSES, arms


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
    """A row's name in tables and pictures. "mdlm-8e-05" is Standard MDLM at another learning rate,
    "memdlm_train_inference@0.4" a row at one of several anchor ratios."""
    name, _, ratio = method.partition("@")
    name, _, rate = name.partition("-")
    text = ROWS[name].title + (f", rate {rate}" if rate else "")
    return text + (f", anchor ratio {ratio}" if ratio else "")


# ---- records of results.json ---------------------------------------------------------------------


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


def by_unit(records: list[dict]) -> dict[tuple, list[dict]]:
    """(seed, draw) -> its records. What has no draws, a real checkpoint, has draw 0 alone."""
    units: dict[tuple, list[dict]] = {}
    for one in records:
        units.setdefault((one["seed"], one.get("draw", 0)), []).append(one)
    return units


def unit_means(records: list[dict], key: str) -> dict[tuple, float]:
    """(seed, draw) -> the mean of a field over all that the unit has."""
    return {unit: mean_of(found, key) for unit, found in by_unit(records).items()}


def bias_records(curves: dict[str, list], plain: dict[str, str]) -> list[dict]:
    """A record for each row and mask ratio. plain: the row of its checkpoint without a memory."""
    records = []
    for method, curve in curves.items():
        ratios = exposure_ratio(curve, curves[plain[method]])
        for (mask_ratio, static, sequential), ratio in zip(curve, ratios):
            values = {"static": static, "sequential": sequential, "ratio": ratio}
            record = {"method": method, "mask_ratio": mask_ratio}
            records.append(record | {key: finite(value) for key, value in values.items()})
    return records


# ---- statistics ----------------------------------------------------------------------------------
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_QUANTILES += (2.160, 2.145)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval over the values; infinite for one."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]  # beyond: a little too wide
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def at_equal(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x on the straight lines between points (x, y); beyond them that of the nearest."""
    xs, ys = zip(*sorted(points))
    return float(np.interp(x, xs, ys))


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


# ---- tables --------------------------------------------------------------------------------------


def number_text(value: float | None, digits: int = 2) -> str:
    """0.83, or "-" for nan and None."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


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


def score_table(records: list[dict]) -> str:
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


def interval_table(header: list, records: list[dict], keys: Sequence[str], name=title) -> str:
    """The mean of some fields for each row, with 95% t-intervals over units."""
    rows = []
    for method in distinct(records, "method"):
        found = matching(records, method=method)
        cells = [interval_text(unit_means(found, key).values()) for key in keys]
        rows.append([name(method), *cells])
    return markdown(header, rows)


def exposure_table(records: list[dict]) -> str:
    """Means over the mask ratios below 1, where the two states differ. As a ratio R_EB rewards a
    bad static loss: the gap beside it does not."""
    later = []
    for one in records:
        static, sequential = as_floats([one["static"], one["sequential"]])
        if one["mask_ratio"] < 1:
            later.append(one | {"gap": sequential - static})
    header = ["exposure bias", "L_static", "L_seq", "L_seq - L_static", "R_EB"]
    return interval_table(header, later, ("static", "sequential", "gap", "ratio"))


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
        # Standard MDLM without a memory, at any rate: the base has rate 0.
        names = [name for name in means if name == "base" or name.partition("-")[0] == "mdlm"]
        standard = [means[name] for name in names]
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
