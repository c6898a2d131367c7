"""
benchmark.py: `eval_niah.py --backbone`: RULER, BABILong and the exposure bias of real checkpoints.

    python eval_niah.py --backbone llada-moe --adapter runs/moe/adapter --memory --out runs/table1
    torchrun --nproc_per_node 8 eval_niah.py --backbone ...         a process for each GPU

A row of the tables is the backbone; or with the adapter of a fine-tuning; or one of these with a
memory, for which each prompt is written into the weights first. No memory can leak an answer: it is
written by a function that is given the prompt alone. One prompt is read at a time, as in the
published evaluation, and random draws depend on the seed and on the question's number alone: so no
answer depends on what else is asked. predictions.py asks, report.py draws up what came out.

Reading list: RULER, arXiv 2404.06654; BABILong, arXiv 2406.10149; exposure bias, Ranzato et al.
2016, arXiv 1511.06732. The words reader, cell, answer, place and settings stand in predictions.py.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch

from data import Example, collate
from eval_niah import exposure_walk, mean_curve
from full_scale import backbone, report
from full_scale.babilong import find_babi
from full_scale.documents import DOCUMENTS, find_qa
from full_scale.drafts import Style
from full_scale.pairs import find_data, read_data, read_text
from full_scale.predictions import KEY, Cell, Predictions, Reader, ask_all, place
from full_scale.processes import processes, together
from full_scale.prompts import BENCHMARKS, check_length, make_draft, make_question
from full_scale.ruler import NIAH
from full_scale.samplers import sampler_flags, sampler_for
from full_scale.scoring import METRICS, metrics_of
from lab import tools
from lab.ask import decoding_flags
from lab.pictures import canvas_text
from lab.report import (
    PLAIN,
    WITH_MEMORY,
    as_floats,
    bias_records,
    mean_of,
    number_text,
    title,
)
from lab.tools import DEVICES, Parser, real, whole
from lab.variants import WRITE_RULES, check_write_flags, memory_of, write_with
from memdlm import generator_for
from model import Transformer, UserError
from sample import Write, write_prompt

# ---- one answer ------------------------------------------------------------------------------


def question_cell(args, task: str, length: int, style: Style, architecture: str, tokenizer) -> Cell:
    """Questions whose answers are generated and scored, or a UserError if one does not fit."""
    check_length(task, args.samples, length, args.seed, style)
    tokens = make_draft(task, 0, length, args.seed, style).tokens  # the same for all questions
    if args.steps is not None:  # tasks differ: a short answer takes one pass a token at most
        args = argparse.Namespace(**{**vars(args), "steps": min(args.steps, tokens)})
    sampler = sampler_for(args, architecture, tokens, tokenizer.eos)
    metrics = metrics_of(task, args.protocol)

    def ask(model: Transformer, reader: Reader, index: int) -> dict:
        question, canvases = make_question(task, index, length, args.seed, style), []
        prompt = torch.tensor([question.prompt], device=model.embedding.weight.device)
        fast = reader.write and write_prompt(model, prompt, reader.write, args.seed, [index])
        options = {"threshold": args.threshold, "fast": fast, "watch": canvases.append}
        text = tokenizer.decode(sampler(model, prompt, **options)[0].tolist())
        return {
            "tokens": len(question.prompt),
            "depth": question.depth,
            "steps": len(canvases),
            "references": question.references,
            "prediction": text,
            "scores": {name: METRICS[name](question, text) for name in metrics},
        }

    return Cell(task, length, args.seed, args.samples, ask, tokens)


def bias_cell(args: argparse.Namespace, pairs: list[Example], eos: int) -> Cell:
    """Pairs on which the exposure bias is walked. The static masks of a pair depend on seed and
    index alone, so that all rows share them."""

    def ask(model: Transformer, reader: Reader, index: int) -> dict:
        batch = collate([pairs[index]], model.embedding.weight.device, eos)
        generator = generator_for(args.seed, "static masks", index)
        order = torch.rand(batch.x0.shape, generator=generator).to(batch.x0.device)
        prompt = batch.x0[:, : len(pairs[index].prompt)]
        fast = reader.write and write_prompt(model, prompt, reader.write, args.seed, [index])
        walk = exposure_walk(model, batch.x0, batch.maskable, order, args.bias_steps, fast)
        points = []
        for ratio, static, sequential in mean_curve([walk]):
            points.append([ratio, tools.finite(static), tools.finite(sequential)])
        return {"walk": points}

    return Cell(report.BIAS, 0, args.seed, len(pairs), ask)


# ---- what comes out --------------------------------------------------------------------------


def score_record(reader: Reader, cell: Cell, predictions: Predictions) -> dict:
    """The mean score of a reader's answers to a cell, its 95% interval, what they cost, and which
    share of the length prompt and answer fill. Where memory ran out there is no score: those that
    found room are no fair sample."""
    where, answers = place(reader, cell), predictions.of(reader, cell)
    record = dict(zip(KEY, where)) | {"n": len(answers)}
    if where in predictions.without_room:
        return record | {"score": None, "ci95": None, "scores": {}, "steps": None, "full": None}
    scores = {}
    for name in answers[0]["scores"]:
        scores[name] = mean_of([answer["scores"] for answer in answers], name)
    score = next(iter(scores.values()))  # the first metric is the protocol's own
    interval, steps = report.wilson_interval(score, len(answers)), mean_of(answers, "steps")
    full = (mean_of(answers, "tokens") + cell.room) / cell.length
    record |= {"score": score, "ci95": interval, "scores": scores, "steps": steps}
    return record | {"full": full}


def exposure_records(readers: list[Reader], cell: Cell, predictions: Predictions) -> list[dict]:
    """R_EB by row and mask ratio, of walks averaged over the pairs. A row is left out where memory
    ran out for it, or for its checkpoint without a memory, whose loss is the denominator."""
    lacking = {method for method, task, *_ in predictions.without_room if task == report.BIAS}
    curves, denominators = {}, {}
    for reader in readers:
        plain = PLAIN[reader.checkpoint]
        if not lacking & {reader.method, plain}:
            walks = as_floats(answer["walk"] for answer in predictions.of(reader, cell))
            curves[reader.method] = walks.mean(axis=0).tolist()  # (pairs, steps, 3) -> (steps, 3)
            denominators[reader.method] = plain
    return [one | {"seed": cell.seed} for one in bias_records(curves, denominators)]


def results_of(readers: list[Reader], cells: list[Cell], predictions: Predictions) -> dict:
    """results.json, but for the settings, the machine and the depths."""
    results = {"niah": [], "pairs": 0, "exposure_bias": []}
    for cell in cells:
        if cell.task == report.BIAS:
            results["pairs"] = cell.n
            results["exposure_bias"] = exposure_records(readers, cell, predictions)
        else:
            results["niah"] += [score_record(reader, cell, predictions) for reader in readers]
    results["failed"] = [dict(zip(KEY, where)) for where in sorted(predictions.without_room)]
    asked, seeds = {place(*pair) for pair in product(readers, cells)}, {cell.seed for cell in cells}
    others = sorted({key[:4] for key in predictions.answers} - asked)
    left_out = [f"{title(row)}, {task} {length}" for row, task, length, s in others if s in seeds]
    return results | {"left_out": left_out}


# ---- whom and what a command line asks -------------------------------------------------------

TRAINED = ("mdlm", "memdlm")
TABLE_1 = ["niah_multivalue", "ruler_vt", "ruler_cwe"]
TABLE_1 += [f"babilong_qa{number}" for number in range(1, 6)]
WITH_STORIES = [task for task in BENCHMARKS if task.startswith("babilong_")]  # --babi
WITH_ESSAY = [task for task, needles in NIAH.items() if needles.hay == "essay"] + WITH_STORIES


def find_adapters(texts: list[str]) -> dict[str, Path]:
    """--adapter: {one of TRAINED: folder}. Which method trained an adapter stands in front of an
    "=", or else in the training.json that a fine-tuning leaves beside it."""
    found: dict[str, Path] = {}
    for text in texts:
        said, _, folder = text.partition("=")
        if said not in TRAINED or not folder:
            said, folder = None, text
        noted = backbone.trained_with(folder).get("method")
        name = said or noted
        if name not in TRAINED:
            raise UserError(f"--adapter {text}: say what trained it, mdlm={text} or memdlm={text}.")
        if noted not in (None, name):
            raise UserError(f"--adapter {text}: its training.json says that {noted} trained it.")
        if name in found:
            raise UserError(f"--adapter: {found[name]} and {folder} are both of {name}.")
        found[name] = Path(folder)
    return found


def find_readers(args: argparse.Namespace, adapters: dict[str, Path]) -> list[Reader]:
    """Base, a row for each adapter, and with --memory one more, or one for each anchor ratio: of
    MemDLM's adapter, or else of what there is."""
    readers = [Reader(PLAIN["base"], "base", None)]
    readers += [Reader(PLAIN[name], name, None) for name in TRAINED if name in adapters]
    if args.memory:
        checkpoint = readers[-1].checkpoint
        for ratio in args.anchor_ratio or [Write().anchor_ratio]:
            suffix = f"@{ratio}" if len(args.anchor_ratio) > 1 else ""
            written = find_write(args, adapters.get(checkpoint), ratio)
            readers.append(Reader(WITH_MEMORY[checkpoint] + suffix, checkpoint, *written))
    return readers


