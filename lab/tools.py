"""
tools.py: what every program needs besides its subject: flags, errors of one line, devices, files
(safetensors and JSON, nothing else), and the folder of a run. memdlm.py, sample.py and eval_niah.py
are a library and end in `start`: their commands are the run(arguments) of a module in DOORS.
"""

import argparse
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Config, Transformer, UserError

# ---- command lines -------------------------------------------------------------------------------
DEVICES = ("auto", "cpu", "cuda", "mps")


def number(kind: Callable, low: float, high: float = 1e18) -> Callable[[str], float]:
    """argparse type: a number in a range, a whole one (kind int) or a real one (float)."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or 0 < abs(value) < 1e-30:  # that would vanish in float32
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = "number"  # as argparse calls it in an error
    return parse


whole, real = partial(number, int), partial(number, float)


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, defaults in its help, and no abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *names, help="", **options):
        if options.get("default") not in (None, argparse.SUPPRESS):
            help += " (default: %(default)s)"
        return super().add_argument(*names, help=help, **options)

    def error(self, message: str):
        raise UserError(f"{message}. --help lists the flags.")

    def refuse(self, args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
        """Stops if one of these flags was given: it would have no effect."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} {reason}.")


def run_flags(flag: Callable) -> None:
    """How a run goes."""
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--save-every", type=whole(1), default=100, help="steps between checkpoints")
    flag("--device", choices=DEVICES, default="auto", help="where to compute")
    flag("--seed", type=whole(0, 2**32 - 1), default=0, help="of data, noise and new weights")


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no room. A CPU's allocator raises a RuntimeError like any other."""
    signs = "out of memory|allocate memory|not enough memory|calculation overflow|is too big"
    signs += "|terminated abruptly"  # a process that the system has killed
    return isinstance(error, MemoryError) or re.search(signs, str(error)) is not None


def guarded(run: Callable[[], None]) -> None:
    """Runs a program: what the user can mend becomes one line on stderr, and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # what a console cannot show is printed as "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        return run()
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, RuntimeError, MemoryError, ValueError) as error:
        line = str(error).partition("\n")[0]
        if out_of_memory(error):
            line = f"out of memory ({line}): lower the batch, the length or the rank."
        elif not isinstance(error, (UserError, OSError)):
            raise
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


# For each program: the first flag that is given picks the module whose run(arguments) is called; ""
# is the default. Modules are named here and not imported, since a folder may be missing.
DOORS = {
    "memdlm": {"--backbone": "full_scale.finetune", "--student": "exercises.plug", "": "lab.tiny"},
    "sample": {"--backbone": "full_scale.samplers", "": "lab.ask"},
    "eval_niah": {"--backbone": "full_scale.benchmark", "": "lab.evaluate"},
}


def start(program: str, arguments: list[str] | None = None) -> None:
    """What `python PROGRAM.py` does."""
    arguments = sys.argv[1:] if arguments is None else [*map(str, arguments)]
    given = {argument.partition("=")[0] for argument in arguments} | {""}
    flag, name = next(door for door in DOORS[program].items() if door[0] in given)

    def run() -> None:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if f"{name}.".startswith(f"{error.name}."):  # a folder that was deleted, or emptied
                reason = f"the folder {name.partition('.')[0]}/, which is not here"
            else:
                folder = "full_scale/" if flag == "--backbone" else ""
                reason = f"{error.name}: pip install -r {folder}requirements.txt"
            raise UserError(f"{flag or program} needs {reason}.") from None
        module.run(arguments)

    guarded(run)


def pick_device(name: str) -> str:
    """--device: "auto" takes the first of cuda, mps and cpu that is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if not there.get(name, name == "auto"):
        raise UserError(f"--device {name} is not available here; leave --device out.")
    return next(device for device in there if there[device]) if name == "auto" else name


