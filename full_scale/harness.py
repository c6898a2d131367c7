"""
harness.py: a real backbone under lm-evaluation-harness, as its model "memdlm": LongBench (Table 3),
and everything else that the harness has.

    python full_scale/harness.py --backbone llada-moe --adapter DIR --memory --tasks longbench
    python full_scale/harness.py --model memdlm --model_args backbone=llada-moe,memory=True ...
    torchrun --nproc_per_node 8 full_scale/harness.py --backbone ...       a process for each GPU

The second form is the harness's own: this program is `lm_eval` with one model more. Our flags are
read first (--device and --seed are ours), and all others are the harness's: --tasks, --limit,
--output_path, and --use_cache FILE, with which it goes on after a stop (with as many processes as
before). Requests are read one at a time, and the random draws of each depend on its text alone:
neither order nor batch nor a stop changes an answer. Where a task wants several answers to a text,
its draws depend on the answer's number, too. Each process needs a document at least.

  generate_until   an answer by the samplers of sample.py and samplers.py, cut at the stop strings
                   (which may be special tokens) and at the end of the assistant's turn
  loglikelihood    LLaDA's Monte-Carlo estimate: the continuation is masked --mc-samples times, 1 to
                   all of its tokens (in equal steps), and the mean loss of a masked token counts as
                   that of all. It is greedy if our sampler, as the flags set it, says just the same

Reading list: lm-evaluation-harness, github.com/EleutherAI/lm-evaluation-harness; the likelihood,
LLaDA, arXiv 2502.09992; LongBench, arXiv 2308.14508.
"""

import argparse
import json
import sqlite3
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, hash_args
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    print(f"error: {error.name} is missing: pip install lm_eval.", file=sys.stderr)
    sys.exit(2)
from torch import Tensor
from tqdm import tqdm

