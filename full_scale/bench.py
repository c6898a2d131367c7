"""
bench.py: what a training step and an answer cost on this machine, in time and memory.

    python full_scale/bench.py --out runs/bench      real sizes on a GPU, small ones on a CPU

Weights are random: nothing is downloaded. Each line is written as soon as it is measured; the same
command goes on where it was, begins nothing new after --minutes, and prints a table of markdown. A
step is a forward and a backward pass of two rows without the optimizer, an eighth of each row being
response; one outer LoRA and one set of fast weights, of rank 32, as in Sec. 4.1.

  MFU   the share of this machine's own matrix product that an MDLM step reaches: per token 4 N for
        the N frozen weights that it meets (forward, and backward to the input) and 12 T D a layer
        for attention. Passes that checkpointing repeats, the LoRAs and the head are not counted
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Batch
from full_scale import backbone, experts
from full_scale.cache import cached
from full_scale.checkpoints import add_outer_lora, random_llada
from full_scale.configs import BackboneConfig
from full_scale.finetune import checkpoint_activations
from lab import tools
from lab.tools import Parser, guarded, real, whole
from lab.training import METHODS
from memdlm import Memory, generator_for
from model import Transformer, UserError
from sample import Block, Write, generate, plan_blocks, write_prompt

MIXTURE = {"moe_layers": tuple(range(4)), "experts": 8, "experts_per_token": 2, "expert_ffn": 64}
SIZES = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32, "qk_norm": True}
SMALL = BackboneConfig(8192, 8191, architecture="llada-moe", **SIZES, **MIXTURE)
DEVICE = tools.pick_device("auto")
CUDA = DEVICE == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
MODELS = {"llada-moe": "llada-moe", "llada-8b": "llada-8b"} if CUDA else {"small": SMALL}
LENGTHS = [1024, 4096] if CUDA else [256, 512]  # of a step's rows
PROMPTS = [8192, 1024, 32768] if CUDA else [256, 1024]
KEPT: dict[tuple, Transformer] = {}
ANSWER, SAMPLE = 128, 4  # tokens of an answer; of its exact passes so many are timed


def seconds(function: Callable[[], object], repeats: int = 2) -> float:
    """The shortest of some runs after one to warm up; of one run, with repeats=0."""
    spent = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent[1:] or spent)


def model_of(*key) -> Transformer:
    """(name, in NF4, with checkpointing) -> random weights, and an outer LoRA whose B is not zero,
    as after some training. The last one is kept; there may be room for one alone."""
    if key not in KEPT:
        KEPT.clear()
        name, nf4, checkpointing = key
        model = KEPT[key] = random_llada(MODELS[name], DEVICE, DTYPE, nf4)
        add_outer_lora(model, 32, 64.0, 0.05, generator_for(0, "bench"))
        for parameter, p in model.named_parameters():
            if parameter.endswith("lora_B"):
                p.data.fill_(0.01)
        if checkpointing:
            checkpoint_activations(model)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return KEPT[key]


def flops(config: BackboneConfig, rows: int, length: int) -> float:
    """Of an MDLM step, as the head of this file counts them."""
    mixtures, D = len(config.moe_layers), config.hidden
    attention = config.layers * D * (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    dense = 3 * D * config.ffn * (config.layers - mixtures)
    mixed = mixtures * D * (config.experts + 3 * config.experts_per_token * config.expert_ffn)
    width = config.heads * config.head_dim
    return rows * length * (4 * (attention + dense + mixed) + 12 * length * width * config.layers)


def matmul() -> dict:
    """The rate of a large product, which is the limit of everything below."""
    a = torch.randn([8192 if CUDA else 2048] * 2, device=DEVICE, dtype=DTYPE)
    spent = seconds(lambda: a @ a, 5)
    return {"s": spent, "TFLOP/s": 2 * len(a) ** 3 / spent / 1e12}


def bandwidth() -> dict:
    """Bytes read and written by a copy, each second."""
    a = torch.empty(2**30 if CUDA else 2**26, dtype=torch.uint8, device=DEVICE)
    spent = seconds(lambda: a.clone(), 5)
    return {"s": spent, "GB/s": 2 * a.numel() / spent / 1e9}


def step(name: str, method: str, length: int, nf4=False, checkpointing=False, loop=False) -> dict:
    """A training step of two rows. loop: experts one after the other, not in one kernel."""
    model = model_of(name, nf4, checkpointing).train()
    x0 = torch.randint(0, model.config.mask_id, (2, length), device=DEVICE)
    maskable = (torch.arange(length, device=DEVICE) >= length * 7 // 8).expand(2, length)

    def once() -> None:
        batch = Batch(x0, maskable, None)
        METHODS[method](model, batch, Memory(), generator_for(0, "bench")).backward()
        model.zero_grad()  # no gradients beside the answers of other cases

    looped = mock.patch.object(experts, "kernel_fits", return_value=False)
    with looped if loop else nullcontext():
        spent = seconds(once)
    done = flops(model.config, 2, length) if method == "mdlm" else None
    return {"s": spent, "tokens/s": 2 * length / spent, "flops": done}


@torch.no_grad()
def answer(name: str, length: int, cache: bool, memory: bool) -> dict:
    """An answer of 128 tokens, one a pass, after a prompt of so many tokens."""
    model = model_of(name, False, False).eval()
    prompt = torch.randint(0, model.config.mask_id, (1, length), device=DEVICE)

    def once(blocks: list[Block]) -> None:
        fast = write_prompt(model, prompt, Write(), 0) if memory else None
        sampler = cached(generate, "dual") if cache else generate
        sampler(model, prompt, blocks=blocks, fast=fast)

    if cache:
        return {"s": seconds(partial(once, plan_blocks(ANSWER)), 1)}
    first = seconds(partial(once, [Block(0, ANSWER, [1])]), 1)  # a pass, and writing the prompt
    more = seconds(partial(once, [Block(0, ANSWER, [1] * (SAMPLE + 1))]), 0)
    each = (more - first) / SAMPLE  # exact passes all cost the same
    return {"s": first + (ANSWER - 1) * each, "note": f"from {SAMPLE + 1} passes"}


def cases(prompts: list[int]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """All that is measured, the most telling first; what shares a model stands in a row."""
    yield "matrix product", matmul
    yield "copy", bandwidth
    for name in MODELS:
        whole = name != "llada-8b"  # which is dense, and measured at fewer lengths
        steps = list(product(LENGTHS if whole else LENGTHS[:1], ("mdlm", "memdlm")))
        for length, method in steps:
            yield f"{name}, {method}, 2 x {length}", partial(step, name, method, length)
        if whole:
            loop = partial(step, name, "mdlm", LENGTHS[0], loop=True)
            yield f"{name}, mdlm, 2 x {LENGTHS[0]}, experts in a loop", loop
        switches = product(prompts if whole else prompts[:1], (False, True), (True, False))
        for length, memory, cache in switches:
            flags = " --cache" * cache + " --memory" * memory
            todo = partial(answer, name, length, cache, memory)
            yield f"{name}, {ANSWER} tokens after {length}{flags}", todo
        for nf4, (length, method) in product((False, True) if CUDA else (False,), steps):
            kind = "NF4, checkpointing" if nf4 else "checkpointing"
            todo = partial(step, name, method, length, nf4=nf4, checkpointing=True)
            yield f"{name}, {method}, 2 x {length}, {kind}", todo


def table(records: list[dict]) -> str:
    """What has been measured, as markdown, and the ratios that it is about."""
    spent = {one["case"]: one["s"] for one in records if "s" in one}
    rate = next((one["TFLOP/s"] for one in records if "TFLOP/s" in one), None)
    lines = ["| case | s | tokens/s | MFU, % | peak GiB | |", "|---|---|---|---|---|---|"]
    for one in records:
        case, notes = one["case"], [one.get("note", "")]
        notes += [f"{one[unit]:.3g} {unit}" for unit in ("TFLOP/s", "GB/s") if unit in one]
        without = spent.get(case.replace(" --cache", ""))
        mdlm = spent.get(case.replace("memdlm", "mdlm"))
        if " --cache" in case and without and "s" in one:
            notes.append(f"{without / one['s']:.1f} times as fast")
        if "memdlm" in case and mdlm and "s" in one:
            notes.append(f"{one['s'] / mdlm:.2f} of mdlm's time")
        mfu = 100 * one["flops"] / one["s"] / rate / 1e12 if one.get("flops") and rate else None
        cells = [one.get("s"), one.get("tokens/s"), mfu, one.get("peak GiB")]
        shown = " | ".join("-" if value is None else f"{value:.3g}" for value in cells)
        lines.append(f"| {case} | {shown} | {', '.join(filter(None, notes))} |")
    return "\n".join(lines)


def measured(todo: Callable[[], dict]) -> dict:
    """What a case gives, and its peak of memory; or that there was no room for it."""
    try:
        record = todo()
    except (RuntimeError, MemoryError) as error:
        if not tools.out_of_memory(error):
            raise
        KEPT.clear()  # with the gradients that it was left with
        return {"note": "out of memory"}
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    return record | {"peak GiB": peak}


def run(arguments: list[str]) -> None:
    """Measures what is missing in OUT."""
    parser = Parser("Measures training steps and answers on this machine, with random weights.")
    parser.add_argument("--out", required=True, help="folder for bench.json and table.md")
    parser.add_argument("--minutes", type=real(0), default=8, help="begin nothing new after these")
    prompts = "lengths of the answers' prompts, in tokens"
    parser.add_argument("--prompts", nargs="+", type=whole(1), default=PROMPTS, help=prompts)
    args, clock = parser.parse_args(arguments), time.monotonic()
    where = tools.machine(DEVICE, str(DTYPE).removeprefix("torch."))
    backbone.check_out(Path(args.out), "bench.json")
    path = Path(args.out) / "bench.json"
    known = tools.read_json(path) if path.exists() else {"machine": where, "records": []}
    if known.get("machine") != where:
        raise UserError(f"{path} was measured on another machine: name another --out.")
    try:
        records, left = known["records"], 0
        done = {one["case"] for one in records}
        table(records)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged: delete it, or name another --out.") from None
    tools.write_json(path, known)  # the folder is ours from now on
    for name, todo in cases(args.prompts):
        if name in done:
            continue
        if time.monotonic() - clock > 60 * args.minutes:
            left += 1
            continue
        records.append({"case": name, **measured(todo)})
        tools.write_json(path, known)
        print(table(records[-1:]).splitlines()[-1], flush=True)
    title = ", ".join(f"{name} {value}" for name, value in where.items())
    tools.write_text(Path(args.out) / "table.md", f"{title}\n\n{table(records)}\n")
    print(f"\n{title}\n\n{table(records)}")
    if left:
        print(f"\n{left} cases are left: start the same command again.")


if __name__ == "__main__":
    guarded(lambda: run(sys.argv[1:]))
