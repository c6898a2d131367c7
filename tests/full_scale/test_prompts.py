"""
test_prompts.py: a prompt of RULER says what its answer needs, whatever was drawn; what holds for a
question of any task; and how answers score. (Wording and published scores: test_golden.py.)
"""

import itertools
import json
import re
import sys
from collections import Counter

import pytest
from commands import questions
from remaking import NEEDLE, REMAKE, listed_in
from toys import LANGUAGES

from full_scale import ruler
from full_scale.documents import SOURCES, read_qa
from full_scale.drafts import Style
from full_scale.prompts import BENCHMARKS, Question, check_length, grow, make_draft, make_question
from full_scale.scoring import METRICS, metrics_of
from model import UserError

# Every letter is a token.
ORIGINAL = Style(lambda text, prefix: list((text + prefix).encode()), qa=questions())
ESSAY = 'Once there was a fox. "Who are you?" it asked. Nobody knew! The road went on... and on.'
LENGTH = 4000  # of prompt and answer
EVERY = pytest.mark.parametrize("task", BENCHMARKS)
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
    """Every needle is there, in the order of the answer; the variables are one chain; words are as
    frequent as their length says; nothing else is there. (The harness strips the prefix.)"""
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
    """Needles stand between its sentences. Without them it is there word for word."""
    for index in range(20):
        context = context_of(ask(task, index, haystack=ESSAY.replace(" ", " \n\t")))
        before, *_ = re.split(NEEDLE, context)
        assert before == " " or re.search(r'[.!?]"? $', before)
        words = re.sub(NEEDLE, "", context).split()
        assert len(words) > 2 * len(ESSAY.split())
        assert words == list(itertools.islice(itertools.cycle(ESSAY.split()), len(words)))
    with pytest.raises(UserError, match=r"^[^\n]*--haystack[^\n]*$"):
        ask(task, haystack=" \n")  # no reason to fall back on noise


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_of_any_language_fills_the_prompt_and_is_cut_at_its_own_stops(language):
    """Or else anywhere: a script may have no blanks between words, and no stops."""
    text, stops = LANGUAGES[language]
    depths, whole = [], "".join(text.split()) * 200
    for index in range(12):
        question = ask(
            "niah_single_2", index, haystack=text, encode=lambda text, prefix: text + prefix
        )
        assert len(question.prompt) + question.tokens > 2980, "the prompt is not filled"
        before, *_ = re.split(NEEDLE, context_of(question))
        if stops and before.strip():
            assert before.rstrip()[-1] in stops
        assert whole.startswith(re.sub(NEEDLE, "", context_of(question)).replace(" ", ""))
        depths.append(question.depth)
    assert 0 <= min(depths) < 0.2 < 0.8 < max(depths) <= 1


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
    """Statements stand in the same lines, as many lines as 500 tokens have room for."""
    names, plain, quarter = [], [], lambda text, prefix: range(len(text + prefix) // 4)
    for index in range(2):
        text = ask("ruler_vt", index, protocol=protocol, encode=quarter).text
        example = text[: text.rindex("Memorize and track")]
        names.append(re.findall("VAR ([A-Z]{3}) =", example))
        plain.append(re.sub(r"\d{5}", "N", re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "X", example)))
    assert names[0] != names[1]
    assert plain[0] == plain[1]
    assert len(plain[0]) // 4 <= 500 < (len(plain[0]) + 5 * len(ruler.GRASS)) // 4 + 30


@pytest.mark.parametrize(("length", "protocol"), [(300_000, "original"), (600_000, "harness")])
def test_long_lists_are_of_rulers_8000_words(length, protocol):
    """Where these are used up, the harness leaves its prompts short."""
    question = ask("ruler_cwe", length=length, protocol=protocol)
    words = set(listed_in(question.text[question.text.rindex("Below") :].split("\n")[1]))
    usual = set(ruler.english("noun", "adjective", "verb"))
    full = (len(question.prompt) + question.tokens) / length
    assert (full > 0.999, words == usual) == ((True, False) if length < 400_000 else (False, True))
    assert words <= usual