from full_scale import backbone
from full_scale.benchmark import end_settings, reader_settings
from full_scale.predictions import Reader
from full_scale.processes import from_all, processes, together
from full_scale.samplers import sampler_flags, sampler_for
from full_scale.scoring import log_likelihood
from lab.ask import decoding_flags
from lab.tools import DEVICES, Parser, guarded, pick_device, whole
from lab.variants import memory_of
from memdlm import generator_for
from model import Fast, UserError
from sample import Write, write_prompt


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
    """(samples, tokens) bool: masks that hide 1, 2, ... or all tokens, each number equally often,
    from a random one on. One token has one mask."""
    samples = 1 if tokens == 1 else samples
    start = torch.randint(tokens, (1,), generator=generator)
    counts = (start + torch.arange(samples) * tokens // samples) % tokens + 1
    rank = torch.rand(samples, tokens, generator=generator).argsort(1).argsort(1)
    return rank < counts[:, None]


@register_model("memdlm")
class MemDLM(LM):
    """A backbone as the harness wants it. Keyword arguments are the flags of `build_parser`.
    batch_size: how many masks of a likelihood are computed at once; requests come one by one."""

    def __init__(self, batch_size=1, max_batch_size=None, device="cuda:0", **flags):
        super().__init__()
        words = []
        for name, value in flags.items():
            if value is not False and value is not None:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        self.args = args = build_parser().parse_args(words)
        if not str(batch_size).isdigit() or device not in (*DEVICES, "cuda:0"):
            raise UserError("--batch_size must be a number, and --device cpu, cuda or mps.")
        (self._rank, self._world_size), self.batch = processes(), max(1, int(batch_size))
        # The harness says "cuda:0" if nobody says anything. Of several GPUs, "cuda" is our own.
        self._device = pick_device("auto" if device == "cuda:0" else device)
        self.tokenizer = backbone.backbone_tokenizer(args, plain=not args.chat)
        if args.chat and self.tokenizer.template is None:
            raise UserError(f"--chat: {args.backbone} has no chat template.")
        self.architecture = backbone.architecture_of(args)
        self.sampler(args.block_length or 1)  # faults in the flags show before the weights are read
        trained = backbone.trained_with(args.adapter)
        self.write = Write(memory_of(trained))
        backbone.check_fit(args, self.tokenizer, args.adapter)
        model = backbone.load_backbone(args, self.tokenizer, self._device)
        self.model = backbone.add_adapter(model, args.adapter)
        self.how = backbone.write_settings(self.write, trained) if args.memory else {}
        self.written = (None, None)  # the last context that was written, and its memory

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The harness asks for it where it would put messages into a template itself."""
        raise UserError("--apply_chat_template is not for this model: say --chat.")

    def set_cache_hook(self, hook) -> None:
        """--use_cache: the harness's key is the request alone, so other models are refused here."""
        adapter = Path(self.args.adapter) if self.args.adapter else None
        known = vars(self.args) | backbone.files_of(self.args) | end_settings(self.tokenizer)
        known = json.dumps(
            known | reader_settings(Reader("", "", None, self.how), adapter), default=str
        )
        if hook.dbdict is not None:
            if len(hook.dbdict) and hook.dbdict.get("memdlm") != known:
                raise UserError("--use_cache has answers of another model or other flags.")
            hook.dbdict["memdlm"] = known
        super().set_cache_hook(hook)

    def sampler(self, tokens: int):
        """The sampler for an answer of this length: a pass a block at least, a token at most."""
        steps = self.args.steps
        if steps and self.architecture != "llada2":  # whose steps are those of a block
            blocks = -(-tokens // (self.args.block_length or tokens))
            steps = min(max(steps, blocks), tokens)
        args = argparse.Namespace(**{**vars(self.args), "steps": steps})
        return sampler_for(args, self.architecture, tokens, self.tokenizer.eos)

    def fitting(self, ids: list[int], rest: int) -> Tensor:
        """The context (1, P), cut off at its beginning (--chat: the template's too) to fit."""
        room = self.args.max_length - rest
        if room < 0:
            raise UserError(f"--max-length {self.args.max_length} has no room for {rest} tokens.")
        if len(ids) > room:
            text = f"cut off: of a context of {len(ids)} tokens, the last {room} are read"
            tqdm.write(text, file=sys.stderr)
            ids = ids[len(ids) - room :]
        return torch.tensor([ids], dtype=torch.long, device=self._device)

    def written_from(self, prompt: Tensor) -> Fast | None:
        """What the context writes into the weights, if anything (--memory). Choices share it."""
        number = number_of(prompt)
        if not self.args.memory or not prompt.numel():
            return None
        if self.written[0] != number:
            fast = write_prompt(self.model, prompt, self.write, self.args.seed, [number])
            self.written = number, fast
        return self.written[1]

    def answer(self, context: str, options: dict, repeat: int = 0) -> str:
        """The text of one answer. repeat: where a task wants several, which of them it is."""
        options = normalize_gen_kwargs(options)
        tokens = max(1, options["max_gen_toks"])
        prompt = self.fitting(self.tokenizer.encode_prompt(context), tokens)
        drawn = generator_for(self.args.seed, "sample", number_of(prompt), repeat)
        known = {"fast": self.written_from(prompt), "threshold": self.args.threshold}
        known |= {"temperature": options.get("temperature", 0.0), "generator": drawn}
        ids = self.sampler(tokens)(self.model, prompt, **known)[0].tolist()
        return self.tokenizer.decode(ids, [*filter(None, options.get("until", []))])

    def likelihood(self, context: str, continuation: str, greedy=True) -> tuple[float, bool]:
        """log p(continuation | context), and whether our sampler would answer just that."""
        text, encode = context.rstrip(), self.tokenizer.encode
        continuation = context[len(text) :] + continuation  # a blank belongs to the word behind it
        ids = self.tokenizer.encode_prompt(text) if text else []
        whole = ids + encode(continuation) if self.args.chat else encode(text + continuation)
        border = 0  # the context ends where the tokens of both together differ from its own
        while border < len(ids) and ids[border : border + 1] == whole[border : border + 1]:
            border += 1
        target = whole[border:]
        if not target:
            return 0.0, True
        prompt = self.fitting(whole[:border], len(target))
        x0 = torch.cat([prompt[0], prompt.new_tensor(target)])
        drawn = generator_for(self.args.seed, "likelihood", number_of(x0))
        hidden = stratified_masks(len(target), self.args.mc_samples, drawn).to(x0.device)
        masked = torch.nn.functional.pad(hidden, (prompt.shape[1], 0))
        fast, estimates = self.written_from(prompt), []
        for part in masked.split(self.batch):
            share = part.sum(1) / len(target)
            estimates.append(
                log_likelihood(self.model, x0, prompt.shape[1], part, share, fast=fast)
            )
        if greedy:
            known = {"fast": fast, "threshold": self.args.threshold}
            said = self.sampler(len(target))(self.model, prompt, **known)
            greedy = said[0].tolist() == target
        return torch.cat(estimates).mean().item(), greedy

    def each(self, kind: str, requests: list[Instance], do: Callable) -> list:
        """do(*arguments) of each request that --use_cache has no answer to, and keeps each."""
        results = []
        for request in tqdm(requests, desc=kind, disable=self.rank > 0):
            results.append(do(*request.args))
            self.cache_hook.add_partial(kind, request.args, results[-1])
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Where a task wants several answers to a document, each has a number. (A process that has
        fewer documents than another is asked for its last one's answers again.)

        --use_cache: the harness would keep one answer for each text, but leaves alone what says
        do_sample. So whatever samples says that here, and is kept under the answer's number.
        """
        results, seen, kept = [], Counter(), self.cache_hook.dbdict
        for request in tqdm(requests, desc="generate_until", disable=self.rank > 0):
            context, options = key = request.args
            sampled = normalize_gen_kwargs(options)["do_sample"]
            if sampled:
                options["do_sample"] = True
            document = request.task_name, request.doc_id, context, str(options)
            repeat = seen[document] % (request.repeats or len(requests))
            seen[document] += 1
            if sampled:
                key = context, options, repeat
            name = hash_args("generate_until", key)
            known = kept is not None and name in kept
            results.append(kept[name] if known else self.answer(context, options, repeat))
            self.cache_hook.add_partial("generate_until", key, results[-1])
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.each("loglikelihood", requests, self.likelihood)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of a whole text: it is refused where it is longer than --max-length."""
        whole = partial(self.likelihood, "", greedy=False)
        return self.each("loglikelihood_rolling", requests, lambda text: whole(text)[0])

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


@contextmanager
def explained() -> Iterator[None]:
    """Makes one line of what the harness says, or asserts, about what it was given."""
    try:
        yield
    except (AssertionError, ValueError, ImportError, NotImplementedError) as error:
        ours = str(Path(__file__).parents[1]), run.__code__.co_filename
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        *_, inner = [file for file in files if "lm_eval" in file or file.startswith(ours)]
        reason = str(error).strip().partition("\n")[0]
        if "lm_eval" not in inner or not reason:
            raise
        if isinstance(error, AssertionError) and "tokenizer" in reason:
            reason = "this task needs a tokenizer: --metadata tokenizer=FOLDER, the backbone's"
        if "did not find any docs" in reason and processes()[1] > 1:
            reason = "each process needs a document of each task: lower --nproc_per_node"
        raise UserError(f"lm_eval: {reason}") from None


def check_cache(arguments: list[str]) -> None:
    """--use_cache: a damaged file shows before any work."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-c", "--use_cache", type=Path)
    path = parser.parse_known_args(arguments)[0].use_cache
    for file in path.parent.glob(f"{path.name}_rank*.db") if path else ():
        try:
            with closing(sqlite3.connect(file)) as kept:
                [(sound,)] = kept.execute("PRAGMA quick_check(1)")
        except sqlite3.DatabaseError as error:
            sound = str(error)
        if sound != "ok":
            advice = "delete it if it is damaged (its answers are made again), or name another"
            raise UserError(f"--use_cache: {file} cannot be used ({sound}): {advice}.")


def run(arguments: list[str]) -> None:
    """The harness with our flags in front, or with its own alone."""
    device = "auto"
    check_cache(arguments)
    if {"-h", "--help"} & {*arguments} and arguments[0] not in ("ls", "validate"):
        build_parser().print_help()
        print("\nThe harness's own flags:\n")
        arguments = ["run", "--help"]
    if any(word.partition("=")[0] == "--backbone" for word in arguments):
        parser = build_parser()
        args, rest = parser.parse_known_args(arguments)
        device, own = args.device, vars(args)
        del own["device"]  # which is the harness's flag, too
        own = {name: value for name, value in own.items() if value != parser.get_default(name)}
        arguments = ["--model", "memdlm", "--model_args", json.dumps(own), *rest]
        arguments += ["--device", pick_device(device)]
    sys.argv[1:] = arguments
    with together(pick_device(device)), explained():
        cli_evaluate()


if __name__ == "__main__":
    guarded(lambda: run(sys.argv[1:]))
