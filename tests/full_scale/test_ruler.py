"""
test_ruler.py: a prompt of RULER says what its answer needs, whatever was drawn. That the wording is
the published one, test_golden.py shows; what holds for all benchmarks alike, test_prompts.py.
"""

import itertools
import re
import sys
from collections import Counter

import pytest
from remaking import NEEDLE, REMAKE, listed_in

from full_scale import ruler
from full_scale.drafts import Style
from full_scale.prompts import Question, make_draft, make_question
from model import UserError

ORIGINAL = Style(lambda text, prefix: list((text + prefix).encode()))  # every letter is a token
ESSAY = 'Once there was a fox. "Who are you?" it asked. Nobody knew! The road went on... and on.'
BOTH = pytest.mark.parametrize("protocol", ["original", "harness"])
HAY = pytest.mark.parametrize("haystack", [None, ESSAY], ids=["noise", "essay"])


def ask(task: str, index: int = 0, length: int = 3000, **style) -> Question:
    return make_question(task, index, length, 0, ORIGINAL._replace(**style))


def context_of(question: Question) -> str:
    """What stands between the first line of a needle task and its question."""
    return question.text.split("\n", 1)[1].rsplit("\n", 1)[0]


@BOTH
@HAY
@pytest.mark.parametrize("task", ruler.RULER)
def test_our_prompts_come_apart_like_the_published_ones(task, haystack, protocol):
    """Every needle is there and whole, and stands in its place in the order of the answer; the
    variables are one chain; words are as frequent as their length says; and nothing else is there.
    The harness strips what the answer begins with: after a space most models would not go on."""
    for index, length in ((0, 3000), (1, 3000), (0, 8000)):
        question = ask(task, index, length, haystack=haystack, protocol=protocol)
        prefix = make_draft(task, index, length, 0, ORIGINAL._replace(protocol=protocol)).prefix
        text, answers = question.text.removesuffix(prefix), list(question.references)
        again, published = REMAKE[task](task, text, answers, protocol, length)
        assert again == text
        if protocol == "harness":
            published = ("\n\n" if task == "ruler_cwe" else " ") + published.strip()
        assert prefix == published


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multiquery"])
def test_essay_is_the_users_text_again_and_again(task):
    """Needles stand between its sentences. Without them the haystack is the beginning of the text,
    repeated word for word."""
    for index in range(20):
        context = context_of(ask(task, index, haystack=ESSAY.replace(" ", " \n\t")))
        before, *_ = re.split(NEEDLE, context)
        assert before == " " or re.search(r'[.!?]"? $', before)
        words = re.sub(NEEDLE, "", context).split()
        assert len(words) > 2 * len(ESSAY.split())
        assert words == list(itertools.islice(itertools.cycle(ESSAY.split()), len(words)))
    with pytest.raises(UserError, match=r"^[^\n]*--haystack[^\n]*$"):
        ask(task, haystack=" \n")  # no reason to fall back on noise


@HAY
@pytest.mark.parametrize("task", ruler.NIAH)
def test_depth_is_where_the_asked_needle_stands(task, haystack):
    """0 is the beginning of the haystack, 1 its end; several needles have no one depth."""
    questions = [ask(task, index, haystack=haystack) for index in range(12)]
    if len(questions[0].references) > 1:
        assert {question.depth for question in questions} == {None}
        return
    for question in questions:
        context = context_of(question)
        needles = re.finditer(NEEDLE, context)
        needle = next(match for match in needles if match[3] == question.references[0])
        before, after = needle.start(), len(context) - needle.end()
        assert question.depth == pytest.approx(before / (before + after), abs=0.01)
    depths = [question.depth for question in questions]
    assert 0 <= min(depths) < 0.2 < 0.8 < max(depths) <= 1


def test_hay_of_needles_avoids_the_keys_that_are_asked_for():
    """Otherwise a question could have two answers."""
    spec = ruler.NIAH["niah_multikey_2"]
    key = re.fullmatch(NEEDLE, ruler.needle_hay(spec, [], seed=7, size=3)[2])[2]
    assert not any(key in line for line in ruler.needle_hay(spec, [key], seed=7, size=5))


@BOTH
def test_examples_of_tracking_differ_in_names_alone(protocol):
    """Each has names and a value of its own; its statements stand in the same lines, and as many
    lines as 500 tokens have room for."""
    names, plain = [], []
    for index in range(2):
        quarter = {"encode": lambda text, prefix: range(len(text + prefix) // 4)}
        text = ask("ruler_vt", index, protocol=protocol, **quarter).text
        example = text[: text.rindex("Memorize and track")]
        names.append(re.findall("VAR ([A-Z]{3}) =", example))
        plain.append(re.sub(r"\d{5}", "N", re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "X", example)))
    assert names[0] != names[1]
    assert plain[0] == plain[1]
    assert len(plain[0]) // 4 <= 500 < (len(plain[0]) + 5 * len(ruler.GRASS)) // 4 + 30


def test_list_ends_with_the_dictionary():
    """There are some 8,000 words; a length that would need more is left short."""
    question = ask("ruler_cwe", length=10**7, encode=lambda text, prefix: range(len(text)))
    listed = listed_in(question.text[question.text.rindex("Below") :].split("\n")[1])
    assert set(listed) == set(ruler.english("noun", "adjective", "verb"))
    assert len(question.prompt) + question.tokens < 10**6


def test_smallest_coded_text_has_three_winners():
    """Below 53 words the third and the fourth coded word may be equally frequent; then never."""
    tied = []
    for total in range(10, 1000):
        counts = Counter(ruler.coded_text(list("abcde"), total).split())
        if counts["d"] == counts["e"]:
            tied.append(total)
    smallest = make_draft("ruler_fwe", 0, 3000, 0, ORIGINAL).smallest
    assert max(tied) + 1 == smallest


def test_missing_dictionary_is_named(monkeypatch):
    """The words come from a package that only these prompts need."""
    ruler.english.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(UserError, match=r"^[^\n]*pip install wonderwords[^\n]*$"):
        ask("ruler_cwe")
