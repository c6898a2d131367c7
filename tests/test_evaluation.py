"""
test_evaluation.py: eval_niah.py's two measurements, scores and exposure bias. They compare like
with like, tables say what the records say, and no evaluation overwrites another.
"""

import itertools
import math
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from running import ASKED, evaluated, finished, refusal, results, stamps

import data
import eval_niah
import memdlm
import sample
from lab import evaluate, report, training
from lab.tools import read_json


@pytest.mark.parametrize(
    ("prediction", "score"),
    [(" river holds 47. river holds 12.", 1), (" RIVER HOLDS 47.", 2 / 3), ("", 0)],
)
def test_a_score_is_the_share_of_references_found(prediction, score):
    """RULER's string_match_all: in any place and in any case, each reference counts alike."""
    assert eval_niah.string_match_all(("47", "12", "River"), prediction) == pytest.approx(score)


@pytest.mark.parametrize("task", data.TASKS)
def test_the_oracle_scores_1_and_silence_0(model, task, monkeypatch):
    """The references are in the true answers, and those of the prompts do not count."""
    asked = SimpleNamespace(samples=40, steps=1, block_length=None, threshold=None)
    examples = data.make_examples(task, 40, 96, data.split_seed(5, "test"))
    answer = {tuple(example.prompt): example.response for example in examples}

    def oracle(model, prompts, blocks, **options):
        return torch.tensor([answer[tuple(prompt)] for prompt in prompts.tolist()])

    def silence(model, prompts, blocks, **options):
        return torch.full((len(prompts), blocks[-1].stop), data.EOS)

    for speaker, score in ((oracle, 1), (silence, 0)):
        monkeypatch.setattr(sample, "generate", speaker)
        record = evaluate.score_cell(model, None, task, 96, 5, asked, "old")
        assert (record["score"], record["n"]) == (score, 40), f"{speaker.__name__} on {task}"


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [([1, 2, 3, 4, 5], 3, 1.9632), ([0, 1], 0.5, 6.3531), ([2, 2, 2], 2, 0), ([7], 7, math.inf)],
)
def test_t_interval_equals_known_values(values, mean, half):
    """Student's t over seeds; one seed says nothing about others."""
    assert report.t_interval(values) == pytest.approx((mean, half), abs=2e-3)


PROMPT = 4  # tokens of the rows that are walked


