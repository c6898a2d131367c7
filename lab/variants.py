"""
variants.py: what the paper's Sec. 4 compares its choices with, and our rule of writing a prompt.

Each takes the place of the method's own in a field of `memdlm.Memory` or of `sample.Write`. A run's
settings are names and numbers, as in JSON: `memory_of` alone makes functions of names. A number's
default stands in Memory, a name's is the first of CHOICES; flags and help are made from them.

Reading list: distillation (Fig. 6), Hinton et al. 2015, arXiv 1503.02531.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import memdlm
from data import Batch
from lab.tools import Parser, real, whole
from memdlm import Anchor, Memory, Stage, embed, precise, stage_of, two_stages
from model import Fast, Transformer
from sample import Write

# ---- through which states (Figs. 9-11) -----------------------------------------------------------


def chain(masks: list[Tensor], maskable: Tensor) -> list[Stage]:
    """A stage for each mask (B, T), in order."""
    return [stage_of(one, maskable, after) for one, after in pairwise([*masks, None])]


def consistent(anchor: Anchor, maskable: Tensor, memory: Memory, generator, steps: int) -> list:
    """Fig. 9: the paper's trajectory (published name: pmc) for any K. K = 1 is stage 1 alone. K > 2
    inserts nested states, each revealing an even share, rounded up, of what is left (Fig. 11)."""
    pre, last = two_stages(anchor, maskable, memory, generator)
    if steps <= 2:
        return [pre, last] if steps == 2 else [pre._replace(following=None)]
    extra, masks = pre.masked & ~last.masked, [pre.masked]
    chance = torch.rand(maskable.shape, generator=generator).to(maskable.device)
    rank = chance.masked_fill(~extra, 2.0).argsort(dim=1).argsort(dim=1)
    left = extra.sum(1, keepdim=True)
    for more in range(steps - 2, 0, -1):  # steps after this one
        left = left * more // (more + 1)
        masks.append(last.masked | (extra & (rank < left)))
    return chain([*masks, last.masked], maskable)


def pre_anchor_only(anchor, maskable, memory, generator, steps: int) -> list[Stage]:
    """Fig. 10 (published name: pre_only): stage 1 alone, whose next state still is the anchor."""
    return two_stages(anchor, maskable, memory, generator)[:1]


def anchor_only(anchor, maskable, memory, generator, steps: int) -> list[Stage]:
    """Fig. 10 (published name: no_progressive): stage 2 alone, weighted by the t that was drawn."""
    return [Stage(anchor.masked, anchor.masked, 1 / (anchor.t + 1e-6))]


def inconsistent(anchor, maskable, memory, generator, steps: int) -> list[Stage]:
    """Fig. 9 (published name: progressive_memory): masks unrelated to the anchor, from 80% to 20%.
    The first of several masks each token with chance 0.8, the others int(n * ratio) tokens of it;
    the weights are those of the nominal ratios."""
    chance = torch.rand(maskable.shape, generator=generator).to(maskable.device)
    chance = chance.masked_fill(~maskable, 2.0)
    rank, n = chance.argsort(dim=1).argsort(dim=1), maskable.sum(1, keepdim=True)
    masks, ratios = [], [0.2]
    if steps > 1:
        # In just this order of operations: the last ratio comes out a little below 0.2.
        ratios = [0.8 + (0.2 - 0.8) * (k / (steps - 1)) for k in range(steps)]
        masks.append(chance < 0.8)
    for ratio in ratios[len(masks) :]:
        fewest = rank < (n.double() * ratio).long()
        masks.append(fewest & masks[0] if masks else fewest & maskable)
    weights = [torch.full_like(anchor.t, 1 / (ratio + 1e-6)) for ratio in ratios]
    return [s._replace(weight=weight) for s, weight in zip(chain(masks, maskable), weights)]


def newly_revealed(states, *given, **options) -> list[Stage]:
    """Eq. 7 read literally: a stage's loss is at the tokens that the next state reveals."""
    stages = states(*given, **options)
    shown = [None if s.following is None else s.masked & ~s.following for s in stages]
    return [s if new is None else s._replace(scored=new) for s, new in zip(stages, shown)]


