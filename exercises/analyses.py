"""
analyses.py: the analyses of the paper's Sec. 4 on a laptop, ours beside the paper's.

    python memdlm.py --tiny
    python exercises/analyses.py fig6 fig11         some of figures.json
    python exercises/analyses.py all                all of them but step0

Each variant of the memory is trained from the bases of a finished `--tiny` run, on the batches and
under the masks of that run, so that it differs from the run's MemDLM by the variant alone. What is
measured is kept: started again, the command goes on where it was. Each figure becomes a picture and
a table in OUT. figures.json says what a variant changes of the run's settings, and what the paper
found (LLaDA-MoE, BABILong-1K). A difference is that from the default, paired by base; intervals are
95% t-intervals over bases, uncorrected.
"""

import math
import sys
import zlib
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from tqdm import tqdm

import memdlm
import sample
from data import TASKS, collate
from exercises.methods import exact_method, pretraining_with_memory
from lab import evaluate, pictures, report, tiny, tools, training, variants
from lab.tools import Parser, guarded, read_json, write_json, write_text
from model import UserError

FIGURES = read_json(Path(__file__).with_name("figures.json"))
FIGURE_HELP = "; ".join(f"{name}, {one['title']}" for name, one in FIGURES.items()).replace(
    "%", "%%"
)
VARIANTS = {name: one for figure in FIGURES.values() for name, one in figure["variants"].items()}
TIMES, SAMPLES = (1, 4), 32  # lengths that are scored, in lengths of the base; answers a task

# ---- one job: a variant from one base --------------------------------------------------------


def score(model, config: dict, seed: int, write: sample.Write | None) -> dict:
    """{"1x": mean score over the tasks, "4x": ...}, as `--tiny` scores; with `write`, after each
    prompt was written."""
    asked = Namespace(samples=SAMPLES, steps=None, block_length=None, threshold=0.95)
    scores = {}
    for times in TIMES:
        one = partial(evaluate.score_cell, model, write, length=times * config["length"])
        cells = [one(task, seed=seed, args=asked, wording=config["wording"]) for task in TASKS]
        scores[f"{times}x"] = sum(cell["score"] for cell in cells) / len(cells)
    return scores


def fine_tuned(run: Path, config: dict, variant: dict, seed: int, folder: Path) -> tuple:
    """The model of a variant, and the log of its training."""
    exact = variant.get("method") == "exact"
    training.METHODS["memdlm"] = exact_method if exact else memdlm.memory_method
    changed = config | variant.get("change", {})
    model, _ = training.open_run(run, seed, "base", "cpu")
    training.fine_tune(changed, model, "memdlm", seed, folder, "cpu", saving=50)
    model, meta = tools.load_model(folder / "memdlm.safetensors")
    return model, meta["log"]


def pretrained(config: dict, seed: int, folder: Path) -> tuple:
    """A base that has met a memory from its first step on, and its losses on the fine-tuning set,
    measured as those of the run's base."""
    own = variants.memory_of(config)
    training.METHODS["base"] = partial(pretraining_with_memory, own)
    model = training.pretrain(config, seed, folder, "cpu", saving=50)
    asked = (("train", config["noise"]), ("held out", 0.0))
    sets = [[collate(training.tiny_pairs(config, seed, *which))] for which in asked]
    return model.eval(), [training.measure_losses(model, *sets, own, seed, repeats=4)]


def measure(run: Path, out: Path, job: tuple[str, int]) -> dict:
    """The record of a job, (model of the run or variant, seed), made if OUT has it not. It belongs
    to the variant's settings and to the weights of the run that it starts from."""
    name, seed = job
    variant, config = VARIANTS.get(name, {}), tools.read_config(run)
    own = "memdlm" if "anchor_ratio" in variant else "base" if variant else name
    weights = training.checkpoint_path(run, seed, own).read_bytes()
    digest = zlib.crc32(repr((variant, zlib.crc32(weights))).encode())
    folder = out / f"{name}-{digest:08x}".replace(" ", "_") / f"seed{seed}"
    if (folder / "record.json").exists():
        return read_json(folder / "record.json")
    if variant.get("method") == "step0":
        model, log = pretrained(config, seed, folder)
    elif own == "base" and variant:
        model, log = fine_tuned(run, config, variant, seed, folder)
    else:  # a model of the run; what its base has learnt, Standard MDLM's log says at step 0
        model, meta = training.open_run(run, seed, own, "cpu")
        log = meta["log"]
        if name == "base":
            log = training.open_run(run, seed, "mdlm", "cpu")[1]["log"][:1]
    write = None
    if "anchor_ratio" in variant:  # the paper's step size and its one pass
        memory = replace(variants.memory_of(config), lr=0.1)
        write = sample.Write(memory, variant["anchor_ratio"])
    record = {"variant": name, "seed": seed, "with_memory": log[-1][training.LOSSES[0]]}
    record |= {"learnt": log[-1][training.LOSSES[1]], "kept": score(model, config, seed, write)}
    write_json(folder / "record.json", record)
    return record


