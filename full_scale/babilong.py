"""
babilong.py: prompts of BABILong's tasks qa1 to qa10 (Kuratov et al. 2024, arXiv 2406.10149).

A story of bAbI (Weston et al. 2015, arXiv 1502.05698) is hidden, fact by fact, among the sentences
of a text that has nothing to do with it, and a question is asked about the story:

  task  what the facts tell                 a question
  qa1   "Mary went to the office."          "Where is Mary?"
  qa2   qa1's, and "Mary took the milk."    "Where is the milk?"
  qa3   what they tell in qa2               "Where was the milk before the office?"
  qa4   "The hallway is north of the ..."   "What is north of the kitchen?"
  qa5   qa2's, and "Mary gave the milk ..." "Who gave the milk to John?"
  qa6   what they tell in qa2               "Is Mary in the office?"
  qa7   what they tell in qa5               "How many objects is Mary carrying?"
  qa8   what they tell in qa2               "What is Mary carrying?"
  qa9   qa1's, and "Mary is not in the ..." "Is Mary in the office?"
  qa10  "Mary is either in the ... or ..."  "Is Mary in the park?"

bAbI's files are not part of this project, so the stories come from a small simulated world. It
keeps two books: where everybody and everything is (`place`), and what a reader can tell from the
facts so far (`told`). A question is asked only if exactly one answer follows from the facts. A
folder with the published files (`style.babi`) takes the place of the simulation. drafts.py explains
Draft, Style and size. What the prompts say beside story and question is in babilong.json.

Glossary
  name here  | meaning
  truth      | an Event that answers a question; which question, QUESTIONS says
  spot       | where a fact goes in the background: 0 is its beginning, 1 its end
"""

import functools
import itertools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from full_scale.drafts import Draft, Style, sentences_of, shuffled, words_of
from full_scale.pairs import read_text
from lab.tools import read_json
from model import UserError

WORDS = read_json(Path(__file__).with_name("babilong.json"))

# ---- what the stories are made of ----------------------------------------------------------------


class Event(NamedTuple):
    """What happens, or is true. The other fields' names stand in SENTENCES and QUESTIONS.

    kind  who          what       to
    go    person       -          place
    take  person       object     -
    drop  person       object     -
    give  person       object     the person who gets it
    is    -            object     the place where it is
    was   later place  object     the place where it was before
    side  place        direction  the place that it lies on this side of
    at    person       -          place
    not   person       -          a place where the person is not
    left  person       -          the place where the person was a moment ago
    or    person       place      another place: the person is in one of the two
    in    person       answer     place: whether the person is there, "yes", "no" or "maybe"
    load  person       answer     how many objects the person carries, or which
    """

    kind: str
    who: str
    what: str = ""
    to: str = ""


FOUR = ["Mary", "John", "Sandra", "Daniel"]
PEOPLE = {f"qa{number}": FOUR for number in (1, 2, 3, 6, 7, 8, 9)}
PEOPLE |= {"qa5": ["Mary", "Fred", "Bill", "Jeff"], "qa10": ["Mary", "Fred", "Bill", "Julie"]}
OBJECTS = ["apple", "football", "milk"]
PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
TOWN = ["bedroom", "cinema", "kitchen", "office", "park", "school"]  # of qa10
NUMBERS = ["none", "one", "two", "three"]
DIRECTIONS = ["north", "east", "south", "west"]

# task -> the fewest and the most facts of a story
STORY_SIZES = {"qa1": (2, 10), "qa2": (6, 30), "qa3": (10, 60), "qa4": (2, 2), "qa5": (5, 20)}
STORY_SIZES |= {"qa6": (2, 26), "qa7": (5, 40), "qa8": (5, 40), "qa9": (2, 10), "qa10": (2, 10)}


def ways_to_tell(verbs: str, *endings: str) -> list[str]:
    """Each verb with each ending: ("took, got", "the {what}.") -> "{who} took the {what}.", ..."""
    return ["{who} " + verb + " " + end for verb in verbs.split(", ") for end in endings]


# kind of event -> ways to tell it
SENTENCES = {
    "go": ways_to_tell("moved, went, went back, journeyed, travelled", "to the {to}."),
    "take": ways_to_tell("took, got, grabbed, picked up", "the {what}.", "the {what} there."),
    "drop": ways_to_tell("dropped, discarded, left, put down", "the {what}."),
    "give": ways_to_tell("gave, handed, passed", "the {what} to {to}."),
    "side": ["The {who} is {what} of the {to}."],
    "at": ["{who} is in the {to}."],
    "not": ["{who} is not in the {to}."],
    "left": ["{who} is no longer in the {to}."],
    "or": ["{who} is either in the {what} or the {to}."],
}

