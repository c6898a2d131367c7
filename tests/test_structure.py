"""
test_structure.py: the walls of the house. Five core files that are read from top to bottom, each of
which knows those before it; the method in one stretch; and nothing of full_scale/ in any of them.
"""

import ast

import pytest
from running import ROOT, start

CORE = ("model", "data", "memdlm", "sample", "eval_niah")  # each may import those before it
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in CORE}


def imported(tree: ast.AST) -> list[str]:
    """The top-level names of the modules that are imported anywhere below a node."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return [module.partition(".")[0] for module in modules]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """All functions and methods below a node."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", CORE)
def test_imports_run_down_only(name):
    """model <- data <- memdlm <- sample <- eval_niah. The one import that goes up stands in
    memdlm.py's `run`, which hands its finished folder to the evaluation."""
    up = [module for module in imported(TREES[name]) if module in CORE[CORE.index(name) :]]
    handing_over = [f.name for f in functions(TREES[name]) if "eval_niah" in imported(f)]
    wanted = (["eval_niah"], ["run"]) if name == "memdlm" else ([], [])
    assert (up, handing_over) == wanted, f"{name}.py imports {up}, which must be able to import it"


def test_core_imports_nothing_of_full_scale():
    """Whoever deletes full_scale/ keeps a working core, tests included. The one place that looks
    for it is data.start, where --backbone was typed."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        assert "full_scale" not in imported(ast.parse(path.read_text(encoding="utf-8"))), path
    late = {"data": ["start"], "memdlm": ["run"]}  # --backbone: full_scale/; --student: exercises/
    for name, tree in TREES.items():
        loading = [node for node in tree.body if "import_module(" in ast.unparse(node)]
        assert [node.name for node in loading] == late.get(name, [])


def test_a_real_process_loads_only_what_it_needs_and_refuses_in_one_line(tmp_path):
    """matplotlib takes a second to load: no training needs it, and the evaluation loads it for its
    pictures alone. Refused, a process has one line on stderr (here: after the list of imports),
    nothing on stdout, and an exit code for scripts."""
    for name in CORE[:-1]:
        assert "matplotlib" not in imported(TREES[name]), f"{name}.py draws"
    process = start("-X", "importtime", "eval_niah.py", "--run", tmp_path)
    output, errors = process.communicate(timeout=120)
    *imports, last = errors.splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "memdlm" in loaded
    assert not loaded & {"matplotlib", "full_scale", "transformers", "peft"}
    assert (process.returncode, output) == (2, "")
    assert last.startswith(f"error: there is no run in {tmp_path}")


@pytest.mark.parametrize("name", CORE)
def test_no_function_is_longer_than_a_screen(name):
    """45 lines; most have 10 to 25."""
    lines = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[name])}
    too_long = {function: count for function, count in lines.items() if count > 45}
    assert not too_long, f"{name}.py: cut these into parts with names of their own: {too_long}"


def test_no_line_is_longer_than_100_columns():
    """In any Python file, comments and docstrings included."""
    folders, too_long = ("full_scale", "exercises", "assets", "tests"), []
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*ROOT.glob("*.py"), *paths]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                too_long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not too_long, f"wider than 100 columns: {too_long}"


def test_the_method_is_one_stretch():
    """From drawing an anchor to the optimizer's step, uninterrupted: what one reads beside the
    paper. Variants, training loop and command line come after it."""
    top = [node for node in TREES["memdlm"].body if isinstance(node, ast.FunctionDef)]
    names = [function.name for function in top]
    first, last = names.index("draw_anchor"), names.index("train_step")
    assert {"draw_pre_anchor", "init_fast", "inner_loop", "memdlm_loss"} <= set(names[first:last])
    assert top[last].end_lineno - top[first].lineno + 1 <= 190


def test_the_core_can_be_read_in_an_evening():
    """3,050 lines, a sixth of them pictures and tables. Do less, and do it once; never save lines
    by writing denser."""
    lines = {name: (ROOT / f"{name}.py").read_text("utf-8").count("\n") for name in CORE}
    assert sum(lines.values()) <= 3050, f"{sum(lines.values())} lines: {lines}"