def test_lists_that_need_more_words_go_over_to_a_dictionary(monkeypatch):
    """As in the original, for all of their words. A package that is missing is named."""
    question = ask("ruler_cwe", length=600_000)
    listed = listed_in(question.text[question.text.rindex("Below") :].split("\n")[1])
    words = Counter(listed)
    assert len(question.prompt) + question.tokens > 0.999 * 600_000, "the prompt is not filled"
    assert {word: words[word] for word in question.references} == dict(words.most_common(10))
    assert set(question.references) < words.keys() < set(ruler.dictionary())
    for package in ("wonderwords", "english-words"):
        for cached in (ruler.english, ruler.dictionary):
            cached.cache_clear()
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        with pytest.raises(UserError, match=rf"^[^\n]*pip install {package}[^\n]*$"):
            ask("ruler_cwe", length=3000 if package == "wonderwords" else 600_000)
        monkeypatch.undo()


def test_smallest_coded_text_has_three_winners():
    """Below 53 words the third and the fourth coded word may be equally frequent; then never."""
    texts = {total: ruler.coded_text(list("abcde"), total) for total in range(10, 1000)}
    tied = [total for total, text in texts.items() if text.count("d") == text.count("e")]
    smallest = make_draft("ruler_fwe", 0, 3000, 0, ORIGINAL).smallest
    assert max(tied) + 1 == smallest


def houses(question: Question) -> list[str]:
    """The documents of a prompt: "12.3" for "House 12.3 is small. ..."."""
    documents = re.findall(r"Document (\d+):\n(?:House|Town) (\d+\.\d)", question.text)
    assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
    return [name for _, name in documents]


def test_the_paragraph_that_answers_is_there_and_its_article_comes_first():
    """SQuAD: first the question's own paragraph, then the other three of its article, then others.
    A longer prompt has the documents of a shorter one. HotpotQA: all three are always there."""
    lengths = [500, 600, 700, 1000, 3000]
    for index in (0, 7):
        own = re.search(r"house (\d+\.\d)", ask("ruler_qa_1", index, 500).text)[1]
        found = [houses(ask("ruler_qa_1", index, length)) for length in lengths]
        for short, long in itertools.pairwise(found):
            assert own in short
            assert set(short) <= set(long)
            strangers = [name for name in long if name.split(".")[0] != own.split(".")[0]]
            assert not strangers or len(set(long) - set(strangers)) == 4
        assert len(found[-1]) > len(found[0]) > 0
    for length in (700, 3000):
        names = houses(ask("ruler_qa_2", 5, length))
        assert {"5.0", "5.1", "5.2"} <= set(names)
        assert len(set(names)) == len(names)
    mixed = [
        houses(ask("ruler_qa_1", i, 700 + 97 * i)).index(f"{i // 3}.{i % 3}") for i in range(9)
    ]
    assert len(set(mixed)) > 2, "documents are not mixed"


@pytest.mark.parametrize("task", ["ruler_qa_1", "ruler_qa_2"])
def test_documents_come_again_when_all_are_there(task):
    """Each as often as another, or once more. The harness leaves its prompts short."""
    length = 20_000  # of letters; all documents are some 8,000
    question, short = ask(task, 0, length), ask(task, 0, length, protocol="harness")
    counts = Counter(houses(question))
    assert len(question.prompt) + question.tokens > 0.99 * length, "the prompt is not filled"
    assert max(counts.values()) - min(counts.values()) == 1
    assert set(houses(short)) == counts.keys()
    assert len(houses(short)) == len(counts)


QUESTION = {"question": "Who?", "is_impossible": False, "answers": [{"text": "Ann"}]}
HOTPOT = {"question": "Who?", "answer": "Ann", "context": [["Town", ["Ann is."]]]}
NOT_PUBLISHED = {  # what one question of a file has in place of what it should
    "ruler_qa_1": [{"answers": []}, {"answers": [{"text": ""}]}, {"question": 5}],
    "ruler_qa_2": [{"answer": ""}, {"answer": ["Ann"]}, {"question": "\ud800"}, {"context": 5}],
}
NOT_PUBLISHED["ruler_qa_2"] += [{"context": [["Town", ["\udc00"]]]}, {"answer": " "}]