# task -> questions and their answers, both filled in from a truth
QUESTIONS = {
    "qa1": [("Where is {who}?", "{to}")],
    "qa2": [("Where is the {what}?", "{to}")],
    "qa3": [("Where was the {what} before the {who}?", "{to}")],
    "qa4": [("What is {what} of the {to}?", "{who}"), ("What is the {who} {what} of?", "{to}")],
    "qa5": [
        ("What did {who} give to {to}?", "{what}"),
        ("Who gave the {what} to {to}?", "{who}"),
        ("Who did {who} give the {what} to?", "{to}"),
        ("Who gave the {what}?", "{who}"),
        ("Who received the {what}?", "{to}"),
    ],
    "qa7": [("How many objects is {who} carrying?", "{what}")],
    "qa8": [("What is {who} carrying?", "{what}")],
}
WHETHER = ("qa6", "qa9", "qa10")
QUESTIONS |= {task: [("Is {who} in the {to}?", "{what}")] for task in WHETHER}

# ---- a world in which people move and objects change hands ---------------------------------------

# task -> kind of event -> how likely it is among those that are possible
WEIGHTS = {
    "qa1": {"go": 1},
    "qa2": {"go": 6, "take": 3, "drop": 2},
    "qa3": {"go": 6, "take": 3, "drop": 2},
    "qa5": {"go": 3, "take": 3, "drop": 1, "give": 4},
    "qa6": {"go": 6, "take": 3, "drop": 2},
    "qa7": {"go": 3, "take": 6, "drop": 1, "give": 2},
    "qa8": {"go": 3, "take": 6, "drop": 2},
}


@dataclass
class Scene:
    """The world at one moment, and what the facts have told of it so far."""

    people: list[str]
    objects: list[str]
    place: dict[str, str]  # of each person, and of each object that lies somewhere
    told: dict[str, list[str]]  # the places of a person or an object that a reader knows, in order
    holder: dict[str, str] = field(default_factory=dict)  # of each object that is carried

    def load(self, who: str) -> list[str]:
        """The objects that a person carries."""
        return [what for what, holder in self.holder.items() if holder == who]

    def possible(self, kind: str, places: list[str]) -> list[Event]:
        """All events of a kind that can happen now."""
        place = self.place
        if kind == "go":
            pairs = itertools.product(self.people, places)
            return [Event("go", who, to=to) for who, to in pairs if to != place[who]]
        if kind == "take":  # what lies free in the same place
            free = [what for what in self.objects if what not in self.holder]
            pairs = itertools.product(self.people, free)
            return [Event("take", who, what) for who, what in pairs if place[who] == place[what]]
        if kind == "drop":
            return [Event("drop", who, what) for what, who in self.holder.items()]
        gifts = []  # to somebody who is in the same place
        for who, to in itertools.permutations(self.people, 2):
            if place[who] == place[to]:
                gifts += [Event("give", who, what, to) for what in self.load(who)]
        return gifts

    def happen(self, event: Event) -> None:
        """Moves the world on, and notes what a reader can tell from it.

        Whoever acts together is in one place, with everything that they carry. Where a reader knows
        the place of one of them, it is now told of the others too. What this says about *earlier*
        places is not followed up.
        """
        if event.kind == "go":
            self.place[event.who] = event.to
            for name in (event.who, *self.load(event.who)):
                self.told[name].append(event.to)
            return
        if event.kind == "drop":
            del self.holder[event.what]
            self.place[event.what] = self.place[event.who]
        else:
            self.holder[event.what] = event.who if event.kind == "take" else event.to
        present = [event.who, event.what, *self.load(event.who)]
        if event.kind == "give":
            present += [event.to, *self.load(event.to)]
        if any(self.told[name] for name in present):
            for name in present:
                if not self.told[name]:
                    self.told[name].append(self.place[event.who])


