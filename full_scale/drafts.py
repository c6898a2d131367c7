"""
drafts.py: what the generators of prompts (ruler.py, documents.py, babilong.py) take and give.

A generator takes a random number generator, the number of the question, its length in tokens and a
`Style`, and returns a `Draft`: a prompt whose haystack may still have any size.

Glossary
  name here | meaning
  haystack  | the text that facts are hidden in: sentences of filler, lines of noise, or an essay
  size      | how much haystack there is, in what the generator counts: lines, words, list entries
  prefix    | the first words of the answer, which are put into the model's mouth
  protocol  | whose wording a prompt has: "original" (the benchmark's own repository) or "harness"
            | (lm-evaluation-harness 0.4.9.2, which the paper's scores were made with)
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Style(NamedTuple):
    """What a benchmark's prompts depend on, beside the seed."""

    encode: Callable[[str, str], list[int]]  # (text, prefix of the answer) -> token ids
    protocol: str = "original"
    haystack: str | None = None  # a text of the user's to hide facts in
    babi: Path | None = None  # a folder with bAbI's published files, which replace our stories
    qa: Path | None = None  # a folder with the files of RULER's question answering


class Draft(NamedTuple):
    """A prompt before its haystack is measured out, and what is known of its answer."""

    # size -> the text up to the answer's prefix, and the depth of the needle that is asked for:
    # 0 where the haystack begins, 1 where it ends, None unless there is exactly one such needle
    render: Callable[[int], tuple[str, float | None]]
    smallest: int  # the least size with which the question has one right answer
    tokens: int  # how many tokens a model may answer with
    references: tuple[str, ...]  # the strings that a right answer contains
    prefix: str = ""
    asked: str = ""  # the question alone, which BABILong's scoring looks at
    largest: int = 1 << 24


def shuffled(items: Iterable, seed: int = 42) -> list:
    """A shuffled copy. The default seed is RULER's own: lists of one length get one order."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items
