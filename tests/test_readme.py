"""
test_readme.py: the README's results are those of the run whose results.json lies in assets/.
"""

import re

from running import ROOT, start

from lab import report
from lab.tools import read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = read_json(ROOT / "assets" / "results.json")


def short(text: str) -> str:
    """Numbers as the README prints them: without a zero before the point."""
    return re.sub(r"\b0\.", ".", text)


def test_the_library_example_runs_as_it_stands():
    """The README's lines of Python take three steps and print an answer."""
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = start("-c", example)
    output, errors = done.communicate(timeout=60)
    assert (done.returncode, errors) == (0, "")
    assert output.strip(), "no answer was printed"


def rows(table: str) -> dict[str, list[str]]:
    """A markdown table: the first cell of each line -> the others."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_the_main_table_is_that_of_the_recorded_run():
    """Every number of the table under Results: learnt and kept, with their intervals, made again
    from the recorded scores and losses."""
    printed, section = rows(README.partition("## Results")[2]), 0
    for name, cells in rows(report.frontier_table(RESULTS["frontier"])).items():
        if name not in ("frontier", "---", "difference at equal learnt loss"):
            assert printed[name] == [short(cell) for cell in cells], f"README, Results: {name}"
            section += 1
    assert section == 4


def test_the_headline_is_that_of_the_recorded_run():
    """The comparison that was chosen beforehand, and its interval, are computed from the frontier,
    and the README says them where it begins and under Results."""
    headline = report.headline_of(RESULTS["frontier"])
    assert headline == RESULTS["headline"]
    low, high = headline["ci95"]
    said = short(f"{headline['difference']:+.3f} [{low:.3f}, {high:.3f}]")
    assert re.sub(r"\s+", " ", README).count(said) == 2, f"the README should say {said} twice"


def test_kept_scores_are_means_of_the_recorded_cells():
    """The frontier's scores are those of the cells: nothing in between was touched by hand."""
    for point in report.matching(RESULTS["frontier"], method="memdlm"):
        where = {"seed": point["seed"], "draw": point["draw"], "method": "memdlm_train"}
        for times, score in point["kept"].items():
            length = 96 * int(times.removesuffix("x"))
            found = report.matching(RESULTS["niah"], length=length, **where)
            assert report.mean_of(found, "score") == score
