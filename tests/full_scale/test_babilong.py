"""
test_babilong.py: BABILong's stories and prompts, and bAbI's own files. A reader of the text alone
must arrive at each answer. That the wording is the published one, test_golden.py shows.
"""

import random
import re
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from toys import LANGUAGES

from full_scale import babilong
from full_scale.drafts import Style
from full_scale.prompts import Question, make_question
from full_scale.scoring import BABILONG_LABELS
from model import UserError

STYLE = Style(lambda text, prefix: list((text + prefix).encode()))  # every letter is a token
EVERY = pytest.mark.parametrize("task", babilong.QUESTIONS)

FACTS = {
    "give": r"([A-Z]\w+) (?:gave|handed|passed) the (\w+) to ([A-Z]\w+)\.",
    "take": r"([A-Z]\w+) (?:took|got|grabbed|picked up) the (\w+)(?: there)?\.",
    "drop": r"([A-Z]\w+) (?:dropped|discarded|left|put down) the (\w+)\.",
    "go": r"([A-Z]\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)\.",
    "at": r"([A-Z]\w+) is in the (\w+)\.",
    "absent": r"([A-Z]\w+) is not in the (\w+)\.",
    "leave": r"([A-Z]\w+) is no longer in the (\w+)\.",
    "either": r"([A-Z]\w+) is either in the (\w+) or the (\w+)\.",
    "side": r"The (\w+) is (north|south|east|west) of the (\w+)\.",
}
STEPS = {"north": 1j, "south": -1j, "east": 1, "west": -1}  # on a map of complex numbers


class Reader:
    """Follows facts. A place that was not told is an unknown, until it proves to be another's."""

    def __init__(self, facts: list[str]):
        self.where, self.holder, self.left, self.doubt = {}, {}, {}, {}
        self.same = {}  # unknown place -> the place that it is
        self.ways, self.gifts, self.spots = {}, [], {}
        for fact in facts:
            (kind,) = [kind for kind, form in FACTS.items() if re.fullmatch(form, fact)]
            getattr(self, kind)(*re.fullmatch(FACTS[kind], fact).groups())
            for thing, holder in self.holder.items():
                self.where[thing] = self.place(holder)
                self.ways.setdefault(thing, []).append(self.where[thing])

    def root(self, place: str) -> str:
        return self.root(self.same[place]) if place in self.same else place

    def place(self, name: str) -> str:
        return self.root(self.where.setdefault(name, f"? {name}"))

    def meet(self, one: str, other: str) -> None:
        unknown, known = sorted([self.place(one), self.place(other)])  # "?" before any letter
        if unknown != known:
            assert unknown.startswith("?"), f"{one} and {other} are in two places"
            self.same[unknown] = known

    def go(self, who: str, to: str) -> None:
        assert self.place(who) != to, "has been there all along"
        self.arrive(who, to)

    def arrive(self, who: str, to: str) -> None:
        self.where[who] = to
        self.left.pop(who, None), self.doubt.pop(who, None)

    def at(self, who: str, to: str) -> None:
        assert self.place(who) in (to, f"? {who}"), "was somewhere else a moment ago"
        assert self.left.get(who) != to
        assert to in self.doubt.get(who, [to])
        self.arrive(who, to)

    def leave(self, who: str, place: str) -> None:
        assert self.place(who) == place, "was not there"
        self.absent(who, place)

    def absent(self, who: str, place: str) -> None:
        self.where.pop(who, None)
        self.doubt.pop(who, None)
        self.left[who] = place

    def either(self, who: str, *places: str) -> None:
        self.where.pop(who, None)
        self.doubt[who] = places

    def take(self, who: str, what: str) -> None:
        assert what not in self.holder, "somebody has it"
        self.meet(who, what)
        self.holder[what] = who

    def drop(self, who: str, what: str) -> None:
        assert self.holder.pop(what, None) == who, "does not have it"
        self.where[what] = self.place(who)

    def give(self, who: str, what: str, to: str) -> None:
        assert who != to
        self.drop(who, what)
        self.meet(who, to)
        self.holder[what] = to
        self.gifts.append((who, what, to))

    def side(self, one: str, side: str, other: str) -> None:
        """Two places are put on the map, where one of them may stand already."""
        if one in self.spots:
            self.spots[other] = self.spots[one] - STEPS[side]
        else:
            self.spots[one] = self.spots.setdefault(other, 0) + STEPS[side]

    def answers(self) -> list[tuple[str, str]]:
        """(question, answer): all that follows from the facts."""
        found = []
        for name in self.where:
            the, place = "" if name[0].isupper() else "the ", self.place(name)
            found.append((f"Where is {the}{name}?", place))
            for other in {*babilong.PLACES, *babilong.TOWN}:
                if not place.startswith("?"):
                    found.append((f"Is {name} in the {other}?", "yes" if other == place else "no"))
            load = sorted(what for what, holder in self.holder.items() if holder == name)
            number = ["none", "one", "two", "three"][len(load)]
            found.append((f"How many objects is {name} carrying?", number))
            found.append((f"What is {name} carrying?", ",".join(load) or "nothing"))
        found += [(f"Is {name} in the {place}?", "no") for name, place in self.left.items()]
        for name, places in self.doubt.items():
            for other in babilong.TOWN:
                found.append((f"Is {name} in the {other}?", "maybe" if other in places else "no"))
        for what, way in self.ways.items():
            for before, place in pairwise(map(self.root, way)):
                if before != place:
                    found.append((f"Where was the {what} before the {place}?", before))
        for who, what, to in self.gifts:
            found += [(f"What did {who} give to {to}?", what), (f"Who gave the {what}?", who)]
            found += [(f"Who gave the {what} to {to}?", who), (f"Who received the {what}?", to)]
            found.append((f"Who did {who} give the {what} to?", to))
        for one, other in permutations(self.spots, 2):
            for side, step in STEPS.items():
                if self.spots[one] - self.spots[other] in (step, 2 * step):
                    found.append((f"What is {side} of the {other}?", one))
                    found.append((f"What is the {one} {side} of?", other))
        return found


