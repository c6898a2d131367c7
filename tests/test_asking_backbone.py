"""
test_asking_backbone.py: `eval_niah.py --backbone` from end to end on toys, and that its scores can be trusted: who knows the
answer gets 1 on every task, who says nothing or anything gets nothing.
"""

import contextlib
import functools
import io
import random
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbones import TOKENIZER
from running import ESSAY, contents, lines_of, only, read, toy_command

import data
import eval_niah
import sample
from eval_niah import BIAS, Row

TOY = data.load_tokenizer(TOKENIZER, plain=True)
STYLE = data.Style(lambda text, prefix: TOY.encode(text + prefix))


def answers_of(out: Path) -> list[dict]:
    return [line for line in lines_of(out) if "settings" not in line]


def settings_of(out: Path) -> dict[str, dict]:
    return {line["method"]: line["settings"] for line in lines_of(out) if "settings" in line}


def predictions(out: Path, **where) -> list[str]:
    return [answer["prediction"] for answer in only(answers_of(out), **where)]


# ---- four rows from two adapters -------------------------------------------------------------------------------------------

FOUR = "--adapter mdlm={}/mdlm/adapter {}/memdlm/adapter --memory --show --steps 2 --samples 2 --seed 3 --max-length 19 "
FOUR += "--tasks niah_single_1 babilong_qa1 --lengths 660 700 --exposure-bias --data {}/pairs.jsonl --bias-steps 3"
CELLS = [(task, length) for length in (660, 700) for task in ("niah_single_1", "babilong_qa1")]