def truths_of(task: str, scene: Scene, events: list[Event]) -> list[Event]:
    """What a reader knows in the end of what the task asks for."""
    told = scene.told
    if task == "qa1":  # where people are
        return [Event("go", who, to=told[who][-1]) for who in scene.people if told[who]]
    if task == "qa2":  # where objects are
        return [Event("is", "", what, told[what][-1]) for what in scene.objects if told[what]]
    if task == "qa6":  # where people are, and where they are not
        known = [Event("go", who, to=told[who][-1]) for who in scene.people if told[who]]
        return [truth for event in known for truth in whereabouts(event, PLACES)]
    if task in ("qa7", "qa8"):  # what people carry, if the facts have told of their doings
        named = {name for event in events for name in (event.who, event.to)}
        loads = {who: sorted(scene.load(who)) for who in scene.people if who in named}
        said = {who: ",".join(load) or "nothing" for who, load in loads.items()}
        if task == "qa7":
            said = {who: NUMBERS[len(load)] for who, load in loads.items()}
        return [Event("load", who, answer) for who, answer in said.items()]
    if task == "qa5":  # who gave what to whom
        return [event for event in events if event.kind == "give"]
    # qa3: where objects were before each of their places. Before the first place nobody knows (""):
    # this makes a question unclear that has a second answer, and is never an answer itself.
    truths = []
    for what in scene.objects:
        for before, later in itertools.pairwise(["", *told[what]]):
            truths.append(Event("was", later, what, before))
    return truths


def live(task: str, n: int, rng: random.Random) -> tuple[list[Event], list[Event]]:
    """n events in a new world, where all start at random places that no fact tells; and what is
    true in the end."""
    people = rng.sample(PEOPLE[task], 4)
    objects = rng.sample(OBJECTS, 3)
    places = rng.sample(PLACES, 6)
    start = {name: rng.choice(places) for name in people + objects}
    scene = Scene(people, objects, start, told={name: [] for name in people + objects})
    events = []
    for _ in range(n):
        possible = {kind: scene.possible(kind, places) for kind in WEIGHTS[task]}
        kinds = [kind for kind in possible if possible[kind]]
        (kind,) = rng.choices(kinds, [WEIGHTS[task][kind] for kind in kinds])
        event = rng.choice(possible[kind])
        scene.happen(event)
        events.append(event)
    return events, truths_of(task, scene, events)


# ---- qa6, qa9, qa10: whether somebody is in a place ----------------------------------------------


def whereabouts(event: Event, places: list[str]) -> list[Event]:
    """Whether the person of an event is in each of the places, as far as it tells."""
    answers = {event.to: "no"}
    if event.kind not in ("not", "left"):
        answers = dict.fromkeys(places, "no") | {event.to: "yes"}
    if event.kind == "or":
        answers |= {event.what: "maybe", event.to: "maybe"}
    return [Event("in", event.who, answer, place) for place, answer in answers.items()]


def hear(task: str, n: int, rng: random.Random) -> tuple[list[Event], list[Event]]:
    """n facts about where people are, who may have moved unseen since the last one about them; and
    what the last one about each of them tells."""
    places = TOWN if task == "qa10" else PLACES
    events: list[Event] = []
    last: dict[str, Event] = {}
    open_to: dict[str, list[str]] = {}  # where a person may be, as far as the reader can tell
    for _ in range(n):
        who = rng.choice(PEOPLE[task])
        kind = rng.choice(("go", "at", "or" if task == "qa10" else "not"))
        here = rng.choice(open_to.get(who, places))
        others = [place for place in places if place != here]
        away = rng.sample(others, 2)
        if kind == "not" and len(open_to.get(who, places)) == 1:
            kind = "left"
        event = Event(kind, who, to=away[0] if kind in ("go", "or") else here)
        if kind == "or":
            event = event._replace(what=away[1])
        open_to[who] = {"or": away, "not": others, "left": others}.get(kind, [event.to])
        last[who] = event
        events.append(event)
    return events, [truth for event in last.values() for truth in whereabouts(event, places)]


# ---- qa4: places around a place ------------------------------------------------------------------


def both_ways(one: str, direction: int, other: str) -> list[Event]:
    """A relation and its converse: A is north of B, and B is south of A."""
    opposite = DIRECTIONS[direction - 2]
    return [Event("side", one, DIRECTIONS[direction], other), Event("side", other, opposite, one)]