@pytest.mark.parametrize(
    ("task", "wrong"), [(t, w) for t in NOT_PUBLISHED for w in NOT_PUBLISHED[t]]
)
def test_a_question_that_nobody_or_anybody_can_answer_is_refused(tmp_path, task, wrong):
    """Every text contains an empty answer, which would score 1; with no answer at all every text
    would score 0. What is no text, or half a surrogate pair, cannot be asked."""
    for one, broken in ((QUESTION | HOTPOT, False), (QUESTION | HOTPOT | wrong, True)):
        paragraph = {"context": "Ann lives here.", "qas": [one]}
        file = {"data": [{"paragraphs": [paragraph]}]} if task == "ruler_qa_1" else [one]
        (tmp_path / SOURCES[task][0]).write_text(json.dumps(file))
        read_qa.cache_clear()
        if not broken:
            assert ask(task, qa=tmp_path).references == ("Ann",)
            continue
        with pytest.raises(UserError, match=r"^--qa: [^\n]*.json is not the published file[^\n]*$"):
            ask(task, qa=tmp_path)


def test_questions_without_an_answer_are_not_asked(tmp_path):
    """SQuAD 2.0 has many; here each fourth one. Another file than the published one is named."""
    asked, documents = read_qa(questions() / "squad.json", "ruler_qa_1")
    assert (len(asked), len(documents)) == (120, 160)
    assert asked[0].answers == ("Ann00", "Miss Ann00")
    with pytest.raises(UserError, match=r"has 120 questions: lower --samples\.$"):
        ask("ruler_qa_1", 120, 1000)
    for text in ("{}", "[1]", "5", "no JSON"):
        (tmp_path / "squad.json").write_text(text)
        with pytest.raises(UserError, match=r"^--qa: [^\n]*squad.json is not the published file"):
            ask("ruler_qa_1", qa=tmp_path)
        read_qa.cache_clear()


@BOTH
@EVERY
def test_prompt_and_answer_fill_the_length_to_the_last_unit_of_haystack(task, protocol):
    """One more line, or word, of haystack would not fit."""
    sizes, style = [], ORIGINAL._replace(protocol=protocol)

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
def test_length_that_is_too_short_is_refused_with_the_shortest_that_is_not(task, protocol):
    """All of the questions fit into the length that the message names, and one fills it."""
    style = ORIGINAL._replace(protocol=protocol)
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


CARRIED = "What is Mary carrying?"
SAID = [  # what is said, the task, its target and the question, and the score
    ("In the kitchen <example> in the garden", "qa1", "kitchen", "Where is Mary?", 1),
    ("None.", "qa7", "none", CARRIED, 1),
    ("None.", "qa7", "one", CARRIED, 0),
    ("one or none", "qa7", "none", CARRIED, 0),
    ("Milk and apple", "qa8", "apple,milk", CARRIED, 1),
    ("apple", "qa8", "apple,milk", CARRIED, 0),
    ("apple, milk", "qa8", "apple", CARRIED, 0),
    ("nothing", "qa8", "nothing", CARRIED, 1),
    ("Maybe yes.", "qa10", "maybe", CARRIED, 0),
    ("I do not know.", "qa9", "no", CARRIED, 1),
]


@pytest.mark.parametrize(("said", "task", "target", "asked", "score"), SAID)
def test_babilong_wants_the_label_alone(said, task, target, asked, score):
    """Lists are sets. "none" is no "one" (but "not" has a "no", as in the published rule). The
    harness's rule takes any mention of the target."""
    question = Question(f"babilong_{task}", [], 20, (target,), asked=asked)
    assert METRICS["babilong"](question, said) == score
    assert METRICS["harness"](question, said) == (target in said.lower())
    assert metrics_of(question.task, protocol="harness")[0] == "harness"
