"""BABILong's stories, prompts and small tasks. A reader of the text alone, with regular expressions and no view of the
simulator, must arrive at each answer."""

import random
import re
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pytest

import data
import eval_niah
from model import UserError

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
STYLE = data.Style(lambda text, prefix: data.TINY.encode(text + prefix))  # spells most words: two thousand tokens are short
HARNESS = STYLE._replace(protocol="harness")
WORLDS = {"English": data.BABI_WORLDS, "small": data.SMALL_WORLDS}
MOVES, TAKES = r"(?:moved|went|went back|journeyed|travelled)(?: to the)?", r"(?:took|got|grabbed|picked up|holds)"
FACTS = {
    "give": r"([A-Z]\w+) (?:gave|handed|passed) the (\w+) to ([A-Z]\w+)\.",
    "take": rf"([A-Z]\w+) {TAKES} the (\w+)(?: there)?\.",
    "drop": r"([A-Z]\w+) (?:dropped|discarded|left|put down) the (\w+)\.",
    "side": r"The (\w+) is (north|south|east|west) of the (\w+)\.",
    "go": rf"([A-Z]\w+) {MOVES} (\w+)\.",
}


# ---- a reader -------------------------------------------------------------------------------------------------------------


def understand(fact: str) -> tuple[str, ...]:
    """Mary got the milk there. -> ("take", "Mary", "milk"). Exactly one reading fits."""
    (found,) = [(kind, *match.groups()) for kind, text in FACTS.items() if (match := re.fullmatch(text, fact.strip()))]
    return found


class Reader:
    """Follows the facts. A place that was not told is an unknown of its own, until it turns out to be another's."""

    def __init__(self, facts: list[str]):
        self.same, self.at, self.holder, self.gifts, self.ways = {}, {}, {}, [], {}
        for kind, who, what, *to in map(understand, facts):
            if kind == "go":
                assert self.place(who) != what, "has been there all along"
                self.at[who] = what
            elif kind == "take":
                assert what not in self.holder, "somebody has it"
                self.meet(who, what)
                self.holder[what] = who
            else:
                assert self.holder.pop(what) == who, "does not have it"
                self.at[what] = self.place(who)
                if kind == "give":
                    assert who != to[0]
                    self.meet(who, to[0])
                    self.holder[what] = to[0]
                    self.gifts.append((who, what, to[0]))
            for thing, holder in self.holder.items():
                self.at[thing] = self.place(holder)
                self.ways.setdefault(thing, []).append(self.place(thing))

    def root(self, place: str) -> str:
        return self.root(self.same[place]) if place in self.same else place

    def place(self, name: str) -> str:
        return self.root(self.at.setdefault(name, f"? {name}"))

    def meet(self, one: str, other: str) -> None:
        a, b = self.place(one), self.place(other)
        if a != b:
            unknown, known = (a, b) if a.startswith("?") else (b, a)
            assert unknown.startswith("?"), f"{one} and {other} are in two places"
            self.same[unknown] = known

    def before(self, what: str, later: str) -> set[str]:
        way = [self.root(place) for place in self.ways[what]]
        return {before for before, place in pairwise(way) if before != place == later}


def directly(facts: list[str], one: str | None, side: str, other: str | None) -> set[str]:
    """The places that lie exactly on this side of `other` (or that `one` lies on this side of), from coordinates."""
    steps, at = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}, {}
    relations = [understand(fact)[1:] for fact in facts]
    ((a, _, b), other_relation) = relations
    at[a if a in other_relation else b] = (0, 0)
    for a, way, b in relations:
        x, y = steps[way]
        if b in at:
            at[a] = (at[b][0] + x, at[b][1] + y)
        else:
            at[b] = (at[a][0] - x, at[a][1] - y)
    x, y = steps[side]
    ways = {(a, b): tuple((p > q) - (p < q) for p, q in zip(at[a], at[b])) for a in at for b in at}
    return {a if one is None else b for (a, b), way in ways.items() if way == (x, y) and (one or a, other or b) == (a, b)}