def find_write(args: argparse.Namespace, adapter: Path | None, anchor_ratio: float) -> tuple:
    """How prompts are written, as a `Write` and as its settings: with the memory of the adapter's
    training, but for what the --write flags change of it."""
    config = backbone.trained_with(adapter)
    window = config.get("max_length", 4096)  # our rule's: the length of the training [4096]
    asked = args.write, args.write_passes, anchor_ratio, window
    write = write_with(memory_of(config), *asked, args.write_lr, args.write_rank)
    return write, backbone.write_settings(write, config, *asked)


def read_haystack(path: str) -> str:
    """The text of --haystack: a file's, or that in RULER's own PaulGrahamEssays.json."""
    text = read_text(path, "--haystack")
    if not (text.lstrip().startswith("{") or path.endswith((".json", ".jsonl"))):
        return text
    try:
        text = json.loads(text)["text"]
        text.encode()  # it is a text, without half a surrogate pair
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        form = 'plain text, or one JSON object {"text": "..."}'
        raise UserError(f"--haystack {path} must be {form} ({error!r}).") from None
    return text


def style_of(args: argparse.Namespace, tokenizer) -> Style:
    """What the prompts are made of."""

    def encode(text: str, prefix: str) -> list[int]:
        if args.chat:  # the prefix begins the assistant's turn
            return tokenizer.encode_prompt(text) + tokenizer.encode(prefix.strip())
        return tokenizer.encode(text + prefix)

    haystack = read_haystack(args.haystack) if args.haystack else None
    folders = [Path(folder) if folder else None for folder in (args.babi, args.qa)]
    return Style(encode, args.protocol, haystack, *folders)


