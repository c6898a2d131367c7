"""
test_evaluation.py: the two measurements, exposure bias (Sec. 2.2) and scores. The walk compares like with like, and the
intervals are those of the textbooks.
"""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from slow import prompts_of, seeded, sharpened

import data
import eval_niah
from memdlm import Memory
from sample import Write


@pytest.fixture
def sharp(make_model):
    return sharpened(make_model())


# ---- exposure bias (Sec. 2.2) ----------------------------------------------------------------------------------------------


class Stub:
    """Stands for a model whose predictions are known: `predict` maps ids (B, T) to logits (B, T, V)."""

    config = SimpleNamespace(layers=0, mask_id=data.MASK)

    def __init__(self, predict):
        self.predict = predict

    def embedding(self, ids):
        return ids

    def run(self, h, start, stop, attention_mask=None, fast=None):
        return self.predict(h)

    def read(self, h, start, where, attention_mask=None, fast=None):
        return self.run(h, start, 0)[where]

    def head(self, h):
        return h


def walk_inputs(rows: int = 3, prompt: int = 4, n: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0 = prompts_of(rows, prompt + n)
    response = (torch.arange(prompt + n) >= prompt).expand(rows, -1)
    return x0, response, torch.rand(x0.shape, generator=seeded(8))


def truth_logits(x0: torch.Tensor, height: float) -> torch.Tensor:
    return height * torch.nn.functional.one_hot(x0, data.VOCAB_SIZE).float()


@pytest.mark.parametrize(("n", "steps"), [(10, 5), (10, 8), (3, 8), (12, 1)])
def test_static_and_sequential_states_mask_the_same_number(sharp, n, steps):
    """R_EB compares losses at one noise level: both states must hide max(1, int(n * ratio)) tokens in every row. The static
    state shows true tokens; no state hides the prompt; both start all-masked and get less and less masked."""
    x0, response, order = walk_inputs(n=n)
    seen = []
    hook = sharp.embedding.register_forward_hook(lambda _, args, __: seen.append(args[0].clone()))
    curve = eval_niah.exposure_walk(sharp, x0, response, order, steps, None)
    hook.remove()
    assert [ratio for ratio, *_ in curve] == pytest.approx([1 - step / steps for step in range(steps)])
    static, sequential = seen[::2], seen[1::2]
    for (ratio, *_), a, b in zip(curve, static, sequential):
        expected = [max(1, round(n * ratio * steps) // steps)] * 3
        assert (a == data.MASK).sum(1).tolist() == expected
        assert (b == data.MASK).sum(1).tolist() == expected
        assert torch.equal(a[a != data.MASK], x0[a != data.MASK])
        assert torch.equal(b[~response], x0[~response])
    for states in (static, sequential):
        for before, after in pairwise(states):
            assert not ((after == data.MASK) & (before != data.MASK)).any(), "a visible token was hidden again"


def test_all_masked_static_equals_sequential(sharp):
    """At ratio 1 nothing of the answer is visible, so both are the same state and R_EB = 1 by definition; further on, a
    random model's own tokens are wrong and the two differ."""
    x0, response, order = walk_inputs()
    curve = eval_niah.exposure_walk(sharp, x0, response, order, 5, None)
    assert torch.equal(curve[0][1], curve[0][2])
    assert not any(torch.allclose(static, sequential) for _, static, sequential in curve[1:])


def test_static_loss_is_the_mean_nll_of_the_hidden_tokens(sharp):
    """Eq. 3, row by row, without the weight 1/t: what exactly the curves show."""
    x0, response, order = walk_inputs()
    _, static, _ = eval_niah.exposure_walk(sharp, x0, response, order, 2, None)[1]
    for row in range(3):
        places = [p for p in order[row].argsort().tolist() if response[row, p]][:5]
        ids = x0[row].clone()
        ids[places] = data.MASK
        with torch.no_grad():
            logp = sharp(ids[None])[0].log_softmax(-1)
        assert static[row].item() == pytest.approx(-sum(logp[p, x0[row, p]].item() for p in places) / 5, rel=1e-5)


def test_a_model_that_knows_the_answer_has_no_exposure_bias():
    """It commits true tokens only, so its own states are as good as the true ones: R_EB = 1 at every ratio, and its loss is
    the -log p that it was given."""
    x0, response, order = walk_inputs()
    height = 8.0
    knows = Stub(lambda ids: truth_logits(x0, height))
    nll = math.log(math.exp(height) + data.VOCAB_SIZE - 1) - height
    for _, static, sequential in eval_niah.exposure_walk(knows, x0, response, order, 5, None):
        torch.testing.assert_close(static, torch.full((3,), nll), rtol=0, atol=1e-5)
        torch.testing.assert_close(sequential, static)


def test_a_model_led_astray_by_its_own_mistake_has_exposure_bias():
    """It knows the answer, but is surest of one wrong token, and lost as soon as it sees one. Its static loss stays low, its
    sequential loss rises to that of pure guessing. Fails when the walk shows it true tokens instead of its own."""
    x0, response, order = walk_inputs()
    place = 9
    wrong = (x0[:, place] + 1) % data.EOS

    def predict(ids: torch.Tensor) -> torch.Tensor:
        lost = ((ids != x0) & (ids != data.MASK)).any(1)
        logits = truth_logits(x0, 8.0)
        logits[:, place] = 0
        logits[torch.arange(3), place, wrong] = 20.0
        return torch.where(lost[:, None, None], 0.0, logits)

    curve = eval_niah.exposure_walk(Stub(predict), x0, response, order, 10, None)
    for *_, sequential in curve[1:]:
        torch.testing.assert_close(sequential, torch.full((3,), math.log(data.VOCAB_SIZE)), rtol=0, atol=1e-5)
    rank = order.masked_fill(~response, 2.0).argsort(dim=1).argsort(dim=1)[:, place]
    for step, (_, static, _) in enumerate(curve):
        hidden = rank < 10 - step  # once the hard token is visible, the rest is easy
        assert (static[~hidden] < 0.2).all()
    assert not hidden.all(), "the hard token is never shown: choose another seed"


def test_exposure_ratio_is_against_the_static_loss_without_memory(make_model):
    """Both MemDLM rows share one denominator, the memory-free static loss; with its own, a memory that lowers both losses
    would look as if it had changed nothing (or the reverse)."""
    models = {"memdlm": make_model(torch.float32), "mdlm": make_model(torch.float32, seed=1)}
    write = Write("surprise", Memory(rank=3, alpha=6.0, lr=1.0, fraction=0.5, scope="sample"), window=32)
    records = eval_niah.exposure_bias(models, ["mv", "cwe"], 64, 2, 0, write, steps=3)
    by = {(r["method"], round(r["mask_ratio"], 3)): r for r in records}
    assert {method for method, _ in by} == {"mdlm", "memdlm_train", "memdlm_train_inference"}
    assert len(by) == len(records) == 9
    for (method, ratio), r in by.items():
        denominator = by["mdlm" if method == "mdlm" else "memdlm_train", ratio]["static"]
        assert r["ratio"] == pytest.approx(r["sequential"] / denominator)
    for method in ("mdlm", "memdlm_train"):
        assert by[method, 1.0]["ratio"] == 1
    assert by["memdlm_train_inference", 1.0]["static"] != by["memdlm_train", 1.0]["static"]


# ---- scores and intervals --------------------------------------------------------------------------------------------------


def test_score_cells_make_one_record_per_method_task_and_length(make_model):
    """Rows without a checkpoint are left out, and the two MemDLM rows come from one model: with the memory and without."""
    write = Write("surprise", Memory(rank=3, alpha=6.0, lr=1.0, fraction=0.5, scope="sample"), window=32)
    records = eval_niah.score_cells({"memdlm": make_model(torch.float32)}, ["cwe", "mv"], [64, 72], 2, 0, write)
    cells = {(r["method"], r["task"], r["length"]) for r in records}
    methods = ("memdlm_train", "memdlm_train_inference")
    assert cells == {(m, t, n) for m in methods for t in ("cwe", "mv") for n in (64, 72)}
    assert len(records) == 8
    assert all(r["ci95"][0] <= r["score"] <= r["ci95"][1] for r in records)


@pytest.mark.parametrize(
    ("mean", "n", "low", "high"),
    [(0.5, 10, 0.23659, 0.76341), (0.0, 10, 0.0, 0.27754), (1.0, 10, 0.72246, 1.0), (0.9, 100, 0.82563, 0.94477)],
)
def test_wilson_interval_equals_known_values(mean, n, low, high):
    """Published values of Wilson's score interval. Unlike mean ± 1.96 s it neither leaves [0, 1] nor vanishes at 0 and 1."""
    assert eval_niah.wilson_interval(mean, n) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [([1, 2, 3, 4, 5], 3.0, 1.9632), ([0, 1], 0.5, 6.3531), ([2.0, 2.0, 2.0], 2.0, 0.0), ([7.0], 7.0, math.inf)],
)
def test_t_interval_equals_known_values(values, mean, half):
    """Student's t over seeds: quantile 2.776 for five of them, 12.706 for two, and no interval at all for one."""
    assert eval_niah.t_interval(values) == pytest.approx((mean, half), abs=2e-3)


def scored(task: str, length: int, score: float | None, seed: int = 0, method: str = "base") -> dict:
    record = {"method": method, "task": task, "length": length, "n": 4, "score": score, "seed": seed}
    return record | {"ci95": None if score is None else [score / 2, 1.0]}


def test_babilong_has_one_number_more_but_counts_once_in_the_mean():
    """The headline is the mean of its tasks; the mean over all tasks is over the tasks. What has no score makes neither."""
    scores = {("babilong_qa1", 64): 0.5, ("babilong_qa2", 64): 0.25, ("ruler_vt", 64): 0.0}
    records = [scored(task, length, score) for (task, length), score in scores.items()]
    records += [scored(task, 96, None if task == "babilong_qa2" else 1.0) for task, _ in scores]
    header, _, line = eval_niah.score_table({"niah": records}).split("\n")
    tasks = "babilong_qa1 {0} | babilong_qa2 {0} | ruler_vt {0} | babilong {0}"
    assert header == f"| method | {tasks.format(64)} | {tasks.format(96)} | mean 64 | mean 96 |"
    assert line == "| Base | 0.50 | 0.25 | 0.00 | 0.38 | 1.00 | - | 1.00 | - | **0.250** | **-** |"


def test_pictures_over_length_show_the_mean_over_seeds():
    """With Student's interval, which ends at 0 and 1; a single seed keeps the interval over its questions."""
    records = [scored("vt", 64, 0.25, 0), scored("vt", 64, 0.75, 1), scored("vt", 96, 0.5, 0), scored("vt", 96, None, 1)]
    both, one = eval_niah.over_seeds(records)
    assert (both["score"], both["ci95"], both["length"]) == (0.5, [0, 1], 64)
    assert (one["score"], one["ci95"], one["length"]) == (0.5, [0.25, 1], 96)


def test_the_deepest_needle_is_in_the_last_fifth():
    """Depth 1 is the end of the haystack, not a sixth bin; needles among other needles, and tasks without a depth, are in
    none."""
    row, predictions = eval_niah.Row("base", "base", None), eval_niah.Predictions()
    cell, *others = (eval_niah.Cell(task, 64, 0, [[0], [1], [2]], None) for task in ("niah_single_1", "niah_multikey_2", "mv"))
    for i, (depth, score) in enumerate([(0.0, 1.0), (0.8, 0.0), (1.0, 1.0)]):
        predictions.add(row, cell, [i], [{"depth": depth, "scores": {"ruler": score}}])
        predictions.add(row, others[0], [i], [{"depth": 0.5, "scores": {"ruler": 1.0}}])
        predictions.add(row, others[1], [i], [{"depth": None, "scores": {"ruler": 1.0}}])
    base = {"method": "base", "length": 64}
    wanted = [base | {"depth": 0, "score": 1, "n": 1}, base | {"depth": 4, "score": 0.5, "n": 2}]
    assert eval_niah.depth_records([row], [cell, *others], predictions) == wanted


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_measured_noise_levels_cover_0_to_1_however_examples_are_batched(size):
    """Six examples have t = 1/12, 3/12 ... 11/12, each the same one in every batching: measurements of runs with different
    batch sizes, or at different steps, are then comparable."""
    everywhere = torch.ones(6, 5, dtype=torch.bool)
    batch = data.Batch(torch.zeros(6, 5, dtype=torch.long), everywhere, None)
    cut = [data.Batch(batch.x0[i : i + size], batch.maskable[i : i + size], None) for i in range(0, 6, size)]
    t = torch.cat([anchor.t for anchor in eval_niah.stratified_anchors(cut, 3)])
    assert torch.equal(t, eval_niah.stratified_anchors([batch], 3)[0].t)
    torch.testing.assert_close(t.sort()[0], (torch.arange(6) + 0.5) / 6)
