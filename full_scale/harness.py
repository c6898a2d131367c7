"""
harness.py: a real backbone under lm-evaluation-harness, as its model "memdlm": LongBench (Table 3),
and everything else that the harness has.

    python full_scale/harness.py --backbone llada-moe --adapter DIR --memory --tasks longbench
    python full_scale/harness.py --model memdlm --model_args backbone=llada-moe,memory=True ...
    torchrun --nproc_per_node 8 full_scale/harness.py --backbone ...       a process for each GPU

The second form is the harness's own: this program is `lm_eval` with one model more. Our flags are
read first, and all others are the harness's: --tasks, --limit, --output_path, and --use_cache FILE,
with which it goes on after a stop. Requests are read one at a time, and the random draws of each
depend on its text alone: neither order nor batch nor a stop changes an answer.

  generate_until   an answer by the samplers of sample.py and samplers.py, cut at the stop strings
  loglikelihood    LLaDA's Monte-Carlo estimate: the continuation is masked --mc-samples times, 1 to
                   all of its tokens (in equal steps), and the mean loss of a masked token counts as
                   that of all. It is greedy if our sampler, a token a pass, says just the same

Reading list: lm-evaluation-harness, github.com/EleutherAI/lm-evaluation-harness; the likelihood,
LLaDA, arXiv 2502.09992, App. B.5; LongBench, arXiv 2308.14508.
"""

import argparse
import json
import sys
import zlib
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from data import DEVICES, Parser, guarded, pick_device, whole
from full_scale import backbone
from full_scale.processes import from_all, processes, together
from full_scale.samplers import sampler_flags, sampler_for
from full_scale.scoring import log_likelihood
from memdlm import generator_for, memory_of
from model import UserError
from sample import Write, decoding_flags, generate, plan_blocks, write_prompt


def build_parser() -> Parser:
    """Our flags, which are the names of --model_args as well (with _ for -)."""
    parser = Parser(
        "lm-evaluation-harness with a real backbone. All other flags are the harness's."
    )
    flag = parser.add_argument
    backbone.backbone_flags(flag)
    flag("--adapter", help="outer LoRA in PEFT's format: DIR/adapter of a fine-tuning")
    flag("--memory", action="store_true", help="write each context into the weights (Sec. 4.5)")
    flag("--chat", action="store_true", help="contexts go through the chat template [off]")
    flag("--max-length", type=whole(2), default=8192, help="of context and answer, in tokens")
    flag("--mc-samples", type=whole(1), default=128, help="masks of a likelihood's estimate [128]")
    flag("--seed", type=whole(0), default=0, help="of all of our own random draws")
    flag("--device", choices=DEVICES, default="auto", help="where to compute")
    decoding_flags(flag)
    sampler_flags(flag)
    return parser


