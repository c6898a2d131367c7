"""
eval_niah.py: what trained models can find in a haystack, and how far their own denoising leads them astray.

    python eval_niah.py --run runs/tiny --tasks mv vt qa1 --lengths 96 192 --out runs/eval
    python eval_niah.py --backbone llada-moe --adapter runs/mdlm/adapter runs/moe/adapter --memory --out runs/ruler

Two measurements, each made for the rows Base, Standard MDLM, MemDLM (Train-Only) and MemDLM (Train & Inference):
  score          RULER's and BABILong's: is the reference in the generated answer? By task and length (Sec. 4.2, Tables 1, 2)
  exposure bias  R_EB = L_seq / L_static (Sec. 2.2, Fig. 3): how much worse the true tokens are predicted on states that the
                 model has reached by its own denoising than on states whose visible tokens are the true ones

Leak-free by construction: a memory is written from the prompt alone, by a function that is never given an answer.
An answer costs as many full forwards as its commit schedule has steps (128 for a needle, one a token), and one more pass or
two where the prompt is written. Each is kept in OUT/predictions.jsonl as it is made; the same command goes on after a stop.

In this file: scoring rules; asking, and what is kept of it; exposure bias; losses; tables; pictures; the command line. Read
"asking" first; tables and pictures can wait.

Reading list: RULER, arXiv 2404.06654; BABILong, arXiv 2406.10149; exposure bias, Ranzato et al. 2016, arXiv 1511.06732;
Wilson's score interval, 1927.

Glossary
  paper        | name here        | shape
  L_static     | static           | float, mean NLL of the true tokens at masked positions, Eq. 3
  L_seq        | sequential       | the same on the model's own states, Eq. 4
  R_EB         | ratio            | sequential / (static without memory)
  mask ratio   | mask_ratio       | share of the answer that is still masked, from 1 towards 0
  anchor ratio | anchor_ratio     | share of the prompt that the memory's anchor masks, Fig. 8
  -            | row              | a line of the paper's tables: a checkpoint, with or without a memory
  -            | cell             | the questions of one task at one length, for one seed
  -            | group            | indices of a cell's questions that are answered together: of one shape
  -            | response         | (B, T) bool: the answer's positions
  -            | order            | (B, T) random numbers that rank the positions: the shared static masks
  -            | counts           | (steps + 1,) how many positions are masked at each step of the walk
"""

import argparse
import hashlib
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

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
from data import Batch, Parser, Question, guarded, pick_device, real, whole
from memdlm import (
    SCOPES,
    STRATEGIES,
    Anchor,
    Memory,
    backbone_flags,
    backbone_tokenizer,
    corrupt,
    dtype_name,
    embed,
    generator_for,
    init_fast,
    load_backbone,
    mdlm_loss,
    memdlm_loss,
    read_config,
    token_nll,
)
from model import (
    Fast,
    Transformer,
    UserError,
    check_writable,
    find_checkpoint,
    load_model,
    read_json,
    tensor_files,
    write_json,
    write_text,
)

# method name in results.json -> (title in tables, checkpoint, whether a memory is written from the prompt)
ROWS = {
    "base": ("Base", "base", False),
    "mdlm": ("Standard MDLM", "mdlm", False),
    "memdlm_train": ("MemDLM (Train-Only)", "memdlm", False),
    "memdlm_train_inference": ("MemDLM (Train & Inference)", "memdlm", True),
}
# Not the paper's: a memory for models that were not trained with one.
MORE_ROWS = {
    "base_inference": ("Base, memory at inference", "base", True),
    "mdlm_inference": ("Standard MDLM, memory at inference", "mdlm", True),
}


def title(method: str) -> str:
    """A row's name in tables; a sweep over anchor ratios has rows such as memdlm_train_inference@0.3."""
    name, _, ratio = method.partition("@")
    return (ROWS | MORE_ROWS)[name][0] + (f", anchor ratio {ratio}" if ratio else "")


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


# ---- scoring rules of the published benchmarks -----------------------------------------------------------------------------


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


BABILONG_LABELS = {task: tuple(world.places) for task, world in data.BABI_WORLDS.items()}
BABILONG_LABELS["qa5"] = (*sorted(data.BABI_WORLDS["qa5"].people), *data.BABI.objects)


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


# name in results.json -> what it gives for (question, prediction)
METRICS: dict[str, Callable[[Question, str], float]] = {
    "ruler": lambda question, text: string_match_all(question.references, text),
    "babilong": lambda question, text: float(
        babilong_correct(question.task[-3:], question.asked, question.references[0], text)
    ),
    "harness": lambda question, text: babilong_accuracy(question.references[0], text),
}


def metrics_of(task: str, protocol: str = "original") -> list[str]:
    """The first is the score. RULER's is NVIDIA's, and the harness's is the same; BABILong's own and the harness's differ."""
    if not task.startswith("babilong"):
        return ["ruler"]
    return ["babilong", "harness"] if protocol == "original" else ["harness", "babilong"]


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


# ---- asking ---------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the tables: a checkpoint, and how prompts are written into its weights, if they are."""

    method: str  # a key of ROWS or MORE_ROWS, perhaps with an anchor ratio: "memdlm_train_inference@0.3"
    checkpoint: str  # "base", "mdlm" or "memdlm"
    write: sample.Write | None


class Cell(NamedTuple):
    """The questions of one task at one length, and how some of them are put to a model."""

    task: str
    length: int
    seed: int
    groups: list[list[int]]
    ask: Callable[[Transformer, Row, list[int]], list[dict]]  # -> one record for each index
    first: Question | None = None


def answer(
    model: Transformer,
    questions: Sequence[Question],
    write: sample.Write | None,
    seed: int,
    numbers: Sequence[int],
    tokenizer: data.Tokenizer = data.TINY,
    **options,
) -> tuple[list[str], int]:
    """Answers to questions of one shape, as text, and how many forward passes they took. With `write`, each prompt is first
    written into the weights; its draws depend on its number. options: those of `sample.generate`."""
    prompts = torch.tensor([question.prompt for question in questions], device=next(model.parameters()).device)
    fast, canvases = sample.write_prompt(model, prompts, write, seed, numbers) if write else None, []
    ids = sample.generate(model, prompts, questions[0].tokens, fast=fast, watch=canvases.append, **options)
    return [tokenizer.decode(row) for row in ids.tolist()], len(canvases) - 1


