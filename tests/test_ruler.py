"""
test_ruler.py: what has to hold for RULER's prompts, whatever is drawn. That the wording is the published one, test_golden.py
shows; here a prompt is as long as was asked for, says what its answer needs, and does not give the answer away.
"""

import itertools
import random
import re
import sys
from collections import Counter
from unittest import mock

import pytest
from remaking import NEEDLE, listed_in, unshuffled

import data
from eval_niah import string_match_all
from model import UserError

ORIGINAL = data.Style(lambda text, prefix: data.TINY.encode(text + prefix))  # most letters are a token of their own
HARNESS = ORIGINAL._replace(protocol="harness")
ESSAY = 'Once there was a fox. "Who are you?" it asked. Nobody knew! The road was long, and so it went on... alone.'
LENGTH = 3000
EVERY = pytest.mark.parametrize("task", data.RULER)
BOTH = pytest.mark.parametrize("style", [ORIGINAL, HARNESS], ids=["original", "harness"])


def ask(task: str, index: int = 0, length: int = LENGTH, style: data.Style = ORIGINAL) -> data.Question:
    return data.make_question(task, index, length, 0, style)


def draft(task: str, length: int = LENGTH, style: data.Style = ORIGINAL, seed: int = 0) -> data.Draft:
    return data.RULER[task](random.Random(seed), 0, length, style)


def context(question: data.Question) -> str:
    """What stands between the first line of a needle task and its question."""
    return question.text.split("\n", 1)[1].rsplit("\n", 1)[0]


def asked(question: data.Question) -> str:
    """What follows the haystack."""
    return question.text[question.text.rindex("\nWhat" if question.task in data.NIAH else "\nQuestion") :]


# ---- every task ----------------------------------------------------------------------------------------------------------


@BOTH
@EVERY
def test_prompt_and_answer_fill_the_length_to_the_last_unit_of_haystack(task, style):
    """One more line, or word, of haystack would not fit."""
    made = draft(task, style=style)
    question = data.grow(task, made, LENGTH, style)
    assert len(question.prompt) + question.tokens <= LENGTH
    sizes = [size for size in range(made.smallest, 1000) if made.render(size)[0] + made.prefix == question.text]
    assert len(style.encode(made.render(max(sizes) + 1)[0], made.prefix)) + question.tokens > LENGTH


@BOTH
@EVERY
def test_only_the_right_answer_scores(task, style):
    """Naming all references scores 1, silence 0, and repeating the question 0: it does not give the answer away."""
    for index in range(5):
        question = ask(task, index, style=style)
        scores = [string_match_all(question.references, said) for said in (", ".join(question.references), "", asked(question))]
        assert scores == [1, 0, 0]  # "list" is one of cwe's 8,166 words, and 13 others of its question are too: not in these


@EVERY
def test_question_depends_on_its_own_index_alone(task):
    """Asked first or last, alone or among others, question 2 is the same; its neighbours are others."""
    alone, among = ask(task, 2), [ask(task, index) for index in (3, 2, 0, 1)]
    assert alone == among[1]
    assert len({question.text for question in among}) == len({question.references for question in among}) == 4


@EVERY
def test_size_alone_decides_what_is_rendered(task):
    """Bisection asks for sizes in any order; each has one text, so that what was measured is what is sent."""
    made = draft(task, style=ORIGINAL._replace(haystack=ESSAY))
    sizes = [made.smallest + more for more in (9, 2, 40, 2, 9)]
    texts = [made.render(size) for size in sizes]
    assert (texts[0], texts[1]) == (texts[4], texts[3])
    assert texts[0] != texts[1] != texts[2]