# ---- tables and pictures ---------------------------------------------------------------------


class Line(NamedTuple):
    """A variant of a figure."""

    name: str
    paper: float  # the paper's score minus that of its default; nan: none is known
    numbers: dict[str, list[float]]  # column -> its values, one a base

    def sign(self) -> int:
        """Whether it is better (1) or worse (-1) than the default by more than its interval."""
        mean, half = report.t_interval(self.numbers["4x minus default"])
        return 0 if abs(mean) <= half else int(math.copysign(1, mean))


def line_of(name: str, paper: float, records: dict, default: str, controls: list) -> Line | None:
    """records: model or variant -> seed -> record. A seed whose training has exploded, so that a
    loss is no number, is left out, and the name says how many are left; without any, None."""
    ours, columns = dict(records[name]), {}
    for seed, one in records[name].items():
        if None in (one["learnt"], one["with_memory"]):
            del ours[seed]
    if len(ours) < len(records[name]):
        name = f"{name} (n = {len(ours)})"
    if not ours:
        return None
    columns["train, with memory"] = [one["with_memory"] for one in ours.values()]
    columns["learnt"] = [one["learnt"] for one in ours.values()]
    for times in ("1x", "4x"):
        columns[times] = [one["kept"][times] for one in ours.values()]
    before = [records[default][seed]["kept"]["4x"] for seed in ours]
    columns["4x minus default"] = [b - a for a, b in zip(before, columns["4x"])]
    standard = []
    for seed, one in ours.items():
        known = [records[control][seed] for control in controls]
        points = [(two["learnt"], two["kept"]["4x"]) for two in known if two["learnt"] is not None]
        standard.append(report.at_equal(points, one["learnt"]))
    gains = [b - a for a, b in zip(standard, columns["4x"])]
    columns["4x minus Standard MDLM at equal learnt loss"] = gains
    return Line(name, paper, columns)


def verdict(lines: list[Line]) -> str:
    """A sentence: whether our differences from the default are the paper's."""
    clear = [line for line in lines if line.sign()]
    if all(math.isnan(line.paper) for line in lines):
        found = [f"{line.name} is {'better' if line.sign() > 0 else 'worse'}" for line in clear]
        return f"Clear differences from the default: {'; '.join(found) or 'none'}."
    agree = [line.name for line in clear if line.sign() * line.paper > 0]
    against = [line.name for line in clear if line.sign() * line.paper < 0]
    text = f"{len(lines)} differences from the default. As in the paper: "
    text += f"{'; '.join(agree) or 'none'}. Against it: {'; '.join(against) or 'none'}. "
    return text + f"Not told apart from zero: {len(lines) - len(clear)}."


def table(title: str, lines: list[Line], seeds: list[int]) -> str:
    """A figure's table in markdown, and its verdict."""
    rows = []
    for line in lines:
        cells = [line.name, "-" if math.isnan(line.paper) else f"{line.paper:+.3f}"]
        for key, values in line.numbers.items():
            text = report.difference_text if "minus" in key else report.interval_text
            cells.append(text(values))
        rows.append(cells)
    found = report.markdown(["variant", "paper", *lines[0].numbers], rows)
    told = f"n = {len(seeds)} bases, {SAMPLES} answers a task and length."
    return "\n".join([f"## {title}", "", found, "", f"{verdict(lines[1:])} {told}", ""])


