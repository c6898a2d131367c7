"""
report.py: what the records of a run say: statistics over seeds, sentences, tables.

Each seed has a base and a fine-tuning set of its own; intervals are 95% t-intervals over seeds.
*Learnt* is the training loss without a memory, *kept* the score: what is left of what the base
could do. A lower rate learns less and keeps more, so methods are compared at equal learnt loss.

Reading list: learning and forgetting with LoRA, Biderman et al. 2024, arXiv 2405.09673.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np

from eval_niah import exposure_ratio
from lab.tools import finite
from lab.training import LOSSES, arms

# The rows of Table 1, and two controls: a memory for models that were not trained with one.
TITLES = {
    "base": "Base",
    "mdlm": "Standard MDLM",
    "memdlm_train": "MemDLM (Train-Only)",
    "base_inference": "Base, memory at inference",
    "mdlm_inference": "Standard MDLM, memory at inference",
    "memdlm_train_inference": "MemDLM (Train & Inference)",
}
# The row of a checkpoint without a memory, and that with one.
PLAIN = {"base": "base", "mdlm": "mdlm", "memdlm": "memdlm_train"}
WITH_MEMORY = {name: f"{row}_inference" for name, row in PLAIN.items()}


def title(method: str) -> str:
    """A row's name. "mdlm-8e-05": at another rate; "memdlm_train_inference@0.4": anchor ratio."""
    name, _, ratio = method.partition("@")
    name, _, rate = name.partition("-")
    text = TITLES[name] + (f", rate {rate}" if rate else "")
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


def seed_means(records: list[dict], key: str) -> dict[int, float]:
    """Seed -> the mean of a field over all that the seed has."""
    seeds = distinct(records, "seed")
    return {seed: mean_of(matching(records, seed=seed), key) for seed in seeds}


def bias_records(curves: dict[str, list], plain: dict[str, str]) -> list[dict]:
    """A record for each row and mask ratio. plain: the row of its checkpoint without a memory."""
    records = []
    for method, curve in curves.items():
        ratios = exposure_ratio(curve, curves[plain[method]])
        for (mask_ratio, static, sequential), ratio in zip(curve, ratios):
            values = {"static": static, "sequential": sequential, "ratio": ratio}
            values["gap"] = sequential - static
            record = {"method": method, "mask_ratio": mask_ratio}
            records.append(record | {key: finite(value) for key, value in values.items()})
    return records


# ---- statistics ----------------------------------------------------------------------------------
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


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
    """What each model has learnt, the training loss without a memory, and what it has kept of the
    base (Fig. 5), its scores: {"method": row, "seed", "learnt", "1x": score, "4x": score, ...}."""
    points = []
    for seed, name in product(distinct(results["loss"], "seed"), ("base", *arms(config))):
        # Of the base, the loss is what Standard MDLM's log says before its first step.
        logged = matching(results["loss"], seed=seed, method="mdlm" if name == "base" else name)
        point, kept = {"method": PLAIN.get(name, name), "seed": seed}, {}
        for length in distinct(results["niah"], "length"):
            scored = matching(results["niah"], length=length, **point)
            kept[f"{length / config['length']:g}x"] = mean_of(scored, "score")
        learnt = logged[0 if name == "base" else -1]["train_without_memory"]
        [cost] = matching(results["training"], seed=seed, name=name)
        if cost["skipped_updates"] >= config["steps"] > 0:  # it is still the base, whatever it says
            learnt = None
        points.append(point | {"learnt": learnt, **kept})
    return points