QUESTIONS = {
    r"where is the (\w+)\?": lambda facts, what: {Reader(facts).place(what)},
    r"where is (\w+)\?": lambda facts, who: {Reader(facts).place(who)},
    r"where was the (\w+) before (?:the )?(\w+)\?": lambda facts, what, later: Reader(facts).before(what, later),
    r"what is (\w+) of the (\w+)\?": lambda facts, side, other: directly(facts, None, side, other),
    r"what is the (\w+) (\w+) of\?": lambda facts, one, side: directly(facts, one, side, None),
    r"what did (\w+) give to (\w+)\?": lambda facts, a, b: {g[1] for g in Reader(facts).gifts if (g[0], g[2]) == (a, b)},
    r"who gave the (\w+) to (\w+)\?": lambda facts, a, b: {g[0] for g in Reader(facts).gifts if g[1:] == (a, b)},
    r"who did (\w+) give the (\w+) to\?": lambda facts, a, b: {g[2] for g in Reader(facts).gifts if g[:2] == (a, b)},
    r"who gave the (\w+)\?": lambda facts, what: {g[0] for g in Reader(facts).gifts if g[1] == what},
    r"who received the (\w+)\?": lambda facts, what: {g[2] for g in Reader(facts).gifts if g[1] == what},
}


def reply(facts: list[str], question: str) -> str:
    """The one answer that follows from these facts."""
    question = question[0].lower() + question[1:]
    (ask, groups) = next((ask, match.groups()) for text, ask in QUESTIONS.items() if (match := re.fullmatch(text, question)))
    (answer,) = ask(facts, *groups)
    return answer


# ---- stories --------------------------------------------------------------------------------------------------------------


def stories(task: str, worlds: str = "English", n: int = 300, **options) -> list[data.Story]:
    return [data.make_story(task, WORLDS[worlds][task], random.Random(f"{task} {i}"), **options) for i in range(n)]


@pytest.mark.parametrize("worlds", WORLDS)
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_from_the_facts_alone(task, worlds):
    """What a reader finds is the target, and nothing impossible happens on the way: nobody takes what is not there or what
    another one has, drops or gives what he has not, gives to somebody elsewhere, or goes where he is."""
    for story in stories(task, worlds):
        assert reply(story.facts, story.question) == story.target, story


@pytest.mark.parametrize(
    ("fact", "after"),
    [
        ("Mary dropped the milk.", []),
        ("John took the milk.", ["Mary took the milk."]),
        ("John took the milk.", ["Mary went to the office.", "Mary got the milk.", "Mary left the milk.", "John went home."]),
        ("Mary gave the milk to John.", ["Mary went to the office.", "John went to the garden.", "Mary took the milk."]),
        ("Mary moved to the office.", ["Mary went to the office."]),
    ],
)
def test_the_reader_notices_what_is_impossible(fact, after):
    Reader(after)
    with pytest.raises((AssertionError, KeyError)):
        Reader([*after, fact])


def test_what_acts_together_is_in_one_place():
    """Mary was told to be in the kitchen. John, who gives her the milk, is there too, and so is the apple that he has."""
    scene = data.Scene(["Mary", "John"], ["milk", "apple"], dict.fromkeys(["John", "milk", "apple"], "kitchen"), {})
    scene.place["Mary"], scene.told = "office", {name: [] for name in (*scene.people, *scene.objects)}
    for event in (("go", "Mary", "", "kitchen"), ("take", "John", "milk"), ("take", "John", "apple")):
        scene.happen(data.Event(*event))
    assert scene.told == {"Mary": ["kitchen"], "John": [], "milk": [], "apple": []}
    scene.happen(data.Event("give", "John", "milk", "Mary"))
    assert set(map(tuple, scene.told.values())) == {("kitchen",)}
    scene.happen(data.Event("go", "John", to="office"))
    assert scene.told["apple"] == scene.told["John"] == ["kitchen", "office"] != scene.told["milk"]


