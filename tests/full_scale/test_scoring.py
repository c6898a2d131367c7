"""
test_scoring.py: who knows the answer scores 1, who says nothing or guesses does not. That the rules
give the published scores, test_golden.py shows.
"""

import pytest
import torch
from commands import questions

from full_scale.drafts import Style
from full_scale.prompts import BENCHMARKS, Question, make_question
from full_scale.scoring import METRICS, log_likelihood, metrics_of

STYLE = Style(lambda text, prefix: list((text + prefix).encode()), qa=questions())


@pytest.mark.parametrize("task", BENCHMARKS)
def test_only_the_right_answer_scores(task):
    """The references score 1 (any of them where any will do), silence 0, and the question 0: it
    does not give the answer away."""
    for index in range(5):
        question = make_question(task, index, 4090, 0, STYLE)
        answer = ", ".join(question.references)
        if "ruler_qa" in task:
            answer = question.references[-1]
        for said, score in ((answer, 1), (f"It is {answer}.", 1), ("", 0), (question.asked, 0)):
            assert {METRICS[name](question, said) for name in metrics_of(task)} == {score}


@pytest.mark.parametrize(
    ("said", "babilong", "harness"),
    [
        ("The kitchen.", 1, 1),
        ("Before the office it was in the KITCHEN. Or in the garden?", 1, 1),
        ("In the kitchen or the garden.", 0, 1),
        ("In the garden. Then in the kitchen.", 0, 1),
        ("In the kitchen <example> in the garden", 1, 1),
        ("In the garden.", 0, 0),
    ],
)
def test_babilong_wants_one_label_in_the_first_statement(said, babilong, harness):
    """Labels that the question names are set aside; the harness's rule takes any mention."""
    asked = "Where was the milk before the office?"
    question = Question("babilong_qa3", [], 20, ("kitchen",), asked=asked)
    assert METRICS["babilong"](question, said) == babilong
    assert METRICS["harness"](question, said) == harness


@pytest.mark.parametrize(
    ("task", "target", "said", "score"),
    [
        ("qa7", "none", "None.", 1),
        ("qa7", "one", "None.", 0),
        ("qa7", "none", "one or none", 0),
        ("qa8", "apple,milk", "Milk and apple", 1),
        ("qa8", "apple,milk", "apple", 0),
        ("qa8", "apple", "apple, milk", 0),
        ("qa8", "nothing", "nothing", 1),
        ("qa10", "maybe", "Maybe yes.", 0),
        ("qa9", "no", "I do not know.", 1),
    ],
)
def test_babilong_counts_lists_and_hesitates(task, target, said, score):
    """Lists are sets. "none" is no "one", where the published rule finds both; but as in it, any
    letters count: "not" has a "no"."""
    question = Question(f"babilong_{task}", [], 20, (target,), asked="What is Mary carrying?")
    assert METRICS["babilong"](question, said) == score


def test_the_protocols_rule_comes_first():
    """It makes the score. RULER's rule is the same in both."""
    assert metrics_of("babilong_qa1", "original") == ["babilong", "harness"]
    assert metrics_of("babilong_qa1", "harness") == ["harness", "babilong"]
    assert metrics_of("ruler_vt", "harness") == metrics_of("ruler_vt") == ["ruler"]


def test_log_likelihood_is_the_loss_of_hidden_tokens_over_the_share(model):
    """Written out for three masks with plain forward passes; guidance changes the estimate."""
    x0 = torch.arange(3, 11)  # 3 tokens of prompt, 5 of answer
    masked = torch.zeros(3, 8, dtype=torch.bool)
    for row, places in enumerate(([3, 4, 5, 6, 7], [4, 7], [5])):
        masked[row, places] = True
    share = masked[:, 3:].double().mean(1)
    canvas = x0.expand(3, 8).masked_fill(masked, model.config.mask_id)
    with torch.no_grad():
        logp = model(canvas).log_softmax(-1).gather(2, x0.expand(3, 8)[..., None])[..., 0]
    found = log_likelihood(model, x0, 3, masked, share)
    expected = (logp * masked).sum(1) / share
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    guided = log_likelihood(model, x0, 3, masked, share, cfg_scale=1.0)
    assert not torch.allclose(found, guided)
