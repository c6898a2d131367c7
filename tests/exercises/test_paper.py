"""
test_paper.py: exercises/paper.md tells the truth about the code. Each function that it names is
there, and names the place of the paper beside which it stands in the table.
"""

import ast
import re

import pytest
from running import ROOT

TEXT = (ROOT / "exercises" / "paper.md").read_text(encoding="utf-8")
NUMBERS = r"\d+(?:\.\d+)?(?:(?:-| to |, | and )\d+(?:\.\d+)?)*"


def labels(text: str) -> set[str]:
    """The places of the paper that a text names: "Eqs. 6-8" -> Eq. 6, Eq. 7, Eq. 8."""
    found = set()
    for kind, numbers in re.findall(rf"(Eq|Fig|Sec|Table)s?\.? ({NUMBERS})", text):
        parts = re.split(r", | and ", numbers)
        for part in parts:
            first, _, last = part.replace(" to ", "-").partition("-")
            if "." in first or not last:
                found.add(f"{kind} {first}")
            else:
                found |= {f"{kind} {number}" for number in range(int(first), int(last) + 1)}
    return found


def source_of(name: str) -> str:
    """A function, class or constant with the comment that stands above it."""
    module, _, what = name.rpartition(".")
    file = module.replace(".", "/") + ".py"
    path = next(place for place in (ROOT / file, ROOT / "lab" / file) if place.exists())
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if what in names:
            start = node.lineno - 1
            while start and lines[start - 1].startswith("#"):
                start -= 1
            return "\n".join(lines[start : node.end_lineno])
    pytest.fail(f"paper.md names {name}, which is not there")


def rows() -> list[tuple[str, str]]:
    """(place of the paper, function) of each row."""
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[0] not in ("paper", "---"):
            assert cells[4], f"no result: {line}"
            found += [(cells[0], name) for name in re.findall(r"`([a-z_.]+\.\w+)`", cells[2])]
    return found


@pytest.mark.parametrize(("place", "name"), rows())
def test_each_function_is_there_and_cites_its_place(place, name):
    cited, wanted = labels(source_of(name)), labels(place)
    missing = wanted - cited
    assert wanted, f"{place} is no place of the paper"
    assert not missing, f"{name} does not name {missing}; it names {sorted(cited)}"


def test_every_equation_table_and_figure_has_a_row():
    """Equations 1 to 10 but for the 5th, which is a definition by words; Tables 1 to 3; the figures
    with measurements, 3 to 11."""
    places = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| ")]
    named = labels(" ".join(places))
    wanted = {f"Eq {number}" for number in (1, 2, 3, 4, 6, 7, 8, 9, 10)}
    wanted |= {f"Table {number}" for number in (1, 2, 3)} | {f"Fig {n}" for n in range(3, 12)}
    assert not wanted - named
