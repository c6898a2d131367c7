"""
ask.py: `sample.py --run`: answers a prompt with a model of a run.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
from lab.pictures import canvas_text
from lab.tools import DEVICES, Parser, pick_device, read_config, real, whole
from lab.training import open_run
from lab.variants import check_write_flags, write_flags, write_of
from memdlm import generator_for
from model import UserError
from sample import Write, generate, plan_blocks, write_prompt


def decoding_flags(flag: Callable) -> None:
    """How an answer is decoded."""
    flag("--steps", type=whole(1), help="forward passes for the answer; without it, one a token")
    flag("--block-length", type=whole(1), help="decode in blocks of so many tokens; else in one")
    flag("--threshold", type=real(0, 1), help="commit all tokens more probable than this at once")


def answer_flags(flag: Callable) -> None:
    """What is asked, and how a token is chosen."""
    flag("--prompt", required=True, help="the text to answer; it never becomes a special token")
    flag("--length", type=whole(1, 4096), default=16, help="tokens of the answer")
    flag("--temperature", type=real(0), default=0.0, help="0 takes the most probable token")
    flag("--cfg-scale", type=real(0, 1e6), default=0.0, help="guidance: u + (scale + 1) (c - u)")
    flag("--memory", action="store_true", help="write the prompt into the weights (Sec. 4.5)")
    flag("--quiet", action="store_true", help="print the answer alone, without the steps")
    flag("--device", choices=DEVICES, default="auto", help="where to compute")


def answer_prompt(args, model, tokenizer, write: Write | None, seed: int, answer) -> None:
    """Prints the answer to --prompt and, unless --quiet, the way to it.
    answer(model, prompt (1, P), **options) -> (1, R): `generate`, or another sampler."""
    ids = tokenizer.encode_prompt(args.prompt)
    if not (args.prompt and ids):
        raise UserError("--prompt is empty.")
    prompt = torch.tensor([ids], device=model.embedding.weight.device)

    def show(canvas: Tensor) -> None:
        if not args.quiet:
            print(canvas_text(canvas[0, len(ids) :].tolist(), tokenizer).strip())

    options = {"fast": write_prompt(model, prompt, write, seed) if write else None, "watch": show}
    options |= {"generator": generator_for(seed, "sample"), "threshold": args.threshold}
    options |= {"temperature": args.temperature, "cfg_scale": args.cfg_scale}
    print(tokenizer.decode(answer(model, prompt, **options)[0].tolist()).strip())


def build_parser() -> Parser:
    parser = Parser("Answers a prompt with a model of a run. --backbone NAME --help lists others.")
    flag = parser.add_argument
    flag("--run", required=True, help="folder of a --tiny run, such as runs/tiny")
    flag("--model", default="memdlm", help="which of its models: base, mdlm, memdlm, mdlm-8e-05")
    flag("--seed", type=whole(0), help="which of its seeds; without it, the first")
    answer_flags(flag)
    decoding_flags(flag)
    write_flags(flag)
    parser.set_defaults(length=11)  # of the tiny tasks: two sentences about a key, and EOS
    return parser


def run(arguments: list[str]) -> None:
    """Answers with a model of a --tiny run."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    config = read_config(Path(args.run))
    seed = config["seed"] if args.seed is None else args.seed
    check_write_flags(parser, args, args.memory)
    write = write_of(args, config) if args.memory else None
    device = pick_device(args.device)
    model, _ = open_run(Path(args.run), seed, args.model, device)
    blocks = plan_blocks(args.length, args.steps, args.block_length)
    answer_prompt(args, model, data.TINY, write, seed, partial(generate, blocks=blocks))