@pytest.mark.parametrize("worlds", WORLDS)
@pytest.mark.parametrize("task", TASKS)
def test_stories_are_as_long_as_told(task, worlds):
    low, high = WORLDS[worlds][task].facts[task]
    sizes = Counter(len(story.facts) for story in stories(task, worlds))
    assert low <= min(sizes) <= max(sizes) <= high
    assert max(sizes) - min(sizes) >= (high - low) * 2 / 3
    assert {len(story.facts) for story in stories(task, n=30, most=low)} <= {WORLDS["English"][task].facts[task][0]}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_balanced(task):
    """No label is a good guess, and each is right now and then."""
    labels = eval_niah.BABILONG_LABELS[task]
    share = {target: count / 600 for target, count in Counter(story.target for story in stories(task, n=600)).items()}
    assert share.keys() == set(labels)
    assert max(share.values()) < 0.3
    assert min(share.values()) > 0.04


@pytest.mark.parametrize("task", TASKS)
def test_every_form_of_question_and_every_verb_occurs(task):
    world, told = data.BABI_WORLDS[task], stories(task, n=600)
    forms = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text.partition("?")[0] + "?")) for text in world.questions[task]]
    assert all(any(re.fullmatch(form, story.question) for story in told) for form in forms)
    kinds = {"qa1": ["go"], "qa4": ["side"], "qa5": ["go", "take", "drop", "give"]}.get(task, ["go", "take", "drop"])
    facts = set(chain(*(story.facts for story in told)))
    for text in chain(*(world.sentences[kind] for kind in kinds)):
        assert any(re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text)), fact) for fact in facts), text


# ---- prompts --------------------------------------------------------------------------------------------------------------


def questions(task: str, n: int = 20, length: int = 4000, style: data.Style = STYLE) -> list[data.Question]:
    return [data.make_question(f"babilong_{task}", i, length, 7, style) for i in range(n)]


def context_of(task: str, question: data.Question, style: data.Style) -> str:
    """What stands between the prompt's words: they are the ones of an empty context."""
    build, _ = data.BABILONG_PROTOCOLS[style.protocol]
    head, tail = build(task, "@", question.asked).split("@")
    assert question.text.startswith(head)
    assert question.text.endswith(tail)
    return question.text[len(head) : -len(tail)]


def facts_in(context: str) -> list[str]:
    """All of the facts, in order: what the background's sentences are not. None of these can be read as a fact."""
    patterns = "|".join(re.sub(r"\((?!\?)", "(?:", text) for text in FACTS.values())
    return re.findall(rf"(?<!\S)(?:{patterns})(?!\S)", context)