def find_cells(args: argparse.Namespace, tokenizer, style: Style) -> list[Cell]:
    """All that is asked. What does not fit, or cannot be read, shows before any work."""
    cells, architecture = [], backbone.architecture_of(args)
    for length, task in product(args.lengths, args.tasks):
        cells.append(question_cell(args, task, length, style, architecture, tokenizer))
    if args.exposure_bias:
        pairs, dropped = read_data(args.data, tokenizer, args.max_length)
        taken = pairs[: args.samples]
        print(
            f"exposure bias on {len(taken)} of {len(pairs)} pairs; {dropped} longer ones left out"
        )
        cells.append(bias_cell(args, taken, tokenizer.eos))
    return cells


def show_prompts(args: argparse.Namespace, tokenizer, style: Style) -> None:
    """The first prompt of each task and length, as the model reads it."""
    for length, task in product(args.lengths, args.tasks):
        question = make_question(task, 0, length, args.seed, style)
        text = canvas_text(question.prompt, tokenizer) if args.chat else question.text
        size = f"{len(question.prompt)} tokens, {question.tokens} to generate"
        answers = ", ".join(question.references)
        print(f"---- {task} {length}: {size}, a right answer contains {answers}\n{text}\n")


# ---- what the answers depend on --------------------------------------------------------------