def lie_around(rng: random.Random) -> tuple[list[Event], list[Event]]:
    """Two places on two sides of a third: the two facts, and all that is true.

    Each of the two is told in one of its two ways. If the three places lie in a row, the outer two
    have their sides of each other too.
    """
    middle, one, other = rng.sample(PLACES, 3)
    side_of_one, side_of_other = rng.sample(range(4), 2)
    ways_of_one = both_ways(one, side_of_one, middle)
    ways_of_other = both_ways(other, side_of_other, middle)
    facts = [rng.choice(ways_of_one), rng.choice(ways_of_other)]
    truths = ways_of_one + ways_of_other
    if abs(side_of_one - side_of_other) == 2:
        truths += both_ways(one, side_of_one, other)
    return facts, truths


# ---- stories: simulated, or read from bAbI's files -----------------------------------------------


class Story(NamedTuple):
    facts: list[str]
    question: str
    target: str  # the answer, a word; in qa8 perhaps several, as in "apple,milk"


def clear_questions(task: str, truths: list[Event]) -> list[tuple[str, str]]:
    """Questions with their answers: those that exactly one truth answers."""
    fitting: dict[str, set] = {}  # question -> each (answer, truth) that fits it
    for question_form, answer_form in QUESTIONS[task]:
        for truth in truths:
            names = truth._asdict()
            question, answer = question_form.format(**names), answer_form.format(**names)
            fitting.setdefault(question, set()).add((answer, truth))
    clear = []
    for question, found in fitting.items():
        answer, _ = next(iter(found))
        if len(found) == 1 and answer:
            clear.append((question, answer))
    return clear


def make_story(task: str, rng: random.Random, most: int = 60) -> Story:
    """A simulated story of at most `most` facts (but no fewer than the task's least)."""
    low, high = STORY_SIZES[task]
    high = max(low, min(high, most))
    clear = []
    while not clear:
        n = rng.randint(low, high)
        if task == "qa4":
            events, truths = lie_around(rng)
        else:
            events, truths = (hear if task in ("qa9", "qa10") else live)(task, n, rng)
        clear = clear_questions(task, truths)
    facts = [rng.choice(SENTENCES[event.kind]).format(**event._asdict()) for event in events]
    if task in (*WHETHER, "qa7", "qa8"):  # "no" and "none" would be the answer most of the time
        wanted = rng.choice(sorted({answer for _, answer in clear}))
        clear = [one for one in clear if one[1] == wanted]
    question, target = rng.choice(clear)
    return Story(facts, question, target)


# "1 Mary moved to the office.", or a question, a tab, its answer, a tab, numbers of facts
BABI_LINE = re.compile(r"(\d+) ([^\t]*\S[^\t]*)(?:\t([^\t]*\S[^\t]*)\t[\d ]+)?")


def find_babi(folder: Path, task: str) -> Path:
    """The file of a task: in the folder itself, or else below it, best in en-10k: the published
    archive has several versions of each task, of which BABILong reads this one."""

    def preference(file: Path) -> tuple:
        return file.parent != folder, file.parent.name != "en-10k", file

    files = list(folder.rglob(f"{task}_*train.txt"))
    if not files:
        raise UserError(f"no {task}_*train.txt of bAbI in the folder {folder}.")
    return min(files, key=preference)


@functools.lru_cache
def read_babi(folder: Path, task: str) -> list[Story]:
    """bAbI's own stories: each question with all facts of its story so far, in the file's order."""
    path = find_babi(folder, task)
    form = "NUMBER FACT, or NUMBER QUESTION, TAB, ANSWER, TAB, NUMBERS"
    stories: list[Story] = []
    facts: list[str] = []
    expected = 1
    for i, line in enumerate(read_text(path, "--babi").splitlines(), 1):
        match = BABI_LINE.fullmatch(line)
        number, text, target = match.groups() if match else ("", "", None)
        if number == "1":  # a new story begins
            facts, expected = [], 1
        if number != str(expected) or (target and not facts):
            raise UserError(f"{path}, line {i}: not bAbI's {form}.")
        expected += 1
        if target:
            stories.append(Story(list(facts), text, target.strip()))
        else:
            facts.append(" ".join(text.split()))
    return stories


def choose_published(folder: Path, task: str, index: int, length: int, most: int) -> Story:
    """Story number `index` of the published ones with at most `most` facts. They are shuffled, for
    up to five questions in a row are about one story."""
    stories = [story for story in shuffled(read_babi(folder, task)) if len(story.facts) <= most]
    if index >= len(stories):
        raise UserError(
            f"babilong_{task}: {folder} has {len(stories)} questions after at most {max(most, 0)} "
            f"facts, the room in --lengths {length}: lower --samples."
        )
    return stories[index]


