"""
conftest.py: what the tests of full_scale/ share, beside the fixtures of tests/conftest.py.

    python -m pytest tests/full_scale [--golden DIR]
"""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # for `from backbones import ...` and `model`
pytest.register_assert_rewrite("replaying", "remaking")


def pytest_addoption(parser):
    folder = HERE.parent / "golden"
    help_text = "folder of records that test_golden.py replays"
    parser.addoption("--golden", default=folder, type=Path, help=help_text)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