def end_settings(tokenizer) -> dict:
    """The tokens that end an answer. EOS alone, as in earlier versions, goes without saying."""
    return {"ends": sorted(tokenizer.ends)} if len(tokenizer.ends) > 1 else {}


def reader_settings(reader: Reader, adapter: Path | None) -> dict:
    """Which adapter a reader has, and how it writes prompts, field by field."""
    found = {}
    if adapter is not None:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            found[name] = backbone.digest(adapter / name)
    found |= {f"write {name}": value for name, value in reader.how.items()}
    return found


def task_settings(args: argparse.Namespace, task: str) -> dict:
    """What is read, and how answers are decoded, for one task."""
    if task == report.BIAS:
        pairs = backbone.digest(find_data(args.data))
        return {"data": pairs, "max_length": args.max_length, "bias_steps": args.bias_steps}
    names = ("protocol", "steps", "block_length", "schedule", "threshold")
    names += ("edit_threshold", "cache")
    found = {name: getattr(args, name) for name in names}
    if args.haystack and task in WITH_ESSAY:
        found["haystack"] = backbone.digest(Path(args.haystack))
    if args.babi and task in WITH_STORIES:
        found["babi"] = backbone.digest(find_babi(Path(args.babi), task.removeprefix("babilong_")))
    if task in DOCUMENTS:
        found["qa"] = backbone.digest(find_qa(Path(args.qa), task))
    return found


def settings_of(args, readers: list[Reader], adapters: dict, where: dict) -> dict[tuple, dict]:
    """SETTINGS_KEY -> what those answers depend on. where: the machine."""
    alike = {name: getattr(args, name) for name in ("backbone", "random_weights", "chat")}
    alike |= where | backbone.files_of(args)
    tasks = [*args.tasks, report.BIAS] if args.exposure_bias else args.tasks
    of_task, settings = {task: task_settings(args, task) for task in tasks}, {}
    for reader in readers:
        own = reader_settings(reader, adapters.get(reader.checkpoint))
        for task in tasks:
            settings[reader.method, task, args.seed] = alike | of_task[task] | own
    return settings


# ---- command line ----------------------------------------------------------------------------


def build_parser() -> Parser:
    """The flags of `eval_niah.py --backbone`. The paper's values stand in brackets."""
    parser = Parser("Scores a real backbone and its adapters on RULER and BABILong.")
    flag = parser.add_argument
    backbone.backbone_flags(flag)
    flag("--adapter", nargs="+", metavar="[mdlm=|memdlm=]DIR", help="outer LoRAs, a row each")
    flag("--memory", action="store_true", help="one more row, whose prompts are written (Sec. 4.5)")
    flag("--out", required=True, help="folder for all results; started again, it goes on there")
    tasks = f"of {', '.join(BENCHMARKS)}; without it those of Table 1"
    flag("--tasks", nargs="+", choices=BENCHMARKS, metavar="TASK", help=tasks)
    lengths = "of prompt and answer, in the backbone's tokens"
    flag("--lengths", nargs="+", type=whole(64, 1 << 20), default=[4096, 8192], help=lengths)
    flag("--samples", type=whole(1), default=25, help="questions for each task and length [500]")
    flag("--seed", type=whole(0), default=0, help="of the questions and of all random draws")
    flag("--protocol", choices=("original", "harness"), default="original", help="whose wording")
    flag("--chat", action="store_true", help="questions go through the chat template [off]")
    flag("--haystack", metavar="FILE", help="a text to hide needles and facts in")
    flag("--babi", metavar="DIR", help="bAbI's published files, in place of our stories")
    flag("--qa", metavar="DIR", help="squad.json and hotpotqa.json, for ruler_qa_1 and ruler_qa_2")
    flag("--show", action="store_true", help="print the first prompt of each task and length")
    bias = "also measure R_EB (Fig. 3), on --data; tasks are asked only where --tasks names some"
    flag("--exposure-bias", action="store_true", help=bias)
    flag("--data", help="pairs for --exposure-bias, in any form that memdlm.py takes")
    flag("--max-length", type=whole(2), default=4096, help="longest pair taken, in tokens [4096]")
    flag("--bias-steps", type=whole(2), default=48, help="denoising steps of R_EB [48, Fig. 3]")
    decoding_flags(flag)
    sampler_flags(flag)
    flag("--write", choices=WRITE_RULES, default="paper", help="rule of writing [paper, Sec. 4.5]")
    flag("--write-lr", type=real(0), help="its step size; without it, that of training [0.1]")
    flag("--write-rank", type=whole(1), help="its rank; without it, that of training [32]")
    flag("--write-passes", type=whole(1), default=1, help="passes through its stages [1]")
    flag("--anchor-ratio", nargs="+", type=real(0.01, 1), help="of rule paper [0.2]; a row each")
    flag("--device", choices=DEVICES, default="auto", help="where to compute")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags; refuses those that would have no effect, and takes out what is named twice."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.tasks is None:
        args.tasks = [] if args.exposure_bias else TABLE_1
    if not args.exposure_bias:
        parser.refuse(args, ["data", "max_length", "bias_steps"], "needs --exposure-bias")
    elif not args.data:
        raise UserError("--exposure-bias needs --data FILE, the pairs that it is measured on.")
    check_write_flags(parser, args, args.memory)
    if not set(args.tasks) & set(WITH_ESSAY):
        parser.refuse(args, ["haystack"], "is read by none of these tasks")
    if not set(args.tasks) & set(WITH_STORIES):
        parser.refuse(args, ["babi"], "is read by the BABILong tasks alone")
    if not set(args.tasks) & set(DOCUMENTS):
        parser.refuse(args, ["qa"], "is read by ruler_qa_1 and ruler_qa_2 alone")
    for name in ("tasks", "lengths", "anchor_ratio"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])))
    return args