# ---- files: safetensors and JSON -----------------------------------------------------------------


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path to write to, renamed to `path` at the end: no broken file has that name."""
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        if aside.exists():
            aside.unlink()  # it may be what has filled the disk
        raise UserError(f"cannot write {path}: {error}; choose another --out.") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file."""
    with written_aside(path) as aside:
        aside.touch()  # for the mode that the umask gives: safetensors' own files are 0600
        mode = aside.stat().st_mode
        save_file(tensors, aside, metadata)
        aside.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata. Nothing is unpickled."""
    try:
        with open(path, "rb"), safe_open(path, "pt") as file:  # whose errors call any file missing
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: it is not trained, or not yet.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read here: {error}.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it to make it again.") from None


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Tensors, and `meta` as JSON in the header of the file."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, tensors, {"json": json.dumps(meta)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_checkpoint` has written."""
    tensors, metadata = read_tensors(path)
    try:
        meta = json.loads(metadata["json"])
        meta["step"], meta["config"], meta["identity"]  # they are there
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is no checkpoint of this program: delete it.") from None
    return tensors, meta


def load_weights(model: Transformer, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads the tensors named "model.*". A missing or a surplus one is a UserError."""
    start = "model."
    weights = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit the model: {last}") from None


def load_model(path: Path, device: str = "cpu") -> tuple[Transformer, dict]:
    """The model of a finished `--tiny` checkpoint, in eval mode, and the checkpoint's meta."""
    tensors, meta = load_checkpoint(path)
    if not meta.get("done"):
        raise UserError(f"{path} is not finished: memdlm.py --resume goes on with it.")
    model = Transformer(Config(**meta["config"]))
    load_weights(model, tensors, path)
    return model.to(device).eval(), meta


def write_text(path: Path, text: str) -> None:
    """Writes a text file."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object, or an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing in {path.parent}: is that the folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it must hold a JSON object.")
    return value


def finite(value: float) -> float | None:
    """None, JSON's null, for what is no number: the mean of nothing, an exploded loss."""
    return value if math.isfinite(value) else None


def kept(path: Path, identity: dict, make: Callable[[], dict]) -> dict:
    """make()'s record: read from the file, if that has it under this identity, or made and kept."""
    record = read_json(path) if path.exists() else {}
    if record.get("identity") != identity:
        record = {"identity": identity, **make()}
        write_json(path, record)
    return record


# ---- the folder of a run -------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict:
    """Every flag that decides the numbers. Where the run lies and how often it saves do not."""
    elsewhere = ("run", "out", "resume", "bases", "save_every", "device")
    return {name: value for name, value in sorted(vars(args).items()) if name not in elsewhere}


def start_run(out: Path, wanted: dict, resume: bool) -> None:
    """Notes the run's settings in out/config.json, so that old weights never get new settings."""
    there = [path for name in ("*.safetensors", "*/*.safetensors") for path in out.glob(name)]
    if not resume and (there or (out / "results.json").exists() or (out / "bench.json").exists()):
        raise UserError(f"--out {out} holds a run: add --resume, or name another folder.")
    known = read_config(out, wanted["dial"]) if resume else wanted
    for name, value in wanted.items():
        if known.get(name) != value:
            asked = f"--{name.replace('_', '-')} {known.get(name)}, not {value}"
            raise UserError(f"--resume: the run in {out} was started with {asked}.")
    write_json(out / "config.json", wanted)


def read_config(out: Path, dial: str = "tiny") -> dict:
    """A run's settings. dial: "tiny" or "backbone", what kind of run it must be."""
    if not (out / "config.json").exists():
        raise UserError(f"there is no run in {out} (no config.json): train one with memdlm.py.")
    config = read_json(out / "config.json")
    own = {"control_lr", "wording", "length", "lr", "seeds"} if dial == "tiny" else set()
    needed = {"seed", "start_scale"} | own
    rates = config.get("control_lr", [])
    if config.get("dial") != dial or not needed <= config.keys() or not isinstance(rates, list):
        raise UserError(f"{out}/config.json is not that of a run of --{dial}.")
    return config


def check_identity(path, meta: dict, wanted: dict, advice: str = "name another folder") -> None:
    """Refuses a checkpoint that was trained under other settings."""
    for key, value in wanted.items():
        if meta["identity"].get(key) != value:
            known = f"{key} {meta['identity'].get(key)}, not {value}"
            raise UserError(f"{path} was trained with {known}: {advice}.")


def machine(device: str, dtype: str = "float32") -> dict:
    """Where numbers come from, to be quoted beside them."""
    name, threads = device, torch.get_num_threads()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {"device": name, "dtype": dtype, "torch": torch.__version__, "threads": threads}


def peak_memory(device: str) -> float | None:
    """GiB: this process's largest resident size, or on a GPU the most that torch had allocated."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
