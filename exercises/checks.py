"""
checks.py: `python -m pytest --student FILE`, the project's own tests on a student's functions.

Only the tests that are marked as one of a step (`@pytest.mark.step3`) are run. Those of a step that
is not written yet are skipped, which the summary says; the exit code is 0 only where every step
that was asked for is written and right.
"""

from collections import Counter
from pathlib import Path

import pytest

from exercises.plug import STEPS, plug
from model import UserError


def pytest_addoption(parser):
    parser.addoption("--student", type=Path, help="a file whose functions are put to the test")


def pytest_configure(config):
    """Before any test module is read, so that all of them meet the student's functions."""
    path = config.getoption("student")
    if path is None:
        return
    try:
        config.not_written = plug(path)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"


def step_of(item: pytest.Item) -> int | None:
    """The step that a test belongs to."""
    names = {mark.name for mark in item.iter_markers()}
    return next((number for number in STEPS if f"step{number}" in names), None)


def order_of(item: pytest.Item) -> tuple[int, bool]:
    """By steps, and within a step those marked `first=True` first: their messages name the usual
    mistakes."""
    number = step_of(item)
    return number, not item.get_closest_marker(f"step{number}").kwargs.get("first")


def pytest_collection_modifyitems(config, items):
    if config.getoption("student") is None:
        return
    config.tests_of = Counter(step_of(item) for item in items)  # before -k takes some away
    others = [item for item in items if step_of(item) is None]
    config.hook.pytest_deselected(items=others)
    items[:] = sorted((item for item in items if step_of(item)), key=order_of)
    for item in items:
        number = step_of(item)
        if number in config.not_written:
            item.add_marker(pytest.mark.skip(reason=f"step {number} is not written yet"))


def outcomes_of(reporter, number: int) -> Counter:
    """How many of a step's tests have passed, failed and been skipped."""
    counts = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        reports = reporter.stats.get(outcome, [])
        marks = [getattr(report, "keywords", ()) for report in reports]  # an import error has none
        counts[outcome] = sum(f"step{number}" in names for names in marks)
    return counts


def pytest_terminal_summary(terminalreporter, config):
    """A line for each step that was asked for."""
    if config.getoption("student") is None:
        return
    terminalreporter.section(str(config.getoption("student")))
    for number, step in STEPS.items():
        counts = outcomes_of(terminalreporter, number)
        wrong = counts["failed"] + counts["error"]
        if number in config.not_written and counts["skipped"]:
            told = f"not written yet: {', '.join(config.not_written[number])}"
        elif wrong:
            told = f"{wrong} of {sum(counts.values())} tests fail; begin with the first one above"
        elif counts["passed"]:
            told = f"right, {counts['passed']} tests"
            named = any("::" in path or path.endswith(".py") for path in config.args)
            if named or counts["passed"] < config.tests_of[number]:
                told = f"right so far, {counts['passed']} of {config.tests_of[number]} tests"
        else:
            continue  # not asked for
        terminalreporter.write_line(f"step {number}, {step.title}: {told}")
    asked = any(outcomes_of(terminalreporter, number).total() for number in STEPS)
    if not asked and not config.option.collectonly:
        terminalreporter.write_line("no test of a step was asked for: -k step1 to -k step7")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A step that is not written is not passed."""
    if session.config.getoption("student") is None or exitstatus != pytest.ExitCode.OK:
        return
    if any(step_of(item) in session.config.not_written for item in session.items):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
