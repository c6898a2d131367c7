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

import functools
import random
import re
import unicodedata
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
    larger: "Callable[[], Draft] | None" = None  # what takes over where even `largest` leaves room


def shuffled(items: Iterable, seed: int = 42) -> list:
    """A shuffled copy. The default seed is RULER's own: lists of one length get one order."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


# ---- words and sentences of a text in any language -----------------------------------------------

# Scripts without blanks between words, by Unicode's blocks: Thai to Burmese, Khmer, Chinese and
# Japanese with their punctuation.
UNSPACED = r"\u0e00-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
# How Unicode's names of the signs that end a sentence end, from "." to Khmer's.
STOPS = ("FULL STOP", "QUESTION MARK", "EXCLAMATION MARK", "DANDA", "SHAD", "SECTION", "KHAN")


@functools.lru_cache
def words_of(text: str) -> list[str]:
    """What a text may be cut into: its words, each with the blank behind it, if there is one. Where
    a script has no blanks between words, each sign counts as one."""
    text = re.sub(r"\s+", " ", text.lstrip())
    return re.findall(rf"(?:[{UNSPACED}]|[^ {UNSPACED}]+) ?", text)


def sentences_of(words: list[str], quotes: str = "") -> list[str]:
    """Sentences, each with the blank behind it. A blank must follow the stop, and one of `quotes`
    may stand between them; in a script without blanks the next sentence may follow at once. Words
    with next to no stop, as in Thai, are cut into tens."""
    text = "".join(words)
    found = {sign for sign in set(text) if unicodedata.name(sign, "").endswith(STOPS)}
    stops, closing = "".join({*".!?", *found}), "」』）》〉】" + quotes
    following = rf"(?=[“{UNSPACED}])(?![{stops}{closing}])"
    ends = rf"[{stops}]+[{closing}]?(?: |{following})"
    sentences = re.sub(ends, r"\g<0>\n", text).removesuffix("\n").split("\n")
    if len(words) <= 100 * len(sentences):
        return sentences
    return ["".join(words[start : start + 10]) for start in range(0, len(words), 10)]
