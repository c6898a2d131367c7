"""
test_evaluation.py: eval_niah.py's two measurements, scores and exposure bias. They compare like
with like, tables say what the records say, and no evaluation overwrites another.
"""

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
    asked = SimpleNamespace(samples=40, wording="old", steps=1, block_length=None, threshold=None)
    examples = data.make_examples(task, 40, 96, data.split_seed(5, "test 0"))
    answer = {tuple(example.prompt): example.response for example in examples}

    def oracle(model, prompts, blocks, **options):
        return torch.tensor([answer[tuple(prompt)] for prompt in prompts.tolist()])

    def silence(model, prompts, blocks, **options):
        return torch.full((len(prompts), blocks[-1].stop), data.EOS)

    for speaker, score in ((oracle, 1), (silence, 0)):
        monkeypatch.setattr(sample, "generate", speaker)
        record = evaluate.score_cell(model, False, task, 96, 5, 0, asked)
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
        model = SimpleNamespace(embedding=torch.nn.Identity(), head=torch.nn.Identity())
        model.config, model.run = SimpleNamespace(mask_id=data.MASK), lambda h, *rest: predict(h)
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
    records = report.matching(results(finished())["exposure_bias"], seed=0, draw=0)
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
    """For each fine-tuning of each draw: learnt is its last training loss without a memory, kept
    the mean of its scores without one; and the base is Standard MDLM at rate 0."""
    found = results(finished())
    points = found["frontier"]
    known = [("mdlm", 0.0, "mdlm", 0, "base"), ("mdlm", 5e-4, "mdlm", 3, "mdlm")]
    known.append(("mdlm", 1e-4, "mdlm-0.0001", 3, "mdlm-0.0001"))
    known.append(("memdlm", 5e-4, "memdlm", 3, "memdlm_train"))
    for unit in ({"seed": seed, "draw": draw} for seed in (0, 1) for draw in (0, 1)):
        mine = report.matching(points, **unit)
        assert len(mine) == 4
        for method, rate, arm, step, row in known:
            [point] = report.matching(mine, method=method, lr=rate)
            [loss] = report.matching(found["loss"], method=arm, step=step, **unit)
            [score] = report.matching(found["niah"], method=row, **unit)
            assert point["learnt"] == loss["train_without_memory"]
            assert point["kept"] == {"1x": score["score"]}


def frontier(units: list[tuple[float, float]], draws: int = 9) -> list[dict]:
    """Points of some units. Standard MDLM keeps .2 at loss .4, .6 at 1.2 and .8 at 2.0; MemDLM is
    where the units say. draws: of one seed; then the next seed begins."""
    points = []
    for number, (learnt, kept) in enumerate(units):
        seed, draw = divmod(number, draws)
        places = [("mdlm", 1e-3, 0.4, 0.2), ("mdlm", 1e-4, 1.2, 0.6), ("mdlm", 0.0, 2.0, 0.8)]
        for method, rate, x, y in [*places, ("memdlm", 1e-3, learnt, kept)]:
            point = {"method": method, "lr": rate, "seed": seed, "draw": draw, "learnt": x}
            points.append(point | {"kept": {"4x": y}})
    return points


@pytest.mark.parametrize(
    ("learnt", "kept", "gain"),
    [(0.8, 0.5, 0.1), (1.2, 0.5, -0.1), (1.6, 0.7, 0.0), (0.1, 0.2, 0.0), (3.0, 0.9, 0.1)],
)
def test_methods_are_compared_at_equal_learnt_loss(learnt, kept, gain):
    """On the line between Standard MDLM's two nearest rates, or with its first or last."""
    points = frontier([(learnt, kept)])
    assert report.gains_at_equal_loss(points, "4x") == {(0, 0): pytest.approx(gain)}


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [((0.5, 0.51, 0.49), "is more than"), ((0.3, 0.31, 0.29), "better"), ((0.2, 0.6), "no diff")],
)
def test_the_headline_says_what_its_interval_allows(kept, verdict):
    """Above zero, below zero, or neither: the verdict goes by the 95% interval over bases. The
    interval that is printed first is over draws, and draws of one base alone decide nothing."""
    units = [(0.8, one) for one in kept]
    assert "decides nothing" in report.headline_of(frontier(units))["text"]
    headline = report.headline_of(frontier(units, draws=1))
    gains = [one - 0.4 for one in kept]
    mean, half = report.t_interval(gains)
    assert (headline["difference"], headline["n"]) == (pytest.approx(mean), len(kept))
    assert headline["ci95"] == pytest.approx([mean - half, mean + half])
    assert verdict in headline["text"]