def comparisons(points: list[dict], times: str = "4x") -> dict[str, dict]:
    """MemDLM (Train-Only) against Standard MDLM: {name: {"values": one a seed, "difference": their
    mean, "ci95": its interval}}. "equal_rate" is the difference at one learning rate; of it
    "lower_rate" is what Standard MDLM gains by a rate at which it learns as little, and the rest is
    "equal_loss", which was chosen beforehand. A seed whose loss is no number is left out."""
    gains, found = [], {}
    for seed in distinct(points, "seed") if times in points[0] else []:
        ours = matching(points, seed=seed)
        models = {one["method"]: (one["learnt"], one[times]) for one in ours}
        if None not in [learnt for learnt, _ in models.values()]:
            (learnt, score), (_, same) = models.pop("memdlm_train"), models["mdlm"]
            lower = at_equal(list(models.values()), learnt)  # the base is Standard MDLM at rate 0
            gains.append((score - same, lower - same, score - lower))
    for name, values in zip(("equal_rate", "lower_rate", "equal_loss"), zip(*gains)):
        mean, half = t_interval(values)
        ci95 = [mean - half, mean + half] if math.isfinite(half) else None
        found[name] = {"values": list(values), "difference": mean, "ci95": ci95}
    return found


# ---- sentences and tables ------------------------------------------------------------------------


def number_text(value: float | None, digits: int = 2) -> str:
    """0.83, or "-" for nan and None."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval_text(values: Iterable[float]) -> str:
    """0.183 ± 0.081, the 95% t-interval over seeds; the value alone where there is one."""
    mean, half = t_interval(list(values))
    return number_text(mean, 3) + (f" ± {half:.3f}" if math.isfinite(half) else "")


def difference_text(values: Sequence[float]) -> str:
    """+0.183 [+0.102, +0.264], a mean difference and its 95% t-interval over seeds."""
    mean, half = t_interval(values) if values else (math.nan, math.inf)
    interval = f" [{mean - half:+.3f}, {mean + half:+.3f}]" if math.isfinite(half) else ""
    return f"{mean:+.3f}{interval}" if math.isfinite(mean) else "-"


def sentences(found: dict[str, dict]) -> str:
    """The comparisons in words, and what the interval of the last one allows to say."""
    if not found:
        return "Nothing can be compared: there is no score at 4x, or no finite loss."
    rate, lower, rest = (difference_text(one["values"]) for one in found.values())
    n, (low, high) = len(found["equal_loss"]["values"]), found["equal_loss"]["ci95"] or (0, 0)
    verdict = "no difference is shown" if n > 1 else "one base decides nothing"
    if low > 0 or high < 0:
        verdict = "the memory is more than a lower rate" if low > 0 else "a lower rate does better"
    return (
        f"At the same learning rate MemDLM scores {rate} more than Standard MDLM at 4x.\n"
        f"A lower rate, at which Standard MDLM learns as little, gives {lower} of this as well;\n"
        f"the rest, at equal learnt loss, is {rest}, n = {n}: {verdict}."
    )


def word_means(views: list[dict], noisy: bool) -> list[float]:
    """The mean -log p of the masked words that are noise, or not, before and after each stage."""
    stages = range(len(views[0]["nll"]))
    words = [(one["nll"], i) for one in views for i, n in enumerate(one["noisy"]) if n == noisy]
    return [float(np.mean([nll[k][i] for nll, i in words])) if words else math.nan for k in stages]


def memory_text(views: list[dict]) -> str:
    """What the inner loop takes up of noise words and of true ones, the mean over bases."""
    seeds, parts = [matching(views, seed=seed) for seed in distinct(views, "seed")], []
    for name, noisy in (("noise", True), ("true", False)):
        means = np.mean([word_means(found, noisy) for found in seeds], axis=0)
        parts.append(f"{name} words {' -> '.join(map(number_text, means))}")
    return f"Mean -log p before the inner loop and after each stage: {', '.join(parts)}"


def markdown(header: list, rows: list[list]) -> str:
    """A table, ready to paste."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main_table(results: dict) -> str:
    """Learnt and kept by row; in the last row, with the longest prompts written."""
    points, length = results["frontier"], results["config"]["run"]["length"]
    keys, written = [key for key in points[0] if key not in ("method", "seed")], []
    for one in matching(results["niah"], method="memdlm_train_inference"):
        score = {f"{one['length'] / length:g}x": one["score"]}
        written.append(dict.fromkeys(keys) | one | score)
    return interval_table(["mean score over the tasks", *keys], [*points, *written], keys)


