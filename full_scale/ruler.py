"""
ruler.py: prompts of RULER (Hsieh et al. 2024, arXiv 2404.06654), eleven of its thirteen tasks.

  task       what is hidden, and in what                     what is asked for
  niah_...   needles among noise, an essay or other needles  their values (NIAH lists eight tasks)
  ruler_vt   a chain of variables in lines of noise          the variables that have its value
  ruler_cwe  a list of words, ten of them common             the ten common words
  ruler_fwe  a text of coded words                           the three most frequent ones

The words of the prompts are in ruler.json: those of NVIDIA's repository. Where `style.protocol` is
"harness", lm-evaluation-harness 0.4.9.2 is followed, its slips included. Its two tasks of question
answering are in documents.py. drafts.py explains Draft, Style, size and prefix.

Glossary
  name here  | meaning
  needle     | one sentence that says the value of a key: NEEDLE
  hay        | the lines or sentences that needles are put between
  place      | the number of the line or sentence that a needle goes before
"""

import functools
import itertools
import math
import random
import string
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from full_scale.drafts import Draft, Style, sentences_of, shuffled, words_of
from lab.tools import read_json
from model import UserError

WORDS = read_json(Path(__file__).with_name("ruler.json"))
GRASS, NEEDLE = WORDS["noise"], WORDS["needle"]
# Each prompt is a text and the prefix of its answer.
NIAH_PROMPT, NIAH_SINGLE_VALUE = WORDS["niah"], WORDS["niah_single_value"]
VT_PROMPT, CWE_PROMPT, FWE_PROMPT = WORDS["ruler_vt"], WORDS["ruler_cwe"], WORDS["ruler_fwe"]


def lead_in(prefix: str, protocol: str, between: str = " ") -> str:
    """The prefix as it follows the text: the harness strips it and puts `between` before it."""
    return between + prefix.strip() if protocol == "harness" else prefix


# ---- random keys, values and words ---------------------------------------------------------------


def draw_distinct(count: int, draw: Callable, *arguments) -> list:
    """Calls `draw` until there are `count` different results. (The original may repeat a key.)"""
    found: dict = {}  # a set that keeps the order
    while len(found) < count:
        found[draw(*arguments)] = None
    return list(found)