def same_shape(questions: list[Question], most: int) -> list[list[int]]:
    """Indices of questions with equally long prompts and answers, at most so many together."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, question in enumerate(questions):
        shapes.setdefault((len(question.prompt), question.tokens), []).append(i)
    return [indices[at : at + most] for indices in shapes.values() for at in range(0, len(indices), most)]


def question_cell(
    task: str,
    length: int,
    seed: int,
    groups: list[list[int]],
    question: Callable[[int], Question],
    metrics: Sequence[str] = ("ruler",),
    tokenizer: data.Tokenizer = data.TINY,
    options: Callable[[Transformer], dict] = lambda model: {},
) -> Cell:
    """A cell whose answers are generated and scored."""

    def ask(model: Transformer, row: Row, indices: list[int]) -> list[dict]:
        questions, records = [question(i) for i in indices], []
        texts, steps = answer(model, questions, row.write, seed, indices, tokenizer, **options(model))
        for asked, text in zip(questions, texts):
            scores = {metric: METRICS[metric](asked, text) for metric in metrics}
            record = {"tokens": len(asked.prompt), "depth": asked.depth, "steps": steps, "references": asked.references}
            records.append(record | {"prediction": text, "scores": scores})
        return records

    return Cell(task, length, seed, groups, ask, question(0))


def small_cell(task: str, length: int, seed: int, samples: int, options: Callable = lambda model: {}) -> Cell:
    """Test examples of a task in the tiny vocabulary, answered 32 at a time."""
    examples = data.make_examples(task, samples, length, data.split_seed(seed, "test"))
    questions = [
        Question(task, example.prompt, len(example.response), example.references, data.decode(example.prompt))
        for example in examples
    ]
    return question_cell(task, length, seed, same_shape(questions, 32), questions.__getitem__, options=options)


def unless_out_of_memory(compute: Callable[[], list[dict]]) -> list[dict] | None:
    """What `compute` returns, or None where the device has no room for it."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:  # a CPU's or a Mac's allocator has no error class of its own
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not full and not re.search("out of memory|can't allocate memory", str(error)):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


# What a line of predictions.jsonl is found by: an answer or a walk (whose task is BIAS) ...
KEY = ("method", "task", "length", "seed", "index")
BIAS = "exposure bias"
# ... and what answers (kind "answers") or walks (BIAS) depend on.
BEGUN = ("method", "kind", "seed")


class Predictions:
    """Every answer that was given. With a file, each is appended as it is made, and a stopped evaluation finds them there.

    Lines of settings say what each row's answers depend on, so that answers to other questions or of other weights are not
    taken for these. A line that a power cut cut off is dropped. One process at a time may write.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.settings, self.done = path, {}, {}
        try:
            content = path.read_bytes() if path and path.exists() else b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}.") from None
        whole_lines = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole_lines.splitlines(), 1):
            try:
                record = json.loads(line)
                if "settings" in record:
                    self.settings[tuple(record[name] for name in BEGUN)] = record["settings"]
                else:
                    record["walk" if record["task"] == BIAS else "scores"]  # it is there
                    self.done[tuple(record[name] for name in KEY)] = record
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}, line {number} is damaged: delete that line, and its answer is made again.") from None
        if len(whole_lines) < len(content):
            os.truncate(path, len(whole_lines))

    def append(self, records: Iterable[dict]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}. The answers so far are kept; start again to go on.") from None

    def agree(self, settings: dict[tuple[str, str, int], dict]) -> None:
        """Refuses to go on where a row was answered with other settings; notes the new ones. settings: by BEGUN."""
        answered = {(method, BIAS if task == BIAS else "answers", seed) for method, task, _, seed, _ in self.done}
        for place, wanted in settings.items():
            begun = self.settings.get(place, {}) if place in answered else wanted
            for name in {**wanted, **begun}:
                if begun.get(name) != wanted.get(name):
                    said = f"{name} {begun.get(name)!r}, not {wanted.get(name)!r}"
                    raise UserError(f"{self.path.parent} holds answers of {title(place[0])} with {said}: name another --out.")
        new = {place: wanted for place, wanted in settings.items() if self.settings.get(place) != wanted}
        self.append(dict(zip(BEGUN, place)) | {"settings": wanted} for place, wanted in new.items())

    def add(self, row: Row, cell: Cell, indices: Sequence[int], records: Sequence[dict]) -> None:
        """Keeps those that are new: after a stop some of a group may be there already."""
        news = {key: record for key, record in zip(keys(row, cell, indices), records) if key not in self.done}
        named = [dict(zip(KEY, key)) | record for key, record in news.items()]
        if self.path:
            self.append(named)
        self.done |= dict(zip(news, named))

    def of(self, row: Row, cell: Cell) -> list[dict]:
        """The answers to a cell so far, by index."""
        found = [self.done.get(key) for key in keys(row, cell, sorted(i for group in cell.groups for i in group))]
        return [record for record in found if record]


def keys(row: Row, cell: Cell, indices: Iterable[int]) -> list[tuple]:
    return [(row.method, cell.task, cell.length, cell.seed, i) for i in indices]


def running_score(records: list[dict]) -> str:
    scores = [next(iter(record["scores"].values())) for record in records if "scores" in record]
    return f"score {np.mean(scores):.2f}" if scores else ""


def measured(model: Transformer, row: Row, cell: Cell, group: list[int]) -> list[dict]:
    """The answers of a group, each with what it cost."""
    on_gpu, clock = next(model.parameters()).is_cuda, time.monotonic()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    records = cell.ask(model, row, group)
    cost = {"seconds": (time.monotonic() - clock) / len(group)}
    cost |= {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {}
    return [record | cost for record in records]


def ask_cell(model: Callable[[], Transformer], row: Row, cell: Cell, predictions: Predictions, bar: tqdm) -> bool:
    """Puts to a row what is left of a cell. Groups stay as they are after a stop, so that rounding is the same too.
    Returns False where memory ran out."""
    for group in cell.groups:
        if any(key not in predictions.done for key in keys(row, cell, group)):
            if (records := unless_out_of_memory(partial(measured, model(), row, cell, group))) is None:
                return False
            predictions.add(row, cell, group, records)
            bar.update(len(group))
            bar.set_postfix_str(f"{row.method} {cell.task} {cell.length} {running_score(predictions.of(row, cell))}", False)
    return True


def evaluate(rows: list[Row], cells: list[Cell], open_model: Callable, predictions: Predictions) -> set[tuple]:
    """Asks every row every cell, one checkpoint after the other in memory, and none that has nothing left to do.

    open_model(seed, checkpoint) -> Transformer. Returns the (method, task, length, seed) at which memory ran out.
    """
    failed, opened = set(), {}
    every = list(product(rows, cells))
    total = sum(len(group) for _, cell in every for group in cell.groups)
    order = sorted(every, key=lambda pair: (pair[1].seed, [row.checkpoint for row in rows].index(pair[0].checkpoint)))

    def model(seed: int, checkpoint: str) -> Transformer:
        if (seed, checkpoint) not in opened:
            opened.clear()  # before the next is loaded: there may be room for one alone
            if bar.n > begun:
                bar.clear()  # what loading says gets a line of its own
            opened[seed, checkpoint] = open_model(seed, checkpoint)
        return opened[seed, checkpoint]

    begun = sum(len(predictions.of(row, cell)) for row, cell in every)
    with tqdm(total=total, initial=begun, desc="answers", delay=2, mininterval=1) as bar:
        for row, cell in order:
            if not ask_cell(partial(model, cell.seed, row.checkpoint), row, cell, predictions, bar):
                failed.add((row.method, cell.task, cell.length, cell.seed))
    return failed


def summarize(rows: list[Row], cells: list[Cell], predictions: Predictions, failed: set[tuple]) -> list[dict]:
    """One record per row and cell: the mean score of the answers, its 95% interval, and what the answers cost."""
    records = []
    for cell, row in product(cells, rows):
        found = predictions.of(row, cell)
        record = {"method": row.method, "task": cell.task, "length": cell.length, "n": len(found), "score": None, "ci95": None}
        if found:
            scores = {name: float(np.mean([one["scores"][name] for one in found])) for name in found[0]["scores"]}
            record["score"] = next(iter(scores.values()))
            record |= {"ci95": wilson_interval(record["score"], len(found)), "scores": scores}
            record["steps"] = float(np.mean([one["steps"] for one in found]))
        if (row.method, cell.task, cell.length, cell.seed) in failed:  # those that found room are no fair sample
            record |= {"score": None, "ci95": None, "failed": "out of memory"}
        records.append(record | {"seed": cell.seed})
    return records


def score_cells(models: dict, tasks: list[str], lengths: list[int], samples: int, seed: int, write: sample.Write) -> list[dict]:
    """The small tasks put to the paper's rows; those whose checkpoint is not among `models` are left out."""
    rows = [Row(method, name, write if memory else None) for method, (_, name, memory) in ROWS.items() if name in models]
    cells = [small_cell(task, length, seed, samples) for length in lengths for task in tasks]
    predictions = Predictions()
    return summarize(rows, cells, predictions, evaluate(rows, cells, lambda seed, name: models[name], predictions))


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
    """The exposure bias of the paper's rows on the small tasks: one record per method and mask ratio."""
    rows = [Row(method, name, write if memory else None) for method, (_, name, memory) in ROWS.items() if name in models]
    walks: dict[str, list] = {row.method: [] for row in rows}
    for row, task in tqdm([(r, t) for r in rows for t in tasks], f"seed {seed}: exposure bias", delay=2, mininterval=1):
        model = models[row.checkpoint]
        examples = data.make_examples(task, samples, length, data.split_seed(seed, "test"))
        batch = data.collate(examples, next(model.parameters()).device)
        order = torch.rand(batch.x0.shape, generator=generator_for(seed, "static masks", task)).to(batch.x0.device)
        prompts = batch.x0[:, : int((~batch.maskable[0]).sum())]
        fast = sample.write_prompt(model, prompts, row.write, seed) if row.write else None
        walks[row.method].append(exposure_walk(model, batch.x0, batch.maskable, order, steps, fast))
    curves = {
        row.method: [
            (parts[0][0], *(torch.cat([part[i] for part in parts]).mean().item() for i in (1, 2)))
            for parts in zip(*walks[row.method])
        ]
        for row in rows
    }
    return bias_records(rows, curves, seed)