def walk_inputs(answer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, response and order of three rows."""
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randint(0, data.EOS, (3, PROMPT + answer), generator=generator)
    response = (torch.arange(PROMPT + answer) >= PROMPT).expand(3, -1)
    return x0, response, torch.rand(x0.shape, generator=generator)


@pytest.mark.parametrize(("n", "steps"), [(10, 5), (10, 8), (3, 8), (12, 1)])
def test_static_and_sequential_losses_are_those_of_states_that_hide_equally_much(sharp, n, steps):
    """R_EB compares losses at one noise level: both states hide max(1, int(n * ratio)) tokens of
    each row, fewer and fewer, and none of the prompt. Which ones the static state hides depends on
    the order that was drawn, not on the model, and it shows true tokens. Both losses are Eq. 3, row
    by row and without the weight 1/t; at ratio 1 the states are one, later they are not."""
    (x0, response, order), seen = walk_inputs(n), []
    sharp.embedding.register_forward_hook(lambda module, ids, output: seen.append(ids[0].clone()))
    curve = eval_niah.exposure_walk(sharp, x0, response, order, steps, None)
    shown, reached = seen[::2], seen[1::2]
    assert [ratio for ratio, *_ in curve] == [1 - step / steps for step in range(steps)]
    for step, (_, *losses) in enumerate(curve):
        count = max(1, n * (steps - step) // steps)
        static = shown[step] == data.MASK
        for row in range(3):
            drawn = [place for place in order[row].argsort().tolist() if response[row, place]]
            assert static[row].nonzero()[:, 0].tolist() == sorted(drawn[:count])
        assert shown[step][~static].equal(x0[~static])
        assert reached[step][~response].equal(x0[~response])
        for state, loss in zip((shown[step], reached[step]), losses):
            hidden = state == data.MASK
            assert hidden.sum(1).tolist() == [count] * 3
            nll = -sharp(state).log_softmax(-1).gather(2, x0[..., None])[..., 0]
            torch.testing.assert_close(
                loss.double(), (nll * hidden).sum(1) / count, rtol=1e-5, atol=0
            )
        assert losses[0].equal(losses[1]) == (step == 0)
    for before, after in pairwise(reached):
        assert not ((after == data.MASK) & (before != data.MASK)).any(), "hidden once more"


def test_a_model_led_astray_by_its_own_mistake_has_exposure_bias():
    """It knows the answer, but is surest of one wrong token, and lost as soon as it sees one: the
    walk must show a model what it has said itself. Without that token, R_EB is 1."""
    (x0, response, order), place = walk_inputs(10), 9
    truth = 8.0 * torch.nn.functional.one_hot(x0, data.VOCAB_SIZE).float()
    misled = truth.clone()
    misled[:, place] = 0
    misled[torch.arange(3), place, (x0[:, place] + 1) % data.EOS] = 20.0

    def astray(ids: torch.Tensor) -> torch.Tensor:
        lost = ((ids != x0) & (ids != data.MASK)).any(1)
        return torch.where(lost[:, None, None], 0.0, misled)

    def curve_of(predict, steps: int) -> list[tuple]:
        def run(h, start, stop, attention_mask, fast, at) -> torch.Tensor:
            return predict(h)[at]

        model = SimpleNamespace(embedding=torch.nn.Identity(), head=torch.nn.Identity(), run=run)
        model.config = SimpleNamespace(mask_id=data.MASK)
        return eval_niah.exposure_walk(model, x0, response, order, steps, None)

    curve = curve_of(astray, 10)
    guessing = torch.full((3,), math.log(data.VOCAB_SIZE))
    for *_, sequential in curve[1:]:
        torch.testing.assert_close(sequential, guessing, rtol=0, atol=1e-5)
    assert curve[-1][1].min() < 0.2, "the static state must show it true tokens"
    for _, static, sequential in curve_of(lambda ids: truth, 5):
        torch.testing.assert_close(sequential, static)


def test_the_ratio_is_against_the_static_loss_without_a_memory():
    """Or a memory that lowers both losses would look as if it had changed nothing."""
    records = report.matching(results(finished())["exposure_bias"], seed=0)
    static = {(record["method"], record["mask_ratio"]): record["static"] for record in records}
    for record in records:
        method, ratio = record["method"], record["mask_ratio"]
        plain = {"memdlm_train_inference": "memdlm_train"}.get(method, method)
        plain = plain.removesuffix("_inference")
        assert record["ratio"] == pytest.approx(record["sequential"] / static[plain, ratio])
    assert static["memdlm_train_inference", 1] != static["memdlm_train", 1], "no memory was read"


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_measured_noise_levels_cover_0_to_1_however_examples_are_batched(size):
    """Six examples have t = 1/12, 3/12, ... 11/12: losses of two runs are comparable."""
    row = data.Batch(torch.zeros(size, 5, dtype=torch.long), torch.ones(size, 5, dtype=bool), None)
    t = torch.cat([anchor.t for anchor in training.even_anchors([row] * (6 // size), 3)])
    torch.testing.assert_close(t.sort()[0], (torch.arange(6) + 0.5) / 6)
    one_by_one = data.Batch(row.x0[:1], row.maskable[:1], None)
    assert t.tolist() == [anchor.t.item() for anchor in training.even_anchors([one_by_one] * 6, 3)]


def test_the_frontier_says_what_losses_and_scores_say():
    """For each model of each seed: learnt is its last training loss without a memory, kept the mean
    of its scores without one; and what the base has learnt is what the others begin with."""
    found = results(finished())
    known = [("mdlm", 0, "base"), ("mdlm", 3, "mdlm"), ("memdlm", 3, "memdlm_train")]
    known.append(("mdlm-0.0001", 3, "mdlm-0.0001"))
    assert len(found["frontier"]) == 2 * len(known)
    for seed in (0, 1):
        for arm, step, row in known:
            [point] = report.matching(found["frontier"], method=row, seed=seed)
            [loss] = report.matching(found["loss"], method=arm, step=step, seed=seed)
            [score] = report.matching(found["niah"], method=row, seed=seed)
            assert point["learnt"] == loss["train_without_memory"]
            assert point["1x"] == score["score"]


def test_a_training_that_skipped_every_update_is_no_result():
    """It is still the base, whose loss and scores would look like a very careful training's."""
    found = results(finished())
    [record] = report.matching(found["training"], seed=1, name="memdlm")
    record["skipped_updates"] = 3
    points = report.frontier_of(found, found["config"]["run"])
    [point] = report.matching(points, seed=1, method="memdlm_train")
    assert point["learnt"] is None
    assert "memdlm of seed 1: 3 updates skipped" in report.summary(found)


def frontier(*ours: tuple[float, float]) -> list[dict]:
    """Points of some seeds. Standard MDLM keeps .2 at loss .4, .6 at 1.2, and the base .8 at 2.0;
    MemDLM has learnt and kept what is said."""
    points = []
    for seed, (learnt, kept) in enumerate(ours):
        places = [("base", 2.0, 0.8), ("mdlm", 0.4, 0.2), ("memdlm_train", learnt, kept)]
        for method, x, y in [*places, ("mdlm-8e-05", 1.2, 0.6)]:
            points.append({"method": method, "seed": seed, "learnt": x, "4x": y})
    return points


@pytest.mark.parametrize(
    ("learnt", "kept", "gain"),
    [(0.8, 0.5, 0.1), (1.2, 0.5, -0.1), (1.6, 0.7, 0.0), (0.1, 0.2, 0.0), (3.0, 0.9, 0.1)],
)
def test_methods_are_compared_at_equal_learnt_loss(learnt, kept, gain):
    """On the line between Standard MDLM's two nearest rates, or with its first or last. It is what
    a lower rate does not give of the difference at equal rate."""
    found = report.comparisons(frontier((learnt, kept)))
    assert found["equal_loss"]["values"] == [pytest.approx(gain)]
    assert found["equal_rate"]["values"] == [pytest.approx(kept - 0.2)]
    assert found["lower_rate"]["values"] == [pytest.approx(kept - 0.2 - gain)]


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [
        ((0.5, 0.51, 0.49), "is more than"),
        ((0.3, 0.31, 0.29), "better"),
        ((0.2, 0.6), "no difference"),
        ((0.9,), "one base decides nothing"),
    ],
)
def test_the_sentences_say_what_the_interval_allows(kept, verdict):
    """Above zero, below zero, or neither: the verdict goes by the 95% interval over bases."""
    found = report.comparisons(frontier(*((0.8, one) for one in kept)))
    mean, half = report.t_interval([one - 0.4 for one in kept])
    assert found["equal_loss"]["difference"] == pytest.approx(mean)
    interval = None if len(kept) == 1 else pytest.approx([mean - half, mean + half])
    assert found["equal_loss"]["ci95"] == interval
    text = report.sentences(found)
    assert f"n = {len(kept)}: " in text
    assert verdict in text


