"""
test_documents.py: RULER's question answering: which documents stand in a prompt, and whose
questions are asked. That the wording is the published one, test_golden.py shows.
"""

import itertools
import json
import re
import shutil

import pytest
from commands import questions, refusal
from toys import command

import eval_niah
from full_scale.documents import read_qa, squad
from full_scale.drafts import Style
from full_scale.prompts import Question, make_question
from model import UserError

STYLE = Style(lambda text, prefix: list((text + prefix).encode()), qa=questions())


def ask(task: str, index: int, length: int) -> Question:
    return make_question(task, index, length, 0, STYLE)


def houses(question: Question) -> list[str]:
    """The documents of a prompt: "12.3" for "House 12.3 is small. ..."."""
    documents = re.findall(r"Document (\d+):\n(?:House|Town) (\d+\.\d)", question.text)
    assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
    return [name for _, name in documents]


def test_the_paragraph_that_answers_is_there_and_its_article_comes_first():
    """SQuAD: however short the prompt, the question's own paragraph; then the other three of its
    article; then others. A longer prompt has the documents of a shorter one."""
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


def test_all_paragraphs_of_hotpotqa_are_there():
    """Its questions need two of them, and the others mislead."""
    for length in (700, 3000):
        names = houses(ask("ruler_qa_2", 5, length))
        assert {"5.0", "5.1", "5.2"} <= set(names)
        assert len(set(names)) == len(names)


def test_documents_are_mixed():
    """The answer is not always in the first one."""
    places = [
        houses(ask("ruler_qa_1", i, 700 + 97 * i)).index(f"{i // 3}.{i % 3}") for i in range(9)
    ]
    assert len(set(places)) > 2


def test_questions_without_an_answer_are_not_asked():
    """SQuAD 2.0 has many; here each fourth one."""
    path = questions() / "squad.json"
    asked, documents = read_qa(path, "ruler_qa_1")
    assert (len(asked), len(documents)) == (120, 160)
    assert len(list(squad(json.loads(path.read_text())))) == 120
    assert asked[0].answers == ("Ann00", "Miss Ann00")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has 120 questions: lower --samples\.$"):
        ask("ruler_qa_1", 120, 1000)
    with pytest.raises(UserError, match=r"^ruler_qa_2: needs --qa DIR[^\n]*hotpotqa.json"):
        make_question("ruler_qa_2", 0, 1000, 0, STYLE._replace(qa=None))
    for text in ("{}", "[1]", "no JSON"):
        (tmp_path / "squad.json").write_text(text)
        with pytest.raises(UserError, match=r"^--qa: [^\n]*squad.json is not the published file"):
            make_question("ruler_qa_1", 0, 1000, 0, STYLE._replace(qa=tmp_path))
        read_qa.cache_clear()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tasks ruler_qa_1 --lengths 1000", "ruler_qa_1: needs --qa DIR"),
        ("--tasks ruler_qa_2 --lengths 1000 --qa {}", "is a folder without hotpotqa.json"),
        ("--tasks ruler_vt --qa {}", "--qa is read by ruler_qa_1 and ruler_qa_2 alone"),
    ],
)
def test_a_command_that_cannot_be_run_is_one_line(tmp_path, capsys, flags, named):
    assert named in refusal(eval_niah.main, command(tmp_path / "out", flags), capsys)


def test_another_file_is_another_evaluation(tmp_path, capsys):
    """Answers to questions of one file are not taken for those of another."""
    folder = shutil.copytree(questions(), tmp_path / "qa")
    flags = f"--tasks ruler_qa_1 --lengths 1000 --samples 1 --steps 1 --qa {folder}"
    eval_niah.main(command(tmp_path / "out", flags))
    text = (folder / "squad.json").read_text()
    (folder / "squad.json").write_text(text.replace("lives", "dwells"))
    assert "with qa " in refusal(eval_niah.main, command(tmp_path / "out", flags), capsys)