def bias_records(rows: list[Row], curves: dict[str, list[tuple[float, float, float]]], seed: int) -> list[dict]:
    """R_EB out of each method's curve of (mask ratio, static, sequential), which are means over all examples.

    The denominator is always the model's static loss *without* memory, so that rows of one checkpoint share it.
    """
    plain = {row.checkpoint: curves[row.method] for row in rows if row.write is None and row.method in curves}
    records = []
    for row in rows:
        for (mask_ratio, static, sequential), (_, denominator, _) in zip(curves[row.method], plain[row.checkpoint]):
            values = {"static": static, "sequential": sequential}
            values["ratio"] = sequential / denominator if denominator else math.nan
            record = {"method": row.method, "mask_ratio": mask_ratio}
            records.append(record | {key: finite(value) for key, value in values.items()} | {"seed": seed})
    return records


def bias_cell(pairs: list[data.Example], seed: int, steps: int, eos: int) -> Cell:
    """A cell whose answers are walks, for a user's own pairs: one at a time, each with static masks of its own that all rows
    share."""

    def ask(model: Transformer, row: Row, indices: list[int]) -> list[dict]:
        (index,) = indices
        batch = data.collate([pairs[index]], next(model.parameters()).device, eos=eos)
        order = torch.rand(batch.x0.shape, generator=generator_for(seed, "static masks", index)).to(batch.x0.device)
        prompt = batch.x0[:, : len(pairs[index].prompt)]
        fast = sample.write_prompt(model, prompt, row.write, seed, indices) if row.write else None
        walk = exposure_walk(model, batch.x0, batch.maskable, order, steps, fast)
        return [{"walk": [[ratio, finite(static.item()), finite(sequential.item())] for ratio, static, sequential in walk]}]

    return Cell(BIAS, 0, seed, [[i] for i in range(len(pairs))], ask)


def summarize_bias(rows: list[Row], cell: Cell, predictions: Predictions, failed: set[tuple]) -> list[dict]:
    """Means over the pairs. A row is left out where memory ran out for it, or for its checkpoint without memory."""
    ended = [row for row in rows if (row.method, cell.task, cell.length, cell.seed) not in failed]
    ended = [row for row in ended if any(row.checkpoint == other.checkpoint and other.write is None for other in ended)]
    curves = {}
    for row in ended:
        walks = as_floats([record["walk"] for record in predictions.of(row, cell)])  # (pairs, steps, 3)
        curves[row.method] = [tuple(map(float, point)) for point in walks.mean(axis=0)]
    return bias_records(ended, curves, cell.seed)


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


def scores_by_cell(results: dict, method: str) -> dict[tuple[str, int, int], float | None]:
    """(task, length, seed) -> score."""
    return {(r["task"], r["length"], r["seed"]): r["score"] for r in results["niah"] if r["method"] == method}