def test_what_cannot_be_compared_is_left_out():
    """No score at 4x; or no loss, because training has exploded."""
    assert results(finished())["comparisons"] == {}
    points = frontier((0.8, 0.5), (0.8, 0.6))
    points[0]["learnt"] = None
    assert report.comparisons(points)["equal_loss"]["values"] == [pytest.approx(0.2)]
    points[4]["learnt"] = None
    assert report.comparisons(points) == {}
    assert "Nothing can be compared" in report.sentences({})


def test_the_memory_picture_shows_the_inner_loop(make_model, monkeypatch):
    """-log p of each masked word before the inner loop and after each stage; noisy are the words
    that the true answer does not have. (Answers of one task are of one length: there are no pads.)
    """
    model, config = make_model(torch.float32), read_json(finished() / "config.json")
    monkeypatch.setattr(data, "TASKS", {"mv": data.TASKS["mv"]})
    config |= {"memory_lr": 0.5, "memory_fraction": 0.5, "noise": 0.5, "examples": 16}
    pairs, true = (training.tiny_pairs(config, 0, noise=noise) for noise in (0.5, 0))
    views, batch = evaluate.memory_views(model, config, 0), data.collate(pairs)
    masked = torch.zeros_like(batch.maskable)
    for row, (view, pair, right) in enumerate(zip(views, pairs, true)):
        places = view["places"]
        assert view["noisy"] == [pair.response[i] != right.response[i] for i in places]
        assert places == [i for i, hidden in enumerate(view["hidden"][1]) if hidden]
        assert set(places) <= {i for i, hidden in enumerate(view["hidden"][0]) if hidden}
        masked[row, [len(pair.prompt) + i for i in places]] = True
    logits = model(memdlm.corrupt(batch.x0, masked, data.MASK))[masked]
    nll = torch.nn.functional.cross_entropy(logits, batch.x0[masked], reduction="none")
    seen = [value for view in views for value in view["nll"][0]]
    assert seen == pytest.approx(nll.tolist(), abs=1e-3)
    for noisy in (True, False):
        before, first, second = report.word_means(views, noisy)
        assert second < first < before, "the inner loop learns these pairs"


