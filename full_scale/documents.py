"""
documents.py: RULER's question answering: a question, the documents that answer it, and others.

  task        questions and documents   asks for
  ruler_qa_1  SQuAD 2.0                 a phrase of a paragraph; the rest of its article comes next
  ruler_qa_2  HotpotQA (distractor)     what two of a question's ten paragraphs say together

The data are not part of this project. `style.qa` is a folder with the two files of RULER's own
download script: squad.json (SQuAD's dev-v2.0.json) and hotpotqa.json (HotpotQA's
hotpot_dev_distractor_v1.json). drafts.py explains Draft and Style; size is a number of documents.
"""

import functools
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from full_scale.drafts import Draft, Style, shuffled
from full_scale.pairs import read_text
from full_scale.ruler import WORDS, lead_in
from model import UserError


class Asked(NamedTuple):
    """A question, and which documents go with it."""

    question: str
    answers: tuple[str, ...]  # any of them is right
    own: tuple[str, ...]  # documents that are always there
    near: tuple[str, ...] = ()  # those that fill the prompt before others do: of the article


def said(text: str) -> str:
    """A text of the file. Half a surrogate pair is none, nor is nothing at all: any answer would
    contain it."""
    if not text.strip().encode():
        raise ValueError("an empty text")
    return text


def squad(articles: dict) -> Iterable[Asked]:
    """The questions of SQuAD 2.0 that have an answer."""
    for article in articles["data"]:
        paragraphs = [said(paragraph["context"]) for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            near = tuple(other for other in paragraphs if other != own)
            for one in paragraph["qas"]:
                if not one["is_impossible"]:
                    answers = tuple(said(answer["text"]) for answer in one["answers"])
                    yield Asked(said(one["question"]), answers, (own,), near)


def hotpotqa(records: list) -> Iterable[Asked]:
    """HotpotQA's questions, each with its ten paragraphs."""
    for one in records:
        own = [said(f"{title}\n{''.join(sentences)}") for title, sentences in one["context"]]
        yield Asked(said(one["question"]), (said(one["answer"]),), tuple(own))


SOURCES = {"ruler_qa_1": ("squad.json", squad), "ruler_qa_2": ("hotpotqa.json", hotpotqa)}


def find_qa(folder: Path | None, task: str) -> Path:
    """The file that a task's questions are in."""
    name, _ = SOURCES[task]
    if folder is None:
        raise UserError(f"{task}: needs --qa DIR, a folder with {name}: see full_scale/README.md.")
    if not (folder / name).is_file():
        raise UserError(f"{task}: --qa {folder} is a folder without {name}.")
    return folder / name


@functools.lru_cache
def read_qa(path: Path, task: str) -> tuple[list[Asked], list[str]]:
    """All questions, in the file's order, and all documents."""
    _, questions = SOURCES[task]
    try:
        asked = list(questions(json.loads(read_text(path, "--qa"))))
        if not all(one.answers for one in asked):
            raise ValueError("a question without an answer")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--qa: {path} is not the published file ({error!r}).") from None
    return asked, sorted({document for one in asked for document in (*one.own, *one.near)})


def documents_text(question: str, documents: list[str]) -> str:
    """The prompt, up to the prefix of the answer."""
    numbered = enumerate(documents, 1)
    texts = [WORDS["document"].format(number=i, document=text) for i, text in numbered]
    return WORDS["ruler_qa"][0].format(context="\n\n".join(texts), query=question)


def answer_from_documents(task, rng: random.Random, index: int, length: int, style: Style) -> Draft:
    """Draft of a task. Its size is a number of documents, the answer's own among them; a larger
    haystack has the smaller one's documents, in another order. Once all are there, the original
    goes through them again; the harness leaves the prompt short."""
    path = find_qa(style.qa, task)
    asked, documents = read_qa(path, task)
    if index >= len(asked):
        raise UserError(f"{task}: {path} has {len(asked)} questions: lower --samples.")
    one = asked[index]
    known = {*one.own, *one.near}
    far = [document for document in documents if document not in known]
    chosen = [*one.own, *rng.sample(one.near, len(one.near)), *rng.sample(far, len(far))]

    def render(size: int) -> tuple[str, None]:
        taken = itertools.islice(itertools.chain(chosen, itertools.cycle(documents)), size)
        return documents_text(one.question, shuffled(taken)), None

    prefix = lead_in(WORDS["ruler_qa"][1], style.protocol)
    draft = Draft(render, len(one.own), 32, one.answers, prefix, one.question)
    return draft._replace(largest=len(chosen)) if style.protocol == "harness" else draft


DOCUMENTS = {task: functools.partial(answer_from_documents, task) for task in SOURCES}
