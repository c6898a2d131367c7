"""
test_structure.py: the walls of the house. Five core files that are read from top to bottom, each of
which knows those before it; the method in one stretch; lab/, which runs them; and nothing of
full_scale/ and exercises/ in any of these.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT, start

# Floor above floor: a file may import those on floors below its own.
FLOORS = [
    ("model", "data"),
    ("memdlm", "lab.tools"),
    ("sample",),
    ("eval_niah",),
    ("lab.variants",),
]
FLOORS += [("lab.training",), ("lab.report",), ("lab.pictures",), ("lab.ask",), ("lab.evaluate",)]
FLOORS += [("lab.tiny",)]
CORE = ("model", "data", "memdlm", "sample", "eval_niah")
LAB = tuple(name for floor in FLOORS for name in floor if name not in CORE)
OF_CORE = {"torch", "numpy", "tiktoken"} | {"math", "re", "zlib", "typing", "dataclasses"}
OF_CORE |= {"collections", *CORE}
DOOR = re.compile(
    r'\nif __name__ == "__main__":  # [^\n]+\n    from lab.tools import start\n\n'
    r'    start\("(\w+)"\)\n\Z'
)


def path_of(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


def text_of(name: str) -> str:
    """A file's text without the three lines that make a program of a library."""
    return DOOR.sub("", path_of(name).read_text(encoding="utf-8"))


TREES = {name: ast.parse(text_of(name)) for name in (*CORE, *LAB)}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported anywhere below a node: "math", "lab.tools", ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lab":
            yield from (f"lab.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """All functions and methods below a node."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", TREES)
def test_imports_run_down_only(name):
    """So there is no circle, and whoever reads a file needs none of those above it."""
    [floor] = [number for number, names in enumerate(FLOORS) if name in names]
    above = {other for names in FLOORS[floor:] for other in names} - {name}
    if name == "data":
        above -= {"model"}
    assert not above & {*imported(TREES[name])}, f"{name} must not need what stands above it"


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_a_library(name):
    """It computes: flags, files, progress bars and pictures are the business of lab/. A program
    ends in three lines that lead there; no other line of it does."""
    found = {module.partition(".")[0] for module in imported(TREES[name])}
    assert found <= OF_CORE, f"{name}.py imports {found - OF_CORE}"
    door = DOOR.search(path_of(name).read_text(encoding="utf-8"))
    assert (door and door[1]) == (name if name in ("memdlm", "sample", "eval_niah") else None)


def test_core_and_lab_import_nothing_of_full_scale_and_exercises():
    """Whoever deletes these folders keeps the rest, tests included: lab/tools.py names them in
    DOORS, as strings, and looks for them where a flag asks for it."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            assert module.partition(".")[0] not in ("full_scale", "exercises"), path
    late = [name for name, tree in TREES.items() if "import_module(" in ast.unparse(tree)]
    assert late == ["lab.tools"]
    assert {path.stem for path in (ROOT / "lab").glob("*.py")} == {n.partition(".")[2] for n in LAB}


def test_a_real_process_loads_only_what_it_needs_and_refuses_in_one_line(tmp_path):
    """matplotlib takes a second to load: no training needs it, and the evaluation loads it for its
    pictures alone. Refused, a process has one line on stderr (here: after the list of imports),
    nothing on stdout, and an exit code for scripts."""
    process = start("-X", "importtime", "eval_niah.py", "--run", tmp_path)
    output, errors = process.communicate(timeout=120)
    *imports, last = errors.splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "memdlm" in loaded
    assert not loaded & {"matplotlib", "full_scale", "exercises", "transformers", "peft"}
    assert (process.returncode, output) == (2, "")
    assert last.startswith(f"error: there is no run in {tmp_path}")


def test_no_program_needs_a_unix_or_a_console_for_every_character(monkeypatch):
    """Windows has no module `resource`: the peak of memory is then "-". A character that the
    console does not know becomes "?", and does not end the program."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    text = "import sys; sys.modules['resource'] = None; from lab.evaluate import report, tools; "
    text += r"tools.guarded(lambda: print('\u2192', report.number_text(tools.peak_memory('cpu'))))"
    output, errors = start("-c", text).communicate(timeout=120)
    assert (output, errors) == ("? -\n", "")


@pytest.mark.parametrize("name", TREES)
def test_files_and_functions_are_short(name):
    """350 lines a file, 340 in lab/, and 45 a function; most have 10 to 25."""
    lines = path_of(name).read_text(encoding="utf-8").count("\n")
    assert lines <= (350 if name in CORE else 340), f"{name} has {lines} lines"
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[name])}
    long = {function: count for function, count in long.items() if count > 45}
    assert not long, f"{name}: cut these into parts with names of their own: {long}"


def test_no_line_is_longer_than_100_columns():
    """In any Python file, comments and docstrings included."""
    folders, too_long = ("lab", "full_scale", "exercises", "assets", "tests"), []
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*ROOT.glob("*.py"), *paths]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                too_long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not too_long, f"wider than 100 columns: {too_long}"


def test_the_method_is_one_stretch():
    """From drawing an anchor to the optimizer's step, uninterrupted: what one reads beside the
    paper. It looks nothing up by name: what takes the place of a part of it is handed in."""
    top = [node for node in TREES["memdlm"].body if isinstance(node, ast.FunctionDef)]
    names = [function.name for function in top]
    first, last = names.index("draw_anchor"), names.index("train_step")
    parts = {"draw_pre_anchor", "init_fast", "inner_loop", "memdlm_loss", "memory_method"}
    assert parts <= set(names[first:last])
    assert top[last].end_lineno - top[first].lineno + 1 <= 175
    upper = {
        node.id for f in top[first : last + 1] for node in ast.walk(f) if isinstance(node, ast.Name)
    }
    assert not {name for name in upper if name.isupper() and name != "F"}, "a table is looked up"


def test_the_core_can_be_read_in_an_evening():
    """Do less, and do it once; never save lines by writing denser."""
    core, lab = (
        sum(path_of(name).read_text("utf-8").count("\n") for name in part) for part in (CORE, LAB)
    )
    assert core <= 1350, f"{core} lines in the five files"
    assert lab <= 1850, f"{lab} lines in lab/"
