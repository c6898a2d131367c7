"""
predictions.py: a long evaluation that may be stopped at any moment and goes on where it was.

Each answer is appended to OUT/predictions.jsonl as soon as it is made, one line for each. When the
same command starts again, it reads that file and asks only what is missing: it ends with the same
answers. Lines of settings say what the answers depend on; answers that were made with other
settings are not taken for these, but refused.

Several processes (torchrun) share the questions. The first writes predictions.jsonl, the others
each a part of their own, predictions.1.jsonl and so on; in the end the first takes the parts over.
Whoever starts again, with however many processes, reads the parts that were left, too.

Glossary
  name here | meaning
  reader    | who answers, a row of the tables: a checkpoint, and how it writes prompts, if it does
  cell      | the questions of one task at one length, for one seed
  answer    | the record of one question: what was said, how it scores and what it cost
  place     | (method, task, length, seed) of all answers that one reader gives to one cell
  settings  | what the answers of one reader to one task depend on, beside their questions
"""

import json
import os
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from full_scale.processes import from_all, processes
from lab.report import title
from lab.tools import out_of_memory
from model import Transformer, UserError
from sample import Write


class Reader(NamedTuple):
    """Who answers: a row of the tables."""

    method: str  # a key of lab.report's TITLES; in a sweep with the anchor ratio behind an @
    checkpoint: str  # "base", or whose adapter is put on the backbone: "mdlm", "memdlm"
    write: Write | None  # how each prompt is written into the weights, if it is
    how: dict = {}  # noqa: RUF012 (never changed) the same by names and numbers, for the file


class Cell(NamedTuple):
    """What is asked: n questions of one task at one length."""

    task: str
    length: int
    seed: int
    n: int
    ask: Callable[[Transformer, Reader, int], dict]  # (model, reader, index of the question)
    room: int = 0  # how many of the length's tokens are left for the answer


def place(reader: Reader, cell: Cell) -> tuple:
    """Where a reader's answers to a cell stand in the tables."""
    return (reader.method, cell.task, cell.length, cell.seed)


# A line of the file is an answer, which is found by KEY, or settings, found by SETTINGS_KEY.
KEY = ("method", "task", "length", "seed", "index")
SETTINGS_KEY = ("method", "task", "seed")


