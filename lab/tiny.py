"""
tiny.py: `memdlm.py --tiny`, the experiment on a laptop. From each base, shipped or made here by
--pretrain, both methods are fine-tuned (training.py), and what comes of it is scored (evaluate.py).
"""

from functools import partial
from pathlib import Path

from tqdm import tqdm

import data
from lab import evaluate, tools, training
from lab.tools import Parser, real, run_flags, whole
from lab.variants import loop_flags
from model import UserError

# What `--tiny` changes of the paper's settings, for a small model on a small set.
TINY_SETTINGS = {"steps": 150, "batch": 8, "lr": 5e-4, "memory_rank": 8, "memory_alpha": 16.0}
TINY_SETTINGS |= {"memory_lr": 0.7, "memory_fraction": 0.5, "memory_scope": "sample"}


def build_parser() -> Parser:
    """The flags of --tiny."""
    parser = Parser("Trains Standard MDLM and MemDLM. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    flag("--tiny", action="store_true", required=True, help="small bases (or: --backbone NAME)")
    flag("--out", default="runs/tiny", help="folder for everything that is written")
    flag("--seeds", type=whole(1), default=5, help="how many seeds to run, from --seed on")
    flag("--bases", default=str(training.SHIPPED), help="folder of their bases, such as a run's")
    flag("--pretrain", action="store_true", help="make the bases here, from nothing")
    flag("--control-lr", type=real(0), nargs="*", default=[8e-5], help="lower rates, by MDLM only")
    flag("--examples", type=whole(4), default=32, help="size of the fine-tuning set, by 4 tasks")
    flag("--noise", type=real(0, 1), default=0.5, help="share of its answer words drawn anew")
    flag("--wording", choices=data.WORDINGS, default="old", help="of questions: known or new")
    flag("--length", type=whole(64, 1024), default=96, help="tokens of a pretraining example, 1x")
    flag("--stretch", type=whole(1, 16), default=3, help="a fine-tuning example is so many x long")
    flag("--pretrain-steps", type=whole(1), default=1920, help="steps of a base")
    flag("--pretrain-batch", type=whole(4), default=44, help="sequences in each, 4 tasks")
    flag("--pretrain-lr", type=real(0), default=4e-3, help="peak learning rate of a base")
    flag("--student", help="a file whose functions replace the method's: exercises/README.md")
    run_flags(flag)
    loop_flags(flag)
    parser.set_defaults(dial="tiny", **TINY_SETTINGS)
    return parser


def begin(args, config: dict) -> None:
    """Notes the settings of a run, and puts the bases in place that are not to be made here."""
    out, names = Path(args.out), [f"{rate:g}" for rate in (*args.control_lr, args.lr)]
    if len(set(names)) < len(names) or not all(0 < rate < args.lr for rate in args.control_lr):
        raise UserError("--control-lr: give different rates above 0 and below --lr, or none.")
    if args.examples % len(data.TASKS) or args.pretrain_batch % len(data.TASKS):
        raise UserError("--pretrain-batch, --examples: give multiples of 4, the number of tasks.")
    tools.start_run(out, config, args.resume)
    found = {}
    for seed, name in evaluate.models_of(config):
        path = training.checkpoint_path(out, seed, name)
        if path.exists():
            _, meta = tools.load_checkpoint(path)
            tools.check_identity(path, meta, training.identity_of(config, seed, name))
        elif name == "base" and not args.pretrain:
            found[path] = training.find_base(config, Path(args.bases), seed)
    for path, base in found.items():  # all of them are there
        tools.save_checkpoint(path, *base)


def run(arguments: list[str], student: str | None = None, prepare=None) -> None:
    """Trains and evaluates. student: whose code is plugged in, by `prepare` in each process."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.pretrain:
        parser.refuse(args, ["bases"], "has no effect beside --pretrain")
    args.student = student
    config, device = tools.settings(args), tools.pick_device(args.device)
    begin(args, config)
    asked, _ = evaluate.parse(["--run", args.out, "--device", device])
    train = partial(training.train_job, Path(args.out), config, device, args.save_every)
    do = partial(evaluate.measure, asked, config, device, train)
    with training.workers(device, prepare) as each:
        if args.pretrain:
            bases = [job for job in evaluate.models_of(config) if job[1] == "base"]
            list(tqdm(each(train, bases), "bases", total=len(bases), delay=2))
        evaluate.work_through(each, do, asked, config, device)
