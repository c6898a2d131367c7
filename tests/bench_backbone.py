"""What a training step and an answer of a mixture-of-experts backbone cost: time, memory, and how well the matrices are used.

    python tests/bench_backbone.py                 on a CPU: a small LLaDA-MoE, against the bound of the published code
    python tests/bench_backbone.py                 on a GPU: LLaDA-MoE-7B-A1B at its real size, random weights (78 GiB card)
    python tests/bench_backbone.py --only nf4      on a GPU: the rows of one precision alone (24 GiB card, checkpointing)

A step is forward + backward without the optimizer, outer LoRA r 32, dropout .05, router included; one set of fast weights
r 32 per batch on the last 10% of layers (Sec. 4.1). MFU: model FLOPs / time / the rate of a large matmul in the same run.
Model FLOPs are a forward (2 per active weight and token, plus attention) and, for the frozen weights, as much again for the
backward; LoRA, routing and recomputation are not counted. MemDLM adds a forward of the prefix and two steps of the suffix.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as model_file
import sample
from data import Batch
from memdlm import METHODS, Memory, memory_start
from model import BACKBONES, Config, Transformer, add_outer_lora, loop_matmul, on_meta, pick_matmul, put

SMALL = Config(
    8192, 8191, hidden=256, layers=16, heads=4, kv_heads=4, head_dim=64, rope_base=50_000.0, rotary_fraction=1.0, qk_norm=True,
    canon=0, architecture="llada-moe", moe_layers=tuple(range(16)), experts=16, experts_per_token=4, expert_ffn=128,
)  # fmt: skip
# Seconds on one thread where a 2048^3 float32 matmul runs at 90 GFLOP/s: the published code, and what is asked of ours.
PUBLISHED, ASKED = {"mdlm": 2.8, "memdlm": 6.8}, {"mdlm": 1.7, "memdlm": 2.9}


def random_model(config: Config, device: str, dtype: torch.dtype, load_4bit: bool) -> Transformer:
    """Random weights and an outer LoRA whose B is not zero, as after some training."""
    model, generator = on_meta(config), torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        made = torch.ones(tensor.shape, dtype=dtype, device=device)
        put(model, name, made.normal_(0, 0.02, generator=generator) if tensor.dim() > 1 else made, load_4bit)
    add_outer_lora(model, 32, 64.0, 0.05, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.02, generator=generator)
    return model.train()


def make_batch(config: Config, rows: int, length: int, response: int, device: str) -> Batch:
    x0 = torch.randint(0, config.vocab_size - 200, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    maskable = (torch.arange(length, device=device) >= length - response).expand(rows, length)
    return Batch(x0, maskable, None)


def seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """The shortest of `repeats` runs after one to warm up: CPU seconds of this process, or wall seconds of a GPU."""
    clock, best = (time.process_time if device == "cpu" else time.perf_counter), []
    for _ in range(repeats + 1):
        start = clock()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        best.append(clock() - start)
    return min(best[1:])


def matmul_rate(device: str, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of the largest plain product at hand."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, repeats + 2)


def forward_flops(config: Config, batch: Batch) -> float:
    """2 per active weight and token, and 4 T per attention channel and token; the head on the response only."""
    expert = 3 * config.hidden * config.expert_ffn * config.experts_per_token + config.hidden * config.experts
    channels = config.heads * config.head_dim
    attention = config.hidden * (2 * channels + 2 * config.kv_heads * config.head_dim)
    per_token = 2 * (expert + attention) + 4 * batch.x0.shape[1] * channels
    return config.layers * per_token * batch.x0.numel() + 2 * config.hidden * config.vocab_size * int(batch.maskable.sum()) / 2


def step_flops(model: Transformer, batch: Batch, method: str) -> float:
    forward, share = forward_flops(model.config, batch), 1 - memory_start(model, Memory()) / model.config.layers
    return 2 * forward + (forward * (1 - share) + 2 * 2 * forward * share if method == "memdlm" else 0)


@contextmanager
def experts_by(rule: Callable) -> Iterator[None]:
    """Computes the experts by one of the two ways, whatever the rule would choose."""
    before, model_file.pick_matmul = model_file.pick_matmul, rule
    try:
        yield
    finally:
        model_file.pick_matmul = before


def measure_step(model: Transformer, batch: Batch, method: str, device: str, repeats: int) -> tuple[float, float]:
    """Seconds and peak GiB of one step."""

    def step() -> None:
        model.zero_grad()
        METHODS[method](model, batch, Memory(), torch.Generator().manual_seed(3)).backward()

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    spent = seconds(step, device, repeats)
    return spent, torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else float("nan")


def step_table(args: argparse.Namespace, config: Config, device: str) -> None:
    """Every precision, with and without checkpointing: both methods, grouped experts; then the loop."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rate = matmul_rate(device, dtype, args.repeats)
    batch = make_batch(config, args.batch, args.length, args.response, device)
    print(f"batch {args.batch} x {args.length}, {args.response} of them response; matmul {rate / 1e9:.0f} GFLOP/s")
    print("| weights | checkpointing | experts | method | s / step | tokens/s | MFU | peak GiB | MemDLM / MDLM |")
    print("|---|---|---|---|---|---|---|---|---|")
    for weights in args.only or (["float32"] if device == "cpu" else ["bf16", "nf4"]):
        model = random_model(config, device, dtype, weights == "nf4")
        for checkpointing, rule in ((False, "grouped"), (True, "grouped"), (True, "loop")):
            model.checkpointing, spent = checkpointing, {}
            for method in ("mdlm", "memdlm"):
                try:
                    with experts_by(pick_matmul if rule == "grouped" else lambda x, weight: loop_matmul):
                        spent[method], peak = measure_step(model, batch, method, device, args.repeats)
                except torch.OutOfMemoryError:
                    print(f"| {weights} | {checkpointing} | {rule} | {method} | out of memory | | | | |")
                    continue
                used = step_flops(model, batch, method) / spent[method] / rate
                ratio = f"{spent['memdlm'] / spent['mdlm']:.2f}" if len(spent) == 2 else ""
                cells = [
                    weights,
                    checkpointing,
                    rule,
                    method,
                    f"{spent[method]:.2f}",
                    f"{batch.x0.numel() / spent[method]:.0f}",
                ]
                print("|", " | ".join(map(str, [*cells, f"{used:.0%}", f"{peak:.1f}", ratio])), "|", flush=True)
        answer_cost(model, args, device, weights)
        del model


