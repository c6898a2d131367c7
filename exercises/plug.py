"""
plug.py: a student's functions in the place of the project's own.

`python -m pytest --student FILE` and `python memdlm.py --tiny --student FILE` both come here. A
function that still ends in `raise NotImplementedError` is not written yet; the project's own then
stays in place, so that one can begin with any step.
"""

import ast
import difflib
import functools
import importlib
import inspect
import sys
import traceback
import zlib
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

from lab import tiny  # and with it all modules that might have a function by name
from model import UserError


class Step(NamedTuple):
    """A step of the course."""

    title: str
    home: str  # the file that has the project's own functions
    functions: tuple[str, ...]


STEPS = {
    1: Step("corrupt", "memdlm", ("draw_anchor", "corrupt")),
    2: Step("the masked loss", "memdlm", ("denoising_loss",)),
    3: Step("LoRA", "model", ("fresh_lora", "apply_lora")),
    4: Step("anchor and pre-anchor", "memdlm", ("draw_pre_anchor", "two_stages")),
    5: Step("one inner step", "memdlm", ("stage_loss", "inner_step")),
    6: Step("the outer step", "memdlm", ("memdlm_loss", "train_step")),
    7: Step("commit by confidence", "sample", ("commit_schedule", "select")),
}


def written_functions(path: Path) -> set[str]:
    """The functions that a file defines, but for those that end in `raise NotImplementedError`."""
    if path.suffix != ".py":
        raise UserError(f"--student: {path} is no Python file, whose name ends in .py.")
    try:
        tree = ast.parse(path.read_bytes(), path.name)  # in the encoding that Python would read
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--student: cannot read {path}: {error}.") from None
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            last = node.body[-1]
            if not (isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last)):
                found.add(node.name)
    return found


def load(path: Path) -> ModuleType:
    """The student's file as a module."""
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student"] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the student's own lines may raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        reason = "it calls sys.exit" if isinstance(error, SystemExit) else error
        raise UserError(f"--student: {path} does not load: {reason} ({where}).") from None
    return module


def returning(function: FunctionType) -> FunctionType:
    """The same function, which says so where it returns nothing, or ends the program."""

    @functools.wraps(function)
    def call(*arguments, **options):
        try:
            result = function(*arguments, **options)
        except SystemExit:
            raise UserError(f"--student: {function.__name__} calls sys.exit.") from None
        if result is None:
            raise TypeError(f"{function.__name__} has returned None: is its `return` missing?")
        return result

    return call


def is_own(value: object, name: str, home: str) -> bool:
    """Whether a value is the project's own function of this name."""
    if type(value) is not FunctionType or value.__name__ != name:
        return False
    root = Path(__file__).resolve().parents[1]
    return Path(inspect.getfile(value)).resolve() == root / f"{home}.py"


def replace(name: str, home: str, function: FunctionType) -> None:
    """Puts a function in the place of the project's own: in every module that has it by name, and
    in every dict of variants."""
    own = getattr(importlib.import_module(home), name)
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for place in [names, *(value for value in names.values() if type(value) is dict)]:
            for key, value in list(place.items()):
                if is_own(value, name, home):
                    place[key] = function
    if getattr(importlib.import_module(home), name) is own:
        raise UserError(f"--student: {name} of {home}.py could not be replaced.")


def plug(path: Path) -> dict[int, list[str]]:
    """Puts all functions that are written in place. Returns what is not: step -> names."""
    written, missing = written_functions(path), {}
    wanted = {name for step in STEPS.values() for name in step.functions}
    student = load(path)
    for number, step in STEPS.items():
        for name in step.functions:
            if name in written:
                replace(name, step.home, returning(getattr(student, name)))
            else:
                near = difflib.get_close_matches(name, written - wanted, 1, 0.8)
                meant = f"{name} (is {near[0]} meant to be it?)" if near else name
                missing.setdefault(number, []).append(meant)
                # So that the student's other functions call the project's own, and not the stub.
                setattr(student, name, getattr(importlib.import_module(step.home), name))
    return missing


def run(arguments: list[str]) -> None:
    """`memdlm.py --tiny --student FILE`: tells of each step whose code it is, then trains by it."""
    parser = tiny.build_parser()
    args = parser.parse_args(arguments)
    unread = ("memory_loss", "memory_clip_by")
    parser.refuse(args, unread, "is a variant, which the course's functions do not know")
    path = Path(args.student)
    missing = plug(path)
    for number, step in STEPS.items():
        names = missing.get(number, [])
        told = f"not written yet: {', '.join(names)} (the project's own)" if names else "yours"
        print(f"step {number}, {step.title}: {told}")
    student = f"{path.name} {zlib.crc32(path.read_bytes()):08x}"
    tiny.run(arguments, student, functools.partial(plug, path))
