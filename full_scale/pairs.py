"""
pairs.py: the pairs that a real backbone is fine-tuned on, from their sources, and which of them
share a batch.

Reading list: LongAlpaca, Chen et al. 2023, arXiv 2309.12307, the paper's data (Sec. 4.1).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import data
from data import Batch, Example
from full_scale.checkpoints import fetch
from model import UserError


def find_data(source: str) -> Path:
    """The file that --data names: one that is there, or that of a dataset OWNER/NAME on the hub,
    which is downloaded. Such a dataset is expected to be one file NAME.json, as LongAlpaca is."""
    hub = re.fullmatch(r"[\w.-]+/([\w.-]+)", source)
    if Path(source).exists() or not hub or source.endswith((".json", ".jsonl")):
        return Path(source)
    file = f"{hub[1]}.json"
    return fetch(source, [file], kind="dataset") / file


def read_text(path: str | Path, flag: str = "--data") -> str:
    """A file's text, or an error that names it and the flag that named it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {flag} {path}: {error}.") from None


def parse(place: str, text: str) -> object:
    """What a piece of JSON says, or an error that names its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}).") from None


def jsonl_records(source: str, text: str) -> Iterator[tuple[str, object]]:
    """(place, record) of each line that is not empty. Only "\\n" ends a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{source}, line {number}"
            yield place, parse(place, line)


def alpaca_records(source: str, text: str) -> Iterator[tuple[str, dict]]:
    """(place, pair) of each record of a JSON list. The prompt is the instruction and, after a blank
    line, the input if there is one, all stripped, as published. Records with an empty answer, as in
    Alpaca, are passed over."""
    for number, record in enumerate(parse(source, text), 1):
        place, fields = f"{source}, record {number}", record if isinstance(record, dict) else {}
        texts = fields.get("instruction"), fields.get("input") or "", fields.get("output")
        if not all(isinstance(one, str) for one in texts):
            raise UserError(f"{place}: instruction, input and output must be strings.")
        instruction, context, answer = (one.strip() for one in texts)
        if answer:
            prompt = f"{instruction}\n\n{context}" if context else instruction
            yield place, {"prompt": prompt, "response": answer}


def read_data(source: str, tokenizer, max_length: int) -> tuple[list[Example], int]:
    """The pairs of a JSONL file, a LongAlpaca JSON file or a hub dataset, and how many were left
    out for having more than max_length tokens. All are read and checked before any work begins."""
    text, pairs = read_text(find_data(source)), []
    records = alpaca_records if text.lstrip().startswith("[") else jsonl_records
    for place, record in records(source, text):
        fields = record if isinstance(record, dict) else {}
        prompt, response = fields.get("prompt"), fields.get("response")
        if not all(isinstance(one, str) and one.strip() for one in (prompt, response)):
            raise UserError(f'{place}: must be {{"prompt": "...", "response": "..."}}, not empty.')
        try:
            (prompt + response).encode()  # they are texts, without half a surrogate pair
            ids = tokenizer.encode_pair(prompt, response)
        except (UserError, UnicodeError) as error:  # a chat template may refuse a text
            raise UserError(f"{place}: {error}") from None
        pairs.append(Example(*ids))
    if not pairs:
        raise UserError(f"{source} has not a single pair (those without a response do not count).")
    kept = [pair for pair in pairs if len(pair.prompt) + len(pair.response) <= max_length]
    if not kept:
        raise UserError(f"{source}: none of {len(pairs)} pairs has at most {max_length} tokens.")
    return kept, len(pairs) - len(kept)


def split_pairs(pairs: list[Example]) -> tuple[list[Example], list[Example]]:
    """95% to train on and 5% held out, at least one pair each, split by seed 42 (Sec. 4.1)."""
    order = np.random.default_rng(42).permutation(len(pairs)).tolist()
    held = max(1, len(pairs) // 20)
    return [pairs[i] for i in order[held:]] or pairs, [pairs[i] for i in order[:held]]


PADS = ("learn", "ignore")  # whether EOS padding is a target, as in the paper, or hidden


def collate(examples: list[Example], device: str, eos: int, pads: str = "learn") -> Batch:
    """The core's batch. pads "ignore": attention does not see the padding, no loss scores it."""
    batch = data.collate(examples, device, eos)
    if pads == "learn":
        return batch
    lengths = torch.tensor([[len(one.prompt) + len(one.response)] for one in examples])
    is_real = (torch.arange(batch.x0.shape[1]) < lengths).to(device)  # (B, T)
    return Batch(batch.x0, batch.maskable & is_real, is_real)


def length_grouped(pairs: list[Example], size: int, seed: int, epoch: int) -> list[list[Example]]:
    """One epoch's batches: mixed at random, with pairs of like length together. Sorting within
    groups of 50 batches saves nearly all padding, and leaves to chance which pairs meet."""
    rng, group, ordered = np.random.default_rng([seed, epoch]), 50 * size, []
    shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
    for start in range(0, len(pairs), group):
        part = shuffled[start : start + group]
        ordered += sorted(part, key=lambda pair: len(pair.prompt) + len(pair.response))
    batches = [ordered[i : i + size] for i in range(0, len(pairs), size)]
    return [batches[i] for i in rng.permutation(len(batches))]