@BOTH
@EVERY
def test_length_that_is_too_short_is_refused_with_the_shortest_that_is_not(task, style):
    """The smallest haystack with which the question still has one answer sets the limit."""
    made = draft(task, style=style)
    with pytest.raises(UserError, match=f"{task} needs at least .* 100 ") as refusal:
        data.grow(task, made, 100, style)
    least = int(re.search(r"(\d+) tokens", str(refusal.value))[1])
    question = data.grow(task, made, least, style)
    assert len(question.prompt) + question.tokens == least
    with pytest.raises(UserError):
        data.grow(task, made, least - 1, style)


@EVERY
def test_harness_strips_what_the_answer_begins_with(task):
    """The original's prefix may end in a space, after which most models would not go on; the harness takes it away."""
    original, harness = (draft(task, style=style).prefix for style in (ORIGINAL, HARNESS))
    assert harness.lstrip() == original.strip().replace("assigned", "assgined")
    assert harness[: -len(harness.lstrip())] == ("\n\n" if task == "ruler_cwe" else " ")


# ---- needles in a haystack -----------------------------------------------------------------------------------------------

NEEDLES = pytest.mark.parametrize("task", data.NIAH)
HAY = pytest.mark.parametrize("haystack", [None, ESSAY], ids=["noise", "essay"])


@HAY
@NEEDLES
def test_every_needle_is_whole_and_says_one_value_of_one_key(task, haystack):
    """Each asked value stands in one sentence, and the sentences of the asked keys hold no other value."""
    question = ask(task, style=ORIGINAL._replace(haystack=haystack))
    values = {}
    for kind, key, value in re.findall(NEEDLE, context(question)):
        assert kind == data.NIAH[task].value
        values.setdefault(key, []).append(value)
    keys = [key for key in values if f"{key}," in asked(question) or f"{key} mentioned" in asked(question)]
    assert len(keys) == data.NIAH[task].asked
    assert sorted(value for key in keys for value in values[key]) == sorted(question.references)
    assert len(values) == data.NIAH[task].keys or data.NIAH[task].hay == "needle"


@pytest.mark.parametrize("task", [task for task, spec in data.NIAH.items() if spec.hay == "essay"])
def test_essay_is_the_users_text_again_and_again(task):
    """Without its needles, the haystack is the beginning of the text, word for word; a short text is repeated."""
    question = ask(task, style=ORIGINAL._replace(haystack=ESSAY.replace(" ", " \n\t")))
    words = re.sub(NEEDLE, "", context(question)).split()
    assert len(words) > 2 * len(ESSAY.split())
    assert words == list(itertools.islice(itertools.cycle(ESSAY.split()), len(words)))
    assert data.GRASS not in question.text


def test_needles_stand_between_sentences_of_an_essay():
    """What precedes a needle ends in a full stop or the like; a closing quotation mark may follow it."""
    style = ORIGINAL._replace(haystack=ESSAY)
    for index in range(20):
        before, *_ = re.split(NEEDLE, context(ask("niah_single_2", index, style=style)))
        assert before == " " or re.search(r'[.!?]"? $', before)


def test_haystack_without_a_word_is_refused():
    """An empty file is a slip of the user's, not a reason to fall back on noise."""
    with pytest.raises(UserError, match="--haystack"):
        ask("niah_single_2", style=ORIGINAL._replace(haystack=" \n"))


@NEEDLES
def test_one_value_is_asked_for_in_the_singular(task):
    """The needles themselves stay in the plural, as published: "One of the special magic numbers for ... is"."""
    question, kind = ask(task), data.NIAH[task].value
    if len(question.references) == 1:
        assert question.text.startswith(f"A special magic {kind[:-1]} is hidden")
        assert asked(question).startswith(f"\nWhat is the special magic {kind[:-1]} for ")
        assert question.text.endswith("mentioned in the provided text is")
    else:
        assert question.text.startswith(f"Some special magic {kind} are hidden")
        assert asked(question).startswith(f"\nWhat are all the special magic {kind} for ")
        assert question.text.endswith("mentioned in the provided text are")


