"""
overshoot.py: for which step sizes the inner loop is stable, on the models of finished runs.

    python assets/overshoot.py runs/old runs/tiny --out assets/overshoot.png

For each run it takes the base and the MemDLM model of up to three seeds, and goes through the inner
loop on the pairs of the seed at several step sizes. Left: the share of the memories
whose last step raises the loss that it descends. Right: the loss that the outer step then sees.
It also prints, for the first run, what each stage does to the row that suffers most at step size 1.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import memdlm
from lab import pictures, report, tools, training, variants

RATES = (0.1, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0)


def measure(run: Path, name: str) -> list[dict]:
    """One record for each seed and step size."""
    config, records = tools.read_config(run), []
    for seed in range(config["seed"], config["seed"] + min(3, config["seeds"])):
        model, _ = training.open_run(run, seed, name, "cpu")
        batches = [data.collate(training.tiny_pairs(config, seed, noise=config["noise"]))]
        for rate in RATES:
            memory = replace(variants.memory_of(config), lr=rate)
            losses = training.measure_losses(model, batches, batches, memory, seed)
            records.append({"rate": rate, **losses})
    return records


def row_losses(model, batch, anchor, stages, phi_0, memory) -> list:
    """Each row's part of the outer loss, (B,), with phi_0, phi_1 and phi_2."""
    row, found = anchor.masked.nonzero()[:, 0], []
    for nll in memdlm.nll_by_stage(model, batch, anchor, stages, phi_0, memory):
        parts = torch.zeros(len(anchor.t)).index_add(0, row, nll / (anchor.t[row] + 1e-6))
        found.append(parts / batch.maskable.sum())
    return found


@torch.no_grad()
def show_worst_row(run: Path) -> None:
    """One row, whose loss the second stage raises most at step size 1, at several step sizes."""
    config, rows = tools.read_config(run), {}
    for rate in (1.0, 0.25, 0.5, 2.0):
        memory, worst = replace(variants.memory_of(config), lr=rate), []
        for seed in range(config["seed"], config["seed"] + min(3, config["seeds"])):
            model, _ = training.open_run(run, seed, "memdlm", "cpu")
            batch = data.collate(training.tiny_pairs(config, seed, noise=config["noise"]))
            [anchor], draws = training.even_anchors([batch], seed), memdlm.generator_for(seed)
            stages = memdlm.make_stages(anchor, batch.maskable, memory, draws)
            phi_0 = memdlm.init_fast(model, memory, len(batch.x0), draws)
            losses = row_losses(model, batch, anchor, stages, phi_0, memory)
            i = rows.setdefault(seed, int((losses[2] - losses[1]).argmax()))
            values = [part[i].item() for part in losses]
            worst.append((values[2] - values[1], seed, anchor.t[i], anchor.masked[i].sum(), values))
        if rate == 1.0:
            chosen = max(worst)[1]
        [(_, seed, t, count, values)] = [one for one in worst if one[1] == chosen]
        numbers = " -> ".join(f"{value:.3f}" for value in values)
        print(f"step size {rate}: seed {seed}, a row with t {t:.3f}, {count} masked: {numbers}")


def show(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, draws the picture."""
    panels = [[], []]
    show_worst_row(Path(arguments.runs[0]))
    for run in map(Path, arguments.runs):
        for name, dashes in (("base", ":"), ("memdlm", "-")):
            records = measure(run, name)
            for lines, key in zip(panels, ("overshoot", "train_with_memory")):
                found = [report.matching(records, rate=rate) for rate in RATES]
                values = [report.mean_of(part, key) for part in found]
                print(f"{run} {name} {key}:", *(f"{value:.3f}" for value in values))
                style = {"marker": "o", "linestyle": dashes, "color": f"C{len(lines) // 2}"}
                lines.append((RATES, values, style, f"{run}, {name}"))
    share = {"xlabel": "step size of the inner loop", "ylabel": "share of memories that overshoot"}
    loss = {"xlabel": "step size of the inner loop", "ylabel": "loss that the outer step sees"}
    panels = [{"lines": panels[0], **share}, {"lines": panels[1], **loss, "yscale": "log"}]
    pictures.draw_panels(panels, Path(arguments.out))


if __name__ == "__main__":
    parser = tools.Parser("Draws for which step sizes the inner loop is stable.")
    parser.add_argument("runs", nargs="+", help="folders of finished --tiny runs")
    parser.add_argument("--out", default="assets/overshoot.png", help="the picture")
    tools.guarded(lambda: show(parser.parse_args()))