@pytest.mark.parametrize("style", [STYLE, HARNESS], ids=["original", "harness"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_from_the_prompt(task, style):
    """The facts stand in it whole and in order, and the rest is background: sentences that follow each other."""
    for question in questions(task, style=style):
        context = context_of(task, question, style)
        facts = facts_in(context)
        assert (reply(facts, question.asked),) == question.references
        for fact in facts:
            context = context.replace(fact, " ", 1)
        assert " ".join(context.split()) in " ".join((data.BACKGROUND * 3).split())


@pytest.mark.parametrize("length", [2600, 4000, 6001])
@pytest.mark.parametrize("style", [STYLE, HARNESS], ids=["original", "harness"])
@pytest.mark.parametrize("task", ["qa1", "qa4", "qa5"])
def test_the_length_is_kept_and_used(task, style, length):
    """Prompt and answer fit, and another word of background would not: a word and its space have at most 13 letters."""
    for question in questions(task, 8, length, style):
        assert len(question.prompt) == len(data.TINY.encode(question.text))
        assert question.tokens == {"original": 20, "harness": 16}[style.protocol]
        assert 0 <= length - len(question.prompt) - question.tokens < 26


def test_facts_lie_anywhere():
    """At random places, the two ends among them, and some beside each other: no place is a shortcut."""
    contexts = [context_of("qa1", question, STYLE) for question in questions("qa1", 200, 2600)]
    facts = [facts_in(context) for context in contexts]
    assert 0.05 < sum(context.startswith(own[0]) for context, own in zip(contexts, facts)) / 200 < 0.5
    assert 0.05 < sum(context.endswith(own[-1]) for context, own in zip(contexts, facts)) / 200 < 0.5
    assert any(f"{one} {other}" in context for context, own in zip(contexts, facts) for one, other in pairwise(own))
    places = [context.index(fact) / len(context) for context, own in zip(contexts, facts) for fact in own]
    assert abs(sum(place < 0.5 for place in places) / len(places) - 0.5) < 0.1


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_and_nothing_is_given_away(task):
    """The target scores 1, silence 0, what stands after the context 0, and a label drawn at random little more than chance."""
    labels, rng, guessed, n = eval_niah.BABILONG_LABELS[task], random.Random(0), 0, 60
    for question in questions(task, n, 4500, HARNESS):
        (target,), asked = question.references, question.asked

        def scores(output: str, target=target, asked=asked) -> set[float]:
            return {float(eval_niah.babilong_correct(task, asked, target, output)), eval_niah.babilong_accuracy(target, output)}

        assert scores(target) == scores(f"The answer is {target}.") == {1.0}
        assert scores("") == scores(question.text.rpartition("\n")[2]) == {0.0}
        guessed += eval_niah.babilong_accuracy(target, rng.choice(labels)) / n
    assert guessed < 2.5 / len(labels)


def test_questions_depend_on_their_own_arguments_alone():
    """Also in this order; another index or seed is another question."""
    first = [data.make_question("babilong_qa2", i, 4000, 3, STYLE) for i in range(6)]
    again = [data.make_question("babilong_qa2", i, 4000, 3, STYLE) for i in reversed(range(6))]
    assert first == again[::-1]
    assert len({question.text for question in first}) == 6
    assert data.make_question("babilong_qa2", 0, 4000, 4, STYLE).text != first[0].text


@pytest.mark.parametrize("style", [STYLE, HARNESS], ids=["original", "harness"])
@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused_by_name(task, style):
    """The length that the message names is enough for the question, and has facts and no background."""
    with pytest.raises(UserError, match=rf"babilong_{task} needs at least \d+ tokens; --lengths 200 is"):
        data.make_question(f"babilong_{task}", 0, 200, 0, style)
    draft = data.BABILONG[f"babilong_{task}"](random.Random(5), 0, 200, style)
    with pytest.raises(UserError) as refusal:
        data.grow(f"babilong_{task}", draft, 200, style)
    least = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    question = data.grow(f"babilong_{task}", draft, least, style)
    assert len(question.prompt) + question.tokens == least
    assert context_of(task, question, style) == " ".join(facts_in(context_of(task, question, style)))


def test_the_built_in_text_names_no_label():
    """Nor anybody else of a story; its sentences all have ten words or more, and no two are the same."""
    words = set(chain(*((*world.people, *world.objects, *world.places) for world in data.BABI_WORLDS.values())))
    assert not [word for word in words if word.lower() in data.BACKGROUND.lower()]
    assert len(words) == 4 + 3 + 3 + 6
    sentences = data.sentences_of(data.BACKGROUND)
    assert list(chain(*sentences)) == data.BACKGROUND.split()
    assert len(set(map(tuple, sentences))) == len(sentences) >= 25


def test_a_text_of_the_users_is_the_background():
    """Its short sentences are passed over, as in the original; the last one taken is cut, and the first follows the last."""
    long = ["One two three four five six seven eight nine ten.", "Uno dos tres cuatro cinco seis siete ocho\nnueve diez!"]
    style = STYLE._replace(haystack=f"Too short. {long[0]} Nor is this! {long[1]} The end")
    for question in questions("qa1", style=style):
        context = context_of("qa1", question, style)
        for fact in facts_in(context):
            context = context.replace(fact, " ", 1)
        words = context.split()
        assert " ".join(words) in " ".join(" ".join(long * 99).split())
        assert len(words) > 50
    assert len({question.text for question in questions("qa1", style=style)}) == 20
    for text in ("", "Too short. Nor is this!"):
        with pytest.raises(UserError, match="no sentence of at least ten words"):
            questions("qa1", 1, style=STYLE._replace(haystack=text))


# ---- bAbI's own files -----------------------------------------------------------------------------------------------------

PUBLISHED = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra journeyed to the office.
2 Where is Sandra? \toffice\t1
"""


def babi(folder: Path, text: str = PUBLISHED, name: str = "qa1_single-supporting-fact_train.txt") -> data.Style:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return STYLE._replace(babi=folder)


def test_each_published_question_is_asked_once(tmp_path):
    """It has all earlier facts of its story, without the earlier questions. There is no fourth of three."""
    style = babi(tmp_path)
    found = {q.asked.strip(): (facts_in(context_of("qa1", q, style)), *q.references) for q in questions("qa1", 3, style=style)}
    first = ["Mary moved to the bathroom.", "John went to the hallway."]
    assert found.pop("Where is Mary?") == (first, "bathroom")
    assert found.pop("Where is Daniel?") == ([*first, "Daniel went back to the hallway."], "hallway")
    assert found.pop("Where is Sandra?") == (["Sandra journeyed to the office."], "office")
    with pytest.raises(UserError, match=r"has 3 questions after at most .*: lower --samples"):
        questions("qa1", 4, style=style)


def test_published_questions_are_mixed(tmp_path):
    """Neighbours in the file are about one story; a few samples shall be about many."""
    story = "1 Mary moved to the {}.\n2 Where is Mary? \t{}\t1\n3 John went to the {}.\n4 Where is John? \t{}\t3\n"
    places = [f"room{i}" for i in range(20)]
    style = babi(tmp_path, "".join(story.format(*[place] * 4) for place in places))
    found = [q.references[0] for q in questions("qa1", 8, style=style)]
    assert len(set(found)) > 5
    assert found != sorted(found, key=places.index)


def test_published_stories_have_at_most_an_eighth_of_the_length(tmp_path):
    """(length - 300) // 8 facts: the others are left out, and where none is left, the length is too short."""
    style = babi(tmp_path)._replace(encode=lambda text, prefix: text.split())  # as if each word were a token
    assert {q.references[0] for q in questions("qa1", 2, 323, style)} == {"bathroom", "office"}
    assert {q.references[0] for q in questions("qa1", 3, 324, style)} == {"bathroom", "hallway", "office"}
    with pytest.raises(UserError, match=r"babilong_qa1: .* has 0 questions after at most 0 facts.*--lengths 307: "):
        questions("qa1", 1, 307, style)


def test_published_files_are_found_in_subfolders(tmp_path):
    """The archive has several versions of each task, of which BABILong reads en-10k; a file in the folder itself goes first."""
    babi(tmp_path / "en", "1 Mary went to the garden.\n2 Where is Mary? \tgarden\t1\n")
    babi(tmp_path / "en-10k", "1 Mary went to the office.\n2 Where is Mary? \toffice\t1\n")
    babi(tmp_path / "en-10k", name="qa10_indefinite-knowledge_train.txt")
    babi(tmp_path / "en-10k", name="qa1_single-supporting-fact_test.txt")
    assert data.read_babi(tmp_path, "qa1")[0].target == "office"
    babi(tmp_path / "en" / "en-10k")
    assert data.read_babi(tmp_path / "en", "qa1")[0].target == "garden"


BAD = {
    "no number": "Mary moved to the bathroom.\n",
    "another number": "1 Mary moved to the bathroom.\n3 John went to the hallway.\n",
    "no beginning": "2 Mary moved to the bathroom.\n",
    "no facts": "1 Where is Mary? \tbathroom\t1\n",
    "no answer": "1 Mary moved to the bathroom.\n2 Where is Mary? \t \t1\n",
    "no supporting facts": "1 Mary moved to the bathroom.\n2 Where is Mary? \tbathroom\n",
    "an empty line": "1 Mary moved to the bathroom.\n\n2 Where is Mary? \tbathroom\t1\n",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_malformed_files_are_refused_by_line(tmp_path, text):
    with pytest.raises(UserError, match=r"^\S+_train.txt, line [12]: not bAbI's NUMBER FACT.*$"):
        questions("qa1", 1, style=babi(tmp_path, text))


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^no qa1_\*train.txt of bAbI in the folder .*nowhere\.$"):
        questions("qa1", 1, style=STYLE._replace(babi=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^no qa2_\*train.txt of bAbI"):
        questions("qa2", 1, style=babi(tmp_path))
    with pytest.raises(UserError, match="has 0 questions after at most"):
        questions("qa1", 1, style=babi(tmp_path / "empty", ""))
    (tmp_path / "qa3_x_train.txt").write_bytes(b"1 \xff\xfe\n")
    with pytest.raises(UserError, match=r"^cannot read .*qa3_x_train.txt: [^\n]*$"):
        questions("qa3", 1, style=STYLE._replace(babi=tmp_path))


# ---- the small tasks ------------------------------------------------------------------------------------------------------

FILLER = [text.strip() for text in data.FILLER]


def halves(example: data.Example) -> tuple[str, str]:
    hay, question = data.TOKENIZER.decode(example.prompt).split(" Question: ")
    return hay, question.removesuffix(" Answer:")


@pytest.mark.parametrize("length", [96, 384])
@pytest.mark.parametrize("task", TASKS)
def test_small_answers_follow_from_the_text(task, length):
    """The reader's answer, put into the sentence that the example answers with, is this very sentence."""
    for example in data.make_examples(task, 60, length, seed=length):
        hay, question = halves(example)
        facts, answer = facts_in(hay), data.decode(example.response)
        found = reply(facts, question)
        assert re.search(rf"\b{found}\b", answer)
        assert not re.search(rf"\b{found}\b", question)
        assert {*re.findall(r"\w+", question)} & {*data.PEOPLE, *data.NOUNS} <= {*re.findall(r"\w+", answer)}
        for fact in facts:
            hay = hay.replace(f" {fact}", "", 1)
        assert "".join(f" {FILLER[(i + 1) % 3]}" for i in range(100)).startswith(hay)


@pytest.mark.parametrize("task", TASKS)
def test_small_examples_have_one_length(task):
    """All of a task and a length are equally long, prompt and answer alike: an evaluation stacks them without padding."""
    for length in (data.FACT_TASKS[task], 96, 383):
        examples = data.make_examples(task, 30, length, seed=1)
        assert {len(example.prompt) + len(example.response) for example in examples} == {length}
        assert len({len(example.response) for example in examples}) == 1
        assert {example.response[-1] for example in examples} == {data.EOS}
    assert data.FACT_TASKS[task] <= 96
    with pytest.raises(UserError, match=rf"^{task} needs at least {data.FACT_TASKS[task]} tokens; a length of"):
        data.make_examples(task, 1, data.FACT_TASKS[task] - 1, seed=1)


@pytest.mark.parametrize("task", TASKS)
def test_small_examples_depend_on_seed_and_index_alone(task):
    """Ten examples are the first ten of thirty; another split has none of them."""
    assert data.make_examples(task, 30, 96, 5)[:10] == data.make_examples(task, 10, 96, 5)
    splits = [data.split_seed(0, split) for split in ("train", "held out", "test")]
    prompts = [tuple(example.prompt) for seed in splits for example in data.make_examples(task, 100, 96, seed)]
    assert len(set(prompts)) == 300
    with pytest.raises(UserError, match="no noisy answers"):
        data.make_examples(task, 1, 96, 0, noise=0.5)


@pytest.mark.parametrize("task", TASKS)
def test_small_answers_score(task):
    """The answer scores 1; silence, the question, and the answer to another example 0 or nearly so."""
    examples, score = data.make_examples(task, 100, 96, 6), eval_niah.string_match_all
    assert {score(example.references, data.decode(example.response)) for example in examples} == {1.0}
    assert {score(example.references, text) for example in examples for text in ("", halves(example)[1])} == {0.0}
    answers = [data.decode(example.response) for example in examples]
    assert sum(score(example.references, answer) for example, answer in zip(examples, answers[1:])) <= 5
    share = Counter(answer.split()[-1] for answer in answers)
    assert max(share.values()) < 30


def test_the_other_tasks_are_the_same_as_before():
    """Bases that were trained before BABILong's tasks came still match."""
    assert data.fingerprint() == 1698392225
    assert not {*data.TASKS} & {*data.FACT_TASKS}