def paired_difference(first: dict, method: str, second: dict, baseline: str) -> list[dict]:
    """`method` of the results `first` minus `baseline` of `second`, per length: the score averaged over the tasks that both
    have, paired by seed."""
    one, other = scores_by_cell(first, method), scores_by_cell(second, baseline)
    both, records = [place for place in one if place in other], []
    for length in dict.fromkeys(length for _, length, _ in both):
        gains = []
        for seed in dict.fromkeys(seed for _, n, seed in both if n == length):
            places = [place for place in both if place[1:] == (length, seed)]
            means = [as_floats([scores[place] for place in places]).mean() for scores in (one, other)]
            gains.append(float(means[0] - means[1]))
        mean, half = t_interval(gains)
        ci95 = [mean - half, mean + half] if math.isfinite(half) else None
        tasks = sorted({task for task, n, _ in both if n == length})
        records.append({"better": method, "worse": baseline, "length": length, "mean": mean, "ci95": ci95, "tasks": tasks})
    return records


def compare(specifications: list[str]) -> str:
    """Two methods of two finished runs, given as RUN:method, on the seeds that both have: scores, and what each has learnt."""
    sides = []
    for text in specifications:
        folder, _, method = text.rpartition(":")
        if method.partition("@")[0] not in ROWS | MORE_ROWS:
            raise UserError(f"--compare takes RUN:method with a method of {', '.join(ROWS)}, not {text}.")
        results = read_json(Path(folder) / "results.json")
        if method not in distinct(results.get("niah", []), "method"):
            raise UserError(f"--compare: {folder} has no scores of {method}.")
        sides.append((results, method))
    (first, method), (second, baseline) = sides
    if not (records := paired_difference(first, method, second, baseline)):
        raise UserError("--compare: the two runs have no task with a length and a seed in common.")
    rows = [[f"{specifications[0]} minus {specifications[1]}", *(difference_text(record) for record in records)]]
    learnt = []
    for (results, name), text in zip(sides, specifications):
        last = max((record["step"] for record in results.get("loss", [])), default=None)
        if last is None or name == "base":
            continue  # results of eval_niah.py, or a row without fine-tuning
        final = [r for r in results["loss"] if (r["method"], r["step"]) == ((ROWS | MORE_ROWS)[name][1], last)]
        learnt.append([text, interval_text([record["train_without_memory"] for record in final])])
    columns = (f"{record['length']} ({' '.join(record['tasks'])})" for record in records)
    header = ["difference, mean over the tasks of both", *columns]
    table = markdown(header, rows)
    return table + "\n\n" + markdown(["learnt", "training loss without memory"], learnt) if learnt else table


def difference_text(record: dict) -> str:
    if not math.isfinite(record["mean"]):
        return "-"
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


def with_group_means(records: list[dict]) -> list[dict]:
    """The records, and BABILong's headline number where several of its tasks are there: their mean, as one more task."""
    groups: dict[tuple, list] = {}
    for record in records:
        if record["task"].startswith("babilong_"):
            groups.setdefault((record["method"], record["length"], record["seed"]), []).append(record)
    means = []
    for (method, length, seed), group in groups.items():
        if len(group) > 1:
            mean = finite(float(as_floats([record["score"] for record in group]).mean()))
            means.append({"method": method, "task": "babilong", "length": length, "seed": seed, "score": mean})
    return [*records, *means]


def score_text(values: list[float | None], digits: int = 2) -> str:
    mean = as_floats(values).mean()
    return f"{mean:.{digits}f}" if math.isfinite(mean) else "-"


def score_table(results: dict) -> str:
    """Tables 1 and 2: each row's score by length and task, mean over seeds; "-" where memory ran out. Then, per length,
    the mean over all tasks."""
    records = with_group_means(results["niah"])
    tasks, lengths, rows = distinct(records, "task"), distinct(records, "length"), []
    for method in distinct(records, "method"):
        cells: dict[tuple, list] = {}
        for record in records:
            if record["method"] == method:
                cells.setdefault((record["task"], record["length"]), []).append(record["score"])
        means = [[as_floats(cells[task, n]).mean() for task in tasks if task != "babilong"] for n in lengths]
        scores = (score_text(cells[task, n]) for n in lengths for task in tasks)
        rows.append([title(method), *scores, *(f"**{score_text(row, 3)}**" for row in means)])
    return markdown(["method", *(f"{t} {n}" for n in lengths for t in tasks), *(f"mean {n}" for n in lengths)], rows)


def cell_table(results: dict) -> str:
    """Every row and cell with all that it takes to quote it."""
    rows, place = [], results["machine"]
    for record in results["niah"]:
        low, high = record["ci95"] or (math.nan, math.nan)
        score = f"{score_text([record['score']], 3)} [{low:.3f}, {high:.3f}]" if record["ci95"] else "-"
        other = "; ".join(f"{name} {mean:.3f}" for name, mean in list(record.get("scores", {}).items())[1:])
        score += f" ({other})" if other else ""
        score += " " + record["failed"] if "failed" in record else ""
        steps = f"{record['steps']:g}" if "steps" in record else "-"
        cells = [title(record["method"]), record["task"], record["length"], record["n"], score, steps, record["seed"]]
        rows.append([*cells, place["device"], place["dtype"]])
    return markdown(["method", "task", "length", "n", "score [95%]", "steps", "seed", "device", "dtype"], rows)


def difference_table(results: dict) -> str:
    """The paper's two claims: Train-Only over Standard MDLM, and Train & Inference over Train-Only."""
    lengths, rows, there = distinct(results["niah"], "length"), [], distinct(results["niah"], "method")
    for better, worse in (("memdlm_train", "mdlm"), ("memdlm_train_inference", "memdlm_train")):
        if {better, worse} <= set(there):
            records = paired_difference(results, better, results, worse)
            rows.append([f"{title(better)} minus {title(worse)}", *map(difference_text, records)])
    return markdown(["difference, mean over tasks", *lengths], rows) if rows else ""


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
        rows.append([title(method), *cells])
    without = [one["method"] for one in results.get("failed", []) if one["task"] == BIAS]
    rows += [[title(method), "out of memory", "-", "-"] for method in dict.fromkeys(without)]
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
    where = results["machine"]
    where = f"{where['device']}, {where['dtype']}, torch {where['torch']}, {where['threads']} threads"
    tables = [f"{where}. Memory at inference, where there is one: rule '{results['config']['write']}'."]
    if results.get("pairs"):
        tables[0] += f" Exposure bias: {results['pairs']} pairs, {results['config']['bias_steps']} steps."
    if results["niah"]:
        seeds, n = distinct(results["niah"], "seed"), max(distinct(results["niah"], "n"))
        tables[0] = f"Seeds {seeds}, {n} examples a cell, {tables[0]}"
        tables += [score_table(results), difference_table(results)]
    tables += [exposure_table(results)] if results.get("exposure_bias") or results.get("pairs") else []
    tables += [loss_table(results)] if results.get("loss") else []
    return "\n\n".join(filter(None, tables))


