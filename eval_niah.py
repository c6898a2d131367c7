"""
eval_niah.py: what the trained models can find in a haystack, and how far their own denoising leads them astray.

    python eval_niah.py --run runs/tiny --tasks mv vt --lengths 96 192 --out runs/eval

Two measurements, each made for the rows Base, Standard MDLM, MemDLM (Train-Only) and MemDLM (Train & Inference):
  score          RULER's: the share of reference strings found in the generated answer, per task and length (Sec. 4.2)
  exposure bias  R_EB = L_seq / L_static (Sec. 2.2, Fig. 3): how much worse the true tokens are predicted on states that the
                 model has reached by its own denoising than on states whose visible tokens are the true ones

Leak-free by construction: a memory is written from the prompt alone, by a function that is never given an answer.

Reading list: RULER, arXiv 2404.06654; exposure bias, Ranzato et al. 2016, arXiv 1511.06732; Wilson's score interval, 1927.

Glossary
  paper        | name here        | shape
  L_static     | static           | float, mean NLL of the true tokens at masked positions, Eq. 3
  L_seq        | sequential       | the same on the model's own states, Eq. 4
  R_EB         | ratio            | sequential / (static without memory)
  mask ratio   | mask_ratio       | share of the answer that is still masked, from 1 towards 0
  -            | response         | (B, T) bool: the answer's positions
  -            | order            | (B, T) random numbers that rank the positions: the shared static masks
  -            | counts           | (steps + 1,) how many positions are masked at each step of the walk
"""

import argparse
import math
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import sample
from data import Batch, Example, Parser, guarded, pick_device, real, whole
from memdlm import (
    SCOPES,
    STRATEGIES,
    Anchor,
    Memory,
    corrupt,
    embed,
    generator_for,
    init_fast,
    mdlm_loss,
    memdlm_loss,
    read_config,
    token_nll,
)
from model import Fast, Transformer, UserError, check_writable, load_model, read_json, write_json, write_text

# method name in results.json -> (title in tables, checkpoint, whether a memory is written from the prompt)
ROWS = {
    "base": ("Base", "base", False),
    "mdlm": ("Standard MDLM", "mdlm", False),
    "memdlm_train": ("MemDLM (Train-Only)", "memdlm", False),
    "memdlm_train_inference": ("MemDLM (Train & Inference)", "memdlm", True),
}
# 97.5% quantiles of Student's t by degrees of freedom 1, 2, ...: intervals over a handful of seeds need no more.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def wilson_interval(mean: float, n: int) -> list[float]:
    """95% interval for the mean of n scores in [0, 1]. Meant for 0/1 scores; for fractions it is too wide."""
    z = 1.959964
    centre, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))]


def t_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval over independent seeds; the half-width is infinite for a single one."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    quantile = T_QUANTILE[min(len(values) - 2, len(T_QUANTILE) - 1)]  # beyond the table: a little too wide
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def machine(device: str, dtype: str = "float32") -> dict:
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: str) -> float:
    """GiB: the process's largest resident size, or on a GPU what torch has allocated there at most."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ---- scoring rules of the published benchmarks: RULER's scores the small tasks, the others are for published outputs -------


def clean(prediction: str) -> str:
    """RULER's clean-up: control characters become line ends; outer white space goes."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(references: Sequence[str], prediction: str) -> float:
    """RULER: the share of reference strings found in the prediction, whatever their case. (NVIDIA reports percent, rounded
    to two decimals after averaging; the harness 0 to 1.)"""
    return float(np.mean([reference.lower() in clean(prediction).lower() for reference in references]))


def string_match_part(references: Sequence[str], prediction: str) -> float:
    """RULER's question answering: 1 if any of the references is found."""
    return float(any(reference.lower() in clean(prediction).lower() for reference in references))


PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
BABILONG_LABELS = {"qa1": PLACES, "qa2": PLACES, "qa3": PLACES, "qa4": PLACES}
BABILONG_LABELS["qa5"] = ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")


def first_statement(output: str) -> str:
    """BABILong's clean-up: lower case, up to the first full stop or the next piece of a prompt."""
    output = output.lower().split(".")[0]
    return output.split("<context>")[0].split("<example>")[0]


