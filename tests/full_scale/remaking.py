"""
remaking.py: takes a prompt of RULER apart, and puts it together again with our functions.

What was drawn at random is read from the prompt. What the published code fixes (orders, words,
frequencies, line ends) is ours: a recorded prompt that comes out equal shows that all of it is the
same (test_golden.py), and one of ours that does, that we keep to it (test_prompts.py).
"""

import itertools
import re
from collections import Counter

from full_scale import ruler
from full_scale.documents import DOCUMENTS, documents_text
from full_scale.drafts import shuffled

NEEDLE = r"One of the special magic (\w+) for (.+?) is: (\S+)\."
SHAPES = {
    "words": r"[^\W\d][\w' -]*-[^\W\d][\w' -]*",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


def ruler_task(key: str) -> str:
    """cwe, ruler_cwe and cwe_4096 -> ruler_cwe; niah_multivalue_noise -> niah_multivalue."""
    names = {name.removeprefix("ruler_"): name for name in (*ruler.RULER, *DOCUMENTS)}
    match = re.fullmatch(rf"(?:ruler_)?({'|'.join(names)})(?:_noise|_essay|_\d{{3,}})?", key)
    assert match, f"{key} is none of {', '.join(names)}"
    return names[match[1]]


def unshuffled(items: list) -> list:
    """What `shuffled` was given to return these items."""
    original = [None] * len(items)
    for item, index in zip(items, shuffled(range(len(items)))):
        original[index] = item
    return original


def hidden_in(needles: list[str], spec: ruler.Needles) -> dict[str, list[str]]:
    """Sentences in the order of placing -> {key: values} in the order of drawing."""
    hidden = {}
    for needle in unshuffled(needles):
        _, key, value = re.fullmatch(NEEDLE, needle).groups()
        assert re.fullmatch(SHAPES[spec.key], key)
        assert re.fullmatch(SHAPES[spec.value], value)
        hidden.setdefault(key, []).append(value)
    assert [len(values) for values in hidden.values()] == [spec.values] * spec.keys
    return hidden


def remake_lines(context: str, spec: ruler.Needles, queries: list[str]) -> tuple[str, dict]:
    """Hay of noise, or of needles that nobody asks for. The order of placing is from the end."""
    hay, needles, places = [], [], []
    for line in context.split("\n"):
        match = re.fullmatch(NEEDLE, line)
        if match and (spec.hay != "needle" or match[2] in queries):
            needles.append(line)
            places.append(len(hay))
        else:
            assert match if spec.hay == "needle" else line == ruler.GRASS
            hay.append(line)
    hidden = hidden_in(needles[::-1], spec)
    again = ruler.needle_sentences(hidden, spec.value)
    return "\n".join(ruler.place_lines(hay, again, places[::-1])), hidden


def remake_essay(context: str, spec: ruler.Needles) -> tuple[str, dict]:
    """Between two needles nobody sees where the published code ended its sentences, so that each
    stretch between two needles counts as one sentence."""
    needles = [match[0] for match in re.finditer(NEEDLE, context)]
    stretches = re.split(" (?:" + "|".join(map(re.escape, needles)) + ") ", context)
    hidden = hidden_in(needles, spec)
    places = list(range(1, len(needles) + 1))
    again = ruler.needle_sentences(hidden, spec.value)
    return ruler.place_sentences(stretches, again, places), hidden


def remake_needles(task: str, text: str, outputs: list, protocol: str, length: int) -> tuple:
    spec = ruler.NIAH[task]
    context, question = text.split("\n", 1)[1].rsplit("\n", 1)
    asked = re.search(r"the special magic \w+ for (.*) mentioned", question)[1]
    queries = re.split(", and |, ", asked)
    if spec.hay == "essay" and ruler.GRASS not in context:
        context, hidden = remake_essay(context, spec)
    else:
        context, hidden = remake_lines(context, spec, queries)
    assert len(queries) == spec.asked
    assert [value for key in queries for value in hidden[key]] == outputs
    return ruler.niah_prompt(spec.value, queries, len(outputs) == 1, context)


def remake_tracking(task: str, text: str, outputs: list, protocol: str, length: int) -> tuple:
    """An example with names of three letters, then the question with names of five."""
    _, *sections = text.split("Memorize and track")
    prompts, names = [], []
    for section in sections:
        chain = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", section)
        gaps = re.split(r"VAR [A-Z]+ =", section)[:-1]  # the lines between statements
        places = list(itertools.accumulate(gap.count(ruler.GRASS) for gap in gaps))
        assert len(set(places)) == 5
        names.append([name for name, _ in chain])
        size, value = section.count(ruler.GRASS), int(chain[0][1])
        prompts.append(ruler.tracking_prompt(names[-1], value, places, size, protocol))
    assert [{len(name) for name in group} for group in names] == [{3}, {5}]
    assert names[1] == outputs
    question, prefix = prompts[1]
    return ruler.tracking_example(*prompts[0], names[0], protocol) + question, prefix


def listed_in(text: str) -> list[str]:
    """1. river 2. lamp -> river, lamp"""
    return re.split(r"(?:^| )\d+\. ", text)[1:]


def check_list(listed: list, common: list, different: int, counts: tuple, protocol: str) -> None:
    """All words have their frequencies. Before it was shuffled, the original's list began with the
    ten common ones, in the order of the answer; how the harness shuffles is not recorded."""
    drawn = unshuffled(listed) if protocol == "original" else listed
    words = list(dict.fromkeys([*common, *drawn]))
    assert (len(common), len(words)) == (10, different)
    again = ruler.repeated(words, counts)
    assert Counter(listed) == Counter(again)
    assert protocol == "harness" or shuffled(again) == listed


def remake_common_example(text: str, length: int, protocol: str) -> str:
    """The worked example of the list task."""
    setting = ruler.list_counts(length)
    listed = listed_in(text.split("\n")[1])
    common = listed_in(" " + text.rpartition(":")[2].strip())
    check_list(listed, common, setting.example_words, setting.example_counts, protocol)
    return ruler.common_example(listed, common)


def remake_common(task: str, text: str, outputs: list, protocol: str, length: int) -> tuple:
    """The original has an example before the question, the harness has none."""
    _, *examples, question = re.split("(?=Below is a numbered list)", text)
    listed = listed_in(question.split("\n")[1])
    counts = ruler.list_counts(length).counts
    check_list(listed, outputs, len(set(listed)), counts, protocol)
    assert len(examples) == {"original": 1, "harness": 0}[protocol]
    start = "".join(remake_common_example(example, length, protocol) for example in examples)
    form, prefix = ruler.CWE_PROMPT
    return start + form.format(context=ruler.numbered(listed)), prefix


def remake_coded(task: str, text: str, outputs: list, protocol: str, length: int) -> tuple:
    """Zipf's law over a vocabulary that grows with the length. Which number of words yields the
    recorded frequencies is found by trying."""
    context = text.split("coded words. ", 1)[1].rsplit("\nQuestion:", 1)[0]
    vocabulary = list(dict.fromkeys(unshuffled(context.split(" "))))
    assert (vocabulary[0], vocabulary[1:4]) == ("...", outputs)
    assert all(re.fullmatch("[a-z]{6}", word) for word in vocabulary[1:])
    vocabulary += ["too rare"] * (max(6, length // 50) - len(vocabulary))
    dots = context.split(" ").count("...")
    made = (ruler.coded_text(vocabulary, total) for total in range(dots, 2 * dots))
    form, prefix = ruler.FWE_PROMPT
    return form.format(context=next(again for again in made if again == context)), prefix


def remake_documents(task: str, text: str, outputs: list, protocol: str, length: int) -> tuple:
    """The documents, numbered, in an order that the recorded seed undoes; and the question."""
    head, question = text.rsplit("\n\nQuestion: ", 1)
    context = head.split("given documents.\n\n", 1)[1].rsplit("\n\nAnswer the question", 1)[0]
    documents = re.split(r"(?:^|\n\n)Document \d+:\n", context)[1:]
    assert any(answer in document for answer in outputs for document in documents)
    return documents_text(question, documents), ruler.WORDS["ruler_qa"][1]


# task -> function of (task, text, answers, protocol, length): the text again, and the prefix
REMAKE = dict.fromkeys(ruler.NIAH, remake_needles)
REMAKE |= dict.fromkeys(DOCUMENTS, remake_documents)
REMAKE |= {"ruler_vt": remake_tracking, "ruler_cwe": remake_common, "ruler_fwe": remake_coded}