def answer_cost(model: Transformer, args: argparse.Namespace, device: str, weights: str) -> None:
    """An answer after a long prompt, one token a step, with and without writing the prompt first."""
    model.eval()
    prompt: Tensor = torch.randint(0, model.config.vocab_size - 200, (1, args.prompt), device=device)
    for memory in (False, True):
        clock = time.perf_counter()
        fast = sample.write_prompt(model, prompt, sample.Write(), 0) if memory else None
        sample.generate(model, prompt, args.answer, steps=args.answer, fast=fast)
        if device != "cpu":
            torch.cuda.synchronize()
        spent = time.perf_counter() - clock
        written = "with" if memory else "without"
        print(f"{weights}: {args.answer} tokens after {args.prompt}, {written} memory: {spent:.1f} s")
    model.train()


def cpu_bound(repeats: int) -> None:
    """The small model against the published code's CPU seconds, scaled by the matmul rate of this run."""
    model, batch = random_model(SMALL, "cpu", torch.float32, False), make_batch(SMALL, 2, 512, 128, "cpu")
    rate = max(matmul_rate("cpu", torch.float32, repeats) for _ in range(2)) / 1e9
    print(f"small LLaDA-MoE, 2 x 512 (128 response), float32, 1 thread, torch {torch.__version__}, matmul {rate:.0f} GFLOP/s")
    print("| method | CPU s | at 90 GFLOP/s | published | asked | met |\n|---|---|---|---|---|---|")
    for method, asked in ASKED.items():
        spent, _ = measure_step(model, batch, method, "cpu", repeats)
        scaled = spent * rate / 90
        met = "yes" if scaled <= asked else "NO"
        print(f"| {method} | {spent:.2f} | {scaled:.2f} | {PUBLISHED[method]} | {asked} | {met} |", flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--repeats", type=int, default=5, help="how often each step is timed [5]")
    flag("--only", nargs="+", choices=("float32", "bf16", "nf4"), help="precisions to measure")
    flag("--batch", type=int, default=2, help="pairs per step [2, Sec. 4.1]")
    flag("--length", type=int, default=4096 if cuda else 512, help="tokens per pair")
    flag("--response", type=int, default=256 if cuda else 128, help="how many of them are response")
    flag("--prompt", type=int, default=8192 if cuda else 256, help="prompt of the answer")
    flag("--answer", type=int, default=128 if cuda else 8, help="tokens of the answer")
    args = parser.parse_args()
    if not cuda:
        torch.set_num_threads(1)
        cpu_bound(args.repeats)
    print(f"\n{torch.cuda.get_device_name() if cuda else 'cpu'}, torch {torch.__version__}")
    step_table(args, Config(**BACKBONES["llada-moe"][1]) if cuda else SMALL, "cuda" if cuda else "cpu")


if __name__ == "__main__":
    main()