def reply(facts: list[str], asked: str) -> str:
    """The one answer that follows from these facts."""
    (answer,) = {answer for question, answer in Reader(facts).answers() if question == asked}
    return answer


@EVERY
def test_answer_follows_from_the_facts_alone(task):
    """A reader finds the target and nothing else, and nothing impossible on the way. Stories have
    all sizes; no label is a good guess, and each is right now and then."""
    stories = [babilong.make_story(task, random.Random(f"{task} {i}")) for i in range(400)]
    for story in stories:
        assert reply(story.facts, story.question) == story.target, story
    low, high = babilong.STORY_SIZES[task]
    assert len(babilong.make_story(task, random.Random(0), most=low).facts) == low
    sizes = [len(story.facts) for story in stories]
    assert low <= min(sizes) <= max(sizes) <= high
    assert max(sizes) - min(sizes) >= (high - low) * 2 / 3
    targets = Counter(part for story in stories for part in story.target.split(","))
    assert targets.keys() == set(BABILONG_LABELS[task])
    fair = 400 / len(targets)
    assert 0.1 * fair < min(targets.values()) <= max(targets.values()) < 1.9 * fair


def ask(task: str, n: int = 20, length: int = 4500, style: Style = STYLE) -> list[Question]:
    return [make_question(f"babilong_{task}", i, length, 7, style) for i in range(n)]


def context_of(question: Question, protocol: str = "original") -> str:
    """What stands between the prompt's words: they are the ones of an empty context."""
    prompt, _ = babilong.BABILONG_PROTOCOLS[protocol]
    head, tail = prompt(question.task.removeprefix("babilong_"), "@", question.asked).split("@")
    return question.text.removeprefix(head).removesuffix(tail)


def split_context(context: str) -> tuple[list[str], str]:
    """The facts, in order, and what is left without them."""
    patterns = "|".join(re.sub(r"\((?!\?)", "(?:", form) for form in FACTS.values())
    facts = re.findall(rf"(?<!\S)(?:{patterns})(?!\S)", context)
    for fact in facts:
        context = context.replace(fact, " ", 1)
    return facts, " ".join(context.split())


@pytest.mark.parametrize("protocol", babilong.BABILONG_PROTOCOLS)
@EVERY
def test_answer_follows_from_the_prompt(task, protocol):
    """The facts stand in it whole and in order; the rest is sentences that follow each other."""
    for question in ask(task, style=STYLE._replace(protocol=protocol)):
        facts, rest = split_context(context_of(question, protocol))
        assert (reply(facts, question.asked),) == question.references
        assert rest in " ".join([babilong.BACKGROUND] * 3)


def test_facts_lie_anywhere():
    """At random places, the two ends among them: no place is a shortcut."""
    first = last = 0
    for context in map(context_of, ask("qa1", 200, 2600)):
        facts, _ = split_context(context)
        first += context.startswith(facts[0])
        last += context.endswith(facts[-1])
    assert 10 < min(first, last) <= max(first, last) < 100


