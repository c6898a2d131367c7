"""
report.py: tables and pictures of an evaluation by benchmark.py.

They are made of two lists of records. `results["niah"]` has one for each row and cell, {"method",
"task", "length", "seed", "n", "score", "ci95", "scores", "steps", "full"}: the score is None where
memory ran out, and prompt and answer fill that share of the length ("full"). `answers` are lines of
predictions.jsonl, one for each question.

  score_table     Tables 1 and 2 (eval_niah.py)        niah.png          score over length (Fig. 5)
  babilong_table  the mean of BABILong's tasks         anchor_ratio.png  over the ratio (Fig. 8)
  cell_table      all that it takes to quote a score   depth.png         where needles are found
  exposure_table  the exposure bias R_EB               exposure_bias.png R_EB (Fig. 3)
  cost_table      time and GPU memory of an answer

Reading list: Wilson 1927, "Probable inference, the law of succession, and statistical inference"
(the interval); Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack (the depth grid).

Glossary
  name here    | meaning
  method       | a row of the tables: a key of TITLES, in a sweep with the anchor ratio behind an @
  anchor ratio | share of the prompt that the memory's anchor masks (Sec. 4.5)
  depth        | where in the haystack the needle is: 0 where it begins, 1 where it ends
"""

import math
from pathlib import Path

import numpy as np

from lab.pictures import COLOURS, draw_exposure, draw_panels, mean_by, new_figure, save_picture
from lab.report import (
    difference_table,
    distinct,
    exposure_table,
    markdown,
    matching,
    mean_of,
    number_text,
    score_table,
    title,
)

BIAS = "exposure bias"  # what stands in place of a task's name where R_EB is measured


def wilson_interval(mean: float, n: int) -> list[float]:
    """95% interval of the mean of n scores. It is made for scores of 0 and 1, and too wide for
    shares between them; unlike mean ± 1.96 s it stays in [0, 1] and does not vanish at its ends."""
    z = 1.959964
    centre = mean + z * z / (2 * n)
    spread = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


# ---- tables ----------------------------------------------------------------------------------


def babilong_table(records: list[dict]) -> str:
    """BABILong's headline number: the mean over its tasks by length. Nothing for a single task."""
    records = [one for one in records if one["task"].startswith("babilong_")]
    tasks, lengths = distinct(records, "task"), distinct(records, "length")
    rows = []
    for method in distinct(records, "method"):
        found = matching(records, method=method)
        means = [mean_of(matching(found, length=length), "score") for length in lengths]
        rows.append([title(method), *(number_text(mean, 3) for mean in means)])
    names = " ".join(task.removeprefix("babilong_") for task in tasks)
    return markdown([f"BABILong, mean of {names}", *lengths], rows) if len(tasks) > 1 else ""


def score_text(record: dict) -> str:
    """0.500 [0.095, 0.905] (harness 1.000): score, interval, and the score by another rule."""
    if record["score"] is None:
        return "out of memory"
    low, high = record["ci95"]
    text = f"{record['score']:.3f} [{low:.3f}, {high:.3f}]"
    for name, mean in list(record["scores"].items())[1:]:
        text += f" ({name} {mean:.3f})"
    return text


def cell_table(results: dict) -> str:
    """Every row and cell with all that it takes to quote it."""
    rows, place = [], results["machine"]
    for record in results["niah"]:
        steps = "-" if record["steps"] is None else f"{record['steps']:g}"
        cells = [title(record["method"]), record["task"], record["length"], record["n"]]
        cells += [score_text(record), steps, record["seed"], place["device"], place["dtype"]]
        rows.append(cells)
    header = ["method", "task", "length", "n", "score [95%]", "steps", "seed", "device", "dtype"]
    return markdown(header, rows)


def cost_table(answers: list[dict]) -> str:
    """Seconds an answer by row and length, the making of its prompt included, and the peak memory
    of a GPU. (These stay out of results.json, which is the same after a stop.)"""
    rows = []
    for method in distinct(answers, "method"):
        given = matching(answers, method=method)
        for length in distinct(given, "length"):
            found = matching(given, length=length)
            peak = max(one.get("peak_memory_gib", math.nan) for one in found)
            cells = [title(method), length or BIAS, f"{mean_of(found, 'seconds'):.3g}"]
            rows.append([*cells, number_text(peak)])
    return markdown(["method", "length", "seconds an answer", "GPU peak, GiB"], rows)


def notes(results: dict) -> str:
    """What the tables do not show: prompts that are short of their length, and answers that lie in
    the same folder and were not asked for this time."""
    full = {}
    for one in results["niah"]:
        if one["full"] is not None and one["full"] < 0.95:
            full[f"{one['task']} {one['length']}"] = f"{one['full']:.0%}"
    text = "".join(f"\nPrompts of {cell} are {share} full." for cell, share in full.items())
    if results["left_out"]:
        text += f"\nIn this folder, but not in these tables: {', '.join(results['left_out'])}."
    return text


