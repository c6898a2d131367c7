"""
conftest.py: what the tests of full_scale/ share, beside the fixtures of tests/conftest.py.

    python -m pytest tests/full_scale [--golden DIR]
"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # for `from backbones import ...` and `model`
pytest.register_assert_rewrite("replaying", "remaking")


def pytest_addoption(parser):
    help_text = "folder of records that test_golden.py replays"
    parser.addoption("--golden", default=HERE.parent / "golden", type=Path, help=help_text)