def test_text_of_the_users_is_the_background():
    """Its short sentences are passed over; the last one is cut, and the first follows the last. The
    built-in text names nobody and nothing of a story."""
    words = {*babilong.OBJECTS, *babilong.PLACES, *babilong.TOWN}.union(*babilong.PEOPLE.values())
    assert not [word for word in words if word.lower() in babilong.BACKGROUND.lower()]
    one = "One two three four five six seven eight nine ten."
    other = "Uno dos tres cuatro cinco seis siete ocho\nnueve diez!"
    style = STYLE._replace(haystack=f"Too short. {one} Nor is this! {other} The end")
    rests = [split_context(context_of(question))[1] for question in ask("qa1", style=style)]
    assert all(rest in " ".join(f"{one} {other} ".split() * 99) for rest in rests)
    assert not all(rest.endswith(("ten.", "diez!")) for rest in rests)
    for text in ("", "Too short. Nor is this!"):
        with pytest.raises(UserError, match=r"^[^\n]*--haystack[^\n]*ten words[^\n]*$"):
            ask("qa1", 1, style=STYLE._replace(haystack=text))


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_of_any_language_is_a_background_cut_at_its_own_stops(language):
    """Or else anywhere; where sentences are shorter than ten words or signs, behind several."""
    text, stops = LANGUAGES[language]
    style = STYLE._replace(haystack=text, encode=lambda text, prefix: text + prefix)
    for question in ask("qa1", 6, style=style):
        facts, rest = split_context(context_of(question))
        assert len(question.prompt) + question.tokens > 4480, "the prompt is not filled"
        assert rest.replace(" ", "") in "".join(text.split()) * 200
        for before in re.split("|".join(map(re.escape, facts)), context_of(question))[:-1]:
            assert not stops or not before.strip() or before.rstrip()[-1] in stops


PUBLISHED = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra journeyed to the office.
2 Where is Sandra? \toffice\t1
"""


def babi(folder: Path, text: str = PUBLISHED, name: str = "qa1_x_train.txt") -> Style:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="latin-1")
    return STYLE._replace(babi=folder)


def test_each_published_question_is_asked_once(tmp_path):
    """It has all earlier facts of its story, without the earlier questions. Three is all; a length
    has room for stories of (length - 300) // 8 facts."""
    style, found = babi(tmp_path), {}
    for question in ask("qa1", 3, style=style):
        facts, _ = split_context(context_of(question))
        found[question.asked.strip()] = (facts, *question.references)
    first = ["Mary moved to the bathroom.", "John went to the hallway."]
    assert found == {
        "Where is Mary?": (first, "bathroom"),
        "Where is Daniel?": ([*first, "Daniel went back to the hallway."], "hallway"),
        "Where is Sandra?": (["Sandra journeyed to the office."], "office"),
    }
    with pytest.raises(UserError, match=r"has 3 questions [^\n]*: lower --samples\.$"):
        ask("qa1", 4, style=style)
    style = style._replace(encode=lambda text, prefix: text.split())  # a word is a token
    assert {q.references[0] for q in ask("qa1", 2, 323, style)} == {"bathroom", "office"}
    assert {q.references[0] for q in ask("qa1", 3, 324, style)} == {"bathroom", "hallway", "office"}
    text = "".join(f"1 Ann went to the a{i}.\n2 Where is Ann? \ta{i}\t1\n" for i in range(10, 50))
    answers = [question.references for question in ask("qa1", 8, style=babi(tmp_path / "b", text))]
    assert answers != sorted(answers), "they are not mixed: a few samples shall be of many stories"


def test_published_files_are_found_in_subfolders(tmp_path):
    """BABILong reads en-10k of the archive's versions; a file in the folder itself goes first."""
    babi(tmp_path / "en", "1 Mary went to the garden.\n2 Where is Mary? \tgarden\t1\n")
    babi(tmp_path / "en-10k", "1 Mary went to the office.\n2 Where is Mary? \toffice\t1\n")
    babi(tmp_path / "en-10k", name="qa10_indefinite-knowledge_train.txt")
    babi(tmp_path / "en-10k", name="qa1_single-supporting-fact_test.txt")
    assert ask("qa1", 1, style=STYLE._replace(babi=tmp_path))[0].references == ("office",)
    style = babi(tmp_path / "en" / "en-10k")._replace(babi=tmp_path / "en")
    assert ask("qa1", 1, style=style)[0].references == ("garden",)


LINE = r"^\S+_train.txt, line [12]: [^\n]*$"
BAD = {
    "Mary moved to the bathroom.\n": LINE,
    "1 Mary moved to the bathroom.\n3 John went to the hallway.\n": LINE,
    "1 Where is Mary? \tbathroom\t1\n": LINE,
    "1 Mary moved to the bathroom.\n2 Where is Mary? \t \t1\n": LINE,
    "1 Mary moved to the bathroom.\n2 Where is Mary? \tbathroom\n": LINE,
    "1 Mary moved to the bathroom.\n\n2 Where is Mary? \tbathroom\t1\n": LINE,
    "1 \xff\xfe\n": r"^cannot read [^\n]*qa1_x_train.txt: [^\n]*$",
}


@pytest.mark.parametrize("text", BAD)
def test_malformed_files_are_refused_by_name_and_line(tmp_path, text):
    with pytest.raises(UserError, match=BAD[text]):
        ask("qa1", 1, style=babi(tmp_path, text))