def run(arguments: list[str]) -> None:
    """Evaluates as the command line says. All faults that can show before the work do so."""
    args = parse(arguments)
    with together(tools.pick_device(args.device)) as device:
        evaluate(args, device)


def evaluate(args: argparse.Namespace, device: str) -> None:
    """What `run` does, in one process or in several."""
    out, (rank, _) = Path(args.out), processes()
    backbone.check_out(out, "predictions.jsonl")
    tokenizer = backbone.backbone_tokenizer(args, plain=not args.chat)
    if args.chat and tokenizer.template is None:
        raise UserError(f"--chat: {args.backbone} has no chat template.")
    adapters, style = find_adapters(args.adapter or []), style_of(args, tokenizer)
    readers, cells = find_readers(args, adapters), find_cells(args, tokenizer, style)
    for folder in (None, *adapters.values()):
        backbone.check_fit(args, tokenizer, folder)
    where = tools.machine(
        device, backbone.dtype_name(args, device) + (", NF4" if args.load_4bit else "")
    )
    relevant = {name: where[name] for name in where if name != "threads" or device == "cpu"}
    relevant |= end_settings(tokenizer)
    settings = settings_of(args, readers, adapters, relevant)
    predictions = Predictions(out / "predictions.jsonl")
    predictions.agree(settings)
    if args.show:
        show_prompts(args, tokenizer, style)

    def open_model(checkpoint: str) -> Transformer:
        return backbone.add_adapter(
            backbone.load_backbone(args, tokenizer, device), adapters.get(checkpoint)
        )

    ask_all(readers, cells, open_model, predictions)
    if rank > 0:
        return
    predictions.join()
    pairs = list(product(readers, cells))
    answers = [one for pair in pairs for one in predictions.of(*pair)]
    had_room = [pair for pair in pairs if place(*pair) not in predictions.without_room]
    complete = [one for pair in had_room for one in predictions.of(*pair)]
    elsewhere = ("out", "show", "device")
    config = {name: value for name, value in vars(args).items() if name not in elsewhere}
    results = {"config": config, "machine": where, "depths": report.depth_records(complete)}
    results |= results_of(readers, cells, predictions)
    tools.write_json(out / "results.json", results)
    tools.write_text(out / "table.md", report.report(results) + "\n")
    report.draw_pictures(results, out)
    peak = f"Peak memory {number_text(tools.peak_memory(device))} GiB. Written to {out}/."
    print(f"{report.report(results)}\n\n{report.cost_table(answers)}\n\n{peak}")
