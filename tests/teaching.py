"""
teaching.py: comparisons whose failure teaches: what was expected, what came, and where such a
number usually comes from. A test that knows the usual mistakes computes what each of them would
give; where that is just what came, the message names the mistake.
"""

import pytest
import torch

TIGHT = {"rtol": 0.0, "atol": 1e-9}


def short(value: torch.Tensor) -> str:
    """A number, or the first few of a tensor."""
    numbers = [f"{number:.6g}" for number in value.detach().flatten()[:4].tolist()]
    if value.dim() == 0:
        return numbers[0]
    more = ", ..." if value.numel() > 4 else ""
    return f"[{', '.join(numbers)}{more}] of shape {tuple(value.shape)}"


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are one to 1e-9."""
    return got.shape == expected.shape and torch.allclose(got.to(expected), expected, **TIGHT)


def assert_same(
    got, expected: torch.Tensor, what: str, mistakes: dict | None = None, hint=""
) -> None:
    """Fails with a message that teaches. mistakes: a sentence -> what would come in that case."""
    __tracebackhide__ = True
    if not isinstance(got, torch.Tensor):
        pytest.fail(f"{what}: expected a tensor, got {type(got).__name__}. {hint}")
    if equal(got, expected):
        return
    text = f"{what}: expected {short(expected)}, got {short(got)}."
    for sentence, value in (mistakes or {}).items():
        if equal(got, value):
            text += f" This is what comes out where {sentence}."
    if got.shape == expected.shape and got.dim() > 0:
        worst = (got - expected).abs().argmax()
        pair = f"expected {expected.flatten()[worst]:.6g}, got {got.flatten()[worst]:.6g}"
        text += f" The largest difference: {pair}."
    pytest.fail(f"{text} {hint}")
