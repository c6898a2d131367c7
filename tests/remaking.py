"""
remaking.py: how a recorded prompt of RULER is taken apart, and put together again by the functions that make ours. What is
drawn at random stands in the prompt; what the published code fixes (orders, frequencies, line ends) is ours, and compared.
Used by test_golden.py.
"""

import itertools
import re
from collections import Counter

import data

NEEDLE = r"One of the special magic (\w+) for (.+?) is: (\S+)\."
SHAPES = {"words": r"[^\W\d][\w' -]*-[^\W\d][\w' -]*", "numbers": r"[1-9]\d{6}"}
SHAPES["uuids"] = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def ruler_task(key: str) -> str:
    """cwe, ruler_cwe and cwe_4096 -> ruler_cwe; niah_multivalue_noise -> niah_multivalue; a task that is not ours fails."""
    names = {name.removeprefix("ruler_"): name for name in data.RULER}
    match = re.fullmatch(rf"(?:ruler_)?({'|'.join(names)})(?:_noise|_essay|_\d{{3,}})?", key)
    assert match, f"{key} is none of {', '.join(data.RULER)}"
    return names[match[1]]


def unshuffled(items: list) -> list:
    """What data.shuffled was given."""
    return [item for _, item in sorted(zip(data.shuffled(range(len(items))), items))]


# ---- needles in a haystack -----------------------------------------------------------------------------------------------


def hidden_in(needles: list[str], spec: data.Needles) -> dict[str, list[str]]:
    """Sentences in the order of placing -> {key: values} in the order of drawing."""
    hidden = {}
    for needle in unshuffled(needles):
        kind, key, value = re.fullmatch(NEEDLE, needle).groups()
        assert kind == spec.value
        assert re.fullmatch(SHAPES[spec.key], key)
        assert re.fullmatch(SHAPES[spec.value], value)
        hidden.setdefault(key, []).append(value)
    assert [len(values) for values in hidden.values()] == [spec.values] * spec.keys
    return hidden


def remake_lines(context: str, spec: data.Needles, queries: list[str]) -> tuple[str, dict]:
    """Lines of noise, or needles that nobody asks for. The order of placing is from the end."""
    lines = context.split("\n")
    keys = [match and match[2] for match in (re.fullmatch(NEEDLE, line) for line in lines)]
    here = [i for i, key in enumerate(keys) if key and (spec.hay != "needle" or key in queries)]
    hay = [line for i, line in enumerate(lines) if i not in here]
    assert all(re.fullmatch(NEEDLE, line) if spec.hay == "needle" else line == data.GRASS for line in hay)
    hidden = hidden_in([lines[i] for i in here[::-1]], spec)
    places = [i - before for before, i in enumerate(here)]
    return "\n".join(data.place_lines(hay, data.needle_sentences(hidden, spec.value), places[::-1])), hidden


def remake_essay(context: str, spec: data.Needles, queries: list[str]) -> tuple[str, dict]:
    """Where the published code ended a sentence cannot be seen between needles: each stretch counts as one sentence."""
    needles = [match[0] for match in re.finditer(NEEDLE, context)]
    stretches = re.split(" (?:" + "|".join(map(re.escape, needles)) + ") ", context)
    hidden = hidden_in(needles, spec)
    places = list(range(1, len(needles) + 1))
    return data.place_sentences(stretches, data.needle_sentences(hidden, spec.value), places), hidden


def remake_needles(task: str, text: str, outputs: list[str], protocol: str, length: int) -> list[str]:
    spec, (context, question) = data.NIAH[task], text.split("\n", 1)[1].rsplit("\n", 1)
    queries = re.split(", and |, ", re.search(r"the special magic \w+ for (.*) mentioned", question)[1])
    essay = spec.hay == "essay" and data.GRASS not in context
    context, hidden = (remake_essay if essay else remake_lines)(context, spec, queries)
    assert len(queries) == spec.asked
    assert [value for key in queries for value in hidden[key]] == outputs
    return data.niah_prompt(spec.value, queries, len(outputs) == 1, context)


