"""
test_harness.py: lm-evaluation-harness asks our model two tasks of two lines, and gets what the
samplers and the likelihood say, whatever the batch, the number of processes or a stop.
"""

import json
import sqlite3
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from commands import ROOT, checkpoints, run_python
from test_processes import LAUNCH
from test_samplers import adapter_for

pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler.common_utils import get_tokenizer

import sample
from full_scale import harness
from full_scale.harness import MemDLM, stratified_masks
from full_scale.scoring import log_likelihood
from model import UserError
from sample import generate, plan_blocks

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/two.jsonl}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
TASKS = {
    "two_answers": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
    "two_choices": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{label}}'\nmetric_list: [{metric: acc}]\n",
}
LINES = [
    {"question": "Who is it?", "answer": "Mary", "choices": ["Mary", "John, it is"], "label": 0},
    {"question": "Where is she?", "answer": "here", "choices": ["here", "at home"], "label": 1},
]

# The program without the harness's own 20,000 tasks, which take it ten seconds to read.
QUICK = f"""
import sys
from functools import partialmethod
sys.path.insert(0, {str(ROOT)!r})
from lm_eval.tasks import TaskManager
from full_scale import harness
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
harness.run(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """The harness keeps what it has read below HF_HOME; to describe the machine takes long."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own_alone = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", own_alone)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["harness.py"])


def write_tasks(folder: Path) -> Path:
    """Both tasks and their lines."""
    folder.mkdir()
    (folder / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(folder=folder)}{text}")
    return folder


def flags_for(tasks: Path, out: Path, *more) -> list[str]:
    """A command line: both tasks with a memory, answers kept in OUT."""
    own = ["--backbone", checkpoints()["llada-moe"], "--memory", "--mc-samples", 6]
    own += ["--device", "cpu"]
    theirs = ["--tasks", ",".join(TASKS), "--include_path", tasks, "--log_samples"]
    return [str(word) for word in (*own, *theirs, "--output_path", out, *more)]


def said(out: Path) -> dict[str, list]:
    """What the model has answered, by task and number of the line; numbers to .001."""
    found = {}
    for name in TASKS:
        [path] = out.rglob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[name] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    for line in found["two_choices"]:
        line[:] = [[round(float(value), 3), str(greedy)] for ((value, greedy),) in line]
    return found


def model_with(**flags) -> MemDLM:
    return MemDLM(**{"backbone": checkpoints()["llada-moe"], "device": "cpu", **flags})


def test_an_answer_is_that_of_the_sampler_up_to_the_first_stop(capsys):
    """A context that is too long is cut off at its beginning, and that is said."""
    lm = model_with(steps=4, memory=True)
    context, options = "Who is it?", {"max_gen_toks": 12, "until": []}
    whole = lm.answer(context, options)
    prompt = torch.tensor([lm.tokenizer.encode(context)])
    fast = sample.write_prompt(lm.model, prompt, lm.write, 0, [harness.number_of(prompt)])
    ids = generate(lm.model, prompt, plan_blocks(12, 4), fast=fast)
    assert whole == lm.tokenizer.decode(ids[0].tolist())
    stops = [whole[3:5], whole[7:9]]
    cut = lm.answer(context, {**options, "until": stops})
    assert cut == whole[: min(whole.index(stop) for stop in stops)]
    assert model_with(steps=4).answer(context, options) != whole
    assert "cut off" not in capsys.readouterr().err
    lm, context = model_with(max_length=20, steps=1), "word " * 30
    lm.answer(context, {"max_gen_toks": 8})
    cut = f"of a context of {len(lm.tokenizer.encode(context))} tokens, the last 12 are read"
    assert cut in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--max-length 20 has no room for 30 tokens\.$"):
        lm.answer("word", {"max_gen_toks": 30})