# ---- prompts: the published words, and facts among background ------------------------------------

BABILONG_TEMPLATE = WORDS["template"]
# What hides the facts if the user gives no text: it names no person, object or place of a story.
BACKGROUND = WORDS["background"]


def original_prompt(task: str, context: str, question: str, shots: int = 3) -> str:
    """BABILong's own prompt, with all of the task's examples."""
    words = WORDS[task]["original"]
    form = "<example>\n{facts} {question}\nAnswer: {answer}\n</example>"
    examples = [form.format(**example) for example in WORDS[task]["examples"][:shots]]
    prompt = BABILONG_TEMPLATE.format(
        instruction=words["instruction"],
        examples=words["between_examples"].join(examples) + words.get("after_examples", ""),
        post_prompt=words["post_prompt"],
        context=context.strip(),
        question=question,
    )
    return prompt.strip()


def harness_prompt(task: str, context: str, question: str, shots: int = 2) -> str:
    """lm-evaluation-harness's prompt: nearly the same words, in other places."""
    words = WORDS[task]["original"] | WORDS[task].get("harness", {})
    parts = [f"{words['instruction']}\n{words['post_prompt']}"]
    form = "{facts}\n{question} {answer}"
    parts += [form.format(**example) for example in WORDS[task]["examples"][:shots]]
    parts.append(f"{context.strip()}\n{question.strip()}")
    return "\n\n".join(parts)


# protocol -> how a prompt is made, and how many tokens a model may answer with
BABILONG_PROTOCOLS = {"original": (original_prompt, 20), "harness": (harness_prompt, 16)}


@functools.lru_cache
def background_of(text: str) -> list[list[str]]:
    """The words of each sentence that has at least ten; where none has, as in verse, of several
    together. (The original cuts with an untrained Punkt model, and counts tokens.)"""
    sentences = [words_of(sentence) for sentence in sentences_of(words_of(text + " "))]
    together: list[list[str]] = [[]]
    for words in sentences:
        together[-1] = together[-1] + words
        if len(together[-1]) >= 10:
            together.append([])
    if len(together) == 1:
        raise UserError("the text of --haystack has not ten words: no sentence to hide facts in.")
    return [words for words in sentences if len(words) >= 10] or together[:-1]


def stretch(sentences: list[list[str]], start: int, size: int) -> list[list[str]]:
    """`size` words of sentences from number `start` on, round and round; the last one is cut."""
    taken: list[list[str]] = []
    while size > 0:
        words = sentences[(start + len(taken)) % len(sentences)][:size]
        taken.append(words)
        size -= len(words)
    return taken


def hide(facts: list[str], spots: list[float], background: list[list[str]]) -> str:
    """The facts, in order, between the sentences of the background, as one text.

    Spots, one for each fact, lie in [0, 1): relative to the background, so that a larger one is the
    same draw. Two facts may have one place.
    """
    pieces = ["".join(words) for words in background]
    # It goes from the end, so that an insertion does not move the places that are still to come.
    for fact, spot in zip(reversed(facts), sorted(spots, reverse=True)):
        pieces.insert(int(spot * (len(background) + 1)), f" {fact} ")
    return " ".join("".join(pieces).split())


def babilong(task: str, rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Draft of one of BABILong's tasks. Its size is a number of words of background.

    Like the original, stories keep to 8 tokens for each fact of what the prompt's own words leave,
    which are some 300 tokens.
    """
    most = (length - 300) // 8
    if style.babi is None:
        story = make_story(task, rng, most)
    else:
        story = choose_published(style.babi, task, index, length, most)
    sentences = background_of(BACKGROUND if style.haystack is None else style.haystack)
    start = rng.randrange(len(sentences))
    spots = [rng.random() for _ in story.facts]
    prompt, tokens = BABILONG_PROTOCOLS[style.protocol]

    def render(size: int) -> tuple[str, None]:
        context = hide(story.facts, spots, stretch(sentences, start, size))
        return prompt(task, context, story.question), None

    return Draft(render, 0, tokens, (story.target,), asked=story.question)


# name of a task -> its generator
BABILONG = {f"babilong_{task}": functools.partial(babilong, task) for task in QUESTIONS}