def report(results: dict) -> str:
    """All tables of results.json, as markdown ready to paste."""
    records, pairs = results["niah"], results["pairs"]
    head = ", ".join(f"{key} {value}" for key, value in results["machine"].items()) + "."
    if results["config"]["memory"]:
        head += f" Prompts are written by rule '{results['config']['write']}'."
    tables = []
    if records:
        n = max(distinct(records, "n"))
        head = f"Seed {records[0]['seed']}, {n} questions a cell; {head}"
        tables += [score_table(records), babilong_table(records), difference_table(results)]
    if pairs:
        head += f" Exposure bias: {pairs} pairs, {results['config']['bias_steps']} steps."
        table = exposure_table(results["exposure_bias"])
        for place in matching(results["failed"], task=BIAS):
            table += f"\n| {title(place['method'])} | out of memory | - | - |"
        tables.append(table)
    if records:
        tables.append(cell_table(results))
    return "\n\n".join(table for table in [head + notes(results), *tables] if table)


# ---- depths: where needles are found ---------------------------------------------------------

DEPTH_BINS = 5


def depth_records(answers: list[dict]) -> list[dict]:
    """Mean scores by the depth of the needle, in DEPTH_BINS equal bins: {"method", "length",
    "depth": number of the bin, "score", "n"}. Only needles that have no other beside them count."""
    groups: dict[tuple, list[float]] = {}
    for one in answers:
        if one["task"].startswith("niah_single"):
            depth = min(int(one["depth"] * DEPTH_BINS), DEPTH_BINS - 1)  # 1 ends the last bin
            place = (one["method"], one["length"], depth)
            groups.setdefault(place, []).append(one["scores"]["ruler"])
    records = []
    for (method, length, depth), scores in sorted(groups.items()):
        record = {"method": method, "length": length, "depth": depth}
        records.append(record | {"score": float(np.mean(scores)), "n": len(scores)})
    return records


def draw_depths(records: list[dict], path: Path) -> None:
    """A heat map of scores for each row of the table: depth down, length across. Cells without a
    needle stay white."""
    methods, lengths = distinct(records, "method"), sorted(distinct(records, "length"))
    width = max(3.2, 1.6 + 0.55 * len(lengths)) * len(methods)
    figure, [axes] = new_figure(1, len(methods), width, 3.4)
    for axis, method in zip(axes, methods):
        grid = np.full((DEPTH_BINS, len(lengths)), math.nan)
        for one in matching(records, method=method):
            row, column = one["depth"], lengths.index(one["length"])
            grid[row, column] = one["score"]
            colour = "white" if one["score"] < 0.6 else "black"
            axis.text(column, row, f"{one['score']:.2f}", ha="center", va="center", color=colour)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set(title=title(method).replace(", ", "\n"), xlabel="length in tokens", yticks=[])
    percent = 100 // DEPTH_BINS
    names = [f"{i * percent}-{(i + 1) * percent}%" for i in range(DEPTH_BINS)]
    axes[0].set_yticks(range(DEPTH_BINS), names)
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes.tolist(), label="score")
    save_picture(figure, path)


# ---- curves ----------------------------------------------------------------------------------


def draw_scores(records: list[dict], path: Path) -> None:
    """The score over the length, one panel for each task."""
    panels = []
    for task in distinct(records, "task"):
        lines, found = [], matching(records, task=task)
        for method in distinct(found, "method"):
            points = mean_by(matching(found, method=method), "length", "score")
            lines.append((*points, {"color": COLOURS.get(method), "marker": "o"}, title(method)))
        labels = {"title": task, "xlabel": "length in tokens", "ylabel": "score"}
        panels.append({"lines": lines, "ylim": (-0.03, 1.03), **labels})
    draw_panels(panels, path)


def draw_sweep(swept: list[dict], records: list[dict], path: Path) -> None:
    """Score over the anchor ratio (Fig. 8), a panel for each task and length. The row of the same
    checkpoint without a memory is a level line."""
    name, panels = swept[0]["method"].partition("@")[0], []
    plain = name.removesuffix("_inference")
    for task, length in dict.fromkeys((one["task"], one["length"]) for one in swept):
        points = []
        for one in matching(swept, task=task, length=length):
            points.append((float(one["method"].partition("@")[2]), one["score"]))
        ratios, scores = zip(*sorted(points))
        lines = [(ratios, scores, {"color": COLOURS[name], "marker": "o"}, title(name))]
        for one in matching(records, method=plain, task=task, length=length):
            level = [one["score"]] * len(ratios)
            lines.append((ratios, level, {"color": COLOURS[plain]}, title(plain)))
        labels = {"title": f"{task} {length}", "xlabel": "anchor ratio", "ylabel": "score"}
        panels.append({"lines": lines, "ylim": (-0.03, 1.03), **labels})
    draw_panels(panels, path)


def draw_pictures(results: dict, out: Path) -> None:
    """A picture of everything that was measured. Rows of a sweep have a picture of their own. One
    of an earlier command that measured something else is deleted."""
    for name in ("niah.png", "anchor_ratio.png", "depth.png", "exposure_bias.png"):
        (out / name).unlink(missing_ok=True)
    scored = [one for one in results["niah"] if one["score"] is not None]
    swept = [one for one in scored if "@" in one["method"]]
    over_length = [one for one in scored if one not in swept]
    if over_length:
        draw_scores(over_length, out / "niah.png")
    if swept:
        draw_sweep(swept, scored, out / "anchor_ratio.png")
    if results["depths"]:
        draw_depths(results["depths"], out / "depth.png")
    if results["exposure_bias"]:
        colours = dict(COLOURS)
        for method in distinct(results["exposure_bias"], "method"):
            ratio = method.partition("@")[2]
            if ratio:
                colours[method] = (float(ratio), 0.0, 1 - float(ratio))  # from blue to red
        draw_exposure(results["exposure_bias"], out / "exposure_bias.png", colours)
