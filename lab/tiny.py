"""
tiny.py: `memdlm.py --tiny`, the experiment on a laptop: train a base and fine-tune it by both
methods (training.py), then score what has come of it (evaluate.py).
"""

import data
from lab import evaluate
from lab.tools import Parser, real, run_flags, whole
from lab.training import run_tiny
from lab.variants import loop_flags

# What `--tiny` changes of the paper's settings, for a small model on a small set.
TINY_SETTINGS = {"steps": 150, "batch": 8, "lr": 5e-4, "memory_rank": 8, "memory_alpha": 16.0}
TINY_SETTINGS |= {"memory_lr": 0.7, "memory_fraction": 0.5, "memory_scope": "sample"}


def build_parser() -> Parser:
    """The flags of --tiny."""
    parser = Parser("Trains Standard MDLM and MemDLM. --backbone NAME --help: a real checkpoint.")
    flag = parser.add_argument
    what = "pretrain a small base, fine-tune it by both methods, compare (or: --backbone NAME)"
    flag("--tiny", action="store_true", required=True, help=what)
    flag("--out", default="runs/tiny", help="folder for everything that is written")
    flag("--seeds", type=whole(1), default=1, help="how many seeds to run, from --seed on")
    flag("--draws", type=whole(1), default=3, help="fine-tuning sets for each of their bases")
    lower = "lower rates at which Standard MDLM is fine-tuned, too: its control"
    flag("--control-lr", type=real(0), nargs="*", default=[8e-5], help=lower)
    flag("--bases", help="folder of a run whose finished bases are used")
    flag("--examples", type=whole(4), default=32, help="size of the fine-tuning set, by 4 tasks")
    flag("--noise", type=real(0, 1), default=0.5, help="share of its answer words made random")
    new = "in the words of pretraining, or in new ones: a skill that must be learnt"
    flag("--wording", choices=data.WORDINGS, default="old", help=f"questions {new}")
    flag("--length", type=whole(64, 1024), default=96, help="tokens of a pretraining example, 1x")
    flag("--stretch", type=whole(1, 16), default=3, help="a fine-tuning example is so many x long")
    flag("--pretrain-steps", type=whole(1), default=2400, help="steps of the base")
    flag("--pretrain-batch", type=whole(4), default=64, help="sequences in each, 4 tasks")
    flag("--pretrain-lr", type=real(0), default=4e-3, help="peak learning rate of the base")
    flag("--student", help="a file whose functions replace the method's: exercises/README.md")
    run_flags(flag)
    loop_flags(flag)
    parser.set_defaults(dial="tiny", **TINY_SETTINGS)
    return parser


def run(arguments: list[str], student: str | None = None) -> None:
    """Trains, then hands its folder to the evaluation. student: the record of a student's code
    that is plugged in (exercises/plug.py), kept among the run's settings."""
    args = build_parser().parse_args(arguments)
    args.student = student
    run_tiny(args)
    evaluate.run(["--run", args.out, "--device", args.device])