@pytest.mark.parametrize("stops", [[], ["<|role_end|>"], ["<role>"]])
def test_an_answer_ends_at_special_tokens(stops, monkeypatch):
    """At the end of the turn, whatever the task says, and at one that it names as a stop."""
    lm = model_with()
    end = lm.tokenizer.specials["<role>" if stops == ["<role>"] else "<|role_end|>"]
    ids = [*lm.tokenizer.encode("yes"), end, *lm.tokenizer.encode(" no")]
    monkeypatch.setattr(lm, "sampler", lambda tokens: lambda *_, **__: torch.tensor([ids]))
    assert lm.answer("Is it so?", {"until": stops}) == "yes"


def test_a_likelihood_is_the_mean_of_ladas_estimate():
    """Over masks of all sizes. A blank before the continuation belongs to it."""
    lm, context = model_with(mc_samples=10), "Who is it?"
    value, greedy = lm.likelihood(context, " Mary")
    assert lm.likelihood(context + " ", "Mary") == (value, greedy)
    prompt = lm.tokenizer.encode(context)
    target = lm.tokenizer.encode(context + " Mary")[len(prompt) :]
    x0 = torch.tensor(prompt + target)
    drawn = harness.generator_for(0, "likelihood", harness.number_of(x0))
    hidden = stratified_masks(len(target), 10, drawn)
    masked = torch.nn.functional.pad(hidden, (len(prompt), 0))
    by_hand = log_likelihood(lm.model, x0, len(prompt), masked, hidden.double().mean(1))
    assert value == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert not greedy
    assert lm.likelihood("Who?", "") == (0.0, True), "no token is surely said"
    assert lm.tokenizer.encode("is")[:1] != lm.tokenizer.encode("i"), "they do not merge"
    assert lm.likelihood("i", "s")[0] < 0, "a token across the border belongs to the answer"


def test_a_task_that_samples_gets_answers_that_differ():
    """As many as it asks for, the same again in another run."""
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "until": []}
    four = 4 * [Instance("generate_until", {}, ("Who is it?", options), 0)]
    answers = model_with().generate_until(four)
    assert len(set(answers)) == 4
    assert model_with().generate_until(four) == answers


def sampled(document: int, repeats: int = 2, text: str = "Who is it?") -> list[Instance]:
    """A document's requests, as the harness has them: a temperature makes them sample."""
    options = {"temperature": 2.0, "max_gen_toks": 6, "until": []}
    request = Instance("generate_until", {}, (text, options), 0, ("task", document, repeats))
    return repeats * [request]


def test_answers_that_are_sampled_do_not_depend_on_the_number_of_processes():
    """Equal texts get equal answers, whether or not one process has both; and so do the requests
    that fill up a process which has fewer of them."""
    lm = model_with()
    [one, two] = lm.generate_until(sampled(0))
    assert one != two
    assert lm.generate_until([*sampled(0), *sampled(1)]) == [one, two, one, two]
    assert lm.generate_until([*sampled(1), *sampled(1)]) == [one, two, one, two]


def test_a_cache_keeps_all_answers_to_a_text(tmp_path, monkeypatch):
    """Also of a call that was stopped after the first of three."""
    wanted = model_with().generate_until(sampled(0, 3))
    assert len({*wanted}) == 3
    answer = MemDLM.answer
    stop = [answer, lambda *arguments: 1 / 0, lambda *arguments: 1 / 0]
    monkeypatch.setattr(MemDLM, "answer", lambda *arguments: stop.pop(0)(*arguments))
    with pytest.raises(ZeroDivisionError):
        CachingLM(model_with(), str(tmp_path / "kept.db")).generate_until(sampled(0, 3))
    stop[:] = [answer, answer]
    for _ in range(2):
        kept = CachingLM(model_with(), str(tmp_path / "kept.db"))
        assert kept.generate_until(sampled(0, 3)) == wanted
    assert stop == [], "one answer was kept, two were made, and none again"


