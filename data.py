"""
data.py: the tiny tokenizer, four small reading tasks in plain English, and batches of (prompt, response) pairs.

Every example is a haystack of sentences, a question about a few of them (the needles), and an answer of several tokens:

  task   after                 needles in the haystack                      the answer
  mv     RULER multi-value     " river holds 47." twice for each of 3 keys  " river holds 47. river holds 92."
  vt     RULER var. tracking   " alpha = 47. beta = alpha." ... 2 chains    " alpha = 47. beta = alpha. gamma = beta."
  cwe    RULER common words    " lamp." four times, other words once        " lamp stone."
  babi   bAbI who is where     " Mary went home."; the last move counts     " Mary went home. John went north."

Between the needles stands a filler that repeats three sentences, as RULER's "noise" haystack does: a longer example is the
same problem with more filler. That the filler is *predictable* matters when a prompt is written into the weights
(Sec. 4.5): on random filler there would be nothing but noise to write.

Reading list: RULER, Hsieh et al. 2024, arXiv 2404.06654; bAbI, Weston et al. 2015, arXiv 1502.05698; tiktoken's README.

Glossary
  paper      | name here      | shape
  x_0        | x0             | (B, T) clean token ids: prompt, response, EOS padding
  -          | maskable       | (B, T) bool: the response, that is what the forward process may mask and the loss may score
  -          | attention_mask | (B, T) bool or None: which positions are visible at all (None: every one)
  -          | Example        | prompt (P,) and response (R,) token ids, references: the strings that score
"""

import argparse
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import UserError

# ---- the tokenizer: 256 bytes, then a closed list of words, then two special tokens ------------------------------------

NOUNS = "river lamp stone bread cloud tiger piano clock glass horse candle forest pencil ladder silver garden".split()
NOUNS += "button carpet window rocket island pepper helmet basket".split()
GREEK = "alpha beta gamma delta zeta theta iota kappa lambda rho sigma tau phi chi omega upsilon".split()
PEOPLE = "Mary John Sandra Daniel Julie Fred Bill Emily".split()
PLACES = "home outside upstairs downstairs north south east west abroad away".split()
FILLER = (" The night was calm.", " The road was long.", " The snow was deep.")

# One class of interchangeable words is one run of consecutive ids, so that "another word of this class" is arithmetic.
CLASSES = {"noun": NOUNS, "greek": GREEK, "person": PEOPLE, "place": PLACES, "tens": list("0123456789")}
OTHER = "holds hold went and which what does where are words common Question Answer Where".split()
OTHER += "The was calm long deep night road snow = is in to the of a".split()
WORDS = [" " + word for words in (*CLASSES.values(), OTHER) for word in words]