# ---- pictures --------------------------------------------------------------------------------------------------------------

COLOURS = {
    "base": "tab:gray",
    "mdlm": "tab:red",
    "memdlm_train": "tab:blue",
    "memdlm_train_inference": "tab:green",
    "memdlm": "tab:blue",
    "base_inference": "black",
    "mdlm_inference": "tab:orange",
}


# a row with memory -> the same checkpoint's without
PLAIN = {"base_inference": "base", "mdlm_inference": "mdlm", "memdlm_train_inference": "memdlm_train"}


def colour(method: str):
    """A row's own; the rows of a sweep from violet (0) to yellow (1)."""
    name, _, ratio = method.partition("@")
    return plt.colormaps["viridis"](float(ratio)) if ratio else COLOURS[name]


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
    """Left: R_EB over the denoising, as Fig. 3. Right: the two losses that it is made of."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method in distinct(records, "method"):
        label, shown = title(method), {"color": colour(method), "marker": "o" if len(records) < 100 else None}
        left.plot(*mean_by(records, "mask_ratio", "ratio", method=method), **shown, label=label)
        right.plot(
            *mean_by(records, "mask_ratio", "sequential", method=method), "-", color=colour(method), label=f"{label}: L_seq"
        )
        right.plot(
            *mean_by(records, "mask_ratio", "static", method=method), ":", color=colour(method), label=f"{label}: L_static"
        )
    left.axhline(1, color="black", linewidth=0.8)
    left.set(ylabel="R_EB = L_seq / L_static", title="Exposure bias (1 is ideal)", yscale="log")
    right.set(ylabel="NLL of the true tokens", title="The losses behind it", yscale="log")
    for axis in (left, right):
        axis.set_xlabel("mask ratio (denoising runs to the right)")
        axis.invert_xaxis()
        axis.legend(fontsize=7)
    save_picture(figure, path)


def draw_heat_maps(grids: dict[str, np.ndarray], columns: list, rows: list, label: str, path: Path) -> None:
    """One panel a method: scores (rows, columns) from 0 to 1; nan, where there is none, stays white."""
    wide, high = 1.6 + 0.55 * len(columns), 1.4 + 0.4 * len(rows)
    figure, axes = plt.subplots(
        1, len(grids), figsize=(max(3.2, wide) * len(grids), max(3.4, high)), layout="constrained", squeeze=False
    )
    for axis, (method, grid) in zip(axes[0], grids.items()):
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            text = f"{value:.2f}" if math.isfinite(value) else "-"
            axis.text(column, row, text, ha="center", va="center", color="white" if value < 0.6 else "black")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0, 0] else [])
        axis.set(title=title(method).replace(", ", "\n"), xlabel="length in tokens")
        axis.title.set_fontsize(10)
    axes[0, 0].set_ylabel(label)
    figure.colorbar(image, ax=axes[0].tolist(), label="score")
    save_picture(figure, path)


def draw_scores(records: list[dict], path: Path) -> None:
    """Tasks down, lengths across."""
    methods, tasks, lengths = (distinct(records, key) for key in ("method", "task", "length"))

    def mean(**where) -> float:
        return float(np.mean(mean_by(records, "length", "score", **where)[1] or [math.nan]))

    grids = {m: np.array([[mean(method=m, task=task, length=n) for n in lengths] for task in tasks]) for m in methods}
    draw_heat_maps(grids, lengths, tasks, "", path)


DEPTH_BINS = 5


def depth_records(rows: list[Row], cells: list[Cell], predictions: Predictions) -> list[dict]:
    """Mean scores by the depth of a single needle, in DEPTH_BINS equal bins: [{method, length, depth: bin, score, n}]."""
    found: dict[tuple, list] = {}
    singles = [cell for cell in cells if cell.task.startswith("niah_single")]  # no needle among other needles
    for row, cell in product(rows, singles):
        for one in predictions.of(row, cell):
            place = (row.method, cell.length, min(int(one["depth"] * DEPTH_BINS), DEPTH_BINS - 1))
            found.setdefault(place, []).append(next(iter(one["scores"].values())))
    names = ("method", "length", "depth")
    return [dict(zip(names, place)) | {"score": float(np.mean(x)), "n": len(x)} for place, x in sorted(found.items())]


def draw_depths(records: list[dict], path: Path) -> None:
    """Where in the haystack single needles are found: depth down, length across."""
    methods, lengths = distinct(records, "method"), sorted(distinct(records, "length"))
    grids = {method: np.full((DEPTH_BINS, len(lengths)), math.nan) for method in methods}
    for record in records:
        grids[record["method"]][record["depth"], lengths.index(record["length"])] = record["score"]
    names = [f"{100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS}%" for i in range(DEPTH_BINS)]
    draw_heat_maps(grids, lengths, names, "depth of the needle", path)


def over_seeds(records: list[dict]) -> list[dict]:
    """One record per method, task and length: of several seeds the mean, and the wider of two 95% intervals: t over the seeds,
    and Wilson's over all questions (seeds that happen to agree would leave none)."""
    groups: dict[tuple, list] = {}
    for record in records:
        if record["score"] is not None:
            groups.setdefault((record["method"], record["task"], record["length"]), []).append(record)
    merged = []
    for group in groups.values():
        mean, half = t_interval([record["score"] for record in group])
        low, high = wilson_interval(mean, sum(record["n"] for record in group))
        ci95 = [max(0.0, min(mean - half, low)), min(1.0, max(mean + half, high))] if len(group) > 1 else group[0]["ci95"]
        merged.append(group[0] | {"score": mean, "ci95": ci95})
    return merged


def draw_curves(records: list[dict], key: str, path: Path) -> None:
    """The score of each task over "length" (Fig. 5) or "anchor ratio" (Fig. 8), with 95% intervals."""
    tasks, columns = distinct(records, "task"), min(3, len(distinct(records, "task")))
    lines = -(-len(tasks) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), layout="constrained", squeeze=False)
    methods, ticks = distinct(records, "method"), sorted(set(distinct(records, key)))
    for axis, task in zip(axes.flat, tasks):
        for number, method in enumerate(methods):
            line = sorted((r for r in records if (r["task"], r["method"]) == (task, method)), key=lambda record: record[key])
            score = np.array([record["score"] for record in line])
            spread = np.abs(np.array([record["ci95"] for record in line]).reshape(-1, 2).T - score)
            beside = 0.08 * (number - (len(methods) - 1) / 2)  # so that no interval hides another
            places = [ticks.index(record[key]) + beside for record in line]
            axis.errorbar(places, score, spread, marker="o", capsize=2, color=colour(method), label=title(method))
        axis.set(title=task, xlabel=key, ylabel="score", ylim=(-0.03, 1.03))
        axis.set_xticks(range(len(ticks)), ticks)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    save_picture(figure, path)


