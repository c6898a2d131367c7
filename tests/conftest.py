"""
conftest.py: what the tests share. Everything is tiny and random, and the model is in float64: two
ways of computing one thing must then agree to 1e-9, and no mistake can hide behind rounding.
"""

from pathlib import Path

import pytest
import torch
from slow import SMALL

import data
from memdlm import Anchor, Memory, Stage, two_stages
from model import Config, Transformer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def pytest_addoption(pluginmanager):
    """--student, where the exercises are (exercises/checks.py)."""
    if (ROOT / "exercises").exists():
        pluginmanager.import_plugin("exercises.checks")


def pytest_terminal_summary(terminalreporter, config):
    """Plain `python -m pytest` leaves tests/full_scale out: it says how to run them."""
    named = any("full_scale" in argument for argument in config.args)
    there = (Path(__file__).parent / "full_scale").exists() and (ROOT / "full_scale").exists()
    if there and not named and not config.getoption("student", None):
        install = "pip install -r full_scale/requirements.txt -r tests/requirements.txt"
        run = "python -m pytest tests/full_scale"
        terminalreporter.write_line(f"full-scale tests: {install} && {run}")


def build_model(dtype: torch.dtype = torch.float64, seed: int = 0, **sizes) -> Transformer:
    """A small model with every weight random. `init_weights` starts with outputs of zero, where
    many tests would hold by accident: a layer that adds nothing cannot be wrong."""
    small = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48}
    model = Transformer(Config(data.VOCAB_SIZE, data.MASK, **{**small, "canon": 3, **sizes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif name == "embedding.weight":
                p.copy_(noise)
            elif "taps" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(1.5 * p.shape[-1] ** -0.5 * noise)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def make_model():
    return build_model


@pytest.fixture
def model() -> Transformer:
    return build_model()


@pytest.fixture
def sharp() -> Transformer:
    """A model that is sure of itself: else every probability would be near 1 / vocabulary."""
    model = build_model()
    with torch.no_grad():
        model.output.weight.mul_(3.0)
    return model


@pytest.fixture
def memory() -> Memory:
    """Two of the four layers adapted, one set for each sample, no clipping."""
    return Memory(**SMALL)


@pytest.fixture
def batch() -> data.Batch:
    """Four rows of twelve tokens with prompts of 2, 3, 4 and 5: 10, 9, 8 and 7 are maskable."""
    x0 = torch.randint(0, data.EOS, (4, 12), generator=torch.Generator().manual_seed(1))
    return data.Batch(x0, torch.arange(12) >= torch.tensor([[2], [3], [4], [5]]), None)


@pytest.fixture
def anchor(batch) -> Anchor:
    """A fixed draw that masks 3, 2, 5 and 1 of the maskable tokens."""
    masked = torch.zeros_like(batch.maskable)
    for row, places in enumerate(([2, 6, 11], [3, 9], [4, 5, 7, 10, 11], [8])):
        masked[row, places] = True
    return Anchor(torch.tensor([0.31, 0.22, 0.6, 0.15]), masked)


@pytest.fixture
def stages(batch, anchor) -> list[Stage]:
    """The paper's two stages: pre-anchor, anchor."""
    return two_stages(anchor, batch.maskable, Memory(), torch.Generator().manual_seed(5))