@pytest.fixture(scope="module")
def table(toy, tmp_path_factory) -> Path:
    """What this command leaves, and what it prints (printed.txt). Nobody writes into it."""
    out, printed = tmp_path_factory.mktemp("eval") / "table", io.StringIO()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(printed):
        eval_niah.main(toy_command(toy, out, FOUR))
    (out / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return out


def test_each_row_and_cell_is_written_with_all_that_it_takes_to_quote_it(table):
    """Four rows by the paper's names: number of questions, interval, passes, seed, device and dtype stand beside each score."""
    lines = (table / "table.md").read_text(encoding="utf-8").splitlines()
    records = iter(read(table)["niah"])
    for task, length in CELLS:
        for name, (title, _, _) in eval_niah.ROWS.items():
            record = next(records)
            assert (record["method"], record["task"], record["length"], record["n"]) == (name, task, length, 2)
            low, high = {0: (0, 0.658), 0.5: (0.095, 0.905), 1: (0.342, 1)}[record["score"]]  # Wilson's, of two questions
            other = f" (harness {record['scores']['harness']:.3f})" if task == "babilong_qa1" else ""
            score = f"{record['score']:.3f} [{low:.3f}, {high:.3f}]{other}"
            assert f"| {title} | {task} | {length} | 2 | {score} | 2 | 3 | cpu | float32 |" in lines
    assert next(records, None) is None
    assert any(line.startswith("| method | niah_single_1 660 | babilong_qa1 660 | niah_single_1 700 |") for line in lines)


def test_adapters_and_memory_each_change_the_answers(table):
    """One adapter was named, the other one found by its fine-tuning's config.json; the memory comes on top of MemDLM's. That
    memory is as it was trained, and the settings say so."""
    texts = [predictions(table, method=method, task="niah_single_1") for method in eval_niah.ROWS]
    assert len(texts[0]) == 4
    assert all(one != other for i, one in enumerate(texts) for other in texts[:i])
    settings = settings_of(table)
    assert len({settings[method].get("adapter_model.safetensors") for method in eval_niah.ROWS}) == 3
    assert ["write rule" in settings[method] for method in eval_niah.ROWS] == [False, False, False, True]
    names = ("rule", "anchor_ratio", "passes", "rank", "lr")
    assert [settings["memdlm_train_inference"][f"write {name}"] for name in names] == ["paper", 0.2, 1, 32, 0.1]


def test_show_prints_the_first_prompt_of_each_cell_verbatim(table):
    """What the model reads, to the letter, before any work: how long, how much it may answer, and what is right."""
    printed = (table / "printed.txt").read_text(encoding="utf-8")
    for task, length in CELLS:
        question = data.make_question(task, 0, length, 3, STYLE)
        head = f"---- {task} {length}: {len(question.prompt)} tokens, {question.tokens} to generate, a right answer contains"
        assert f"{head} {question.references[0]}\n{question.text}\n\n" in printed
        assert TOY.decode(question.prompt) == question.text
    assert printed.count("---- ") == 4
    assert (table / "table.md").read_text(encoding="utf-8").strip() in printed
    assert "exposure bias on 2 of 4 pairs; 1 longer ones left out" in printed


def test_needles_are_counted_by_their_depth(table):
    """In five equal bins, single needles alone: the other tasks' answers lie in several places."""
    depths, answers = read(table)["depths"], answers_of(table)
    assert {answer["depth"] is None for answer in only(answers, task="babilong_qa1")} == {True}
    for method, length in [(method, length) for method in eval_niah.ROWS for length in (660, 700)]:
        bins = [int(5 * answer["depth"]) for answer in only(answers, method=method, length=length, task="niah_single_1")]
        found = only(depths, method=method, length=length)
        assert {record["depth"]: record["n"] for record in found} == {depth: bins.count(depth) for depth in bins}


def test_pictures_are_drawn_for_what_was_measured(table):
    names = {name for name, content in contents(table).items() if content.startswith(b"\x89PNG")}
    assert names == {"niah.png", "lengths.png", "depth.png", "exposure_bias.png"}


def test_exposure_bias_has_all_rows_and_a_denominator_without_memory(table):
    """R_EB of both MemDLM rows is over the static loss of the model alone; with everything masked it is 1 by definition."""
    records = read(table)["exposure_bias"]
    assert [(r["method"], round(r["mask_ratio"], 3)) for r in records] == [
        (method, ratio) for method in eval_niah.ROWS for ratio in (1, 0.667, 0.333)
    ]
    for record in records:
        plain = "memdlm_train" if record["method"] == "memdlm_train_inference" else record["method"]
        (other,) = only(records, method=plain, mask_ratio=record["mask_ratio"])
        assert record["ratio"] == pytest.approx(record["sequential"] / other["static"])
        assert record["seed"] == 3
    assert [record["ratio"] for record in only(records, mask_ratio=1)[:3]] == [1, 1, 1]
    assert len({record["static"] for record in records}) == 12, "each row has a loss of its own on the shared states"
    assert [(a["task"], a["index"]) for a in answers_of(table) if "walk" in a] == [(BIAS, i) for _ in range(4) for i in (0, 1)]


def test_one_model_is_loaded_for_two_rows_and_two_are_never_open(ask_toy, toy, monkeypatch):
    """A backbone of 8 billion weights leaves no room for another one. Then nothing is left to do, and none is loaded at all,
    also where fewer questions are wanted; a larger --samples keeps what is there and asks the rest."""
    alive, load = [], eval_niah.load_backbone

    def loading(*arguments):
        assert all(reference() is None for reference in alive), "two models at once"
        model = load(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(eval_niah, "load_backbone", loading)
    flags = "--adapter mdlm={}/mdlm/adapter memdlm={}/memdlm/adapter --memory --tasks niah_single_1 --lengths 330 --steps 1"
    out = ask_toy(f"{flags} --samples 3")
    assert len(alive) == 3
    before = (out / "predictions.jsonl").read_bytes()
    for samples in (3, 2):
        ask_toy(f"{flags} --samples {samples}")
        assert (len(alive), (out / "predictions.jsonl").read_bytes()) == (3, before)
        assert {record["n"] for record in read(out)["niah"]} == {samples}
    ask_toy(f"{flags} --samples 4")
    assert (out / "predictions.jsonl").read_bytes().startswith(before)
    assert len(alive) == 6
    ask_toy(f"{flags} --samples 4", out="at once")
    assert sorted(map(str, answers_of(out))) == sorted(map(str, answers_of(out.with_name("at once"))))
    assert read(out) == read(out.with_name("at once"))


@pytest.mark.parametrize(
    ("adapter", "last"),
    [("", "Base, memory at inference"), ("--adapter {}/mdlm/adapter", "Standard MDLM, memory at inference")],
)
def test_a_memory_for_models_that_were_not_trained_with_one(ask_toy, adapter, last):
    """Not the paper's rows, hence names of their own."""
    out = ask_toy(f"{adapter} --memory --tasks niah_single_1 --lengths 330 --steps 1 --samples 1")
    methods = [record["method"] for record in read(out)["niah"]]
    assert [eval_niah.title(method) for method in methods][-1] == last
    assert len(methods) == (3 if adapter else 2)
    assert predictions(out, method=methods[-1]) != predictions(out, method=methods[-2])
    assert f"| {last} | niah_single_1 | 330 | 1 |" in (out / "table.md").read_text(encoding="utf-8")


def test_a_sweep_of_anchor_ratios_has_a_row_for_each(ask_toy, refused, capsys, pictures):
    """Fig. 8, drawn; each ratio is what that row was written with, and can be named in --compare."""
    flags = "--memory --tasks niah_single_1 --lengths 330 --steps 1 --samples 2 --anchor-ratio 0.1 0.6"
    out = ask_toy(flags)
    methods = ["base", "base_inference@0.1", "base_inference@0.6"]
    assert [record["method"] for record in read(out)["niah"]] == methods
    assert [settings_of(out)[method]["write anchor_ratio"] for method in methods[1:]] == [0.1, 0.6]
    assert len({tuple(predictions(out, method=method)) for method in methods}) == 3
    assert "| Base, memory at inference, anchor ratio 0.6 |" in (out / "table.md").read_text(encoding="utf-8")
    assert {"anchor_ratio.png", "niah.png"} <= contents(out).keys()
    assert "lengths.png" not in contents(out)
    capsys.readouterr()
    eval_niah.main(["--compare", f"{out}:base_inference@0.6", f"{out}:base"])
    assert "base_inference@0.6 minus" in capsys.readouterr().out
    assert "@0.9" in refused(eval_niah.main, "--compare", f"{out}:base_inference@0.9", f"{out}:base")
    one = ask_toy(flags.replace("0.1 0.6", "0.6"), out="one")
    assert predictions(one, method="base_inference") == predictions(out, method=methods[2])


# ---- what each flag changes ------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(ask_toy, monkeypatch):
    """Runs an evaluation and returns the prompts that its model read."""

    def run(flags: str) -> list[list[int]]:
        found, generate = [], sample.generate

        def reading(model, prompts, *rest, **options):
            found.extend(prompts.tolist())
            return generate(model, prompts, *rest, **options)

        monkeypatch.setattr(sample, "generate", reading)
        ask_toy(f"{flags} --steps 1")
        return found

    return run


def made(task: str, length: int, n: int = 1, seed: int = 0, style: data.Style = STYLE) -> list[list[int]]:
    return [data.make_question(task, i, length, seed, style).prompt for i in range(n)]


ASKED = {
    "nothing else": ("--tasks niah_single_2 --lengths 330 --samples 2", "niah_single_2", 330, {"n": 2}),
    "another seed": ("--tasks niah_single_2 --lengths 330 --seed 5", "niah_single_2", 330, {"seed": 5}),
    "the harness": ("--tasks ruler_vt --lengths 900 --protocol harness", "ruler_vt", 900, {"protocol": "harness"}),
    "an essay": ("--tasks niah_single_2 --lengths 500 --haystack {}/essay.txt", "niah_single_2", 500, {"haystack": ESSAY}),
    "a background": ("--tasks babilong_qa4 --lengths 480 --haystack {}/essay.txt", "babilong_qa4", 480, {"haystack": ESSAY}),
    "a chat": ("--tasks niah_single_1 --lengths 440 --chat", "niah_single_1", 440, {"encode": None}),
}


@pytest.mark.parametrize("name", ASKED)
def test_prompts_are_those_of_the_flags(toy, prompts, name):
    """Token by token as make_question makes them in that style; and every style makes other ones."""
    flags, task, length, options = ASKED[name]
    n, seed = options.get("n", 1), options.get("seed", 0)
    style = STYLE._replace(**{key: value for key, value in options.items() if key not in ("n", "seed")})
    if style.encode is None:  # the question is the user's message, the prefix begins the assistant's
        tokenizer = data.load_tokenizer(toy / "toy")
        style = style._replace(encode=lambda text, prefix: tokenizer.encode_prompt(text) + tokenizer.encode(prefix.strip()))
    assert prompts(f"--samples {n} {flags}") == made(task, length, n, seed, style)
    if name != "nothing else":
        assert made(task, length, n, seed, style) != made(task, length, n)


def test_stories_of_babi_take_the_place_of_ours(prompts, tmp_path):
    (tmp_path / "qa1_train.txt").write_text("1 Zoe went to the attic.\n2 Where is Zoe? \tattic\t1\n")
    (ids,) = prompts(f"--samples 1 --tasks babilong_qa1 --lengths 560 --babi {tmp_path}")
    assert "Zoe went to the attic." in TOY.decode(ids)
    assert TOY.decode(ids).endswith("Where is Zoe?")


def test_the_protocol_decides_which_metric_is_the_score(ask_toy, monkeypatch):
    """An answer that names the right place and another one: wrong for BABILong, right for the harness. Both are kept."""
    target = data.make_question("babilong_qa1", 0, 660, 0, STYLE).references[0]
    ids = TOY.encode(f"{target} attic bathroom kitchen")[:16]
    monkeypatch.setattr(sample, "generate", spoken(lambda questions: [ids], []))
    for protocol, first, score in (("original", "babilong", 0), ("harness", "harness", 1)):
        out = ask_toy(f"--tasks babilong_qa1 --lengths 660 --samples 1 --protocol {protocol}", out=protocol)
        (record,) = read(out)["niah"]
        assert next(iter(record["scores"].items())) == (first, score)
        assert record["scores"] == {"babilong": 0, "harness": 1}
        assert record["score"] == score


@pytest.mark.parametrize(
    ("flag", "dtype"), [("--dtype bfloat16", "bfloat16"), ("--load-4bit", "float32, NF4"), ("--random-weights", "float32")]
)
def test_other_weights_give_other_answers_and_are_named(ask_toy, flag, dtype):
    """Rounded, quantized or random."""
    flags = "--tasks niah_single_1 --lengths 330 --samples 2 --steps 1"
    plain, other = ask_toy(flags), ask_toy(f"{flags} {flag}", out="other")
    assert f"| cpu | {dtype} |" in (other / "table.md").read_text(encoding="utf-8")
    assert read(other)["machine"]["dtype"] == dtype
    assert predictions(other) != predictions(plain)


# ---- what an answer costs --------------------------------------------------------------------------------------------------


def left_at_each_pass(tokens: int, quotas: list[int]) -> list[int]:
    return [tokens - sum(quotas[:i]) for i in range(len(quotas))]


COSTS = {
    "--steps 8": left_at_each_pass(128, [16] * 8),
    "--steps 8 --block-length 32": [32, 16] * 4,
    "--threshold 0": [128],
    "--steps 48 --schedule llada": left_at_each_pass(128, [3] * 32 + [2] * 16),
    "--steps 48 --schedule dllm": left_at_each_pass(128, sample.rounded_schedule(128, 48)),
}


@pytest.mark.parametrize("flags", COSTS)
def test_an_answer_takes_the_passes_of_its_schedule(ask_toy, counted, flags):
    """A needle has 128 tokens to answer. Each pass asks the head at the masked positions alone: at 126 464 words and 8192
    positions it would otherwise cost more than the model."""
    out = ask_toy(f"--tasks niah_single_1 --lengths 330 --samples 1 {flags}")
    assert (counted.reads, counted.heads) == ([0] * len(COSTS[flags]), COSTS[flags])
    assert [answer["steps"] for answer in answers_of(out)] == [len(COSTS[flags])]
    assert f"| {len(COSTS[flags])} | 0 | cpu |" in (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("steps", [2, 5])
def test_llada2_takes_the_passes_of_its_blocks(ask_toy, counted, steps):
    """Blocks lie on a grid from the prompt's start on: the prompt's last tokens share one with the first of the answer."""
    out = ask_toy(f"--tasks niah_single_1 --lengths 330 --samples 1 --steps {steps} --threshold 1", backbone="llada2")
    (answer,) = answers_of(out)
    expected, end = [], answer["tokens"] + 128
    for start in range(answer["tokens"] // 32 * 32, end, 32):
        open_ = 32 - max(answer["tokens"] - start, 0)
        for quota in sample.commit_schedule(32, steps):
            expected += [open_] if open_ > 0 else []
            open_ -= quota
    assert (counted.reads, counted.heads) == ([0] * len(expected), expected)
    assert answer["steps"] == len(expected)


# ---- scores that can be trusted --------------------------------------------------------------------------------------------


def spoken(answers, asked: list):
    """In place of sample.generate: the ids that `answers` gives for the questions in `asked`, cut to the room that there is."""

    def generate(model, prompts, length, watch, **options):
        watch(prompts)
        rows = answers(asked)
        return torch.tensor([ids[:length] + [TOY.eos] * (length - len(ids)) for ids in rows])

    return generate


def cells_for(task: str) -> list[eval_niah.Cell]:
    """Six questions at each of two lengths, as the program asks them: small tasks in the tiny vocabulary, others in the toy's.
    (Both spell most words with a token a letter.)"""
    if task in eval_niah.SMALL_TASKS:
        return [eval_niah.small_cell(task, length, 0, 6) for length in (96, 384)]
    flags = ["--backbone", "toy", "--out", "eval", "--tasks", task, "--lengths", "2000", "5200", "--samples", "6"]
    return eval_niah.backbone_cells(eval_niah.build_parser().parse_args(flags), TOY, 0)


def after_the_haystack(question: data.Question) -> str:
    return re.split(r"(?=\bQuestion:|\nWhat )", question.text)[-1]


@pytest.mark.parametrize("task", [*eval_niah.SMALL_TASKS, *data.BENCHMARKS])
def test_who_knows_the_answer_gets_1_and_who_guesses_gets_nothing(monkeypatch, task):
    """Through the program's own questions, decoding and metrics, with as many tokens as a question leaves for its answer. And
    the question itself, after the haystack, does not give the answer away."""
    tokenizer, asked, answer = data.TINY if task in eval_niah.SMALL_TASKS else TOY, [], eval_niah.answer
    monkeypatch.setattr(data, "make_question", functools.cache(data.make_question))
    model, rng = torch.nn.Linear(1, 1), random.Random(0)
    model.config = SimpleNamespace(architecture="llada")

    def listening(model, questions, *rest, **options):
        asked[:] = questions
        return answer(model, questions, *rest, **options)

    monkeypatch.setattr(eval_niah, "answer", listening)
    between = "" if task == "ruler_vt" else ", "  # its 30 tokens have room for five names, and not for commas among letters
    speeches = {
        "oracle": lambda questions: [tokenizer.encode(between.join(question.references)) for question in questions],
        "nothing": lambda questions: [[] for _ in questions],
        "anything": lambda questions: [rng.choices(range(tokenizer.mask - 10), k=question.tokens) for question in questions],
    }
    for cell in cells_for(task):
        scores = {}
        for name, speech in speeches.items():
            monkeypatch.setattr(sample, "generate", spoken(speech, asked))
            records = [record for group in cell.groups for record in cell.ask(model, Row("base", "base", None), group)]
            metrics = eval_niah.metrics_of(task if task in data.BENCHMARKS else "mv")
            assert list(records[0]["scores"]) == metrics
            scores[name] = [sum(record["scores"][metric] for record in records) / 6 for metric in metrics]
        assert scores["oracle"] == [1] * len(metrics)
        assert scores["nothing"] == [0] * len(metrics)
        assert max(scores["anything"]) < 0.2
        for question in asked:
            assert not [r for r in question.references if r.lower() in after_the_haystack(question).lower()]
