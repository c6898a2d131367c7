"""
pictures.py: the pictures of a run: what it comes to, what a memory takes up, an answer's denoising,
losses, and the exposure bias.
"""

from pathlib import Path

import numpy as np

import data
from lab import report
from lab.report import PLAIN, as_floats, distinct, matching, mean_of, t_interval, title
from lab.tools import finite, written_aside
from lab.training import LOSSES

COLOURS = {"base": "tab:gray", "mdlm": "tab:red", "memdlm": "tab:blue"}
COLOURS |= {"memdlm_train": "tab:blue", "memdlm_train_inference": "tab:green"}
COLOURS |= {"base_inference": "black", "mdlm_inference": "tab:orange"}


def new_figure(rows: int, columns: int, width: float, height: float):
    """A figure and its axes (rows, columns), without pyplot, whose backend a notebook may set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_picture(figure, path: Path) -> None:
    """Writes a PNG file."""
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def draw_panels(panels: list[dict], path: Path) -> None:
    """Panels side by side; each is {"lines": [(xs, ys, style, label)], and what axes can set}."""
    figure, [axes] = new_figure(1, len(panels), max(6, 4.6 * len(panels)), 4.8)
    for axis, panel in zip(axes, panels):
        for xs, ys, style, label in panel.pop("lines"):
            axis.plot(xs, ys, **style, label=label)
        axis.set(**panel)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save_picture(figure, path)


def mean_by(records: list[dict], x: str, y: str) -> tuple[list, list]:
    """The distinct values of x, sorted, and the mean of y over seeds at each."""
    places = sorted(distinct(records, x))
    return places, [mean_of(matching(records, **{x: place}), y) for place in places]


def draw_losses(records: list[dict], path: Path) -> None:
    """The losses over the steps (Fig. 4), means over bases."""
    lines, words = [], ("training set, with its memory (leaks)", "training set", "held out")
    for method in ("mdlm", "memdlm"):
        found = matching(records, method=method)
        for key, text, dashes in zip(LOSSES, words, (":", "-", "--")):
            if method == "memdlm" or key != LOSSES[0]:
                style = {"color": COLOURS[method], "linestyle": dashes, "marker": "."}
                label = f"{title(PLAIN[method])}: {text}"
                lines.append((*mean_by(found, "step", key), style, label))
    labels = {"xlabel": "fine-tuning step", "ylabel": "MDLM loss on fixed noise"}
    draw_panels([{"lines": lines, **labels}], path)


def draw_exposure(records: list[dict], path: Path, colours=COLOURS) -> None:
    """Left: R_EB over the denoising, as in Fig. 3. Right: the two losses that it is made of."""
    left, right = [], []
    for method in distinct(records, "method"):
        found, style = matching(records, method=method), {"color": colours.get(method)}
        left.append((*mean_by(found, "mask_ratio", "ratio"), style, title(method)))
        for key, name, dashes in (("sequential", "L_seq", "-"), ("static", "L_static", ":")):
            label, dashed = f"{title(method)}: {name}", {**style, "linestyle": dashes}
            right.append((*mean_by(found, "mask_ratio", key), dashed, label))
    common = {"xlabel": "mask ratio (denoising runs to the right)", "xlim": (1, 0)}
    bias = {"lines": left, "ylabel": "R_EB = L_seq / L_static (1 is ideal)", **common}
    draw_panels([bias, {"lines": right, "ylabel": "-log p of the true tokens", **common}], path)


def draw_scores(axis, results: dict) -> None:
    """Scores at each length: a thin line a base, the mean with its interval."""
    names = {"base": "Base", "mdlm": "Standard\nMDLM\n\nat {}", "memdlm_train": "MemDLM"}
    base, lengths = results["config"]["run"]["length"], distinct(results["niah"], "length")
    for group, length in enumerate(lengths):
        rows = [matching(results["niah"], length=length, method=name) for name in names]
        scores = [list(report.seed_means(row, "score").values()) for row in rows]  # (3, seeds)
        xs = range(4 * group, 4 * group + 3)
        axis.plot(xs, scores, color="0.75", linewidth=0.8)
        for x, name, values in zip(xs, names, scores):
            mean, half = t_interval(values)
            axis.errorbar(x, mean, finite(half) or 0, fmt="o", capsize=4, color=COLOURS[name])
            axis.annotate(f"{mean:.2f}", (x, mean), (7, 3), textcoords="offset points")
    places = [4 * group + i for group in range(len(lengths)) for i in range(3)]
    texts = [one.format(f"{length / base:g}x") for length in lengths for one in names.values()]
    axis.set_xticks(places, texts, fontsize=8)
    axis.margins(x=0.12)
    axis.set(ylabel="score, mean over the tasks", title="Kept, means and single bases")


def draw_frontier(axis, points: list[dict]) -> None:
    """Learnt against kept: small marks are bases, large ones means; the arrow is at equal loss."""
    times, means = "4x" if "4x" in points[0] else list(points[0])[-1], {}
    for method in distinct(points, "method"):
        found = matching(points, method=method)
        learnt, kept = (as_floats(one[key] for one in found) for key in ("learnt", times))
        means[method] = learnt.mean(), kept.mean()
        style = {"color": COLOURS.get(method, COLOURS["mdlm"])}
        axis.scatter(learnt, kept, s=12, alpha=0.45, **style)
        axis.scatter(*means[method], s=70, zorder=3, **style)
        beside, side = ((-9, 5), "right") if method == "memdlm_train" else ((6, -14), "left")
        style |= {"textcoords": "offset points", "fontsize": 8, "ha": side}
        axis.annotate(title(method), means[method], beside, **style)
    x, y = means.pop("memdlm_train")
    standard = sorted(means.values())
    axis.plot(*zip(*standard), color=COLOURS["mdlm"], linewidth=1, zorder=2)
    arrow = {"arrowstyle": "->", "color": COLOURS["memdlm"], "linewidth": 1.6}
    axis.annotate("", (x, y), (x, report.at_equal(standard, x)), arrowprops=arrow)
    values = report.comparisons(points, times).get("equal_loss", {"values": []})["values"]
    gain = report.difference_text(values)
    axis.set_title(f"Learnt and kept; at equal loss {gain}", fontsize=10)
    axis.set(xlabel="training loss without a memory (to the left: more is learnt)")
    axis.set(ylabel=f"score at {times} (up: more is kept)")
    axis.margins(x=0.2)


def canvas_text(ids: list[int], tokenizer=data.TINY) -> str:
    """Ids as text, with an underscore for [MASK], and other special tokens by their names."""
    names = {token: name for name, token in tokenizer.specials.items()}
    names[tokenizer.mask] = " _"
    return "".join(names.get(token) or tokenizer.decode([token]) for token in ids)


def short_text(token: int) -> str:
    """A token as it stands in a picture."""
    return canvas_text([token]).replace("<|endoftext|>", "EOS").strip()


def median_view(views: list[dict]) -> dict:
    """The pair that is shown: of those with five masked words or more, noise among them, the median
    one by what the inner loop takes off the -log p of its noise words."""
    long = [one for one in views if len(one["noisy"]) >= 5 and any(one["noisy"])] or views
    means = [report.word_means([view], True) for view in long]
    return long[int(np.argsort([nll[0] - nll[-1] for nll in means])[len(long) // 2])]


def draw_words(axis, view: dict, names: list[str]) -> None:
    """One pair, word by word; above it, its answer as each stage sees it."""
    for k, (name, nll) in enumerate(zip(names, view["nll"])):
        places = np.arange(len(nll)) + (k - (len(names) - 1) / 2) * 0.8 / len(names)
        shade = str(0.8 * (1 - k / (len(names) - 1)))  # from light gray to black
        axis.bar(places, nll, 0.8 / len(names), label=name, color=shade)
    axis.set_xticks(range(len(view["places"])), [view["answer"][i] for i in view["places"]])
    for label, noisy in zip(axis.get_xticklabels(), view["noisy"]):
        label.set_color("tab:red" if noisy else "black")
    lines = ["the median pair; its noise words are red"]
    for k, hidden in enumerate(view["hidden"], 1):
        words = ("_" if one else word for one, word in zip(hidden, view["answer"]))
        lines.append(f"stage {k} sees: {' '.join(words)}")
    axis.set_title("\n".join(lines), fontsize=9)
    axis.set(ylabel="-log p")
    axis.legend(fontsize=8)


def draw_memory(views: list[dict], path: Path) -> None:
    """Left: mean -log p of noise words and of true ones over the inner loop. Right: one pair."""
    figure, [[left, right]] = new_figure(1, 2, 11, 4.2)
    stages = len(views[0]["nll"])
    names = ["before", *(f"after stage {k}" for k in range(1, stages))]
    for noisy, colour, label in ((True, "tab:red", "noise words"), (False, "0.4", "true words")):
        seeds = [matching(views, seed=seed) for seed in distinct(views, "seed")]
        found = [t_interval(k) for k in zip(*(report.word_means(one, noisy) for one in seeds))]
        means, halves = zip(*((mean, finite(half) or 0) for mean, half in found))
        style = {"marker": "o", "capsize": 4, "color": colour, "label": label}
        left.errorbar(range(stages), means, halves, **style)
    left.set_xticks(range(stages), names)
    left.set(ylabel="mean -log p of the masked answer words", ylim=(0, None))
    left.set(title="What a memory takes up: the bases, all pairs, t = 0.4")
    left.legend()
    draw_words(right, median_view(views), names)
    save_picture(figure, path)


def draw_states(axis, states: list[list[int]], truth: list[int]) -> None:
    """States of a denoising, a row each; under the last one the true answer, green where found."""
    axis.clear()
    middle, shown = {"ha": "center", "va": "center"}, len(truth) + 1  # a step a token
    for row, (before, state) in enumerate(zip([states[0], *states], states)):
        for place, (old, token) in enumerate(zip(before, state)):
            style = {"color": "0.75" if token == data.MASK else "black", **middle}
            if old != token:
                style |= {"color": "tab:blue", "weight": "bold"}
            axis.text(place, row, short_text(token), **style)
    right = [ours == true for ours, true in zip(states[-1], truth)]
    for place, (true, same) in enumerate(zip(truth, right) if len(states) == shown else ()):
        colour = "tab:green" if same else "tab:red"
        axis.text(place, shown, short_text(true), color=colour, **middle)
    axis.set(xlim=(-0.6, len(truth) - 0.4), ylim=(shown + 0.6, -0.6), xticks=[], ylabel="step")
    axis.set_yticks(range(shown + 1), [*map(str, range(shown)), "true"])
    told = f": {sum(right)} of {len(truth)} tokens right" if len(states) == shown else ""
    axis.set_title(f"The base answers its first test question{told}")


def draw_denoising(states: list[list[int]], truth: list[int], out: Path) -> None:
    """denoising.gif, a step a frame, and its last frame as denoising.png."""
    from matplotlib.animation import PillowWriter

    figure, [[axis]] = new_figure(1, 1, 0.72 * len(truth) + 0.8, 0.28 * len(states) + 0.9)
    writer, frames = PillowWriter(fps=2), [*range(1, len(states)), *[len(states)] * 6]
    with writer.saving(figure, out / "denoising.gif", dpi=80):
        for shown in frames:  # the last one stays for three seconds
            draw_states(axis, states[:shown], truth)
            writer.grab_frame()
    save_picture(figure, out / "denoising.png")


def draw_pictures(results: dict, states: list, truth: list[int], out: Path) -> None:
    """All pictures of a run. states, truth: a denoising, and the answer expected."""
    figure, [[left, right]] = new_figure(1, 2, 10.5, 4.2)
    draw_scores(left, results)
    draw_frontier(right, results["frontier"])
    save_picture(figure, out / "result.png")
    draw_memory(results["memory"], out / "memory.png")
    draw_denoising(states, truth, out)
    shown = ("base", "mdlm", "memdlm_train", "memdlm_train_inference")
    bias = [one for one in results["exposure_bias"] if one["method"] in shown]
    draw_exposure(bias, out / "exposure_bias.png")
    draw_losses(results["loss"], out / "loss.png")