def test_several_keys_are_listed_with_commas_and_an_and():
    """The published questions read "a, b, c, and d"; the values are expected in the same order."""
    question = ask("niah_multiquery")
    keys = re.search("numbers for (.*?), and (.*?) mentioned", asked(question)).groups()
    keys = [*keys[0].split(", "), keys[1]]
    needles = {key: value for _, key, value in re.findall(NEEDLE, context(question))}
    assert tuple(needles[key] for key in keys) == question.references


@HAY
@NEEDLES
def test_depth_is_where_the_asked_needle_stands(task, haystack):
    """0 at the beginning of the haystack, 1 at its end, and everything between occurs; several needles have no one depth."""
    questions = [ask(task, index, style=ORIGINAL._replace(haystack=haystack)) for index in range(12)]
    if len(questions[0].references) > 1:
        assert {question.depth for question in questions} == {None}
        return
    for question in questions:
        needle = next(match for match in re.finditer(NEEDLE, context(question)) if match[3] == question.references[0])
        before, after = needle.start(), len(context(question)) - needle.end()
        assert question.depth == pytest.approx(before / (before + after), abs=0.01)
    depths = [question.depth for question in questions]
    assert 0 <= min(depths) < 0.35 < 0.65 < max(depths) <= 1


def test_hay_of_needles_grows_at_its_end():
    """A larger haystack has all the lines of a smaller one, so that one more line costs one more line."""
    made = draft("niah_multikey_3")
    small, large = ([line for line in made.render(size)[0].split("\n") if re.fullmatch(NEEDLE, line)] for size in (10, 30))
    needle = next(line for line in small if made.references[0] in line)
    small.remove(needle)
    large.remove(needle)
    assert small == large[: len(small)]
    assert len(set(large)) == len(large) == 30


def test_needles_stand_in_the_published_order():
    """One shuffle for every sample, seed 42's; lines take the needles from the end, essays from the beginning."""
    for haystack, step in ((None, -1), (ESSAY, 1)):
        for index in range(3):
            question = ask("niah_multivalue", index, style=ORIGINAL._replace(haystack=haystack))
            values = [value for _, _, value in re.findall(NEEDLE, context(question))]
            assert tuple(unshuffled(values[::step])) == question.references


def test_hay_of_needles_avoids_the_keys_that_are_asked_for():
    """Otherwise a question could have two answers. What would be drawn next takes the place."""
    spec = data.NIAH["niah_multikey_2"]
    lines = data.needle_hay(spec, [], 7, ORIGINAL)(5)
    third = re.fullmatch(NEEDLE, lines[2])[2]
    others = data.needle_hay(spec, [third], 7, ORIGINAL)(5)
    assert others[:2] == lines[:2]
    assert not any(third in line for line in others)


def test_depths_are_forty_whole_percents_from_beginning_to_end():
    """The published depths are np.linspace(0, 100, 40), rounded."""
    assert (len(data.DEPTHS), data.DEPTHS[:4], data.DEPTHS[-1]) == (40, [0, 3, 5, 8], 100)


# ---- a chain of variables, and words that are frequent -------------------------------------------------------------------


@BOTH
def test_chain_leads_from_the_value_to_every_variable(style):
    """Read from the top, each statement names a variable that is known by then, and the last one names the fifth."""
    question = ask("ruler_vt", style=style)
    body = question.text[question.text.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+) ", asked(question))[1]
    known = [value]
    for new, old in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", body):
        assert old == known[-1]
        known.append(new)
    assert tuple(known[1:]) == question.references