def ratio_records(records: list[dict]) -> list[dict]:
    """Rows of a sweep over anchor ratios, their ratio taken out of the method's name; and at each, the row without memory."""
    found, place = [], ("method", "task", "length")
    by_place = {tuple(record[key] for key in place): record for record in records}
    for record in records:
        name, _, ratio = record["method"].partition("@")
        if ratio:
            plain = by_place[PLAIN[name], record["task"], record["length"]]
            found += [one | {"anchor ratio": float(ratio)} for one in (plain, record | {"method": name})]
    return found


def save_picture(figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}.") from None
    plt.close(figure)


def draw_pictures(results: dict, out: Path) -> None:
    if results["niah"]:
        draw_scores(results["niah"], out / "niah.png")
    if results.get("depths"):
        draw_depths(results["depths"], out / "depth.png")
    records = over_seeds(results["niah"])
    if len(distinct(records, "length")) > 1:
        draw_curves([record for record in records if "@" not in record["method"]], "length", out / "lengths.png")
    if swept := ratio_records(records):
        named = [record | {"task": f"{record['task']} {record['length']}"} for record in swept]
        draw_curves(named, "anchor ratio", out / "anchor_ratio.png")
    if results.get("exposure_bias"):
        draw_exposure(results["exposure_bias"], out / "exposure_bias.png")
    if results.get("loss"):
        draw_losses(results["loss"], out / "loss.png")


# ---- command line ----------------------------------------------------------------------------------------------------------

SMALL_TASKS = [*data.TASKS, *data.FACT_TASKS]
TABLE_1 = ["niah_multivalue", "ruler_vt", "ruler_cwe", *(f"babilong_qa{i}" for i in range(1, 6))]


class Evaluation(NamedTuple):
    """What a command line asks for."""

    rows: list[Row]
    cells: list[Cell]
    open_model: Callable[[int, str], Transformer]  # (seed, checkpoint)
    settings: Callable[[Row, int], dict]  # what a row's answers depend on, for one seed
    config: dict
    dtype: str


def build_parser() -> Parser:
    parser = Parser("Scores models on needles and facts in long texts, and measures their exposure bias.")
    flag = parser.add_argument
    flag("--run", help="folder of a finished --tiny run, e.g. runs/tiny: the small tasks, all rows, all seeds")
    backbone_flags(flag)
    flag("--adapter", nargs="+", metavar="[mdlm=|memdlm=]DIR", help="outer LoRAs for --backbone: a row of the table each")
    flag("--memory", action="store_true", help="with --backbone: one more row, prompts written into the weights (Sec. 4.5)")
    flag("--out", help="folder for predictions.jsonl, results.json, table.md and pictures; started again, it goes on there")
    flag("--compare", nargs=2, metavar="RUN:METHOD", help="only compare two methods of finished runs, paired by seed")
    # what is asked
    tasks = f"--run: {' '.join(SMALL_TASKS)}; --backbone: {' '.join(data.BENCHMARKS)} (default: the run's; Table 1's)"
    flag("--tasks", nargs="+", choices=[*SMALL_TASKS, *data.BENCHMARKS], metavar="TASK", help=tasks)
    flag(
        "--lengths", nargs="+", type=whole(64, 1 << 20), help="in the model's tokens (default: the run's; 4096 8192 [Table 1])"
    )
    flag("--samples", type=whole(1), help="questions per task and length (default: the run's; 25 [500])")
    flag("--seed", type=whole(0), help="of a backbone's questions and draws (default: 0)")
    flag("--protocol", choices=("original", "harness"), default="original", help="wording: the benchmarks' own [harness]")
    flag("--chat", action="store_true", help="questions go through the backbone's chat template [off]")
    flag("--haystack", metavar="FILE", help="a text for RULER's essay tasks and BABILong (default: noise; built-in sentences)")
    flag("--babi", metavar="DIR", help="bAbI's published files, whose stories take the place of ours")
    flag("--show", action="store_true", help="print the first prompt of each task and length verbatim")
    flag("--exposure-bias", action="store_true", help="R_EB on --data (Fig. 3); tasks only where --tasks names some")
    flag("--data", help='JSONL of {"prompt", "response"} for --exposure-bias')
    flag("--max-length", type=whole(2), default=4096, help="longest pair taken from --data, in tokens [4096, Sec. 4.1]")
    flag("--bias-steps", type=whole(2), default=48, help="denoising steps of the exposure bias [48, Fig. 3]")
    # how it is answered
    sample.decoding_flags(flag)
    flag(
        "--write", choices=list(sample.WRITE_RULES), help="how a prompt is written (default, also of the next four: the run's)"
    )
    flag("--write-lr", type=real(0), help="step size of that [0.1, Sec. 4.5]")
    flag("--write-rank", type=whole(1), help="rank of its fast weights [32, Sec. 4.1]")
    flag("--write-passes", type=whole(1), help="how often its stages are gone through [1, Sec. 4.5]")
    flag("--anchor-ratio", nargs="+", type=real(0.01, 1), help="share masked by 'paper'; several: a row each [0.2, Fig. 8]")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    return parser


BACKBONE_ALONE = ("adapter", "random_weights", "load_4bit", "dtype", "memory", "seed", "protocol", "chat", "haystack", "babi")


def check_flags(args: argparse.Namespace) -> None:
    """Refuses, in one line, what would mislead; takes out what is named twice."""
    if bool(args.run) == bool(args.backbone) or not args.out:
        raise UserError("say what to score, --run DIR or --backbone NAME_OR_DIR, and where to write, --out DIR.")
    default = build_parser().get_default
    if bool(args.data) != args.exposure_bias:
        raise UserError("--exposure-bias and --data FILE go together: it is measured on the pairs of a file.")
    if not args.exposure_bias and (args.bias_steps, args.max_length) != (default("bias_steps"), default("max_length")):
        raise UserError("--bias-steps and --max-length go with --exposure-bias.")
    if args.run:
        for name in BACKBONE_ALONE:
            if getattr(args, name) != default(name):
                raise UserError(f"--{name.replace('_', '-')} goes with --backbone, not with --run.")
        if too_long := [length for length in args.lengths or [] if length > 8192]:
            raise UserError(f"--lengths {too_long[0]}: the small tasks go up to 8192 tokens.")
    elif not args.memory and any(chosen(args, *WRITE_FLAGS, "anchor_ratio")):
        raise UserError("--write... and --anchor-ratio say how a memory is written: add --memory.")
    for name in ("tasks", "lengths", "anchor_ratio"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])) or None)
    known = SMALL_TASKS if args.run else list(data.BENCHMARKS)
    if strangers := [task for task in args.tasks or [] if task not in known]:
        raise UserError(f"{strangers[0]} is not a task of --{'run' if args.run else 'backbone'}, which has {', '.join(known)}.")
    if (Path(args.out) / "config.json").exists():
        raise UserError(f"--out {args.out} is a run, whose results.json would be lost: name another folder.")