def summary(results: dict) -> str:
    """What a run prints when it ends."""
    parts = [memory_text(results["memory"]), main_table(results), sentences(results["comparisons"])]
    for one in results["training"]:
        if one["skipped_updates"]:
            who = f"{one['name']} of seed {one['seed']}"
            parts.append(f"{who}: {one['skipped_updates']} updates skipped, being not finite.")
    return "\n\n".join(parts)


def score_table(records: list[dict]) -> str:
    """Tables 1 and 2: each row's score, the mean over seeds, by length and task; and over tasks."""
    tasks, lengths = distinct(records, "task"), distinct(records, "length")
    header = ["method", *(f"{task} {length}" for length in lengths for task in tasks)]
    header += [f"mean {length}" for length in lengths]
    rows = []
    for method in distinct(records, "method"):
        found = [matching(records, method=method, length=length) for length in lengths]
        scores = [[mean_of(matching(part, task=task), "score") for task in tasks] for part in found]
        means = [f"**{number_text(float(np.mean(part)), 3)}**" for part in scores]
        rows.append([title(method), *(number_text(one) for part in scores for one in part), *means])
    return markdown(header, rows)


# The paper's claims at equal rate, against the base, and what a memory at inference gains.
DIFFERENCES = [("memdlm_train", "mdlm"), ("mdlm", "base"), ("memdlm_train", "base")]
DIFFERENCES += [("base_inference", "base"), ("mdlm_inference", "mdlm")]
DIFFERENCES += [("memdlm_train_inference", "memdlm_train")]


def difference_table(results: dict) -> str:
    """Differences of rows at each length, paired by seed, with their 95% intervals."""
    records, rows = results["niah"], []
    lengths, there = distinct(records, "length"), distinct(records, "method")
    for pair in DIFFERENCES:
        if {*pair} <= {*there}:
            cells = []
            for length in lengths:
                found = [matching(records, method=method, length=length) for method in pair]
                ours, theirs = (seed_means(part, "score") for part in found)
                gains = [score - theirs[seed] for seed, score in ours.items() if seed in theirs]
                cells.append(difference_text(gains))
            rows.append([" minus ".join(map(title, pair)), *cells])
    return markdown(["difference, mean over tasks", *lengths], rows) if rows else ""


def interval_table(header: list, records: list[dict], keys: Sequence[str], name=title) -> str:
    """The mean of some fields for each row, with 95% t-intervals over seeds."""
    rows = []
    for method in distinct(records, "method"):
        found = matching(records, method=method)
        cells = [interval_text(seed_means(found, key).values()) for key in keys]
        rows.append([name(method), *cells])
    return markdown(header, rows)


def exposure_table(records: list[dict]) -> str:
    """Means over the mask ratios below 1, where the two states differ. As a ratio R_EB rewards a
    bad static loss: the gap beside it does not."""
    later = [one for one in records if one["mask_ratio"] < 1]
    header = ["exposure bias", "L_static", "L_seq", "L_seq - L_static", "R_EB"]
    return interval_table(header, later, ("static", "sequential", "gap", "ratio"))


def report(results: dict) -> str:
    """All tables of a run, as markdown."""
    where = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    seeds, n = distinct(results["niah"], "seed"), results["niah"][0]["n"]
    rule = results["config"]["evaluation"]["write"]
    head = f"Seeds {seeds}, {n} answers a task and length; {where}; prompts are written by {rule}."
    tables = [head, summary(results), difference_table(results)]
    for length in distinct(results["niah"], "length"):
        tables.append(score_table(matching(results["niah"], length=length)))
    tables.append(exposure_table(results["exposure_bias"]))
    header = ["last step", "train, with memory (leaks)", "train, without", "held out, without"]
    final = matching(results["loss"], step=max(distinct(results["loss"], "step")))
    tables.append(interval_table(header, final, LOSSES, lambda name: title(PLAIN.get(name, name))))
    return "\n\n".join(tables)
