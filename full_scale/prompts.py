"""
prompts.py: questions of RULER and BABILong, each grown to a length that is given in tokens.

The generators (ruler.py, documents.py, babilong.py) make drafts, whose haystack may have any size.
This file measures out the largest haystack with which prompt and answer fit into the length.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from full_scale.babilong import BABILONG
from full_scale.documents import DOCUMENTS
from full_scale.drafts import Draft, Style
from full_scale.ruler import RULER
from model import UserError

# name of a task -> (random numbers, number of the question, length, style) -> draft
BENCHMARKS: dict[str, Callable[[random.Random, int, int, Style], Draft]] = (
    RULER | DOCUMENTS | BABILONG
)


class Question(NamedTuple):
    """What a model reads, how many tokens it may answer with, and what a right answer contains."""

    task: str
    prompt: list[int]  # token ids, those of the answer's prefix included
    tokens: int
    references: tuple[str, ...]
    text: str = ""  # the prompt as a string
    asked: str = ""  # as in Draft
    depth: float | None = None  # as in Draft.render


def cost(draft: Draft, size: int, style: Style) -> int:
    """The tokens of the prompt with that much haystack, and of the answer."""
    text, _ = draft.render(size)
    return len(style.encode(text, draft.prefix)) + draft.tokens


def too_short(task: str, least: int, length: int) -> UserError:
    return UserError(
        f"{task} needs at least {least} tokens; --lengths {length} is too short for it."
    )


def grow(task: str, draft: Draft, length: int, style: Style) -> Question:
    """The draft with as much haystack as fits: prompt and answer have at most `length` tokens.
    Raises a UserError if not even the smallest haystack fits."""
    fitting = draft.smallest
    least = cost(draft, fitting, style)
    if least > length:
        raise too_short(task, least, length)

    # Double the size until it no longer fits. `fitting` is always a size that was seen to fit,
    # whether or not a larger haystack always costs more tokens.
    too_large = 2 * fitting + 1
    while too_large <= draft.largest and cost(draft, too_large, style) <= length:
        fitting = too_large
        too_large = 2 * too_large
    too_large = min(too_large, draft.largest + 1)

    # Bisect what lies between the two.
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if cost(draft, middle, style) <= length:
            fitting = middle
        else:
            too_large = middle
    if fitting == draft.largest and draft.larger:
        return grow(task, draft.larger(), length, style)

    text, depth = draft.render(fitting)
    ids = style.encode(text, draft.prefix)
    text += draft.prefix
    return Question(task, ids, draft.tokens, draft.references, text, draft.asked, depth)


def make_draft(task: str, index: int, length: int, seed: int, style: Style) -> Draft:
    """Question number `index` of a task in BENCHMARKS, before its haystack is measured out.

    What is drawn depends on its own seed, task and index, not on what else is asked. Most of it is
    the same at every length. Exceptions: the places of facts, stories that are too long for a short
    length, ruler_fwe's coded words, and ruler_cwe's list, which changes at 4,096 tokens.
    """
    rng = random.Random(f"{seed} {task} {index}")
    return BENCHMARKS[task](rng, index, length, style)


def make_question(task: str, index: int, length: int, seed: int, style: Style) -> Question:
    """Question number `index` of a task in BENCHMARKS, grown to a length in tokens."""
    return grow(task, make_draft(task, index, length, seed, style), length, style)


def check_length(task: str, n: int, length: int, seed: int, style: Style) -> None:
    """Raises a UserError, which says what length would do, if one of the first n questions does
    not fit. To find that length, questions are made again at the one that the last attempt asked
    for: where there is more room, a story may be longer."""
    tried, least = 0, length
    while tried < least:
        tried = least
        drafts = [make_draft(task, index, tried, seed, style) for index in range(n)]
        least = max(cost(draft, draft.smallest, style) for draft in drafts)
    if tried > length:
        raise too_short(task, tried, length)