WRITE_FLAGS = ("write", "write_lr", "write_rank", "write_passes")


def chosen(args: argparse.Namespace, *names: str) -> dict:
    """Those of the flags that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def memory_rows(method: str, checkpoint: str, write: sample.Write, ratios: list[float] | None) -> list[Row]:
    """A row with memory, or one for each anchor ratio of a sweep."""
    if ratios and write.rule != "paper":
        raise UserError("--anchor-ratio needs --write paper: no other rule has such an anchor.")
    ratios = ratios or [write.anchor_ratio]
    names = [f"{method}@{ratio}" if len(ratios) > 1 else method for ratio in ratios]
    return [Row(name, checkpoint, write._replace(anchor_ratio=ratio)) for name, ratio in zip(names, ratios)]


def digest(path: str | Path, last: int | None = None) -> str:
    """Tells a file from a later one of that name, by all of its bytes or by the last ones."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - last) if last else 0)
            while chunk := file.read(1 << 20):
                found.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    return found.hexdigest()[:16]


def settings_of(args: argparse.Namespace, evaluation: Evaluation) -> dict[tuple[str, str, int], dict]:
    """What each row's answers and walks depend on, beside their questions, by BEGUN."""
    own = {"answers": chosen(args, "steps", "block_length", "schedule", "threshold")}
    if args.exposure_bias:
        own[BIAS] = {"data": digest(data.find_data(args.data)), "max_length": args.max_length, "bias_steps": args.bias_steps}
    found = {}
    for row, cell in product(evaluation.rows, evaluation.cells):
        kind = BIAS if cell.task == BIAS else "answers"
        if (row.method, kind, cell.seed) not in found:
            write = {**row.write._asdict(), **asdict(row.write.memory), "memory": True} if row.write else {}
            written = {f"write {name}": value for name, value in write.items()}
            found[row.method, kind, cell.seed] = own[kind] | written | evaluation.settings(row, cell.seed)
    return found


def bias_cells(args: argparse.Namespace, seeds: Iterable[int], tokenizer: data.Tokenizer, samples: int) -> list[Cell]:
    """The exposure bias's cell for each seed, if it is asked for."""
    if not args.exposure_bias:
        return []
    pairs, dropped = data.read_pairs(args.data, tokenizer, args.max_length)
    print(f"exposure bias on {min(samples, len(pairs))} of {len(pairs)} pairs; {dropped} longer ones left out")
    return [bias_cell(pairs[:samples], seed, args.bias_steps, tokenizer.eos) for seed in seeds]


def evaluation_of_run(args: argparse.Namespace, device: str) -> Evaluation:
    """The small tasks, put to every seed of a --tiny run."""
    folder, dtype = Path(args.run), "float32"
    config = read_config(folder) | chosen(args, *WRITE_FLAGS, "tasks", "lengths", "samples")
    ratios = args.anchor_ratio or [config["anchor_ratio"]]
    write = sample.write_settings(config | {"anchor_ratio": ratios[0]})
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    paths = {(seed, name): folder / f"seed{seed}" / f"{name}.safetensors" for seed in seeds for name in CHECKPOINTS}
    models = {place: load_model(path, device)[0] for place, path in paths.items()}
    rows = [Row(method, name, None) for method, (_, name, memory) in ROWS.items() if not memory]
    rows += memory_rows("memdlm_train_inference", "memdlm", write, args.anchor_ratio)
    tasks = config["tasks"] if args.tasks or not args.exposure_bias else []
    places = [(task, length, seed) for seed in seeds for length in config["lengths"] for task in tasks]
    options = lambda model: sample.decoding(args, model.config.architecture)  # noqa: E731
    cells = [small_cell(*place, config["samples"], options) for place in places]
    cells += bias_cells(args, seeds, data.TINY, config["samples"])

    def settings(row: Row, seed: int) -> dict:
        return {"weights": digest(paths[seed, row.checkpoint]), "samples": config["samples"], **machine(device)}

    config |= {"tasks": tasks, "anchor_ratio": ratios, "bias_steps": args.bias_steps}
    return Evaluation(rows, cells, lambda *place: models[place], settings, config, dtype)


CHECKPOINTS = ("base", "mdlm", "memdlm")


def find_adapters(texts: list[str]) -> dict[str, str]:
    """--adapter: {"mdlm" or "memdlm": folder}. Which it is stands in the fine-tuning's config.json, or before the "="."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (equals and name in CHECKPOINTS[1:]):
            folder, settings = text, Path(text).parent / "config.json"
            name = read_json(settings).get("method") if settings.exists() else None
        if name not in CHECKPOINTS[1:]:
            raise UserError(f"--adapter {folder}: say what trained it, --adapter mdlm={folder} or memdlm={folder}.")
        if name in found:
            raise UserError(f"--adapter: {found[name]} and {folder} are both of {name}; a table has one of each.")
        found[name] = folder
        digest(Path(folder) / "adapter_model.safetensors")  # it is there
    return found


WITH_MEMORY = {"base": "base_inference", "mdlm": "mdlm_inference", "memdlm": "memdlm_train_inference"}


def backbone_rows(args: argparse.Namespace, adapters: dict[str, str]) -> list[Row]:
    """Base, a row for each adapter, and with --memory one more: of MemDLM's adapter, or else of what there is."""
    names = [name for name in CHECKPOINTS if name == "base" or name in adapters]
    rows = [Row(method, name, None) for method, (_, name, memory) in ROWS.items() if name in names and not memory]
    if args.memory:
        write = sample.real_write(adapters.get(names[-1]), **chosen(args, *WRITE_FLAGS))
        rows += memory_rows(WITH_MEMORY[names[-1]], names[-1], write, args.anchor_ratio)
    return rows