def stratified_masks(tokens: int, samples: int, generator: torch.Generator) -> Tensor:
    """(samples, tokens) bool: masks of 1 to `tokens` tokens, whose numbers are spread evenly, from
    a random one on. One token has one mask."""
    samples = min(samples, 1) if tokens == 1 else samples
    start = torch.randint(tokens, (1,), generator=generator)
    counts = (start + torch.arange(samples) * tokens // samples) % tokens + 1
    rank = torch.rand(samples, tokens, generator=generator).argsort(1).argsort(1)
    return rank < counts[:, None]


@register_model("memdlm")
class MemDLM(LM):
    """A backbone as the harness wants it. Keyword arguments are the flags of `build_parser`; of
    batch_size, it is how many masks of a likelihood are computed at once."""

    def __init__(self, batch_size=1, max_batch_size=None, device="cuda", **flags):
        super().__init__()
        named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        words = [
            (name, str(value)) if value is not True else (name,) for name, value in named.items()
        ]
        given = [word for pair in words for word in pair if named[pair[0]] not in (False, None)]
        self.args = args = build_parser().parse_args(given)
        (self._rank, self._world_size), self.batch = processes(), max(1, int(batch_size))
        # The harness says "cuda:0" if nobody says anything. Of several GPUs, "cuda" is our own.
        self._device = pick_device("auto" if device.startswith("cuda") else device)
        self.tokenizer = backbone.backbone_tokenizer(args, plain=not args.chat)
        if args.chat and self.tokenizer.template is None:
            raise UserError(f"--chat: {args.backbone} has no chat template.")
        self.architecture = backbone.architecture_of(args)
        self.sampler(args.max_length)  # faults in the flags show before the weights are read
        model = backbone.load_backbone(args, self.tokenizer, self._device)
        self.model = backbone.add_adapter(model, args.adapter)
        self.write = Write(memory=memory_of(backbone.trained_with(args.adapter)))

    @cache  # noqa: B019  (there is one model in a process)
    def sampler(self, tokens: int):
        """The sampler for an answer of this length: a short one takes a pass a token at most."""
        steps = self.args.steps and min(self.args.steps, tokens)
        args = argparse.Namespace(**{**vars(self.args), "steps": steps})
        return sampler_for(args, self.architecture, tokens, self.tokenizer.eos)

    def fitting(self, ids: list[int], rest: int) -> Tensor:
        """The context (1, P), whose beginning is cut off if `rest` tokens more do not fit."""
        room = self.args.max_length - rest
        if room < 0:
            raise UserError(f"--max-length {self.args.max_length} has no room for {rest} tokens.")
        if len(ids) > room:
            tqdm.write(f"cut off: of a context of {len(ids)} tokens, the last {room} are read")
            ids = ids[len(ids) - room :]
        return torch.tensor([ids], dtype=torch.long, device=self._device)

    def memory_of(self, prompt: Tensor):
        """What the context writes into the weights, if anything (--memory)."""
        if not self.args.memory or not prompt.numel():
            return None
        return write_prompt(self.model, prompt, self.write, self.args.seed, [number_of(prompt)])

    def answer(self, context: str, options: dict) -> str:
        """The text of one answer."""
        tokens, stops = int(options.get("max_gen_toks", 256)), options.get("until") or []
        prompt = self.fitting(self.tokenizer.encode_prompt(context), tokens)
        drawn = generator_for(self.args.seed, "sample", number_of(prompt))
        heat = float(options.get("temperature", 0)) if options.get("do_sample") else 0.0
        known = {"fast": self.memory_of(prompt), "threshold": self.args.threshold}
        ids = self.sampler(tokens)(self.model, prompt, temperature=heat, generator=drawn, **known)
        text = self.tokenizer.decode(ids[0].tolist())
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.partition(stop)[0] if stop else text
        return text

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """log p(continuation | context), and whether a greedy answer would be just that."""
        text, encode = context.rstrip(), self.tokenizer.encode
        continuation = context[len(text) :] + continuation  # a blank belongs to the word behind it
        ids = self.tokenizer.encode_prompt(text) if text else []
        target = encode(continuation) if self.args.chat else encode(text + continuation)[len(ids) :]
        prompt = self.fitting(ids, len(target))
        x0 = torch.cat([prompt[0], prompt.new_tensor(target)])
        drawn = generator_for(self.args.seed, "likelihood", number_of(x0))
        hidden = stratified_masks(len(target), self.args.mc_samples, drawn).to(x0.device)
        masked = torch.nn.functional.pad(hidden, (prompt.shape[1], 0))
        fast, estimates = self.memory_of(prompt), []
        for part in masked.split(self.batch):
            share = part.sum(1) / len(target)
            estimates.append(
                log_likelihood(self.model, x0, prompt.shape[1], part, share, fast=fast)
            )
        said = generate(self.model, prompt, plan_blocks(len(target)), fast=fast)
        return torch.cat(estimates).mean().item(), said[0].tolist() == target

    def each(self, kind: str, requests: list[Instance], do) -> list:
        """do(*arguments) of each request; what is there already, the harness has not asked for."""
        results = []
        for request in tqdm(requests, desc=kind, disable=self.rank > 0):
            results.append(do(*request.args))
            self.cache_hook.add_partial(kind, request.args, results[-1])
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.each("generate_until", requests, self.answer)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.each("loglikelihood", requests, self.likelihood)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of a whole text: it is refused where it is longer than --max-length."""
        return self.each(
            "loglikelihood_rolling", requests, lambda text: self.likelihood("", text)[0]
        )

    # What the harness needs to share the requests out to several processes.

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(from_all(tensor.cpu()))

    def gather_object(self, obj, dst: int = 0) -> list:
        return from_all(obj)

    def barrier(self) -> None:
        from_all(None)


def number_of(ids: Tensor) -> int:
    """A number of its own for each text: random draws go by it, not by the order of requests."""
    return zlib.crc32(ids.cpu().numpy().tobytes())


def run(arguments: list[str]) -> None:
    """The harness with our flags in front, or with its own alone."""
    device = "auto"
    if any(word.partition("=")[0] == "--backbone" for word in arguments):
        parser = build_parser()
        args, arguments = parser.parse_known_args(arguments)
        device, own = args.device, {}
        for name, value in vars(args).items():
            if name != "device" and value != parser.get_default(name):
                own[name] = value
        own = json.dumps(own)
        if "--use_cache" in arguments:  # the harness's key is the request alone, whoever answers
            place = arguments.index("--use_cache") + 1
            arguments[place:] = [
                f"{arguments[place]}-{zlib.crc32(own.encode()):08x}",
                *arguments[place + 1 :],
            ]
        arguments = ["--model", "memdlm", "--model_args", own, *arguments]
        arguments += ["--device", pick_device(device)]
    sys.argv[1:] = arguments
    with together(pick_device(device)):
        cli_evaluate()


if __name__ == "__main__":
    guarded(lambda: run(sys.argv[1:]))
