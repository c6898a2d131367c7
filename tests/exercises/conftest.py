"""
conftest.py: tests of the course itself, `python -m pytest tests/exercises`. They start many
processes, so that plain `python -m pytest` leaves them out. Without exercises/ there are none.
"""

from pathlib import Path

collect_ignore_glob = []
if not (Path(__file__).parents[2] / "exercises").exists():
    collect_ignore_glob = ["test_*.py"]