@BOTH
def test_example_of_tracking_is_answered_and_differs_in_names_alone(style):
    """Every question's example has names and a value of its own, its statements stand in the same lines."""
    encode = ORIGINAL._replace(encode=lambda text, prefix: range(len(text + prefix) // 4), protocol=style.protocol)
    texts = [ask("ruler_vt", index, style=encode).text for index in range(2)]
    examples = [text[: text.rindex("Memorize and track")] for text in texts]
    names = [re.findall("VAR ([A-Z]{3}) =", example) for example in examples]
    assert all(example.rstrip().endswith(":  " + " ".join(group)) for example, group in zip(examples, names))
    assert names[0] != names[1]
    plain = [re.sub(r"\d{5}", "N", re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "X", example)) for example in examples]
    assert plain[0] == plain[1]
    assert plain[0].count(data.GRASS) % 5 == 0
    assert len(plain[0]) // 4 <= 500


@BOTH
@pytest.mark.parametrize(("length", "common", "other"), [(3000, 6, 1), (8000, 30, 3)])
def test_ten_common_words_are_the_most_common(style, length, common, other):
    """Below 4,096 tokens a common word stands there 6 times and any other once, from there on 30 and 3 times."""
    for index in range(3):
        question = ask("ruler_cwe", index, length, style)
        counts = Counter(listed_in(question.text[question.text.rindex("Below") :].split("\n")[1]))
        assert {word for word, _ in counts.most_common(10)} == set(question.references)
        assert set(counts.values()) == {common, other}
        assert list(counts.values()).count(common) == 10


def test_list_is_shuffled_alike_in_the_original_and_each_time_anew_in_the_harness():
    """Undoing the shuffle of seed 42 brings the ten common words to the front, if it was made with that seed."""
    for style, fixed in ((ORIGINAL, True), (HARNESS, False)):
        question = ask("ruler_cwe", style=style)
        listed = listed_in(question.text[question.text.rindex("Below") :].split("\n")[1])
        assert (tuple(unshuffled(listed)[:10]) == question.references) == fixed


def test_example_of_common_words_is_sent_by_the_original_alone():
    """The harness makes the example and leaves it out of the prompt."""
    assert [ask("ruler_cwe", style=style).text.count("Below is a numbered list") for style in (ORIGINAL, HARNESS)] == [2, 1]


def test_list_ends_with_the_dictionary():
    """There are some 8,000 words; a length that would need more is left short."""
    style = ORIGINAL._replace(encode=lambda text, prefix: range(len(text)))
    words = data.english("noun", "adjective", "verb")
    assert (draft("ruler_cwe").smallest, draft("ruler_cwe").largest) == (11, len(words))  # one word is not common
    question = ask("ruler_cwe", length=10**7, style=style)
    assert set(listed_in(question.text[question.text.rindex("Below") :].split("\n")[1])) == set(words)
    assert len(question.prompt) + question.tokens < 10**6


def test_three_coded_words_are_the_most_frequent():
    """After the dots, that is; each of the three is more frequent than the fourth."""
    for index in range(5):
        question = ask("ruler_fwe", index)
        counts = Counter(re.findall(r"\b[a-z]{6}\b|\.\.\.", question.text.split("coded words. ", 1)[1].split("\nQuestion")[0]))
        (dots, _), *coded = counts.most_common(5)
        assert (dots, *(word for word, _ in coded[:3])) == ("...", *question.references)
        assert coded[2][1] > coded[3][1]


def test_coded_words_follow_zipfs_law():
    """Of 1,000 words, 1000 / (k^2 * 1.6449) are the k-th: 607, 151, 67, 37 ..."""
    counts = Counter(data.coded_text(list("abcd"), 1000).split())
    assert counts == {"a": 607, "b": 151, "c": 67, "d": 37}


def test_smallest_coded_text_has_three_winners():
    """With 52 words in all the third and the fourth coded word may be equally frequent; from 53 on they never are."""
    tied = []
    for total in range(10, 2000):
        counts = Counter(data.coded_text(list("abcde"), total).split())
        if counts["d"] == counts["e"]:
            tied.append(total)
    assert max(tied) + 1 == draft("ruler_fwe").smallest == 53


def test_missing_dictionary_is_named():
    """The words come from a package that only these prompts need."""
    with mock.patch.dict(sys.modules, {"wonderwords": None}), pytest.raises(UserError, match="pip install wonderwords"):
        data.english.__wrapped__("noun")
