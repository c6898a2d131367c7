"""
pictures.py: the pictures of a run: what the memory does to one pair, one answer's denoising, the
exposure bias, the losses and the frontier.
"""

import math
from pathlib import Path

import numpy as np

import data
from lab.report import as_floats, by_unit, distinct, matching, mean_of, t_interval, title
from lab.tools import finite, written_aside
from lab.training import LOSSES

COLOURS = {"base": "tab:gray", "mdlm": "tab:red", "memdlm": "tab:blue"}
COLOURS |= {"memdlm_train": "tab:blue", "memdlm_train_inference": "tab:green"}
COLOURS |= {"base_inference": "black", "mdlm_inference": "tab:orange"}


def new_figure(rows: int, columns: int, width: float, height: float):
    """A figure and its axes (rows, columns). matplotlib is imported here, since training does
    without; and without pyplot, whose backend a notebook may have changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_picture(figure, path: Path) -> None:
    """Writes a PNG file."""
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


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


def draw_exposure(records: list[dict], path: Path, colours=COLOURS) -> None:
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


def canvas_text(ids: list[int], tokenizer=data.TINY) -> str:
    """Ids as text, with an underscore for [MASK], and other special tokens by their names."""
    names = {token: name for name, token in tokenizer.specials.items()}
    names[tokenizer.mask] = " _"
    return "".join(names.get(token) or tokenizer.decode([token]) for token in ids)


def short_text(token: int) -> str:
    """A token as it stands in a picture."""
    return canvas_text([token]).replace("<|endoftext|>", "EOS").strip()


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


def draw_pictures(results: dict, views: dict, out: Path) -> None:
    """All pictures of a run."""
    draw_memory(views["memory"], out / "memory.png")
    draw_denoising(views["states"], views["true"], out / "denoising.png")
    shown = ("base", "mdlm", "memdlm_train", "memdlm_train_inference")
    bias = [one for one in results["exposure_bias"] if one["method"] in shown]
    draw_exposure(bias, out / "exposure_bias.png")
    draw_losses(results["loss"], out / "loss.png")
    draw_frontier(results["frontier"], out / "frontier.png")
