"""
conftest.py: what the tests share. Everything is tiny and random; the model is in float64, so that two ways of computing
one thing must agree to 1e-9 and a mistake cannot hide behind rounding.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch

import data
from memdlm import Anchor, Memory
from model import Config, Transformer

torch.set_num_threads(1)
pytest_plugins = ["running"]
pytest.register_assert_rewrite("replaying", "remaking")


def pytest_addoption(parser):
    default = Path(__file__).parent / "golden"
    parser.addoption("--golden", default=default, type=Path, help="folder of records that test_golden.py replays")


def build_model(dtype: torch.dtype = torch.float64, seed: int = 0, **sizes) -> Transformer:
    """A small model with every weight random. `init_weights` starts with outputs of zero, where many tests would hold by
    accident: a layer that adds nothing cannot be wrong."""
    sizes = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48, "canon": 3} | sizes
    model, generator = Transformer(Config(data.VOCAB_SIZE, data.MASK, **sizes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif name == "embedding.weight":
                p.copy_(noise)
            else:
                p.copy_(noise * (0.3 if "taps" in name else 1.5 * p.shape[-1] ** -0.5))
    return model.to(dtype).eval()


def merge_fast(model: Transformer, fast, index: int) -> dict:
    """Set `index` of the fast weights written into the matrices: {"layers.3.mlp.gate.weight": W + scale * B A, ...}.

    Used with torch.func.functional_call, this is the memory's definition, without any of the code that makes it fast.
    """
    return {
        f"{name}.weight": model.get_parameter(f"{name}.weight") + fast.scale * B[index] @ A[index]
        for name, (A, B) in fast.weights.items()
    }


@pytest.fixture(scope="session")
def make_model():
    return build_model


@pytest.fixture(scope="session")
def merged():
    return merge_fast


@pytest.fixture
def model() -> Transformer:
    return build_model()


@pytest.fixture
def memory() -> Memory:
    """Half of the four layers adapted, one set per sample, clipping off: the tests that need it switch it on."""
    return Memory(rank=3, alpha=6.0, lr=0.3, clip=0.0, fraction=0.5, scope="sample")


@pytest.fixture
def batch() -> data.Batch:
    """Four rows of twelve tokens whose prompts are 2, 3, 4 and 5 tokens long: 10, 9, 8 and 7 tokens are maskable."""
    x0 = torch.randint(0, data.EOS, (4, 12), generator=torch.Generator().manual_seed(1))
    return data.Batch(x0, torch.arange(12)[None] >= torch.tensor([[2], [3], [4], [5]]), None)


@pytest.fixture
def anchor(batch) -> Anchor:
    """A fixed draw that masks 3, 2, 5 and 1 of the maskable tokens."""
    masked = torch.zeros_like(batch.maskable)
    for row, places in enumerate(([2, 6, 11], [3, 9], [4, 5, 7, 10, 11], [8])):
        masked[row, places] = True
    return Anchor(torch.tensor([0.31, 0.22, 0.6, 0.15]), masked)
