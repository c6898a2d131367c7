"""
test_prompts.py: what holds for a question of any benchmark task: it is as long as was asked for, it
depends on its own arguments alone, and a length that is too short is refused with one that is not.
"""

import re

import pytest
from commands import questions

from full_scale.drafts import Style
from full_scale.prompts import BENCHMARKS, check_length, grow, make_draft, make_question
from model import UserError

ORIGINAL = Style(
    lambda text, prefix: list((text + prefix).encode()), qa=questions()
)  # every letter is a token
HARNESS = ORIGINAL._replace(protocol="harness")
LENGTH = 4000
EVERY = pytest.mark.parametrize("task", BENCHMARKS)
BOTH = pytest.mark.parametrize("style", [ORIGINAL, HARNESS], ids=["original", "harness"])


@BOTH
@EVERY
def test_prompt_and_answer_fill_the_length_to_the_last_unit_of_haystack(task, style):
    """One more line, or word, of haystack would not fit."""
    sizes = []

    def render(size: int):
        sizes.append(size)
        return draft.render(size)

    draft = make_draft(task, 0, LENGTH, 0, style)
    question = grow(task, draft._replace(render=render), LENGTH, style)
    assert question.prompt == list(question.text.encode())
    assert len(question.prompt) + question.tokens <= LENGTH
    assert question.text == draft.render(sizes[-1])[0] + draft.prefix
    larger = draft.render(sizes[-1] + 1)[0] + draft.prefix
    assert len(larger.encode()) + question.tokens > LENGTH


@EVERY
def test_question_depends_on_its_own_arguments_alone(task):
    """Asked first or last, alone or among others, question 2 is the same; others are others."""
    alone = make_question(task, 2, LENGTH, 0, ORIGINAL)
    among = [make_question(task, index, LENGTH, 0, ORIGINAL) for index in (3, 2, 0, 1)]
    assert alone == among[1]
    texts = {question.text for question in among}
    texts.add(make_question(task, 2, LENGTH, 1, ORIGINAL).text)
    assert len(texts) == 5, "another index or another seed gave the same question"


@BOTH
@EVERY
def test_length_that_is_too_short_is_refused_with_the_shortest_that_is_not(task, style):
    """All of the questions fit into the length that the message names, and one of them, with the
    smallest haystack that leaves it one answer, fills it."""
    with pytest.raises(UserError, match=r"^[^\n]* 64 [^\n]*$") as refusal:
        check_length(task, 8, 64, 0, style)
    least = int(re.search(rf"^{task} needs at least (\d+) tokens", str(refusal.value))[1])
    check_length(task, 8, least, 0, style)
    questions = [make_question(task, index, least, 0, style) for index in range(8)]
    assert max(len(question.prompt) + question.tokens for question in questions) == least
    with pytest.raises(UserError):
        check_length(task, 8, least - 1, 0, style)
    with pytest.raises(UserError, match=rf"^{task} needs at least \d+ tokens; [^\n]* 64 "):
        make_question(task, 0, 64, 0, style)