def test_the_denoising_picture_shows_the_answer_that_is_given(sharp):
    """From all masked to the answer, a token a step, and no token changes once it is there."""
    example = data.make_examples("mv", 1, 96, 0)[0]
    prompt, tokens = torch.tensor([example.prompt]), len(example.response)
    states = sample.denoising_states(sharp, prompt, tokens)
    assert states[-1] == sample.generate(sharp, prompt, sample.plan_blocks(tokens))[0].tolist()
    assert [state.count(data.MASK) for state in states] == list(range(tokens, -1, -1))
    for before, after in itertools.pairwise(states):
        assert all(old in (data.MASK, new) for old, new in zip(before, after))


def scored(method: str, task: str, length: int, score: float | None, seed: int = 0) -> dict:
    """A record of results.json."""
    cell = {"method": method, "task": task, "length": length, "seed": seed}
    return {**cell, "n": 4, "score": score}


def cells(table: str) -> list[list[str]]:
    """A markdown table's lines, without the rule under its header."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    return rows[:1] + rows[2:]


def test_a_score_table_has_means_over_seeds_and_tasks():
    """What has no score shows as "-", and so does every mean that would need it."""
    records = [scored("base", "mv", 64, 0.5), scored("base", "mv", 64, 1.0, seed=1)]
    records += [scored("base", "vt", 64, 0.25), scored("base", "mv", 96, 0.5)]
    records.append(scored("mdlm", "vt", 64, None))
    header, base, mdlm = cells(report.score_table(records))
    assert header == ["method", "mv 64", "vt 64", "mv 96", "vt 96", "mean 64", "mean 96"]
    assert base == ["Base", "0.75", "0.25", "0.50", "-", "**0.500**", "**-**"]
    assert set(mdlm[1:]) <= {"-", "**-**"}


def test_differences_are_paired_by_seed():
    """Two rows that swing together from seed to seed differ by 0.1 ± 0.13 (t = 12.706 for two
    seeds); unpaired, the swing would hide it. One seed has no interval."""
    records = []
    for seed, (plain, ours) in enumerate([(0.2, 0.29), (0.8, 0.91)]):
        records += [scored("mdlm", task, 64, plain, seed) for task in ("mv", "vt")]
        records += [scored("memdlm_train", task, 64, ours, seed) for task in ("mv", "vt")]
    _, row = cells(report.difference_table({"niah": records}))
    mean, low, high = map(float, re.findall(r"[+-]\d\.\d+", row[1]))
    assert row[0] == "MemDLM (Train-Only) minus Standard MDLM"
    assert mean == pytest.approx(0.1, abs=1e-3)
    assert (low, high) == pytest.approx((0.1 - 0.127, 0.1 + 0.127), abs=1e-3)
    one_seed = {"niah": report.matching(records, seed=0)}
    assert cells(report.difference_table(one_seed))[1][1] == "+0.090"


def test_the_report_says_where_its_numbers_come_from():
    """Each row, the seeds and examples, the machine and the writing rule."""
    text = (finished() / "table.md").read_text(encoding="utf-8")
    known = ["[0, 1]", "2 answers", "cpu", "float32", torch.__version__, "surprise"]
    known += [f"| {title} |" for title in report.TITLES.values()]
    assert not [words for words in known if words not in text]


def test_an_evaluation_with_other_settings_leaves_the_run_alone(tmp_path, capsys):
    """Other tasks, lengths and samples go to another --out, which is asked for before any work.
    Nothing of the run's own evaluation is touched."""
    before = stamps(finished())
    for flag in ("--samples 3", "--tasks mv", "--write-lr 0.1", "--steps 2"):
        said = refusal(capsys, "eval_niah", "--run", finished(), *ASKED, *flag.split())
        assert "--out" in said, flag
    flags = "--tasks mv --lengths 80 --samples 3 --bias-steps 3".split()
    found = evaluated(finished(), tmp_path, *flags, "--steps", 1)
    assert {(r["task"], r["length"], r["n"]) for r in found["niah"]} == {("mv", 80, 3)}
    assert len({record["mask_ratio"] for record in found["exposure_bias"]}) == 3
    assert report.main_table(found) in capsys.readouterr().out
    assert stamps(finished()) == before
