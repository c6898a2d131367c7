"""
scoring.py: how answers are scored: the published rules of RULER and BABILong, and the likelihood.

  metric   | whose rule                           | the score of an answer
  ruler    | RULER's, and lm-evaluation-harness's | the share of references it contains
  any      | theirs, for question answering       | 1 if it contains any of the references
  babilong | BABILong's own                       | 1 if its first statement names just the target
  harness  | the harness's (and paper's) BABILong | 1 if the target is anywhere in it

RULER: arXiv 2404.06654; BABILong: arXiv 2406.10149; the likelihood is LLaDA's, arXiv 2502.09992.
"""

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval_niah import string_match_all
from full_scale.babilong import NUMBERS, OBJECTS, PEOPLE, PLACES
from full_scale.documents import DOCUMENTS
from full_scale.prompts import Question
from memdlm import corrupt
from model import Transformer, UserError
from sample import guided_logits

# task -> all of its possible answers
BABILONG_LABELS = {task: PLACES for task in ("qa1", "qa2", "qa3", "qa4")}
BABILONG_LABELS |= {"qa5": sorted(PEOPLE["qa5"]) + OBJECTS, "qa6": ["no", "yes"]}
BABILONG_LABELS |= {"qa7": NUMBERS, "qa8": [*OBJECTS, "nothing"], "qa9": ["no", "yes"]}
BABILONG_LABELS["qa10"] = ["maybe", "no", "yes"]


def clean(prediction: str) -> str:
    """RULER's clean-up: control characters become line ends; white space around it all goes."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_part(references: Sequence[str], prediction: str) -> float:
    """RULER's rule for question answering: 1 if any of the references is found."""
    prediction = clean(prediction).lower()
    return float(any(reference.lower() in prediction for reference in references))


def first_statement(output: str) -> str:
    """BABILong's clean-up: lower case, up to the first full stop or the next piece of a prompt."""
    statement = output.lower().split(".")[0]
    return statement.split("<context>")[0].split("<example>")[0]


def babilong_correct(task: str, question: str, target: str, output: str) -> bool:
    """BABILong's own rule: the first statement names just the target, be it within another word.

    Labels that the question names are set aside. A target may be a list: "apple,milk". The rule
    finds "one" in "none", too, and so no right "none" in qa7; ours looks for longer labels first.
    """
    labels = [label.lower() for label in BABILONG_LABELS[task]]
    statement, named = first_statement(output), set()
    for label in sorted(labels, key=len, reverse=True):
        if label in statement:
            named.add(label)
            statement = statement.replace(label, "|")
    asked = {label for label in labels if label in question.lower()}
    targets = [target.lower()]
    if "," in target and len(target) > 3:
        targets = [part.strip() for part in target.lower().split(",")]
    return named - asked == set(targets)


def babilong_accuracy(target: str, output: str) -> float:
    """The harness's rule, which the paper reports: the target is somewhere in the output."""
    return float(target.lower() in clean(output).lower())


def babilong_metric(question: Question, prediction: str) -> float:
    task = question.task.removeprefix("babilong_")
    return float(babilong_correct(task, question.asked, question.references[0], prediction))


# name in results.json -> (question, prediction) -> score from 0 to 1
METRICS: dict[str, Callable[[Question, str], float]] = {
    "ruler": lambda question, said: string_match_all(question.references, clean(said)),
    "any": lambda question, said: string_match_part(question.references, said),
    "babilong": babilong_metric,
    "harness": lambda question, said: babilong_accuracy(question.references[0], said),
}


def metrics_of(task: str, protocol: str = "original") -> list[str]:
    """The names of a task's metrics. The first is the score, by the rule of the protocol."""
    if task.startswith("babilong"):
        return ["babilong", "harness"] if protocol == "original" else ["harness", "babilong"]
    return ["any"] if task in DOCUMENTS else ["ruler"]  # NVIDIA's rules and the harness's are alike


@torch.no_grad()
def log_likelihood(
    model: Transformer,
    x0: Tensor,
    prompt: int,
    masked: Tensor,
    share: Tensor,
    cfg_scale=0.0,
    fast=None,
) -> Tensor:
    """Estimates of log p(answer | prompt), one for each of n masks; LLaDA takes their mean.

    x0 (T,): `prompt` tokens, then the answer. masked (n, T) bool: what each mask hides of the
    answer; share (n,): how much of it. Returns minus the sum of the hidden tokens' losses / share.
    """
    x0 = x0.expand_as(masked)
    canvas = corrupt(x0, masked, model.config.mask_id)
    given = (torch.arange(x0.shape[1], device=x0.device) < prompt).expand_as(masked)
    logits = guided_logits(model, canvas, given, fast, cfg_scale, None, masked)  # (M, V)
    if not logits.isfinite().all():
        raise UserError("the model's predictions are not finite: look at its weights and settings.")
    nll = F.cross_entropy(logits, x0[masked], reduction="none")  # (M,)
    rows = masked.nonzero()[:, 0]  # (M,) the mask that each hidden token belongs to
    return -nll.new_zeros(len(masked)).index_add(0, rows, nll) / share