def distillation(model, batch, stage: Stage, h: Tensor, fast: Fast, kind: str) -> Tensor:
    """Fig. 6: the student, h (M, D), follows a teacher, (M,): the same model with the same fast
    weights, which reads the next state, or the clean tokens after the last."""
    masked = torch.zeros_like(stage.masked) if stage.following is None else stage.following
    with torch.no_grad():
        seen = embed(model, batch.x0, masked)
        teacher = model.run(seen, 0, None, batch.attention_mask, fast, at=stage.scored)
    if kind == "hidden_mse":  # both after the final norm
        return (model.norm(h) - model.norm(teacher)).square().mean(-1)
    if kind == "hidden_cosine":
        return 1 - F.cosine_similarity(model.norm(h), model.norm(teacher), dim=-1)
    pair = [model.head(x).log_softmax(-1, dtype=precise(x.dtype)) for x in (h, teacher)]  # (M, V)
    of, against = pair if kind == "kl" else reversed(pair)
    return F.kl_div(of, against, reduction="none", log_target=True).sum(-1)  # KL(against || of)


class FullRank(Fast):
    """B (..., out, in) is the change of the matrix itself, and A the identity, which stays."""

    def tensors(self) -> list[Tensor]:
        return [B for _, B in self.weights.values()]

    def with_tensors(self, tensors: list[Tensor]) -> Fast:
        pairs = {}
        for (name, (A, _)), B in zip(self.weights.items(), tensors):
            pairs[name] = A[:1].expand(len(B), *A.shape[1:]), B
        return self._replace(weights=pairs)


def fresh_full(shape: tuple, rank: int, dtype: torch.dtype, generator) -> tuple:
    """Fig. 7: the identity, and zero. Their product is added times alpha / rank, as a LoRA's is."""
    *stack, _, inputs = shape
    return torch.eye(inputs, dtype=dtype).expand(*stack, -1, -1), torch.zeros(shape, dtype=dtype)


def global_norm(grads) -> list[Tensor]:
    """Sec. 4.6: one norm for each set, over the gradients of all its matrices."""
    total = sum(grad.flatten(1).square().sum(1) for grad in grads).sqrt()  # (N,)
    return [total.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]


# ---- from which rows and states a prompt is written ----------------------------------------------


def surprise_rule(model, prompts, write, generators, window=96, share=0.3, passes=8) -> tuple:
    """Ours, not the paper's: write what the model could not have guessed, in windows as long as the
    examples it was trained on. Each token is scored with a quarter of its window masked, and the
    most surprising `share` is written in two complementary halves, in `passes` through all windows:
    at most two for each window's length of the prompt, and one over a single window (README)."""
    windows = cut_windows(prompts, window)  # (B * n, W)
    surprise = token_surprise(model, windows).view(len(prompts), -1)  # (B, n * W)
    order = surprise.argsort(dim=1, descending=True, stable=True)
    chosen = order.argsort(dim=1, stable=True) < share * surprise.shape[1]
    coins = [torch.rand(surprise.shape[1], generator=generator) for generator in generators]
    half = (torch.stack(coins) < 0.5).to(prompts.device)
    batch = Batch(windows, torch.ones_like(windows, dtype=torch.bool), None)
    stages = []
    for mask in ((chosen & half).view_as(windows), (chosen & ~half).view_as(windows)):
        h = memdlm.prefix(model, batch, mask, write.memory)
        stages.append(stage_of(mask, batch.maskable)._replace(h=h))
    most = round(MOST_PASSES * prompts.shape[1] / window) if prompts.shape[1] > window else 1
    return windows, stages * min(passes, most)