def test_a_headline_that_cannot_be_had_is_none():
    """No score at 4x; or no loss, because training has exploded. One draw has no interval."""
    assert results(finished())["headline"] is None
    points = frontier([(0.8, 0.5)])
    assert report.headline_of(points)["ci95"] is None
    points[0]["learnt"] = None
    assert report.headline_of(points) is None
    assert report.headline_of(points + frontier([(0.8, 0.5)] * 2)[4:])["n"] == 1


def test_the_memory_picture_shows_the_inner_loop(make_model):
    """The NLL before it and after each stage; noisy are words that the true answer does not
    have."""
    model, config = make_model(torch.float32), read_json(finished() / "config.json")
    config |= {"memory_lr": 0.5, "memory_fraction": 0.5, "noise": 0.5}
    pairs = [training.tiny_pairs(config, 0, 0, noise)[0] for noise in (0.5, 0)]
    view = evaluate.memory_view(model, config, 0, *pairs)
    assert view["noisy"] == [a != b for a, b in zip(*(pair.response for pair in pairs))]
    assert 0 < sum(view["noisy"]) < len(view["noisy"])
    batch = data.collate([pairs[0]])
    logits = model(memdlm.corrupt(batch.x0, batch.maskable, data.MASK))[batch.maskable]
    nll = torch.nn.functional.cross_entropy(logits, batch.x0[batch.maskable], reduction="none")
    assert view["nll"][0] == pytest.approx(nll.tolist(), rel=1e-4)
    before, first, second = (sum(curve) for curve in view["nll"])
    assert second < first < before, "the inner loop learns this pair"


def test_the_denoising_picture_shows_the_answer_that_is_given(sharp):
    """Each step commits the place of its largest confidence; the last leaves the answer."""
    example = data.make_examples("mv", 1, 96, 0)[0]
    states = evaluate.denoising_states(sharp, example)
    blocks = sample.plan_blocks(len(example.response))
    answer = sample.generate(sharp, torch.tensor([example.prompt]), blocks)[0].tolist()
    assert states[-1].proposal == answer
    for state in states:
        opened = [c for c, token in zip(state.confidence, state.before) if token == data.MASK]
        best = state.confidence.index(max(opened))
        assert [i for i, commits in enumerate(state.committed) if commits] == [best]


def test_sequential_losses_are_compared_at_equal_static_loss():
    """MemDLM has L_seq 1.5 at L_static .4, where Standard MDLM, with 1 at .2 and 3 at .6, has 2."""
    records = []
    for method, static, sequential in (
        ("base", 0.2, 1.0),
        ("mdlm", 0.6, 3.0),
        ("mdlm-0.0001", 0.6, 3.0),
        ("memdlm_train", 0.4, 1.5),
        ("mdlm_inference", 0.4, 9.0),
    ):
        record = {"method": method, "mask_ratio": 0.5, "seed": 0, "draw": 0}
        records.append(record | {"static": static, "sequential": sequential})
    assert report.sequential_at_equal_static(records).endswith("-0.500")


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


def test_differences_are_paired_by_seed_and_draw():
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
    known = ["[0, 1]", "4 draws", "2 examples", "cpu", "float32", torch.__version__, "surprise"]
    known += [f"| {row.title} |" for row in report.ROWS.values()]
    assert not [words for words in known if words not in text]


def test_an_evaluation_with_other_settings_leaves_the_run_alone(tmp_path, capsys):
    """Other tasks, lengths and samples go to another --out, which is asked for before any work. Its
    table is printed, too. Nothing of the run's own evaluation is touched."""
    before = stamps(finished())
    for flag in ("--samples 3", "--tasks mv", "--write-lr 0.1", "--steps 2"):
        said = refusal(capsys, "eval_niah", "--run", finished(), *ASKED, *flag.split())
        assert "--out" in said, flag
    flags = "--tasks mv --lengths 80 --memory-lengths 80 --samples 3 --bias-steps 3".split()
    found = evaluated(finished(), tmp_path, *flags, "--steps", 1)
    assert {(r["task"], r["length"], r["n"]) for r in found["niah"]} == {("mv", 80, 3)}
    assert len({record["mask_ratio"] for record in found["exposure_bias"]}) == 3
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert stamps(finished()) == before