class Predictions:
    """All answers that were given, in memory and in a file. Each process writes one of its own."""

    def __init__(self, path: Path):
        """Reads what is there, and finds out whether it can be written. A last line that was cut
        off is dropped."""
        rank, _ = processes()
        self.path = path.with_suffix(f".{rank}.jsonl") if rank else path
        self.parts = path.with_suffix("").name + ".*.jsonl"
        self.answers: dict[tuple, dict] = {}  # by KEY
        self.settings: dict[tuple, dict] = {}  # by SETTINGS_KEY
        self.without_room: set[tuple] = set()  # the places where memory ran out this time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            *_, cut_off = self.path.read_bytes().split(b"\n")
            os.truncate(self.path, self.path.stat().st_size - len(cut_off))
        except OSError as error:
            raise UserError(f"cannot use {self.path}: {error}; choose another --out.") from None
        from_all(None)  # each has found its own file now: the first one's is there
        self.read(path)
        self.joined = {*self.answers}  # those of predictions.jsonl itself
        for part in sorted(path.parent.glob(self.parts)):
            self.read(part)
        from_all(None)  # nobody writes before all have read

    def read(self, path: Path) -> None:
        """Takes the lines of a file, but for a last one that was cut off."""
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                self.take(json.loads(line))
            except (ValueError, TypeError, KeyError):
                advice = "delete it (an answer is made again), or name another --out"
                raise UserError(f"{path}, line {number} is damaged: {advice}.") from None

    def join(self) -> None:
        """The chief's last deed: it takes the parts over. Stopped in between, it does so again."""
        for part in sorted(self.path.parent.glob(self.parts)):
            self.read(part)
        for key, answer in self.answers.items():
            if key not in self.joined:
                self.append(answer)
        for part in self.path.parent.glob(self.parts):
            part.unlink()

    def take(self, record: dict) -> None:
        """Remembers a line. A TypeError or a KeyError says that it is neither kind of line."""
        if "settings" in record:
            self.settings[tuple(record[name] for name in SETTINGS_KEY)] = record["settings"]
        elif "walk" in record or "scores" in record:
            self.answers[tuple(record[name] for name in KEY)] = record
        else:
            raise KeyError("scores")

    def append(self, record: dict) -> None:
        """Writes a line, and remembers it."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            advice = "the answers so far are kept; start again to go on"
            raise UserError(f"cannot write {self.path}: {error}; {advice}.") from None
        self.take(json.loads(line))
        if "settings" not in record:
            self.joined.add(tuple(record[name] for name in KEY))

    def agree(self, settings: dict[tuple, dict]) -> None:
        """Refuses to go on where there are answers by other settings; notes those that are new.
        Settings without an answer bind nobody: a request that failed may be corrected."""
        answered = {(method, task, seed) for method, task, _, seed, _ in self.answers}
        for key, wanted in settings.items():
            found = self.settings.get(key, {})
            for name in [*wanted, *found]:
                if key in answered and found.get(name) != wanted.get(name):
                    what = f"{self.path.parent} holds answers of {title(key[0])} to {key[1]} with"
                    other = f"{name} {found.get(name)!r}, not {wanted.get(name)!r}"
                    raise UserError(f"{what} {other}: name another --out.")
        rank, _ = processes()
        for key, wanted in settings.items():
            if rank == 0 and self.settings.get(key) != wanted:
                self.append({**dict(zip(SETTINGS_KEY, key)), "settings": wanted})

    def of(self, reader: Reader, cell: Cell) -> list[dict]:
        """A reader's answers to a cell so far, by index."""
        keys = [(*place(reader, cell), index) for index in range(cell.n)]
        return [self.answers[key] for key in keys if key in self.answers]

    def missing(self, reader: Reader, cell: Cell) -> list[int]:
        """The indices of a cell that this reader has not answered."""
        where = place(reader, cell)
        return [index for index in range(cell.n) if (*where, index) not in self.answers]


def measured_answer(model: Transformer, reader: Reader, cell: Cell, index: int) -> dict | None:
    """An answer, and what it cost; None where memory ran out. An error says whose answer it was."""
    on_gpu, clock = model.embedding.weight.is_cuda, time.monotonic()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        answer = cell.ask(model, reader, index)
    except UserError as error:
        question = f"{cell.task}, length {cell.length}, question {index}"
        raise UserError(f"{title(reader.method)}, {question}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    cost = {"seconds": time.monotonic() - clock}
    if on_gpu:
        cost["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return dict(zip(KEY, (*place(reader, cell), index))) | answer | cost


def ask_all(readers: list[Reader], cells: list[Cell], open_model, predictions) -> None:
    """Asks everything that is missing, and notes the places where memory runs out. Of several
    processes each asks its share, and all know in the end where memory ran out for any.

    open_model(checkpoint) is called for one checkpoint after the other, and for none that has
    nothing left to do. The one before has been let go by then: there may be room for one alone.
    """
    (rank, world), shares = processes(), {}
    for number, (reader, cell) in enumerate(product(readers, cells)):
        missing = predictions.missing(reader, cell)
        shares[place(reader, cell)] = missing[(rank + number) % world :: world]  # odd ones in turn
    own = sum(map(len, shares.values()))
    shown = {"desc": "answers", "delay": 2, "mininterval": 1, "disable": rank > 0}
    with tqdm(total=own, **shown) as bar:
        for checkpoint in dict.fromkeys(reader.checkpoint for reader in readers):
            model = None
            alike = [reader for reader in readers if reader.checkpoint == checkpoint]
            for reader, cell in product(alike, cells):
                bar.set_postfix_str(f"{reader.method} {cell.task} {cell.length}", refresh=False)
                for index in shares[place(reader, cell)]:
                    if model is None:
                        if bar.n:
                            bar.clear()  # what loading says gets a line of its own
                        model = open_model(checkpoint)
                    answer = measured_answer(model, reader, cell, index)
                    if answer is None:
                        torch.cuda.empty_cache()
                        predictions.without_room.add(place(reader, cell))
                        break
                    predictions.append(answer)
                    bar.update()
    predictions.without_room.update(*from_all(predictions.without_room))