def cut_windows(prompts: Tensor, window: int) -> Tensor:
    """(B, P) -> (B * n, W): n windows of equal length W <= window that cover the prompt."""
    length = prompts.shape[1]
    count = -(-length // window)
    width = -(-length // count)
    starts = [min(i * width, length - width) for i in range(count)]
    windows = [prompts[:, start : start + width] for start in starts]
    return torch.stack(windows, dim=1).flatten(0, 1)


def token_surprise(model: Transformer, rows: Tensor, folds: int = 4) -> Tensor:
    """-log p of each token (B, W), predicted while every fourth token, it among them, is masked."""
    nll = torch.zeros(rows.shape, device=rows.device)
    for fold in range(folds):
        masked = torch.arange(rows.shape[1], device=rows.device) % folds == fold
        masked = masked.expand(rows.shape)
        h = model.run(memdlm.embed(model, rows, masked), at=masked)
        nll.masked_scatter_(masked, memdlm.token_nll(model, h, rows[masked]).to(nll.dtype))
    return nll


# ---- by name -------------------------------------------------------------------------------------

STRATEGIES = {f.__name__: f for f in (consistent, pre_anchor_only, anchor_only, inconsistent)}
DISTILLED = ("kl", "reverse_kl", "hidden_mse", "hidden_cosine")
# The settings that are names: their values, the paper's first, each with the fields of Memory that
# it sets. (Strategy and targets set none: they and the steps make one function, in `memory_of`.)
CHOICES: dict[str, dict[str, dict]] = {
    "scope": {"batch": {}, "sample": {"scope": "sample"}},
    "strategy": {name: {} for name in STRATEGIES},
    "loss": {"ce": {}, **{kind: {"loss": partial(distillation, kind=kind)} for kind in DISTILLED}},
    "targets": {"all": {}, "newly_revealed": {}},
    "places": {"ffn": {}, "ffn+attention": {"places": ("mlp", "attention")}},
    "form": {"lora": {}, "full": {"fresh": fresh_full, "kind": FullRank}},
    "clip_by": {"tensor": {}, "global": {"norms": global_norm}},
}
NUMBERS = ("rank", "alpha", "lr", "clip", "fraction", "epochs", "start_scale")  # of Memory
MOST_PASSES = 2  # of our rule, for each window's length of a prompt that has several
WRITE_RULES = ("paper", "surprise")


def setting(name: str) -> str:
    """A field or choice as a run's settings call it: memory_rank, but start_scale."""
    return name if name == "start_scale" else f"memory_{name}"


def paper_settings() -> dict:
    """The paper's inner loop (Sec. 4.1) as a run's settings have it."""
    found = {setting(name): getattr(Memory(), name) for name in NUMBERS}
    found |= {setting(name): next(iter(values)) for name, values in CHOICES.items()}
    return found | {"memory_steps": 2}


def memory_of(config: dict) -> Memory:
    """The inner loop that a run's settings mean. What they do not name is the paper's."""
    config = paper_settings() | config
    memory = Memory(**{name: config[setting(name)] for name in NUMBERS})
    for name, values in CHOICES.items():
        memory = replace(memory, **values[config[setting(name)]])
    asked = [config[f"memory_{name}"] for name in ("strategy", "steps", "targets")]
    if asked == ["consistent", 2, "all"]:
        return memory  # through `two_stages`, the method's own
    states = partial(STRATEGIES[config["memory_strategy"]], steps=config["memory_steps"])
    if config["memory_targets"] == "newly_revealed":
        states = partial(newly_revealed, states)
    return replace(memory, stages=states)


def write_with(memory, rule: str, passes: int, anchor_ratio: float, window: int, lr, rank) -> Write:
    """The `Write` of a rule's name. lr, rank: None for those of `memory`, whose alpha / rank stays.
    passes: through the stages."""
    rank, lr = rank or memory.rank, memory.lr if lr is None else lr
    memory = replace(memory, rank=rank, alpha=rank * memory.alpha / memory.rank, lr=lr)
    passes *= memory.epochs
    if rule == "paper":
        return Write(replace(memory, epochs=passes), anchor_ratio)
    ours = partial(surprise_rule, window=window, passes=passes)
    return Write(replace(memory, epochs=1), anchor_ratio, ours)


def loop_flags(flag: Callable) -> None:
    """Both loops. The paper's values (Sec. 4.1) are the defaults, and stand in brackets."""
    flag("--steps", type=whole(0), default=0, help="fine-tuning steps [5 epochs]")
    flag("--batch", type=whole(1), default=2, help="pairs computed at once [2]")
    flag("--lr", type=real(0), default=2e-5, help="peak learning rate [2e-5]")
    flag("--warmup", type=real(0, 1), default=0.1, help="share of warm-up steps [0.1]")
    flag("--clip", type=real(0), default=1.0, help="norm of theta's gradient, 0 = off [1.0]")
    paper = paper_settings()

    def inner(name: str, words: str, **kind) -> None:
        key = setting(name)
        words = f"{words} [{paper[key]}]"
        flag(f"--{key.replace('_', '-')}", **kind, default=paper[key], help=words)

    inner("rank", "rank of phi", type=whole(1))
    inner("alpha", "alpha of phi", type=real(0))
    inner("lr", "eta, step size of the inner loop", type=real(0))
    inner("clip", "norm of each gradient, 0 = off", type=real(0))
    inner("fraction", "share of layers, the last ones, that is adapted", type=real(0.01, 1))
    inner("epochs", "passes through the stages", type=whole(1, 1000))
    inner("steps", "K, the number of stages, Fig. 11", type=whole(1, 1000))
    inner("start_scale", "s of the pre-anchor", type=real(1))
    inner("scope", "who shares a set of phi", choices=CHOICES["scope"])
    inner("strategy", "through which states, Figs. 9 and 10", choices=STRATEGIES)
    inner("loss", "what is learnt from them, Fig. 6", choices=CHOICES["loss"])
    inner("targets", "and at which places, Sec. 4.6", choices=CHOICES["targets"])
    inner("places", "which matrices are adapted, Fig. 7", choices=CHOICES["places"])
    inner("form", "by two thin matrices or a full one, Fig. 7", choices=CHOICES["form"])
    inner("clip_by", "whose norm is clipped, Sec. 4.6", choices=CHOICES["clip_by"])


def write_flags(flag: Callable) -> None:
    """How a prompt is written into the weights. The paper's values stand in brackets."""
    flag("--write", choices=WRITE_RULES, default="surprise", help="rule [paper, Sec. 4.5]")
    flag("--write-lr", type=real(0), default=0.5, help="its step size [0.1, Sec. 4.5]")
    flag("--write-rank", type=whole(1), default=32, help="rank of its fast weights [32, Sec. 4.1]")
    flag("--write-passes", type=whole(1), default=8, help="passes [1]; ours: 2 a window at most")
    flag("--anchor-ratio", type=real(0.01, 1), default=0.2, help="of rule paper [0.2, Sec. 4.5]")


def check_write_flags(parser: Parser, args: Namespace, memory: bool) -> None:
    """Refuses flags that would have no effect. memory: whether prompts are written at all."""
    if not memory:
        names = ("write", "write_lr", "write_rank", "write_passes", "anchor_ratio")
        parser.refuse(args, names, "says how a memory is written: add --memory")
    elif args.write != "paper":
        parser.refuse(args, ["anchor_ratio"], "needs --write paper")


def write_of(args: Namespace, config: dict) -> Write:
    """The `Write` that these flags mean, with the memory of a run's settings."""
    asked = args.write, args.write_passes, args.anchor_ratio, config["length"]
    return write_with(memory_of(config), *asked, args.write_lr, args.write_rank)