def backbone_cells(args: argparse.Namespace, tokenizer: data.Tokenizer, seed: int) -> list[Cell]:
    """RULER's and BABILong's questions, one at a time as in the published evaluation. A length that is too short for one of
    them shows before any work."""

    def encode(text: str, prefix: str) -> list[int]:
        if args.chat:  # the prefix begins the assistant's turn
            return tokenizer.encode_prompt(text) + tokenizer.encode(prefix.strip())
        return tokenizer.encode(text + prefix)

    haystack = data.read_text(args.haystack, "--haystack") if args.haystack else None
    style = data.Style(encode, args.protocol, haystack, Path(args.babi) if args.babi else None)
    options, cells = (lambda model: sample.decoding(args, model.config.architecture)), []
    tasks, n = args.tasks or ([] if args.exposure_bias else TABLE_1), args.samples or 25
    for length, task in product(args.lengths or [4096, 8192], tasks):
        data.check_length(task, n, length, seed, style)
        question = partial(lambda task, length, index: data.make_question(task, index, length, seed, style), task, length)
        groups, metrics = [[i] for i in range(n)], metrics_of(task, args.protocol)
        cell = question_cell(task, length, seed, groups, question, metrics, tokenizer, options)
        if args.chat:  # --show shows what the model reads
            cell = cell._replace(first=cell.first._replace(text=sample.canvas_text(cell.first.prompt, tokenizer)))
        cells.append(cell)
    return cells + bias_cells(args, [seed], tokenizer, n)


def backbone_files(args: argparse.Namespace) -> dict[str, str]:
    """Digests that tell a checkpoint from another: of its weights the last megabyte of each file, for they are large."""
    folder = Path(args.backbone) if args.random_weights else find_checkpoint(args.backbone)
    small = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    found = {path.name: digest(path) for path in small if path.exists()}
    shards = [] if args.random_weights else sorted(set(tensor_files(folder).values()))
    return found | {path.name: digest(path, last=1 << 20) for path in shards}


def evaluation_of_backbone(args: argparse.Namespace, device: str) -> Evaluation:
    """The original benchmarks, put to a real backbone and to its adapters, which are in memory one after the other."""
    args.plain, seed = not args.chat, args.seed or 0
    tokenizer, adapters, dtype = backbone_tokenizer(args), find_adapters(args.adapter or []), dtype_name(args, device)
    if args.chat and tokenizer.template is None:
        raise UserError(f"--chat: {args.backbone} has no chat template.")
    rows, cells = backbone_rows(args, adapters), backbone_cells(args, tokenizer, seed)
    about = {"backbone": args.backbone, "protocol": args.protocol, "chat": args.chat, "load_4bit": args.load_4bit}
    about |= {"haystack": args.haystack and digest(args.haystack), "babi": args.babi, **machine(device, dtype)}
    tasks = dict.fromkeys(cell.task for cell in cells if args.babi and cell.task.startswith("babilong"))
    stories = [data.find_babi(Path(args.babi), task.removeprefix("babilong_")) for task in tasks]
    about |= backbone_files(args) | {path.name: digest(path) for path in stories}

    def settings(row: Row, seed: int) -> dict:
        files = ("adapter_model.safetensors", "adapter_config.json") if row.checkpoint in adapters else ()
        return about | {name: digest(Path(adapters[row.checkpoint]) / name) for name in files}

    def open_model(seed: int, checkpoint: str) -> Transformer:
        return sample.add_adapter(load_backbone(args, tokenizer, device), adapters.get(checkpoint))

    asked = chosen(args, *(name for name in vars(args) if name not in ("out", "show", "device")))
    config = {"write": args.write or "paper", "tasks": list(dict.fromkeys(cell.task for cell in cells))} | asked
    return Evaluation(rows, cells, open_model, settings, config, dtype + (", NF4" if args.load_4bit else ""))


def show_prompts(cells: list[Cell]) -> None:
    """The first prompt of each task and length, as the model reads it."""
    firsts = {(cell.task, cell.length): cell.first for cell in reversed(cells) if cell.first}
    for (task, length), question in reversed(firsts.items()):
        head = f"---- {task} {length}: {len(question.prompt)} tokens, {question.tokens} to generate, a right answer contains"
        print(f"{head} {', '.join(question.references)}\n{question.text}\n")


def cost_table(rows: list[Row], cells: list[Cell], predictions: Predictions) -> str:
    """Seconds per answer, the making of its prompt included, and on a GPU the peak memory, by row and length. (Apart from
    results.json, which has no times.)"""
    lines = []
    for row, length in product(rows, dict.fromkeys(cell.length for cell in cells)):
        found = [one for cell in cells if cell.length == length for one in predictions.of(row, cell)]
        if found:
            peak = max(one.get("peak_memory_gib", 0.0) for one in found)
            seconds = np.mean([one["seconds"] for one in found])
            lines.append([title(row.method), length or BIAS, f"{seconds:.3g}", f"{peak:.2f}" if peak else "-"])
    return markdown(["method", "length", "seconds an answer", "GPU peak, GiB"], lines)


def run(args: argparse.Namespace) -> None:
    if args.compare:
        print(compare(args.compare))
        return
    check_flags(args)
    out, device = Path(args.out), pick_device(args.device)
    evaluation = (evaluation_of_run if args.run else evaluation_of_backbone)(args, device)
    rows, cells, open_model, _, config, dtype = evaluation
    check_writable(out)
    if args.show:
        show_prompts(cells)
    predictions = Predictions(out / "predictions.jsonl")
    predictions.agree(settings_of(args, evaluation))
    failed = evaluate(rows, cells, open_model, predictions)
    asked, walked = ([cell for cell in cells if (cell.task == BIAS) == bias] for bias in (False, True))
    results = {"config": config, "machine": machine(device, dtype), "niah": summarize(rows, asked, predictions, failed)}
    results["depths"] = depth_records(rows, asked, predictions)
    results["decoding"] = chosen(args, "steps", "block_length", "schedule", "threshold")
    results["failed"] = [dict(zip(("method", "task", "length", "seed"), place)) for place in sorted(failed)]
    results["pairs"] = max((len(cell.groups) for cell in walked), default=0)
    results["exposure_bias"] = [record for cell in walked for record in summarize_bias(rows, cell, predictions, failed)]
    write_json(out / "results.json", results)
    tables = report(results) + ("\n\n" + cell_table(results) if asked else "")
    write_text(out / "table.md", tables + "\n")
    draw_pictures(results, out)
    print(
        f"{tables}\n\n{cost_table(rows, cells, predictions)}\n\nPeak memory {peak_memory(device):.2f} GiB. Written to {out}/."
    )


def main(arguments: list[str] | None = None) -> None:
    guarded(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