def draw(title: str, lines: list[Line], path: Path) -> None:
    """The paper's differences from its default, where it has any, and beside them ours with their
    intervals, on one scale."""
    means, halves = zip(*(report.t_interval(line.numbers["4x minus default"]) for line in lines))
    halves, paper = [tools.finite(half) or 0 for half in halves], [one.paper for one in lines]
    panels = {"ours (4x): score minus the default's": (means, halves, "tab:blue")}
    if not any(map(math.isnan, paper)):
        panels = {
            "paper (BABILong-1K): score minus the default's": (paper, [0] * len(lines), "tab:gray")
        } | panels
    reach = 1.1 * max(abs(x) + half for xs, wide, _ in panels.values() for x, half in zip(xs, wide))
    figure, [axes] = pictures.new_figure(
        1, len(panels), 1.5 + 4 * len(panels), 1.5 + 0.4 * len(lines)
    )
    for axis, (whose, (xs, wide, colour)) in zip(axes, panels.items()):
        axis.errorbar(xs, range(len(lines)), xerr=wide, fmt="o", color=colour, capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=whose, xlim=(-reach, reach))
        axis.locator_params(axis="x", nbins=5)
        names = [line.name for line in lines] if axis is axes[0] else [""] * len(lines)
        axis.set_yticks(range(len(lines)), names)
        axis.set_ylim(len(lines) - 0.5, -0.5)
    figure.suptitle(title.replace(" (", "\n("), fontsize=10)
    pictures.save_picture(figure, path)


def figure_text(name: str, records: dict, controls: list[str], out: Path) -> str:
    """Draws a figure, and returns its table."""
    figure, base = FIGURES[name], FIGURES[name].get("default", "memdlm")
    default = line_of(base, 0.0, records, base, controls)
    if default is None:
        raise UserError(f"every training of {base} in the run has exploded: nothing to compare.")
    lines = [default._replace(name="default")]
    for variant, one in figure["variants"].items():
        paper = one["paper"] - figure["paper"] if "paper" in one else math.nan
        line = line_of(variant, paper, records, base, controls)
        lines += [line] if line else []
    draw(figure["title"], lines, out / f"{name}.png")
    text = table(figure["title"], lines, list(records[base])) + f"\n![{name}]({name}.png)\n"
    write_text(out / f"{name}.md", text)
    return text


# ---- command line ----------------------------------------------------------------------------


def check_variants() -> None:
    """Refuses a line of figures.json that would change nothing."""
    settings = vars(tiny.build_parser().parse_args(["--tiny"]))
    for name, one in VARIANTS.items():
        for key in one.get("change", {}).keys() - settings.keys():
            raise UserError(f"figures.json: {name} changes {key}, which is no setting.")


def open_folders(run: Path, out: Path) -> dict:
    """The settings of a run, if it is one that can be analysed and OUT is not another one's."""
    config, path = tools.read_config(run), out / "config.json"
    if config.get("student"):
        raise UserError(f"{run} was trained by {config['student']}: take a run of this code.")
    for job in evaluate.models_of(config):
        training.open_run(run, *job, "cpu")  # it is finished
    if path.exists() and read_json(path) != {"run": config}:
        raise UserError(f"{out} has the analyses of another run: name another folder.")
    write_json(path, {"run": config})
    return config


def run(arguments: list[str]) -> None:
    """Measures what is missing, then draws."""
    parser = Parser("Draws the paper's analyses of the memory, trained on the bases of a run.")
    flag = parser.add_argument
    flag("names", nargs="+", choices=[*FIGURES, "all"], help=FIGURE_HELP)
    flag("--run", type=Path, default=Path("runs/tiny"), help="folder of a finished --tiny run")
    flag("--out", type=Path, default=Path("runs/analyses"), help="folder for what is written")
    args = parser.parse_args(arguments)
    every = [name for name in FIGURES if name != "step0"] if "all" in args.names else []
    names = list(dict.fromkeys([*every, *(name for name in args.names if name != "all")]))
    check_variants()
    config = open_folders(args.run, args.out)
    controls = ["base", *(arm for arm in training.arms(config) if arm != "memdlm")]
    wanted = [*controls, "memdlm", *(v for name in names for v in FIGURES[name]["variants"])]
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    jobs = [(name, seed) for name in wanted for seed in seeds]
    with training.workers("cpu") as each:
        done = each(partial(measure, args.run, args.out), jobs)
        measured = list(tqdm(done, "variants", total=len(jobs)))
    records: dict = {name: {} for name in wanted}
    for one in sorted(measured, key=lambda one: one["seed"]):
        records[one["variant"]][one["seed"]] = one
    print("\n".join(figure_text(name, records, controls, args.out) for name in names))


if __name__ == "__main__":
    guarded(lambda: run(sys.argv[1:]))