@pytest.mark.parametrize("kind", ["llada-moe", "llada2"])
def test_what_our_sampler_says_is_greedy(kind):
    """By the block sampler where the model has one; a threshold of 0 is a threshold."""
    lm, spelled = model_with(backbone=checkpoints()[kind], mc_samples=1, threshold=0), 0
    prompt = torch.tensor([lm.tokenizer.encode("Who is it?")])
    for tokens in range(1, 9):
        ids = lm.sampler(tokens)(lm.model, prompt, threshold=0.0)[0].tolist()
        text = lm.tokenizer.decode(ids)
        if lm.tokenizer.encode("Who is it?" + text)[prompt.shape[1] :] == ids:
            spelled += 1
            assert lm.likelihood("Who is it?", text)[1]
    assert spelled > 0, "no answer is spelled as it was said: the test shows nothing"


@pytest.mark.parametrize(
    "flags", [{"seed": 5}, {"mc_samples": 5}, {"chat": True}, {"memory": True}, {"load_4bit": True}]
)
def test_each_flag_changes_the_estimate(flags):
    plain, other = model_with(mc_samples=4), model_with(**{"mc_samples": 4, **flags})
    question = "Who is it?", " Mary went home."
    assert plain.likelihood(*question)[0] != other.likelihood(*question)[0]


