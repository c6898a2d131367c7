"""
overshoot.py: for which step sizes the inner loop is stable, on the models of finished runs.

    python assets/overshoot.py runs/old runs/tiny --out assets/overshoot.png

For each run it takes the base and the MemDLM model of the first draw of up to three seeds, and goes
through the inner loop on the draw's pairs at several step sizes. Left: the share of the memories
whose last step raises the loss that it descends. Right: the loss that the outer step then sees.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import eval_niah
import memdlm

RATES = (0.1, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0)


def measure(run: Path, name: str) -> list[dict]:
    """One record for each seed and step size."""
    config, records = memdlm.read_config(run), []
    for seed in range(config["seed"], config["seed"] + min(3, config["seeds"])):
        model, _ = memdlm.open_run(run, seed, 0, name, "cpu")
        batches = [data.collate(memdlm.noisy_pairs(config, seed, 0, config["noise"]))]
        for rate in RATES:
            memory = replace(memdlm.memory_of(config), lr=rate)
            losses = memdlm.measure_losses(model, batches, batches, memory, seed)
            records.append({"rate": rate, **losses})
    return records


def show(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, draws the picture."""
    panels = [[], []]
    for run in map(Path, arguments.runs):
        for name, dashes in (("base", ":"), ("memdlm", "-")):
            records = measure(run, name)
            for lines, key in zip(panels, ("overshoot", "train_with_memory")):
                found = [eval_niah.matching(records, rate=rate) for rate in RATES]
                values = [eval_niah.mean_of(part, key) for part in found]
                print(f"{run} {name} {key}:", *(f"{value:.3f}" for value in values))
                style = {"marker": "o", "linestyle": dashes, "color": f"C{len(lines) // 2}"}
                lines.append((RATES, values, style, f"{run}, {name}"))
    share = {"xlabel": "step size of the inner loop", "ylabel": "share of memories that overshoot"}
    loss = {"xlabel": "step size of the inner loop", "ylabel": "loss that the outer step sees"}
    panels = [{"lines": panels[0], **share}, {"lines": panels[1], **loss, "yscale": "log"}]
    eval_niah.draw_panels(panels, Path(arguments.out))


if __name__ == "__main__":
    parser = data.Parser("Draws for which step sizes the inner loop is stable.")
    parser.add_argument("runs", nargs="+", help="folders of finished --tiny runs")
    parser.add_argument("--out", default="assets/overshoot.png", help="the picture")
    data.guarded(lambda: show(parser.parse_args()))