def build_tokenizer() -> tiktoken.Encoding:
    """A tiktoken.Encoding made here, without a download. Any text encodes to ids and decodes back to itself.

    "river holds 47." -> ["r", "i", "v", "e", "r", " holds", " 4", "7", "."]: a listed word with its leading space is
    one token, everything else falls apart into bytes. Special tokens exist as ids only: `encode_ordinary`, the one
    function used on text, turns a typed "<|mask|>" into ordinary bytes.
    """
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(WORDS)}
    special = {"<|endoftext|>": len(ranks), "<|mask|>": len(ranks) + 1}
    pattern = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
    return tiktoken.Encoding("memdlm-tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encode_text(text: str) -> list[int]:
    """A user's text as ordinary tokens. It gets a leading space if it has none: " river" is one token, "river" five bytes."""
    return TOKENIZER.encode_ordinary(text if text.startswith((" ", "\n")) or not text else " " + text)


TOKENIZER = build_tokenizer()
EOS, MASK, VOCAB_SIZE = (
    TOKENIZER.encode_single_token("<|endoftext|>"),
    TOKENIZER.encode_single_token("<|mask|>"),
    TOKENIZER.n_vocab,
)


def class_range(name: str) -> tuple[int, int]:
    """First id of a word class and its size. "units" are the ten digit bytes, the second digit of a number."""
    if name == "units":
        return ord("0"), 10
    return TOKENIZER.encode_single_token(" " + CLASSES[name][0]), len(CLASSES[name])


# ---- the four tasks, vectorised: every array has the examples along its first axis -------------------------------------


def pick(rng: np.random.Generator, name: str, n: int, k: int) -> np.ndarray:
    """k different words of a class for each of n examples: ids (n, k)."""
    first, size = class_range(name)
    return first + rng.random((n, size)).argsort(axis=1)[:, :k]


def sentence(*parts) -> np.ndarray:
    """Glues text and id arrays of one shape (...) into ids (..., W): sentence(keys, " holds", tens, units, ".")."""
    shape = next(part.shape for part in parts if not isinstance(part, str))
    columns = []
    for part in parts:
        if isinstance(part, str):
            columns += [np.full(shape, token) for token in TOKENIZER.encode_ordinary(part)]
        else:
            columns.append(part)
    return np.stack(columns, axis=-1)


def numbers(rng: np.random.Generator, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k different two-digit numbers for each of n examples: tens (n, k), units (n, k)."""
    value = rng.random((n, 100)).argsort(axis=1)[:, :k]
    return class_range("tens")[0] + value // 10, class_range("units")[0] + value % 10


def shuffle(rng: np.random.Generator, facts: np.ndarray) -> np.ndarray:
    """Each example's facts (n, F, ...) in a random order of its own."""
    order = rng.random(facts.shape[:2]).argsort(axis=1)
    return np.take_along_axis(facts, order.reshape(order.shape + (1,) * (facts.ndim - 2)), axis=1)


class Task(NamedTuple):
    """What a generator returns for n examples; the first question is the one an evaluation asks."""

    facts: np.ndarray  # (n, F, W) ids in reading order, -1 where a fact is shorter than W
    questions: list[tuple[np.ndarray, np.ndarray]]  # pairs of question (n, Q) and answer (n, R)


def multi_value(rng: np.random.Generator, n: int) -> Task:
    names = pick(rng, "noun", n, 3)
    keys = shuffle(rng, np.repeat(names, 2, axis=1))  # (n, 6), each key twice
    facts = sentence(keys, " holds", *numbers(rng, n, 6), ".")
    questions = []
    for name in names.T:
        found = np.argsort(keys != name[:, None], axis=1, kind="stable")[:, :2]  # where it stands, in reading order
        answer = np.take_along_axis(facts, found[..., None], axis=1).reshape(n, -1)
        questions.append((sentence(" Question: what does", name, " hold? Answer:"), answer))
    return Task(facts, questions)


def variable_tracking(rng: np.random.Generator, n: int) -> Task:
    names, (tens, units) = pick(rng, "greek", n, 6).reshape(n, 2, 3), numbers(rng, n, 2)
    first = sentence(names[..., 0], " =", tens, units, ".")  # (n, 2, 5)
    later = sentence(names[..., 1:], " =", names[..., :-1], ".")  # (n, 2, 2, 4)
    chains = np.full((n, 6, 5), -1)
    chains[:, ::3], chains[:, 1:3, :4], chains[:, 4:, :4] = first, later[:, 0], later[:, 1]
    # Each chain keeps its order, but the two are interleaved: draw which chain each of the six places belongs to.
    places = np.argsort(shuffle(rng, np.tile([0, 0, 0, 1, 1, 1], (n, 1))), axis=1, kind="stable")
    facts = np.empty_like(chains)
    np.put_along_axis(facts, places[..., None], chains, axis=1)
    questions = []
    for i in range(2):
        question = sentence(" Question: which =", tens[:, i], units[:, i], "? Answer:")
        questions.append((question, np.concatenate([first[:, i], later[:, i].reshape(n, -1)], axis=1)))
    return Task(facts, questions)


def common_words(rng: np.random.Generator, n: int) -> Task:
    words = pick(rng, "noun", n, 10)
    listed = shuffle(rng, np.concatenate([words[:, :2].repeat(4, axis=1), words[:, 2:]], axis=1))
    first_seen = (listed == words[:, :1]).argmax(1) < (listed == words[:, 1:2]).argmax(1)
    common = np.where(first_seen[:, None], words[:, :2], words[:, 1::-1])
    question = np.tile(TOKENIZER.encode_ordinary(" Question: which words are common? Answer:"), (n, 1))
    return Task(sentence(listed, "."), [(question, sentence(common[:, 0], common[:, 1], "."))])


def who_is_where(rng: np.random.Generator, n: int) -> Task:
    names = pick(rng, "person", n, 4)
    people = shuffle(rng, np.repeat(names, 2, axis=1))  # (n, 8), each moves twice
    first, size = class_range("place")
    moves = sentence(people, " went", first + rng.integers(size, size=people.shape), ".")
    questions = []
    for asked in (names[:, :2], names[:, 2:]):
        last = 7 - (people[:, None, ::-1] == asked[..., None]).argmax(-1)  # (n, 2): each one's last move
        answer = np.take_along_axis(moves, last[..., None], axis=1).reshape(n, -1)
        questions.append((sentence(" Question: where are", asked[:, 0], " and", asked[:, 1], "? Answer:"), answer))
    return Task(moves, questions)


TASKS = {"mv": multi_value, "vt": variable_tracking, "cwe": common_words, "babi": who_is_where}
# What a correct answer must contain, read off the clean answer, and which words of it idiosyncratic noise replaces.
REFERENCE = {"mv": r"\d+", "vt": r"[a-z]+(?= =)", "cwe": r"[a-z]+", "babi": r"\w+ went \w+"}
NOISE = {"mv": ("tens", "units"), "vt": ("tens", "units", "greek"), "cwe": ("noun",), "babi": ("place",)}


def haystack(rng: np.random.Generator, facts: np.ndarray, length: int) -> np.ndarray:
    """Facts (n, F, W) at random places between filler sentences -> ids (n, at most `length`), no padding left."""
    n, n_facts, width = facts.shape
    filler = [TOKENIZER.encode_ordinary(text) for text in FILLER]
    n_filler = max(0, (length - (facts[0] >= 0).sum()) // len(filler[0]))
    width = max(width, len(filler[0]))
    slots = np.full((n, n_facts + n_filler, width), -1)
    is_fact = shuffle(rng, np.repeat((np.arange(n_facts + n_filler) < n_facts)[None], n, axis=0))
    slots[is_fact, : facts.shape[2]] = facts.reshape(-1, facts.shape[2])
    number = np.cumsum(~is_fact, axis=1)[~is_fact] % len(filler)  # filler sentences follow each other in a fixed cycle
    slots[~is_fact, : len(filler[0])] = np.array(filler)[number]
    return slots[slots >= 0].reshape(n, -1)


def make_arrays(task: str, n: int, length: int, rng: np.random.Generator, questions: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """n examples of at most `length` tokens: ids (n, T), and which of the T places belong to an answer (T,).

    Each answer is closed by EOS. More than one question makes the denser documents of the base's pretraining.
    """
    drawn = TASKS[task](rng, n)
    pieces = [piece for question, answer in drawn.questions[:questions] for piece in (question, answer, np.full((n, 1), EOS))]
    is_answer = [np.full(piece.shape[1], i % 3 > 0) for i, piece in enumerate(pieces)]
    hay = haystack(rng, drawn.facts, length - sum(piece.shape[1] for piece in pieces))
    return np.concatenate([hay, *pieces], axis=1), np.concatenate([np.zeros(hay.shape[1], bool), *is_answer])


def add_noise(task: str, response: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Replaces each answer word by a random one of its class with this probability: sample-specific noise.

    It stands for what no rule explains in real instruction data (this user's spelling, that annotator's taste, a wrong
    date): true of one example, worthless for every other, and learnable only by heart.
    """
    response = response.copy()
    for name in NOISE[task]:
        first, size = class_range(name)
        hit = (response >= first) & (response < first + size) & (rng.random(response.shape) < probability)
        response[hit] = first + rng.integers(size, size=hit.sum())
    return response


# ---- examples and batches ------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One (prompt, response) pair of token ids, and the strings that a right answer contains (empty: not scored)."""

    prompt: list[int]
    response: list[int]
    references: tuple[str, ...] = ()


class Batch(NamedTuple):
    """What every loss takes: x0 (B, T) ids, maskable (B, T) bool, attention_mask (B, T) bool or None."""

    x0: Tensor
    maskable: Tensor
    attention_mask: Tensor | None


def split_seed(seed: int, split: str) -> int:
    """Seeds of "train", "held out" and "test" examples that do not coincide in practice, whatever the run's seed."""
    return int(np.random.SeedSequence([seed, zlib.crc32(split.encode())]).generate_state(1)[0])


def fingerprint() -> int:
    """A checksum of what the generators produce: changes when tokenizer or tasks do, and old bases no longer match."""
    return zlib.crc32(b"".join(make_arrays(task, 4, 96, np.random.default_rng(0), 3)[0].tobytes() for task in TASKS))


def make_examples(task: str, n: int, length: int, seed: int, noise: float = 0.0) -> list[Example]:
    """n examples of one task, at most `length` tokens each, the same for the same seed and n. References are clean."""
    rng = np.random.default_rng([seed, length, list(TASKS).index(task)])
    ids, is_answer = make_arrays(task, n, length, rng)
    prompts, clean = ids[:, ~is_answer], ids[:, is_answer]
    references = [tuple(dict.fromkeys(re.findall(REFERENCE[task], decode(row)))) for row in clean.tolist()]
    responses = add_noise(task, clean, noise, rng) if noise else clean
    return [Example(*row) for row in zip(prompts.tolist(), responses.tolist(), references)]


def score(references: tuple[str, ...], output: str) -> float:
    """RULER's string_match_all: the share of reference strings that the output contains."""
    return sum(reference in output for reference in references) / len(references)


def decode(ids: list[int]) -> str:
    """Text up to the first EOS: cut on decoding only, generation itself fills the whole answer."""
    return TOKENIZER.decode(ids[: ids.index(EOS)] if EOS in ids else ids)


def pads_learn(length: Tensor, positions: Tensor, is_response: Tensor) -> tuple[Tensor, None]:
    """The paper's choice: EOS padding is visible, maskable and a target like any token, so that the model learns to stop."""
    return is_response, None


def pads_ignore(length: Tensor, positions: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
    """Padding is hidden from attention, never masked and never a target."""
    real = positions < length[:, None]
    return is_response & real, real


PADS = {"learn": pads_learn, "ignore": pads_ignore}


def collate(examples: list[Example], device: str = "cpu", pads: str = "learn") -> Batch:
    """Right-pads with EOS to the longest example. Asymmetric masking (Sec. 2.1): only the response is maskable."""
    rows = [example.prompt + example.response for example in examples]
    width = max(map(len, rows))
    x0 = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    positions = torch.arange(width)[None]
    prompt_length = torch.tensor([[len(example.prompt)] for example in examples])
    length = torch.tensor([len(row) for row in rows])
    maskable, attention_mask = PADS[pads](length, positions, positions >= prompt_length)
    return Batch(x0.to(device), maskable.to(device), None if attention_mask is None else attention_mask.to(device))


def pretraining_batch(seed: int, step: int, rows: int, length: int, questions: int, whole: float, device: str = "cpu") -> Batch:
    """A fresh batch of all four tasks. With probability `whole` every token is maskable, not the answers alone.

    Predicting the haystack too is what a real pretrained denoiser has done; without it the predictions at a prompt's
    positions would be untrained, and so would be what is written from them.
    """
    rng = np.random.default_rng([seed, step])
    drawn = [make_arrays(task, rows // len(TASKS), length, rng, questions) for task in TASKS]
    width = max(ids.shape[1] for ids, _ in drawn)  # several questions may not fit into `length`
    x0 = np.concatenate([np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=EOS) for ids, _ in drawn])
    is_answer = np.stack([np.pad(mask, (0, width - len(mask))) for _, mask in drawn])
    maskable = is_answer.repeat(rows // len(TASKS), axis=0)
    if rng.random() < whole:
        maskable = np.ones_like(maskable)
    return Batch(torch.from_numpy(x0).to(device), torch.from_numpy(maskable).to(device), None)


# ---- the user's own data -------------------------------------------------------------------------------------------------


def encode_pair(record: object, where: str, max_length: int) -> Example:
    """One JSONL record -> Example, or a UserError that names the place. The response is closed by EOS."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("prompt", "response")):
        raise UserError(f'{where}: each line must be {{"prompt": "...", "response": "..."}} with two strings.')
    if not record["response"].strip():
        raise UserError(f"{where}: the response is empty; there would be nothing to learn.")
    prompt, response = encode_text(record["prompt"]), [*encode_text(record["response"]), EOS]
    if len(prompt) + len(response) > max_length:
        raise UserError(f"{where}: {len(prompt)} + {len(response)} tokens exceed --max-length {max_length}; shorten it.")
    return Example(prompt, response)


def read_jsonl(path: str | Path, max_length: int) -> list[Example]:
    """All pairs of a JSONL file, read and checked in full before any work begins. Empty lines are passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --data {path}: {error}.") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from None
            examples.append(encode_pair(record, f"{path}, line {number}", max_length))
    if not examples:
        raise UserError(f"{path}: no examples in it.")
    return examples


# ---- command lines: shared by the three programs ---------------------------------------------------------------------------


def whole(low: int, high: int | None = None, multiple: int = 1) -> Callable[[str], int]:
    """argparse type: a whole number in a range."""

    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdigit() else None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number of at least {low}" + (f" and at most {high}" if high else "")
            )
        if value % multiple:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple}")
        return value

    return parse


def real(low: float, high: float = math.inf) -> Callable[[str], float]:
    """argparse type: a finite number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and no abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message}. --help lists the flags.")


def guarded(run: Callable[[], None]) -> None:
    """Runs a command; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept (memdlm.py --resume goes on from there).", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine; leave --device out to choose automatically.")
    return name