def babilong_correct(task: str, question: str, target: str, output: str) -> bool:
    """BABILong's own metric: of the task's labels, the output's first statement names the target and no other, those of the
    question aside."""
    labels = {label.lower() for label in BABILONG_LABELS[task]}
    named = {label for label in labels if label in first_statement(output)}
    asked = {label for label in labels if label in question.lower()}
    parts = target.lower().split(",") if "," in target and len(target) > 3 else [target.lower()]
    return named - asked == {part.strip() for part in parts}


def babilong_contains(target: str, output: str) -> bool:
    """BABILong's older metric: the target is somewhere in the first statement."""
    return target.lower() in first_statement(output)


def babilong_accuracy(target: str, output: str) -> float:
    """The harness's metric, which the paper reports: the target is somewhere in the output."""
    return float(target.lower() in clean(output).lower())


# ---- Monte-Carlo likelihood (LLaDA, arXiv 2502.09992) ----------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(
    model: Transformer, x0: Tensor, prompt: int, masked: Tensor, share: Tensor, cfg_scale: float = 0.0
) -> Tensor:
    """Estimates of log p(answer | prompt), one per mask, (n,): minus the sum of the masked tokens' NLL / share.

    x0 (T,): `prompt` tokens, then the answer; masked (n, T) bool, share (n,). Their mean is the estimate that LLaDA reports.
    """
    canvas = corrupt(x0.expand_as(masked), masked, model.config.mask_id)
    given = (torch.arange(len(x0), device=x0.device) < prompt).expand_as(masked)
    logits = sample.guided_logits(model, canvas, given, None, cfg_scale, None, masked)
    nll = F.cross_entropy(logits, x0.expand_as(masked)[masked], reduction="none")
    return -torch.zeros(len(masked), device=nll.device).index_add(0, masked.nonzero()[:, 0], nll) / share


# ---- scores ---------------------------------------------------------------------------------------------------------------


def answer(
    model: Transformer, examples: list[Example], write: sample.Write | None, seed: int, batch_size: int = 32
) -> list[str]:
    """Answers of one length to prompts of one length, as text. With `write`, each prompt is first written into the weights."""
    device, texts = next(model.parameters()).device, []
    for start in range(0, len(examples), batch_size):
        prompts = torch.tensor([example.prompt for example in examples[start : start + batch_size]], device=device)
        fast = sample.write_prompt(model, prompts, write, seed, first_row=start) if write else None
        ids = sample.generate(model, prompts, len(examples[start].response), fast=fast)
        texts += [data.decode(row) for row in ids.tolist()]
    return texts


def score_cells(models: dict, tasks: list[str], lengths: list[int], samples: int, seed: int, write: sample.Write) -> list[dict]:
    """One record per method, task and length: the mean score over `samples` held-out examples and its 95% interval.

    models: checkpoint name ("base", "mdlm", "memdlm") -> Transformer. Rows whose checkpoint is absent are left out.
    """
    rows = [method for method, (_, checkpoint, _) in ROWS.items() if checkpoint in models]
    cells = [(method, task, length) for length in lengths for task in tasks for method in rows]
    records = []
    for method, task, length in tqdm(cells, f"seed {seed}: scores", delay=2, mininterval=1):
        _, checkpoint, memory = ROWS[method]
        examples = data.make_examples(task, samples, length, data.split_seed(seed, "test"))
        texts = answer(models[checkpoint], examples, write if memory else None, seed)
        mean = float(np.mean([string_match_all(example.references, text) for example, text in zip(examples, texts)]))
        record = {"method": method, "task": task, "length": length, "n": samples, "score": mean}
        records.append(record | {"ci95": wilson_interval(mean, samples), "seed": seed})
    return records


# ---- exposure bias (Sec. 2.2, Fig. 3) -------------------------------------------------------------------------------------


def nll_at(model: Transformer, canvas: Tensor, x0: Tensor, masked: Tensor, fast: Fast | None) -> tuple[Tensor, Tensor]:
    """Per row the mean -log p(x0_i) over the masked positions (B,), and the logits (M, V) at them."""
    logits = sample.guided_logits(model, canvas, masked, fast, 0.0, None, masked)
    nll = F.cross_entropy(logits, x0[masked], reduction="none")
    return torch.zeros(masked.shape, device=nll.device).masked_scatter(masked, nll).sum(1) / masked.sum(1), logits