# ---- a chain of variables, and words that are frequent -------------------------------------------------------------------


def remake_tracking(task: str, text: str, outputs: list[str], protocol: str, length: int) -> tuple[str, str]:
    """An example with names of three letters, then the question with names of five. Statements stand between lines."""
    before, *sections = text.split("Memorize and track")
    prompts, names = [], []
    for section in sections:
        chain, gaps = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", section), re.split(r"VAR [A-Z]+ =", section)[:-1]
        names.append([name for name, _ in chain])
        places = list(itertools.accumulate(gap.count(data.GRASS) for gap in gaps))
        assert len(set(places)) == 5
        prompts.append(data.tracking_prompt(names[-1], chain[0][1], places, section.count(data.GRASS), protocol))
    assert (before, [{len(name) for name in group} for group in names]) == ("", [{3}, {5}])
    assert names[1] == outputs
    return data.tracking_example(*prompts[0], names[0], protocol) + prompts[1][0], prompts[1][1]


def listed_in(text: str) -> list[str]:
    """1. river 2. lamp -> river, lamp"""
    return re.split(r"(?:^| )\d+\. ", text)[1:]


def check_list(listed: list[str], common: list[str], different: int, counts: tuple[int, int], protocol: str) -> None:
    """The ten common words and the others have their frequencies. What the original's seed shuffles begins with the common
    ones, in the order of the answer; the harness's shuffle is not recorded."""
    drawn = unshuffled(listed) if protocol == "original" else listed
    words = list(dict.fromkeys([*common, *drawn]))
    assert (len(common), len(words)) == (10, different)
    assert Counter(listed) == Counter(data.repeated(words, counts))
    assert protocol == "harness" or data.shuffled(data.repeated(words, counts)) == listed


def remake_common_example(text: str, length: int, protocol: str) -> str:
    """The worked example of the list task."""
    _, different, counts = data.CWE_COUNTS[4096 if length >= 4096 else 0]
    listed, common = listed_in(text.split("\n")[1]), listed_in(" " + text.rpartition(":")[2].strip())
    check_list(listed, common, different, counts, protocol)
    return data.common_example(listed, common)


def remake_common(task: str, text: str, outputs: list[str], protocol: str, length: int) -> tuple[str, str]:
    """The original has an example before the question, the harness has none."""
    before, *examples, question = re.split("(?=Below is a numbered list)", text)
    listed = listed_in(question.split("\n")[1])
    counts = data.CWE_COUNTS[4096 if length >= 4096 else 0][0]
    check_list(listed, outputs, len(set(listed)), counts, protocol)
    assert (before, len(examples)) == ("", {"original": 1, "harness": 0}[protocol])
    start = "".join(remake_common_example(example, length, protocol) for example in examples)
    return start + data.CWE_PROMPT[0].format(context=data.numbered(listed)), data.CWE_PROMPT[1]


def remake_coded(task: str, text: str, outputs: list[str], protocol: str, length: int) -> tuple[str, str]:
    """Zipf's law over a vocabulary that grows with the length, for a number of words that yields these frequencies."""
    context = text.split("coded words. ", 1)[1].rsplit("\nQuestion:", 1)[0]
    vocabulary = list(dict.fromkeys(unshuffled(context.split(" "))))
    assert (vocabulary[0], vocabulary[1:4]) == ("...", outputs)
    assert all(re.fullmatch("[a-z]{6}", word) for word in vocabulary[1:])
    vocabulary += ["too rare"] * (max(6, length // 50) - len(vocabulary))
    dots = context.split(" ").count("...")
    remade = next(made for total in range(dots, 2 * dots) if (made := data.coded_text(vocabulary, total)) == context)
    return data.FWE_PROMPT[0].format(context=remade), data.FWE_PROMPT[1]


# task, text, answers, protocol, longest length -> the text again, and the prefix of the answer
REMAKE = dict.fromkeys(data.NIAH, remake_needles)
REMAKE |= {"ruler_vt": remake_tracking, "ruler_cwe": remake_common, "ruler_fwe": remake_coded}