@pytest.mark.parametrize(("tokens", "samples"), [(4, 8), (5, 128), (7, 3), (1, 128)])
def test_masks_of_all_sizes_count_alike(tokens, samples):
    """1 to all tokens, each number as often as another, and each token as often as another."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.cat([stratified_masks(tokens, samples, generator) for _ in range(300)])
    assert len(masks) == 300 * (1 if tokens == 1 else samples)
    sizes = torch.bincount(masks.sum(1), minlength=tokens + 1) / len(masks)
    assert sizes.tolist() == pytest.approx([0] + [1 / tokens] * tokens, abs=0.03)
    half = (1 + 1 / tokens) / 2
    assert masks.double().mean(0).tolist() == pytest.approx([half] * tokens, abs=0.06)


def test_order_batch_processes_and_stops_change_nothing(tmp_path, monkeypatch):
    """One process; one named as the harness names models (--model memdlm --model_args ...); two,
    with other batches; and one that was stopped after two answers."""
    tasks, one = write_tasks(tmp_path / "tasks"), tmp_path / "one"
    harness.run(flags_for(tasks, one))
    wanted = said(one)
    assert len({json.dumps(answer) for answers in wanted.values() for answer in answers}) == 4
    named = f"backbone={checkpoints()['llada-moe']},memory=True,mc_samples=6"
    theirs = flags_for(tasks, tmp_path / "named")[7:]
    harness.run(["--model", "memdlm", "--model_args", named, *theirs])
    assert said(tmp_path / "named") == wanted
    (tmp_path / "quick.py").write_text(QUICK)
    program = [*LAUNCH, 2, tmp_path / "quick.py"]
    done = run_python(*program, *flags_for(tasks, tmp_path / "two", "--batch_size", 4))
    assert done.returncode == 0, done.stderr
    assert said(tmp_path / "two") == wanted

    kept, genuine = tmp_path / "cache", MemDLM.likelihood
    monkeypatch.setattr(MemDLM, "likelihood", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        harness.run(flags_for(tasks, tmp_path / "stopped", "--use_cache", kept))
    monkeypatch.setattr(MemDLM, "likelihood", genuine)
    monkeypatch.setattr(MemDLM, "answer", lambda *arguments: 1 / 0)  # two answers are there already
    harness.run(flags_for(tasks, tmp_path / "stopped", "--use_cache", kept))
    assert said(tmp_path / "stopped") == wanted
    for flag in ("--steps=2", f"--adapter={adapter_for('llada-moe')}"):
        with pytest.raises(UserError, match="has answers of another model or other flags"):
            harness.run(flags_for(tasks, tmp_path / "other", f"--use_cache={kept}", flag))


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_predictions_that_are_not_finite_are_no_result(kind):
    lm = model_with(mc_samples=2)
    lm.model.embedding.weight.data.fill_(torch.nan)
    given = {"loglikelihood_rolling": ("Who?",), "loglikelihood": ("Who?", " Mary")}
    request = Instance(kind, {}, given.get(kind, ("Who?", {"max_gen_toks": 2})), 0)
    with pytest.raises(UserError, match=r"^the model's predictions are not finite"):
        getattr(lm, kind)([request])


@pytest.mark.parametrize("damage", ["replaced", "cut off"])
def test_a_damaged_cache_is_one_line_at_the_start(tmp_path, monkeypatch, damage):
    """An empty file, as a stop may leave it, is none."""
    monkeypatch.setattr(harness, "cli_evaluate", lambda: None)
    path = tmp_path / "kept_rank1.db"
    path.touch()
    harness.run(["--use_cache", str(tmp_path / "kept"), "--tasks", "x"])
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        file.executemany("INSERT INTO unnamed VALUES (?, ?)", [(i, 500 * "x") for i in range(50)])
    harness.run(["--use_cache", str(tmp_path / "kept"), "--tasks", "x"])
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:] if damage == "replaced" else whole[:9000])
    with pytest.raises(
        UserError, match=r"^--use_cache: [^\n]*kept_rank1.db cannot be used [^\n]*$"
    ):
        harness.run(["--use_cache", str(tmp_path / "kept"), "--tasks", "x"])


def no_documents():
    """As if the harness had raised it."""
    text = "raise ValueError('task.build_requests() did not find any docs!')"
    exec(compile(text, "lm_eval/api/task.py", "exec"))


SAYS = {
    "--metadata tokenizer=": get_tokenizer,  # of RULER's tasks: an assertion
    "needs a document of each task: lower --nproc_per_node": no_documents,
}


@pytest.mark.parametrize("advice", SAYS)
def test_what_the_harness_refuses_is_one_line_that_says_what_works(advice, monkeypatch):
    monkeypatch.setattr(harness, "cli_evaluate", SAYS[advice])
    monkeypatch.setattr(harness, "processes", lambda: (1, 2))
    with pytest.raises(UserError, match=f"^lm_eval: [^\n]*{advice}[^\n]*$"):
        harness.run(["--tasks", "x"])
    monkeypatch.setattr(harness, "cli_evaluate", lambda: [][0])
    with pytest.raises(IndexError):
        harness.run(["--tasks", "x"])


def test_the_harness_puts_nothing_into_templates_itself(tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    with pytest.raises(UserError, match=r"^--apply_chat_template [^\n]* say --chat\.$"):
        harness.run(flags_for(tasks, tmp_path, "--apply_chat_template"))
    for task in TASKS:
        with pytest.raises(UserError, match=r"^lm_eval: Elements of --samples [^\n]*$"):
            harness.run(
                flags_for(tasks, tmp_path, "--tasks", task, "--samples", f'{{"{task}":[9]}}')
            )


def test_help_lists_our_flags_and_the_harness_s(capsys):
    with pytest.raises(SystemExit) as stop:
        harness.run(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--backbone" in said.partition("The harness's own flags:")[0]
    assert "--use_cache" in said.partition("The harness's own flags:")[2]


REFUSED = {
    "--batch_size must be a number": {"batch_size": "auto"},
    "--device cpu, cuda or mps": {"device": "cuda:1"},
    "--edit-threshold is for LLaDA2.1 alone": {"edit_threshold": 0.9},
    "unrecognized arguments: --nonsense": {"nonsense": 1},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_asked_is_one_line(named):
    with pytest.raises(UserError, match=f"^[^\n]*{named}[^\n]*$"):
        model_with(**REFUSED[named])


def test_without_the_harness_it_says_so_in_one_line():
    """As where only the requirements of the core are installed."""
    program = "import runpy, sys; sys.modules['lm_eval'] = None; "
    program += "runpy.run_path('full_scale/harness.py', run_name='__main__')"
    done = run_python("-c", program)
    assert done.returncode == 2
    assert done.stderr.startswith("error: lm_eval")
    assert done.stderr.count("\n") == 1