@torch.no_grad()
def exposure_walk(
    model: Transformer, x0: Tensor, response: Tensor, order: Tensor, steps: int, fast: Fast | None
) -> list[tuple]:
    """L_static and L_seq per row at mask ratios 1, 1 - 1/steps, ... 1/steps: [(ratio, static (B,), sequential (B,))].

    x0 (B, T), response (B, T) bool with the same n response tokens in each row; order (B, T): random numbers that rank
    the positions. The static mask at each ratio is the first max(1, n * ratio rounded down) of that ranking, so it is shared
    by all models. The walk starts all-masked and commits its most confident tokens down to the same count.
    """
    n = int(response[0].sum())
    counts = [max(1, n * (steps - step) // steps) for step in range(steps + 1)]  # whole numbers: no rounding surprise
    rank = order.masked_fill(~response, 2.0).argsort(dim=1).argsort(dim=1)
    mask_id = model.config.mask_id
    canvas, curve = torch.where(response, mask_id, x0), []
    for step in range(steps):
        static = rank < counts[step]
        masked = (canvas == mask_id) & response
        static_nll, _ = nll_at(model, torch.where(static, mask_id, x0), x0, static, fast)
        sequential_nll, logits = nll_at(model, canvas, x0, masked, fast)
        curve.append((1 - step / steps, static_nll, sequential_nll))
        tokens, probability = sample.choose_tokens(logits, 0.0, None, [mask_id])
        confidence = torch.full(canvas.shape, -1.0, device=canvas.device).masked_scatter(masked, probability)
        canvas = torch.where(
            sample.select(confidence, counts[step] - counts[step + 1], None), canvas.masked_scatter(masked, tokens), canvas
        )
    return curve


def exposure_bias(
    models: dict, tasks: list[str], length: int, samples: int, seed: int, write: sample.Write, steps: int = 8
) -> list[dict]:
    """One record per method and mask ratio. Means over all tasks' examples first, then the ratio of the means.

    The denominator is always the model's static loss *without* memory, so that the two MemDLM rows share it.
    """
    walks = {method: [] for method, (_, checkpoint, _) in ROWS.items() if checkpoint in models}
    for method, task in tqdm([(m, t) for m in walks for t in tasks], f"seed {seed}: exposure bias", delay=2, mininterval=1):
        _, checkpoint, memory = ROWS[method]
        model = models[checkpoint]
        batch = data.collate(
            data.make_examples(task, samples, length, data.split_seed(seed, "test")), next(model.parameters()).device
        )
        order = torch.rand(batch.x0.shape, generator=generator_for(seed, "static masks", task)).to(batch.x0.device)
        prompts = batch.x0[:, : int((~batch.maskable[0]).sum())]
        fast = sample.write_prompt(model, prompts, write, seed) if memory else None
        walks[method].append(exposure_walk(model, batch.x0, batch.maskable, order, steps, fast))
    records, plain_static = [], {}
    for method, by_task in walks.items():
        for step in range(steps):
            ratio = by_task[0][step][0]
            static, sequential = (torch.cat([walk[step][i] for walk in by_task]).mean().item() for i in (1, 2))
            denominator = plain_static.setdefault((ROWS[method][1], step), static)  # rows without memory come first
            record = {
                "static": static,
                "sequential": sequential,
                "ratio": sequential / denominator if denominator else math.nan,
            }
            record = {"method": method, "mask_ratio": ratio} | {key: finite(value) for key, value in record.items()}
            records.append(record | {"seed": seed})
    return records


# ---- losses with and without memory ---------------------------------------------------------------------------------------

T_BINS = 5


def stratified_anchors(batches: list[Batch], seed: int) -> list[Anchor]:
    """Anchors whose t cover (0, 1) evenly over all examples, however they are batched, and are the same at every call:
    less noise when losses are compared over time."""
    generator, rows = generator_for(seed, "measure"), [len(batch.x0) for batch in batches]
    every, anchors = (torch.randperm(sum(rows), generator=generator) + 0.5) / sum(rows), []
    for batch, t in zip(batches, every.split(rows)):
        masked = torch.rand(batch.x0.shape, generator=generator) < t[:, None]
        anchors.append(Anchor(t.to(batch.x0.device), masked.to(batch.x0.device) & batch.maskable))
    return anchors


LOSSES = ("train_with_memory", "train_without_memory", "eval_without_memory")


@torch.no_grad()
def losses_with_and_without(
    model: Transformer, batch: Batch, anchor: Anchor, memory: Memory, generator: torch.Generator
) -> tuple[float, float]:
    """The loss per maskable token with and without memory on the same noise."""
    stages = STRATEGIES[memory.strategy](anchor, batch.maskable, memory, generator)
    fast = init_fast(model, memory, SCOPES[memory.scope](len(batch.x0)), generator)
    return memdlm_loss(model, batch, anchor, stages, fast, memory)[0].item(), mdlm_loss(model, batch, anchor).item()


@torch.no_grad()
def held_out_loss(model: Transformer, batch: Batch, anchor: Anchor) -> tuple[float, Tensor, Tensor]:
    """The loss without memory; the NLL of each masked token (M,), and its t (M,)."""
    h = model.read(embed(model, batch.x0, anchor.masked), 0, anchor.masked, batch.attention_mask)
    nll = token_nll(model, h, batch.x0[anchor.masked])
    return mdlm_loss(model, batch, anchor).item(), nll, anchor.t[anchor.masked.nonzero()[:, 0]]


def measure_losses(model: Transformer, train_set: list[Batch], held_out: list[Batch], memory: Memory, seed: int) -> dict:
    """The losses LOSSES on fixed noise, weighted by the batches' maskable tokens, and the held-out NLL by noise level.

    The loss *with* memory leaks: the inner loop has seen the very labels that it is then scored on. It is logged to show
    that, beside the honest one. With scope "batch" all rows of a batch share one set.
    eval_by_t: held-out NLL per masked token in T_BINS equal bins of t.
    """
    model.eval()
    generator = generator_for(seed, "measure memory")
    noisy = zip(train_set, stratified_anchors(train_set, seed))
    train = [losses_with_and_without(model, batch, anchor, memory, generator) for batch, anchor in noisy]
    held = [held_out_loss(model, batch, anchor) for batch, anchor in zip(held_out, stratified_anchors(held_out, seed))]
    weights = [[int(batch.maskable.sum()) for batch in part] for part in (train_set, held_out)]
    values = [np.average([loss[i] for loss in train], weights=weights[0]) for i in (0, 1)]
    values.append(np.average([loss for loss, _, _ in held], weights=weights[1]))
    nll, t = (torch.cat([one[i] for one in held]) for i in (1, 2))
    bins = (t * T_BINS).long()
    by_t = [finite(nll[bins == i].mean().item()) for i in range(T_BINS)]
    return {name: finite(float(value)) for name, value in zip(LOSSES, values)} | {"eval_by_t": by_t}


def finite(value: float) -> float | None:
    """None, JSON's null, for what is not a number: the mean of an empty bin, the loss of a model that has blown up."""
    return value if math.isfinite(value) else None


def as_floats(values: list[float | None]) -> np.ndarray:
    return np.array(values, dtype=float)  # null becomes nan, which every mean and every picture then shows as missing


# ---- tables ---------------------------------------------------------------------------------------------------------------


def mean_over_tasks(results: dict, method: str, length: int, seed: int) -> float:
    cells = [r["score"] for r in results["niah"] if (r["method"], r["length"], r["seed"]) == (method, length, seed)]
    return float(np.mean(cells))


def paired_difference(first: dict, method: str, second: dict, baseline: str) -> list[dict]:
    """`method` of the results `first` minus `baseline` of `second`, score averaged over tasks, paired by seed, per length."""
    seeds = [seed for seed in distinct(first["niah"], "seed") if seed in distinct(second["niah"], "seed")]
    records = []
    for length in [n for n in distinct(first["niah"], "length") if n in distinct(second["niah"], "length")]:
        gains = [mean_over_tasks(first, method, length, s) - mean_over_tasks(second, baseline, length, s) for s in seeds]
        mean, half = t_interval(gains)
        ci95 = [mean - half, mean + half] if math.isfinite(half) else None
        records.append({"better": method, "worse": baseline, "length": length, "mean": mean, "ci95": ci95})
    return records


def compare(specifications: list[str]) -> str:
    """Two methods of two finished runs, given as RUN:method, on the seeds that both have: scores, and what each has learnt."""
    sides = []
    for text in specifications:
        folder, _, method = text.rpartition(":")
        if method not in ROWS:
            raise UserError(f"--compare takes RUN:method with a method of {', '.join(ROWS)}, not {text}.")
        sides.append((read_json(Path(folder) / "results.json"), method))
    (first, method), (second, baseline) = sides
    if not {r["seed"] for r in first["niah"]} & {r["seed"] for r in second["niah"]}:
        raise UserError("--compare: the two runs have no seed in common.")
    records = paired_difference(first, method, second, baseline)
    rows = [[f"{specifications[0]} minus {specifications[1]}", *(difference_text(record) for record in records)]]
    learnt = []
    for (results, name), text in zip(sides, specifications):
        last = max((record["step"] for record in results.get("loss", [])), default=None)
        if last is None or name == "base":
            continue  # results of eval_niah.py, or a row without fine-tuning
        final = [r for r in results["loss"] if (r["method"], r["step"]) == (ROWS[name][1], last)]
        learnt.append([text, interval_text([record["train_without_memory"] for record in final])])
    header = ["difference, mean over tasks", *(record["length"] for record in records)]
    table = markdown(header, rows)
    return table + "\n\n" + markdown(["learnt", "training loss without memory"], learnt) if learnt else table


def difference_text(record: dict) -> str:
    return f"{record['mean']:+.3f}" + (f" [{record['ci95'][0]:+.3f}, {record['ci95'][1]:+.3f}]" if record["ci95"] else "")


def distinct(records: list[dict], key: str) -> list:
    return list(dict.fromkeys(record[key] for record in records))


def interval_text(values: list[float]) -> str:
    """mean ± half-width of the t-interval over seeds, or the value alone where there is one seed."""
    mean, half = t_interval(as_floats(values))
    return f"{mean:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def markdown(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def score_table(results: dict) -> str:
    """Task by task and on average: each row's score at each length, mean over seeds."""
    tasks, lengths = distinct(results["niah"], "task"), distinct(results["niah"], "length")
    rows = []
    for method in distinct(results["niah"], "method"):
        cells = {}
        for record in results["niah"]:
            if record["method"] == method:
                cells.setdefault((record["task"], record["length"]), []).append(record["score"])
        means = [[float(np.mean(cells[task, length])) for task in tasks] for length in lengths]
        rows.append(
            [ROWS[method][0], *(f"{x:.2f}" for row in means for x in row), *(f"**{np.mean(row):.3f}**" for row in means)]
        )
    return markdown(["method", *(f"{t} {n}" for n in lengths for t in tasks), *(f"mean {n}" for n in lengths)], rows)


def difference_table(results: dict) -> str:
    """The paper's two claims: Train-Only over Standard MDLM, and Train & Inference over Train-Only."""
    lengths, rows = distinct(results["niah"], "length"), []
    for better, worse in (("memdlm_train", "mdlm"), ("memdlm_train_inference", "memdlm_train")):
        records = paired_difference(results, better, results, worse)
        rows.append([f"{ROWS[better][0]} minus {ROWS[worse][0]}", *map(difference_text, records)])
    return markdown(["difference, mean over tasks", *lengths], rows)


def exposure_table(results: dict) -> str:
    """L_static, L_seq and R_EB, averaged over the mask ratios below 1 (at 1 both states are the same, all masked)."""
    rows = []
    for method in distinct(results["exposure_bias"], "method"):
        cells = []
        for key in ("static", "sequential", "ratio"):
            by_seed = {}
            for record in results["exposure_bias"]:
                if record["method"] == method and record["mask_ratio"] < 1:
                    by_seed.setdefault(record["seed"], []).append(record[key])
            cells.append(interval_text([float(as_floats(values).mean()) for values in by_seed.values()]))
        rows.append([ROWS[method][0], *cells])
    return markdown(["exposure bias", "L_static", "L_seq", "R_EB = L_seq / L_static without memory"], rows)


def loss_table(results: dict) -> str:
    """What was learnt: losses at the last step, with and without memory."""
    rows, last = [], max((record["step"] for record in results["loss"]), default=0)
    for method in distinct(results["loss"], "method"):
        final = [record for record in results["loss"] if record["method"] == method and record["step"] == last]
        keys = ("train_with_memory", "train_without_memory", "eval_without_memory")
        rows.append([method, *(interval_text([record[key] for record in final]) for key in keys)])
    return markdown(["loss at the last step", "train, with memory (leaks)", "train, without", "held out, without"], rows)


def report(results: dict) -> str:
    """All tables, as markdown ready to paste. Intervals are 95% t-intervals over seeds."""
    seeds, n = distinct(results["niah"], "seed"), results["niah"][0]["n"]
    where = results["machine"]
    where = f"{where['device']}, {where['dtype']}, torch {where['torch']}, {where['threads']} threads"
    title = f"Seeds {seeds}, {n} examples a cell, {where}. Memory at inference: rule '{results['config']['write']}'."
    tables = [score_table(results), difference_table(results)]
    tables += [exposure_table(results)] if results.get("exposure_bias") else []
    tables += [loss_table(results)] if results.get("loss") else []
    return "\n\n".join([title, *tables])


# ---- pictures --------------------------------------------------------------------------------------------------------------

COLOURS = {
    "base": "tab:gray",
    "mdlm": "tab:red",
    "memdlm_train": "tab:blue",
    "memdlm_train_inference": "tab:green",
    "memdlm": "tab:blue",
}


def mean_by(records: list[dict], x: str, y: str, **where) -> tuple[list, list]:
    """Sorted distinct x values of the matching records, and the mean y (over seeds) at each."""
    groups = {}
    for record in records:
        if all(record[key] == value for key, value in where.items()):
            groups.setdefault(record[x], []).append(record[y])
    return sorted(groups), [float(as_floats(groups[key]).mean()) for key in sorted(groups)]


def draw_losses(records: list[dict], path: Path) -> None:
    """Left: training loss with and without memory, held-out loss. Right: held-out NLL by noise level t at the last step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = {
        "train_with_memory": (":", "train, with memory (leaks)"),
        "train_without_memory": ("-", "train, without memory"),
        "eval_without_memory": ("--", "held out, without memory"),
    }
    for method in ("mdlm", "memdlm"):
        for key, (style, label) in styles.items():
            left.plot(*mean_by(records, "step", key, method=method), style, color=COLOURS[method], label=f"{method}: {label}")
        steps = [record["step"] for record in records if record["method"] == method]
        for step, style, label in ((0, ":", "before"), (max(steps), "-", "after")):
            bins = np.array([r["eval_by_t"] for r in records if r["method"] == method and r["step"] == step], dtype=float)
            centres = (np.arange(bins.shape[1]) + 0.5) / bins.shape[1]
            right.plot(
                centres,
                bins.mean(axis=0),
                style,
                marker="o",
                color=COLOURS[method],
                label=f"{method}, {label} fine-tuning",
            )
    left.set(xlabel="fine-tuning step", ylabel="MDLM loss (Eq. 2)", title="Loss with and without memory")
    right.set(xlabel="noise level t", ylabel="NLL per masked token", title="Held-out loss by noise level", xlim=(0, 1))
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    save_picture(figure, path)


def draw_exposure(records: list[dict], path: Path) -> None:
    """Left: R_EB over the mask ratio, as Fig. 3. Right: the two losses that it is made of."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method in distinct(records, "method"):
        left.plot(
            *mean_by(records, "mask_ratio", "ratio", method=method), marker="o", color=COLOURS[method], label=ROWS[method][0]
        )
        right.plot(
            *mean_by(records, "mask_ratio", "sequential", method=method),
            "-",
            color=COLOURS[method],
            label=f"{ROWS[method][0]}: L_seq",
        )
        right.plot(
            *mean_by(records, "mask_ratio", "static", method=method),
            ":",
            color=COLOURS[method],
            label=f"{ROWS[method][0]}: L_static",
        )
    left.axhline(1, color="black", linewidth=0.8)
    left.set(ylabel="R_EB = L_seq / L_static", title="Exposure bias (1 is ideal)", yscale="log")
    right.set(ylabel="NLL of the true tokens", title="The losses behind it", yscale="log")
    for axis in (left, right):
        axis.set_xlabel("mask ratio (denoising runs to the right)")
        axis.invert_xaxis()
        axis.legend(fontsize=7)
    save_picture(figure, path)


def draw_scores(records: list[dict], path: Path) -> None:
    """Heat map: tasks down, lengths across, one panel a row of the table."""
    methods, tasks, lengths = (distinct(records, key) for key in ("method", "task", "length"))
    figure, axes = plt.subplots(1, len(methods), figsize=(3.2 * len(methods), 3.4), layout="constrained", squeeze=False)
    for axis, method in zip(axes[0], methods):
        grid = np.array(
            [
                [np.mean(mean_by(records, "length", "score", method=method, task=task, length=length)[1]) for length in lengths]
                for task in tasks
            ]
        )
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set(title=ROWS[method][0], xlabel="length in tokens")
        axis.title.set_fontsize(10)
    figure.colorbar(image, ax=axes[0].tolist(), label="score")
    save_picture(figure, path)


def save_picture(figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}.") from None
    plt.close(figure)


def draw_pictures(results: dict, out: Path) -> None:
    draw_scores(results["niah"], out / "niah.png")
    if results.get("exposure_bias"):
        draw_exposure(results["exposure_bias"], out / "exposure_bias.png")
    if results.get("loss"):
        draw_losses(results["loss"], out / "loss.png")


# ---- command line ----------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser("Scores a finished run's models on the tasks, at any lengths.")
    flag = parser.add_argument
    flag("--run", help="folder of a finished run, e.g. runs/tiny")
    flag("--out", help="folder for results.json, niah.png and table.md")
    flag("--compare", nargs=2, metavar="RUN:METHOD", help="only compare two methods of finished runs, paired by seed")
    flag("--tasks", nargs="+", choices=list(data.TASKS), default=list(data.TASKS), help="tasks to evaluate")
    flag("--lengths", nargs="+", type=whole(64, 8192), help="lengths to evaluate (default: the run's)")
    flag("--samples", type=whole(1), help="test examples per task and length (default: the run's)")
    flag("--write", choices=list(sample.WRITE_RULES), help="how a prompt is written (default, as for the next four: the run's)")
    flag("--write-lr", type=real(0), help="step size of that")
    flag("--write-rank", type=whole(1), help="rank of its fast weights")
    flag("--write-passes", type=whole(1), help="how often its stages are gone through")
    flag("--anchor-ratio", type=real(0.01, 1), help="share of the prompt masked by 'paper' (Fig. 8)")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.compare:
        print(compare(args.compare))
        return
    if not (args.run and args.out):
        raise UserError("say which run to score and where to write: --run DIR --out DIR.")
    folder, out, device = Path(args.run), Path(args.out), pick_device(args.device)
    config = read_config(folder) | {key: value for key, value in vars(args).items() if value is not None}
    if (out / "config.json").exists():
        raise UserError(f"--out {out} is a run, whose results.json would be lost: name another folder.")
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    models = {
        (seed, name): load_model(folder / f"seed{seed}" / f"{name}.safetensors", device)[0]
        for seed in seeds
        for name in ("base", "mdlm", "memdlm")
    }
    check_writable(out)
    results = {"config": config, "machine": machine(device), "niah": []}
    for seed in seeds:
        of_seed = {name: model for (s, name), model in models.items() if s == seed}
        write = sample.write_settings(config)
        results["niah"] += score_cells(of_seed, args.tasks, config["lengths"], config["samples"], seed, write)
    results["peak_memory_gib"] = peak_memory(device)
    write_json(out / "results.json", results)
    write_text(out / "table.md", report(results) + "\n")
    draw_pictures(results, out)
    print(report(results))


def main(arguments: list[str] | None = None) -> None:
    guarded(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