@functools.lru_cache
def english(*categories: str) -> tuple[str, ...]:
    """All words of the package wonderwords in these categories, in alphabetical order."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise UserError("RULER's prompts need English words: pip install wonderwords.") from None
    return tuple(sorted(set(RandomWord().filter(include_categories=categories))))


@functools.lru_cache
def dictionary() -> tuple[str, ...]:
    """The 234,000 words of a whole dictionary (Webster's Second), in alphabetical order."""
    try:
        from english_words import get_english_words_set
    except ImportError:
        advice = "pip install english-words"
        raise UserError(f"ruler_cwe needs a dictionary at this length: {advice}.") from None
    return tuple(sorted(get_english_words_set(["web2"], alpha=True, lower=True)))


def draw_words(rng: random.Random) -> str:
    """An adjective and a noun: "quiet-lamp"."""
    adjective = rng.choice(english("adjective"))
    return f"{adjective}-{rng.choice(english('noun'))}"


def draw_number(rng: random.Random) -> str:
    """A number of seven digits."""
    return str(rng.randint(10**6, 10**7 - 1))


def draw_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_letters(rng: random.Random, alphabet: str, count: int) -> str:
    return "".join(rng.choices(alphabet, k=count))


# The names are NVIDIA's own; they also stand in the prompts: "special magic numbers".
KINDS = {"words": draw_words, "numbers": draw_number, "uuids": draw_uuid}

# ---- needles in a haystack -----------------------------------------------------------------------


class Needles(NamedTuple):
    """What sets RULER's eight needle tasks apart, in the order of NVIDIA's own settings."""

    hay: str  # "noise", "essay" or "needle": needles with other keys
    key: str  # kind of the keys: a name in KINDS
    value: str  # kind of the values
    keys: int  # number of keys that are hidden
    values: int  # number of values of each key
    asked: int  # number of keys whose values are asked for


NIAH = {
    "niah_single_1": Needles("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": Needles("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": Needles("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": Needles("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": Needles("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": Needles("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": Needles("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": Needles("essay", "words", "numbers", 4, 1, 4),
}
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of an essay: 0, 3, 5, ... 100


def needle_sentences(hidden: dict[str, list[str]], kind: str) -> list[str]:
    """A sentence for each value of each key, in the order in which they are given their places."""
    needles = []  # The kind keeps its plural even where there is only one.
    for key, values in hidden.items():
        needles += [NEEDLE.format(kind=kind, key=key, value=value) for value in values]
    return shuffled(needles)


def niah_prompt(kind: str, queries: list[str], single: bool, context: str) -> tuple[str, str]:
    """Text and prefix of a question for these keys. `single`: there is one value in all."""
    text, prefix = NIAH_PROMPT
    if single:
        text, prefix = NIAH_SINGLE_VALUE
        kind = kind.removesuffix("s")
    query = queries[0]
    if len(queries) > 1:
        query = ", ".join(queries[:-1]) + ", and " + queries[-1]
    text = text.format(kind=kind, query=query, context=context)
    return text, prefix.format(kind=kind, query=query)


def needle_hay(task: Needles, keys: list[str], seed: int, size: int) -> list[str]:
    """`size` needles with other keys than `keys`; a larger haystack begins with the smaller one."""
    rng = random.Random(seed)
    lines: list[str] = []
    while len(lines) < size:
        key = KINDS[task.key](rng)
        if key not in keys:
            value = KINDS[task.value](rng)
            lines.append(NEEDLE.format(kind=task.value, key=key, value=value))
    return lines


def essay_hay(words: list[str], size: int) -> list[str]:
    """The first `size` words of the user's text (read again from its beginning where it is too
    short), cut into sentences. The original cuts with nltk, which knows that "Dr." ends none."""
    taken = itertools.islice(itertools.cycle(words), size)
    return sentences_of(list(taken), quotes=r"\"')\]”’")


def place_lines(lines: list[str], needles: list[str], places: list[int]) -> list[str]:
    """Puts each needle before the line that its place names: the last line stays the last."""
    lines = list(lines)
    # It goes from the end, so that an insertion does not move the places that are still to come.
    for place, needle in sorted(zip(places, needles), reverse=True):
        lines.insert(place, needle)
    return lines


def place_sentences(sentences: list[str], needles: list[str], places: list[int]) -> str:
    """Puts needles at ascending places, with spaces around them. Where no sentence stands before,
    between or after them, a space too many is left, as in the published prompts."""
    pieces = []
    start = 0
    for needle, place in zip(needles, places):
        pieces += ["".join(sentences[start:place]).removesuffix(" "), needle]
        start = place
    pieces.append("".join(sentences[start:]).removesuffix(" "))
    return " ".join(pieces)


def among_lines(lines: list[str], needles: list[str], seed: int) -> str:
    """Needles at random lines; the first of them nearest to the end, as in the original."""
    places = random.Random(seed).sample(range(len(lines)), len(needles))
    return "\n".join(place_lines(lines, needles, sorted(places, reverse=True)))


def among_sentences(sentences: list[str], needles: list[str], seed: int) -> str:
    """Needles at random depths of an essay; the first of them nearest to the beginning."""
    depths = sorted(random.Random(seed).sample(DEPTHS, len(needles)))
    places = [int(len(sentences) * (depth / 100)) for depth in depths]
    return place_sentences(sentences, needles, places)


def find_needles(task: Needles, rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Draft of a needle task. Its size is a number of lines, or of words of the user's text
    (`style.haystack`). Where there is no such text, noise takes the place of the essay."""
    keys = draw_distinct(task.keys, KINDS[task.key], rng)
    values = draw_distinct(task.keys * task.values, KINDS[task.value], rng)
    hidden = {}
    for i, key in enumerate(keys):
        hidden[key] = values[i * task.values : (i + 1) * task.values]
    queries = rng.sample(keys, task.asked)
    references = tuple(value for key in queries for value in hidden[key])
    single = len(references) == 1
    needles = needle_sentences(hidden, task.value)
    asked_needle = next(needle for needle in needles if references[0] in needle)
    place_seed, hay_seed = rng.getrandbits(64), rng.getrandbits(64)
    essay = task.hay == "essay" and style.haystack is not None
    words = words_of(style.haystack + " ") if essay else []
    if essay and not words:
        raise UserError("the text to hide needles in (--haystack) has no word in it.")

    def render(size: int) -> tuple[str, float | None]:
        if essay:
            context = among_sentences(essay_hay(words, size), needles, place_seed)
        elif task.hay == "needle":
            context = among_lines(needle_hay(task, keys, hay_seed, size), needles, place_seed)
        else:
            context = among_lines([GRASS] * size, needles, place_seed)
        depth = context.index(asked_needle) / (len(context) - len(asked_needle))
        text, _ = niah_prompt(task.value, queries, single, context)
        return text, depth if single else None

    _, prefix = niah_prompt(task.value, queries, single, "")
    return Draft(render, len(needles), 128, references, lead_in(prefix, style.protocol))


# ---- ruler_vt: a chain of variables --------------------------------------------------------------


def tracking_prompt(
    names: list[str], value: int, places: list[int], size: int, protocol: str
) -> tuple[str, str]:
    """Text and prefix. The first variable has the value, each later one that of the one before."""
    chain = [f"VAR {names[0]} = {value}"]
    for older, newer in itertools.pairwise(names):
        chain.append(f"VAR {newer} = VAR {older} ")
    text, prefix = VT_PROMPT
    line, joint = GRASS, "\n"
    if protocol == "harness":
        line, joint = GRASS + "\n", " "
        prefix = prefix.replace("assigned", "assgined")
    context = joint.join(place_lines([line] * size, chain, places))
    text = text.format(context=context, value=value)
    return text, prefix.format(count=len(names), value=value)


def tracking_example(text: str, prefix: str, names: list[str], protocol: str) -> str:
    """The worked example before the question: a prompt with its answer."""
    gap = "\n\n\n\n" if protocol == "harness" else "\n\n"
    return " ".join([text + prefix, *names]) + gap


def track_variables(rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Draft of ruler_vt. Its size is a number of lines.

    Before the question stands a worked example: 5 lines, and 5 more as long as it fits into 500
    tokens. Its names and its value belong to this question alone; its places are always the same.
    """
    shown = draw_distinct(5, draw_letters, rng, string.ascii_uppercase, 3)
    names = draw_distinct(5, draw_letters, rng, string.ascii_uppercase, 5)
    shown_value, value = draw_distinct(2, rng.randint, 10000, 99998)
    seed = rng.getrandbits(64)

    def prompt(names: list[str], value: int, seed: int, size: int) -> tuple[str, str]:
        places = sorted(random.Random(seed).sample(range(size), 5))
        return tracking_prompt(names, value, places, size, style.protocol)

    example_size = 5
    while len(style.encode(*prompt(shown, shown_value, 42, example_size + 5))) + 30 <= 500:
        example_size += 5
    example = tracking_example(*prompt(shown, shown_value, 42, example_size), shown, style.protocol)

    def render(size: int) -> tuple[str, None]:
        text, _ = prompt(names, value, seed, size)
        return example + text, None

    _, prefix = prompt(names, value, seed, 5)
    return Draft(render, 5, 30, tuple(names), lead_in(prefix, style.protocol))


# ---- ruler_cwe and ruler_fwe: words that are frequent --------------------------------------------


class ListCounts(NamedTuple):
    """How often each word stands in a list: (each of the ten common ones, each of the others)."""

    counts: tuple[int, int]
    example_words: int  # how many different words the worked example has
    example_counts: tuple[int, int]


# The least length, in tokens, from which each setting holds.
CWE_COUNTS = {0: ListCounts((6, 1), 20, (3, 1)), 4096: ListCounts((30, 3), 40, (10, 3))}


def list_counts(length: int) -> ListCounts:
    return CWE_COUNTS[4096 if length >= 4096 else 0]


def repeated(words: list[str], counts: tuple[int, int]) -> list[str]:
    """Each word as often as the list has it. The first ten words are the common ones."""
    common, other = counts
    return words[:10] * common + words[10:] * other


def numbered(words: Iterable[str]) -> str:
    """["river", "lamp"] -> "1. river 2. lamp"."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def common_example(listed: list[str], common: list[str]) -> str:
    """The worked example before the question: a prompt with its answer."""
    text, prefix = CWE_PROMPT
    return f"{text.format(context=numbered(listed))}{prefix} {numbered(common)}\n"


def find_common(rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Draft of ruler_cwe. Its size is a number of different words.

    The original sends a worked example and shuffles every list alike, and where its 8,000 words are
    too few it goes over to a whole dictionary. The harness sends no example, shuffles each list in
    its own way, and leaves the prompt short.
    """
    setting = list_counts(length)
    usual = english("noun", "adjective", "verb")
    shown = rng.sample(usual, setting.example_words)
    words = rng.sample(usual, len(usual))
    seed = rng.getrandbits(64)
    _, prefix = CWE_PROMPT
    if style.protocol == "harness":
        return list_draft("", words, setting, seed, lead_in(prefix, style.protocol, "\n\n"))
    example = common_example(shuffled(repeated(shown, setting.example_counts)), shown[:10])

    def larger() -> Draft:
        more = random.Random(seed).sample(dictionary(), len(dictionary()))
        return list_draft(example, more, setting, 42, prefix)

    return list_draft(example, words, setting, 42, prefix)._replace(larger=larger)


def list_draft(example: str, words: list, setting: ListCounts, seed: int, prefix: str) -> Draft:
    """Draft of a list of these words, the first ten of which are the common ones."""

    def render(size: int) -> tuple[str, None]:
        listed = shuffled(repeated(words[:size], setting.counts), seed)
        return example + CWE_PROMPT[0].format(context=numbered(listed)), None

    return Draft(render, 11, 120, tuple(words[:10]), prefix, largest=len(words))


def coded_text(vocabulary: list[str], total: int) -> str:
    """About `total` words that follow Zipf's law: a share 1 / (k^2 zeta(2)) of them is the k-th."""
    zeta_2 = math.pi**2 / 6
    words = []
    for k, word in enumerate(vocabulary, 1):
        words += [word] * int(total * k**-2.0 / zeta_2)
    return " ".join(shuffled(words))


def find_frequent(rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Draft of ruler_fwe. Its size is a number of words, the most frequent of which is "...": it is
    no answer. From 53 words on, the fourth coded word is always rarer than the third."""
    drawn = draw_distinct(max(6, length // 50), draw_letters, rng, string.ascii_lowercase, 6)
    vocabulary = ["...", *shuffled(sorted(drawn))[1:]]
    text, prefix = FWE_PROMPT

    def render(size: int) -> tuple[str, None]:
        return text.format(context=coded_text(vocabulary, size)), None

    return Draft(render, 53, 50, tuple(vocabulary[1:4]), lead_in(prefix, style.protocol))


# name of a task -> its generator
RULER = {name: functools.partial(find_needles, task) for name, task in NIAH.items()}
RULER |= {"ruler_vt": track_variables, "ruler_cwe": find_common, "ruler_fwe": find_frequent}
