"""
sabotages.py: ten faults for teachers. Each is a fault that people really make, and each turns one
of the project's tests red, whose message names the cause.

    python exercises/sabotages.py                               the list, with the answers
    python exercises/sabotages.py causal_attention --out DIR    a copy of the project with it

Give the copy to a class: run `python -m pytest` in it, read the first red message, find the fault.
"""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from lab.tools import Parser, guarded
from model import UserError

ROOT = Path(__file__).resolve().parents[1]


class Sabotage(NamedTuple):
    """A fault, and what finds it."""

    what: str
    file: str
    edits: list[tuple[str, str]]  # what stands there, what stands there instead
    test: str  # the test that goes red
    message: str  # and a part of what it says


SABOTAGES = {
    "causal_attention": Sabotage(
        "attention sees the tokens before alone",
        "model.py",
        [("attn_mask=bias,", "attn_mask=bias, is_causal=bias is None,")],
        "tests/test_model.py::test_every_token_sees_the_ones_after_it",
        "is the attention causal?",
    ),
    "weight_missing": Sabotage(
        "the loss of Eq. 2 without its weight 1/t",
        "memdlm.py",
        [("    weight = 1 / (anchor.t + 1e-6)", "    weight = torch.ones_like(anchor.t)")],
        "tests/test_memory.py::test_the_loss_is_eq_2",
        "the weight w(t) = 1/t is missing",
    ),
    "memory_kept": Sabotage(
        "phi is carried over to the next batch",
        "memdlm.py",
        [
            (
                "    fast = init_fast(model, memory, memory.sets(len(batch.x0)), generator)\n"
                "    return memdlm_loss(",
                "    fast = KEPT[0] or init_fast(model, memory, memory.sets(len(batch.x0)), "
                "generator)\n"
                "    KEPT[0] = inner_loop(model, batch, stages, fast, memory)[0]\n"
                "    return memdlm_loss(",
            ),
            ("\n\ndef memory_method(", "\n\nKEPT = [None]\n\n\ndef memory_method("),
        ],
        "tests/test_outer.py::test_each_batch_starts_from_an_empty_memory",
        "Is phi carried over from the last batch",
    ),
    "answers_leak": Sabotage(
        "the memory at inference is written from the answer, too",
        "eval_niah.py",
        [
            (
                "            fast = sample.write_prompt(model, prompts, write, seed, numbers)\n",
                "            whole = torch.tensor([one.prompt + one.response for one in part])\n"
                "            fast = sample.write_prompt(model, whole, write, seed, numbers)\n",
            )
        ],
        "tests/test_runs.py::test_no_evaluation_sees_the_answers",
        "an answer was written into the memory",
    ),
    "ids_for_ranks": Sabotage(
        "commits the places whose id is small, and not those whose rank is",
        "sample.py",
        [("chosen = order.argsort(dim=1, stable=True) < quota", "chosen = order < quota")],
        "tests/test_sample.py::test_select_takes_the_most_confident_and_all_above_the_threshold",
        "are taken for ranks",
    ),
    "anchor_unmasked": Sabotage(
        "the pre-anchor is a draw of its own, and shows what the anchor masks",
        "memdlm.py",
        [("(chance + 2.0 * masked - 2.0 * ~maskable)", "(chance - 2.0 * ~maskable)")],
        "tests/test_memory.py::test_the_pre_anchor_contains_the_anchor_and_stays_in_the_response",
        "tokens that the anchor masks are visible in the pre-anchor",
    ),
    "clipped_together": Sabotage(
        "the inner gradients are clipped by the norm of all tensors",
        "memdlm.py",
        [
            ("zip(leaves, grads, (memory.norms or each_norm)(grads))", "zip(leaves, grads, norms)"),
            (
                "    for part, grad, norm in zip(leaves",
                "    total = sum(grad.flatten(1).square().sum(1) for grad in grads).sqrt()\n"
                "    norms = [total.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]\n"
                "    for part, grad, norm in zip(leaves",
            ),
        ],
        "tests/test_memory.py::test_each_tensor_of_each_set_is_clipped_alone",
        "all tensors are clipped together",
    ),
    "second_order": Sabotage(
        "the outer gradient goes through the inner loop",
        "memdlm.py",
        [
            ("part.detach().requires_grad_() for", "part.requires_grad_() for"),
            (
                "torch.autograd.grad(loss.sum(), leaves)",
                "torch.autograd.grad(loss.sum(), leaves, create_graph=True)",
            ),
            (" * scale * grad, part).detach()", " * scale * grad, part)"),
            (
                "    with torch.no_grad():  # the layers",
                "    with torch.enable_grad():  # the layers",
            ),
            ("s._replace(h=h.detach())", "s._replace(h=h)"),
        ],
        "tests/test_outer.py::test_the_outer_gradient_is_first_order",
        "it goes through the inner loop",
    ),
    "prompt_masked": Sabotage(
        "the prompt is masked like the answer",
        "memdlm.py",
        [("masked.to(maskable.device) & maskable)", "masked.to(maskable.device))")],
        "tests/test_memory.py::test_corruption_hides_response_tokens_and_nothing_else",
        "prompt tokens are masked",
    ),
    "scale_forgotten": Sabotage(
        "B A x is added without its factor alpha / r",
        "model.py",
        [("B.mT, alpha=scale)", "B.mT)")],
        "tests/test_model.py::test_lora_adds_scale_times_B_A_x_of_each_rows_set",
        "the factor alpha / r is forgotten",
    ),
}


def copy_project(out: Path) -> None:
    """The five files, lab/ and their tests, without exercises/ and full_scale/."""
    if ROOT in [out.resolve(), *out.resolve().parents]:
        raise UserError(f"--out {out} lies in the project itself: name a folder outside.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is no empty folder: name another one.")
    ignored = shutil.ignore_patterns("__pycache__", "full_scale", "exercises")
    shutil.copytree(ROOT / "tests", out / "tests", ignore=ignored, dirs_exist_ok=True)
    for folder in ("lab", "assets"):
        shutil.copytree(ROOT / folder, out / folder, ignore=ignored, dirs_exist_ok=True)
    names = ("pyproject.toml", "requirements.txt", "README.md")
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in names)):
        shutil.copy(path, out / path.name)


def sabotage(name: str, out: Path) -> None:
    """Writes a copy of the project with one fault."""
    copy_project(out)
    path = out / SABOTAGES[name].file
    text = path.read_text(encoding="utf-8")
    for old, new in SABOTAGES[name].edits:
        if text.count(old) != 1:
            raise UserError(f"{name}: {path.name} has changed: {old!r} is not there just once.")
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def run(arguments: list[str]) -> None:
    parser = Parser("Writes a copy of the project with one of ten faults.")
    parser.add_argument("name", nargs="?", choices=SABOTAGES, help="which; without it, the list")
    parser.add_argument("--out", type=Path, help="the folder for the copy")
    args = parser.parse_args(arguments)
    if args.name is None:
        for name, one in SABOTAGES.items():
            print(f"{name}: {one.what}\n    found by {one.test}: ... {one.message} ...")
    elif args.out is None:
        raise UserError("--out: name a folder for the copy.")
    else:
        sabotage(args.name, args.out)
        print(f"a copy with {args.name} is in {args.out}; run `python -m pytest` there.")


if __name__ == "__main__":
    guarded(lambda: run(sys.argv[1:]))
