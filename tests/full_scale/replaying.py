"""
replaying.py: what a record of the published code is, and how its inner loops, outer losses and
training steps are replayed. Used by test_golden.py, which replays the other kinds. "Published" is
what the published code calls a tensor: model.layers.3.mlp.experts.5.up_proj.weight
"""

import copy
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import memdlm
from data import Batch
from full_scale.checkpoints import load_llada, published_name, published_tensors
from lab import variants
from memdlm import Anchor, Memory, Stage, corrupt, inner_loop, mdlm_loss, memdlm_loss
from model import Fast, Transformer

MASK, PAD = 196, 193  # in all recorded models
FAMILIES = {"moe": "llada_moe", "dense": "llada_dense", "l21": "llada21"}
TOLERANCES = {
    "values": {"rtol": 1e-4, "atol": 1e-4},  # logits and hidden states
    "loss": {"rtol": 1e-4, "atol": 1e-6},
    "fast": {"rtol": 0.0, "atol": 2e-5},
    "unchanged": {"rtol": 0.0, "atol": 1e-7},
    "gradient": {"rtol": 1e-3, "atol": 1e-5},
    "confidence": {"rtol": 0.0, "atol": 1e-4},
}


def close(ours, recorded, kind: str, what: str) -> None:
    """Fails, and says what differs by how much, unless both are equal within TOLERANCES[kind]."""
    limits = {**TOLERANCES[kind], "check_dtype": False, "msg": lambda text: f"{what}: {text}"}
    ours, recorded = torch.as_tensor(ours).detach(), torch.as_tensor(recorded)
    torch.testing.assert_close(ours, recorded, **limits)


class Record(dict):
    """A dict that notes which of its entries were looked at. `finish` fails for the others: they
    have not been replayed, whatever they are."""

    def __init__(self, entries: dict):
        super().__init__(entries)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def items(self):
        self.about(*self)
        return super().items()

    def about(self, *keys: str) -> None:
        """These entries tell how the record was made. There is nothing to compare with them."""
        self.seen.update(keys)

    def finish(self, where: str) -> None:
        """Fails unless every entry, and every entry of the records in it, was looked at."""
        unknown = [key for key in self if key not in self.seen]
        assert not unknown, f"{where}: nothing was compared with {unknown}"
        for key, value in super().items():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Record):
                    part.finish(f"{where}.{key}")


def read(path: Path):
    """A JSON file, with a Record for each object in it."""
    return json.loads(path.read_text(encoding="utf-8"), object_hook=Record)


@lru_cache
def load(folder: Path) -> Transformer:
    """A recorded checkpoint. In the published mixtures, the embedding of the padding token gets no
    gradient. Our models, whose embeddings are frozen, leave that out: it is put in here."""
    model = load_llada(folder)
    model.config.mask_id = MASK
    if model.config.moe_layers:
        model.embedding.padding_idx = read(folder / "config.json").get("pad_token_id")
    return model


def model_named(name: str, golden: Path) -> Transformer:
    """dense -> llada_dense/checkpoint, moe_variant -> llada_moe/checkpoint_variant."""
    family, _, suffix = name.partition("_")
    return load(golden / FAMILIES[family] / f"checkpoint_{suffix}".rstrip("_"))


def part(tensors: dict[str, Tensor], model: Transformer, published: str) -> Tensor:
    """The counterpart of a published tensor among tensors that are named as our parameters."""
    ours, expert = published_tensors(model)[published]
    return tensors[ours] if expert is None else tensors[ours][expert]


def fast_part(fast: Fast, model: Transformer, published: str) -> Tensor:
    """The counterpart of a published `<module>.A` (r, in) or `<module>.B` (out, r)."""
    module, _, letter = published.rpartition(".")
    number = {"A": 0, "B": 1}[letter]
    tensors = {f"{name}.weight": pair[number][0] for name, pair in fast.weights.items()}
    return part(tensors, model, f"{module}.weight")


def make_fast(model: Transformer, tensors: dict[str, Tensor], memory: Memory) -> Fast:
    """Recorded fast weights as ours, in one set. Of a matrix that is recorded at all, every expert
    must be there; a B that is not recorded is zero, as it is at every start."""
    fast = memdlm.init_fast(model, memory, 1, torch.Generator())
    for A, _ in fast.weights.values():
        A.fill_(torch.nan)
    for published, tensor in tensors.items():
        ours = fast_part(fast, model, published)
        assert ours.shape == tensor.shape, published
        ours.copy_(tensor)
    weights = {name: pair for name, pair in fast.weights.items() if not pair[0].isnan().all()}
    assert all(A.isfinite().all() for A, _ in weights.values()), "an expert is missing"
    return Fast(weights, fast.scale)


STRATEGY = {
    "pmc": "consistent",
    "progressive_memory_consistent": "consistent",
    "pre_only": "pre_anchor_only",
    "no_progressive": "anchor_only",
    "progressive_memory": "inconsistent",
}
LOSS = {"ce": "ce", "distill": "kl", "distill_reverse": "reverse_kl"}
HIDDEN_LOSS = {"mse": "hidden_mse", "cosine": "hidden_cosine"}
MASK_MODE = {"student_masked": "all", "newly_revealed": "newly_revealed"}
WEIGHTED = {"scheduler": True, "uniform": False}  # by 1/t, or not


class Run(NamedTuple):
    """A recorded inner loop, as our functions take it."""

    entry: Record  # of cases.json
    names: list[str]  # of the published fast weights
    record: Record  # the tensors
    model: Transformer
    batch: Batch
    memory: Memory
    fast: Fast  # phi_0
    anchor: Anchor
    stages: list[Stage]  # of one epoch after the other


def read_memory(case: Record) -> Memory:
    """The published settings as ours."""
    settings = {name: case[name] for name in ("lr", "clip", "fraction", "start_scale", "epochs")}
    settings["rank"], settings["alpha"] = case.get("rank", 4), case.get("alpha", 8.0)
    settings["steps"], settings["strategy"] = case["num_steps"], STRATEGY[case["strategy"]]
    settings["targets"] = MASK_MODE[case["mask_mode"]]
    hidden_loss, loss = HIDDEN_LOSS[case["hidden_type"]], case["loss_type"]
    settings["loss"] = hidden_loss if loss == "distill_hidden" else LOSS[loss]
    assert case["temperature"] == 1 or "kl" not in settings["loss"], "we have no temperature"
    assert (case["norm"], case["pad_unmask"]) == ("token", "none")
    assert case["data"].startswith(("train", "infer"))
    case.about("anchor", "anchor_seed", "sync")  # how the states were drawn, by how many processes
    return by_name(settings)


def by_name(settings: dict) -> Memory:
    """A memory with variants by their names."""
    return variants.memory_of({variants.setting(name): one for name, one in settings.items()})


def make_run(folder: Path, entry: Record, record: Record) -> Run:
    """A record's entry in cases.json, and its tensors, as arguments of our functions."""
    entry.about("model_training_flag_after_adapt", "min_router_topk_margin_over_all_forwards")
    case, names = entry["case"], entry["adapter_param_names_in_order"]
    model, memory = model_named(case["model"], folder.parent), read_memory(case)
    x0, labels = record["in.input_ids"], record["in.labels"]
    batch = Batch(x0, labels != -100, record.get("in.attention_mask"))
    assert torch.equal(labels[batch.maskable], x0[batch.maskable])

    start, targets = load_file(folder / entry["init_file"]), case["targets"].split(",")
    fast = make_fast(model, {name: start[name] for name in names}, memory)
    for ours in memdlm.adapted_matrices(model, memory):
        published = published_name(model.config, ours).rpartition(".")[2]
        assert (published in targets) == (ours in fast.weights), f"is {ours} adapted?"

    stages, weighted = [], WEIGHTED[case["weight"]]
    for k in range(len(entry["stages"])):
        stages.append(read_stage(record, f"stage{k}.", batch, memory, weighted))
    anchor = read_anchor(record, batch, stages[-1], case["prompt_mask_ratio"])
    hs = [memdlm.prefix(model, batch, stage.masked, memory).detach() for stage in stages]
    stages = [stage._replace(h=h) for stage, h in zip(stages, hs)]
    return Run(entry, names, record, model, batch, memory, fast, anchor, stages)


def read_stage(record: Record, key: str, batch: Batch, memory: Memory, weighted: bool) -> Stage:
    """What student and teacher see is what our masks make of the clean tokens, and the weight is
    that of the recorded t."""
    masked, following = record[f"{key}masked"].bool(), record.get(f"{key}next_masked")
    following = None if following is None else following.bool()
    assert torch.equal(record[f"{key}input_ids"], corrupt(batch.x0, masked, MASK))
    if memory.loss is not None:  # there is a teacher
        seen = torch.zeros_like(masked) if following is None else following
        assert torch.equal(record[f"{key}teacher_input_ids"], corrupt(batch.x0, seen, MASK))
    t = record[f"{key}t"]
    weight = 1 / (t + 1e-6) if weighted else torch.ones_like(t)
    by_token = weight[:, None].expand(masked.shape)
    close(by_token, record[f"{key}loss_weights"], "loss", f"{key}loss_weights")
    return Stage(masked, record[f"{key}loss_mask"].bool(), weight, following)


def read_anchor(record: Record, batch: Batch, last: Stage, ratio: float) -> Anchor:
    """The recorded draw. At inference the published code draws by itself: t is then the setting
    prompt_mask_ratio, and a mask that is not recorded is that of the last state."""
    masked, t = record.get("anchor.masked"), record.get("anchor.t")
    if masked is None:
        masked = last.masked if last.following is None else last.following
    else:
        masked = masked.bool()
        assert torch.equal(record["anchor.input_ids"], corrupt(batch.x0, masked, MASK))
    return Anchor(torch.full((len(masked),), ratio) if t is None else t.flatten(), masked)


def replay_stage(run: Run, k: int, fast: Fast) -> Fast:
    """One step of the inner loop: its loss by row and in all, the norm of every gradient, and every
    fast weight after it."""
    stage, entry = run.stages[k], run.entry["stages"][k]
    assert stage.masked.sum(1).tolist() == entry["n_masked_per_row"]
    assert stage.scored.sum() == entry["n_loss_positions"]
    close(run.record[f"stage{k}.t"], entry["t"], "loss", f"t of stage {k}")
    compare_rows(run, stage, fast, run.record[f"stage{k}.weighted_token_loss"])
    compare_gradients(run, stage, fast, entry)
    after, losses = inner_loop(run.model, run.batch, [stage], fast, replace(run.memory, epochs=1))
    close(losses.item(), entry["loss"], "loss", f"loss of stage {k}")
    for name in run.names:
        ours, recorded = fast_part(after, run.model, name), run.record.get(f"stage{k}.after.{name}")
        if recorded is None:  # only what has changed is recorded
            close(ours, fast_part(fast, run.model, name), "unchanged", f"stage {k}: {name}")
        else:
            close(ours, recorded, "fast", f"stage {k}: {name}")
    return after


def compare_rows(run: Run, stage: Stage, fast: Fast, recorded: Tensor) -> None:
    """The weighted losses (B, T), summed over each row."""
    first = run.memory.first_layer(run.model.config.layers)
    h = run.model.run(stage.h, first, None, run.batch.attention_mask, fast, at=stage.scored)
    loss = (run.memory.loss or memdlm.cross_entropy)(run.model, run.batch, stage, h, fast)
    by_token = torch.zeros_like(recorded).masked_scatter(stage.scored, loss.detach())
    by_row = stage.weight * by_token.sum(1)
    close(by_row, recorded.sum(1), "loss", "weighted_token_loss by row")
    assert not recorded[~stage.scored].any()


def compare_gradients(run: Run, stage: Stage, fast: Fast, entry: Record) -> None:
    """Norms before clipping, how many of them are clipped, and the norm of all."""
    leaves = [part.clone().requires_grad_() for part in fast.tensors()]
    loss = memdlm.stage_loss(run.model, run.batch, stage, fast.with_tensors(leaves), run.memory)
    grads = fast.with_tensors(list(torch.autograd.grad(loss.sum(), leaves)))
    norms = torch.stack([fast_part(grads, run.model, name).norm() for name in run.names])
    recorded = [entry["grad_norm_per_param_before_clip"][name] for name in run.names]
    close(norms, recorded, "gradient", "norms of gradients")
    close(norms.norm(), entry["grad_norm_global_before_clip"], "gradient", "norm of all")
    clipped = (norms > run.memory.clip) & (run.memory.clip > 0)
    assert clipped.sum() == entry["n_params_clipped"]


def replay_outer(run: Run, stages: list[Stage]) -> None:
    """Eqs. 9 and 10: the loss with phi_K in place and the plain one, in every normalisation, and
    the gradients of both."""
    model, batch, anchor, outer = run.model, run.batch, run.anchor, run.entry["outer"]
    assert WEIGHTED[run.entry["case"]["weight"]], "the outer loss has weights 1/t"
    loss, _ = memdlm_loss(model, batch, anchor, stages, run.fast, run.memory)
    plain = mdlm_loss(model, batch, anchor)
    close(loss, outer["loss_with_fast_weights"], "loss", "with phi")
    close(plain, outer["loss_plain_mdlm"], "loss", "plain")
    phi, _ = inner_loop(model, batch, stages, run.fast, run.memory)
    for fast, name in ((phi, "loss_with_fast_weights"), (None, "loss_plain_mdlm")):
        rows = losses_of_rows(model, batch, anchor, fast)
        by_batch = (rows * batch.maskable.sum(1)).sum() / len(rows)
        close(rows.mean(), outer[f"{name}_norm_sequence"], "loss", f"{name}, mean of rows")
        close(by_batch, outer[f"{name}_norm_batch"], "loss", f"{name}, by the number of rows")
    recorded = [key for key in run.record if key.startswith("outer.grad_")]
    assert recorded, "no gradient is recorded"
    parameters = dict(model.named_parameters())
    for kind, last in {"with_fast_weights": loss, "plain": plain}.items():
        grads = torch.autograd.grad(last, list(parameters.values()), materialize_grads=True)
        grads, start = dict(zip(parameters, grads)), f"outer.grad_{kind}."
        for key in [key for key in recorded if key.startswith(start)]:
            close(part(grads, model, key.removeprefix(start)), run.record[key], "gradient", key)


@torch.no_grad()
def losses_of_rows(model, batch: Batch, anchor: Anchor, fast: Fast | None) -> Tensor:
    """Eq. 2 for each row by itself, (B,): of them the normalisations are made that only the
    published code has."""
    losses = []
    for i in range(len(batch.x0)):
        one = Batch(*(None if part is None else part[i : i + 1] for part in batch))
        own = Anchor(anchor.t[i : i + 1], anchor.masked[i : i + 1])
        x_t = memdlm.embed(model, one.x0, own.masked)
        losses.append(memdlm.denoising_loss(model, one, own, x_t, fast=fast))
    return torch.stack(losses)


def compare_drawing(run: Run, recorded: list[Stage]) -> None:
    """Our own draws have the recorded sizes and weights; each recorded state knows the next one."""
    own = STRATEGY[run.entry["case"]["strategy"]] == "inconsistent"
    first = recorded[0].masked.sum(1)
    if own and run.entry["case"]["prompt_mask_ratio"] != 0.2:
        return  # there the masks end at this ratio, ours always at 0.2
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        drawn = memdlm.make_stages(run.anchor, run.batch.maskable, run.memory, generator)
        # Masks that do not come from the anchor begin with one of random size. One that is no
        # smaller than the recorded one leaves room for all states after it.
        if (drawn[0].masked.sum(1) >= first).all():
            break
    later = [*(stage.masked for stage in recorded[1:]), run.anchor.masked]
    for k, (ours, theirs) in enumerate(zip(drawn, recorded, strict=True)):
        weight = 1 / (run.record[f"stage{k}.t"] + 1e-6)
        close(ours.weight, weight, "loss", f"weight of state {k} as drawn")
        assert torch.equal(ours.masked.sum(1).minimum(first), theirs.masked.sum(1)), f"state {k}"
        assert own or torch.equal(ours.scored.sum(1), theirs.scored.sum(1)), f"state {k}"
        assert (ours.following is None) == (theirs.following is None), f"state {k}"
        assert theirs.following is None or torch.equal(theirs.following, later[k]), f"state {k}"


def replay_inner_loop(folder: Path, name: str, entries: Record) -> None:
    """A whole inner loop, stage by stage and then at once; then what came after it."""
    assert name in entries, "cases.json has no entry for these tensors"
    run = make_run(folder, entries[name], Record(load_file(folder / f"{name}.safetensors")))
    fast = run.fast
    for k in range(len(run.stages)):
        fast = replay_stage(run, k, fast)
    once = run.stages[: len(run.stages) // run.memory.epochs]
    at_once, losses = inner_loop(run.model, run.batch, once, run.fast, run.memory)
    recorded = [stage["loss"] for stage in run.entry["stages"]]
    close(losses[:, 0], recorded, "loss", "losses, all stages at once")
    for ours, stepwise in zip(at_once.tensors(), fast.tensors()):
        close(ours, stepwise, "fast", "fast weights, all stages at once")
    compare_drawing(run, once)
    assert run.entry["case"]["outer"] == ("outer" in run.entry)
    if "outer" in run.entry:
        replay_outer(run, once)
    run.entry.finish(name)
    run.record.finish(name)


def replay_start(path: Path) -> None:
    """phi_0: A within 1/sqrt(in), B = 0. The cases that name the file compare its numbers."""
    for name, tensor in load_file(path).items():
        bound = 0 if name.endswith(".B") else tensor.shape[1] ** -0.5
        assert tensor.abs().max() <= bound, name


OPTIMIZER = "AdamW(betas=(0.9,0.999), eps=1e-8, weight_decay=0), no gradient clipping, "
OPTIMIZER += "base parameters only"


def replay_training(table: Record, golden: Path) -> None:
    """Steps of AdamW on all weights, with the memory and without it, on the same anchors."""
    record = Record(load_file(golden / "memory/three_outer_steps.safetensors"))
    config = table["config"]
    assert (WEIGHTED[config["weight"]], config["norm"]) == (True, "token")
    settings = {name: config[name] for name in ("rank", "alpha", "clip", "fraction", "start_scale")}
    settings["strategy"], settings["loss"] = STRATEGY[config["strategy"]], LOSS[config["loss"]]
    memory = by_name(settings | {"lr": config["inner_lr"], "steps": config["K"]})
    for kind, final in {"with_memory": "final.", "plain_mdlm_same_anchors": "final_plain."}.items():
        model = copy.deepcopy(load(golden / config["model"].partition(",")[0]))
        replay_steps(model, memory, table[kind], record, with_memory=kind == "with_memory")
        parameters = dict(model.named_parameters())
        for name, norm in table[kind]["final_param_l2"].items():
            close(part(parameters, model, name).norm(), norm, "loss", f"{kind}: norm of {name}")
        for key in [key for key in record if key.startswith(final)]:
            close(part(parameters, model, key.removeprefix(final)), record[key], "fast", key)
    record.finish("three_outer_steps")


def replay_steps(model, memory: Memory, run: Record, record: Record, with_memory: bool) -> None:
    """Losses and norms of gradients at each step. The published code notes the gradient of the fast
    weights too, although no step is taken on them."""
    assert run["optimizer"] == OPTIMIZER
    optimizer = torch.optim.AdamW(model.parameters(), run["lr"], (0.9, 0.999), 1e-8, weight_decay=0)
    for k, step in enumerate(run["steps"]):
        batch, anchor, stages, fast = read_step(model, memory, record, f"step{k}.")
        if with_memory:
            loss, inner = memdlm_loss(model, batch, anchor, stages, fast, memory)
            close(inner[:, 0], step["inner_losses"], "loss", f"inner losses of step {k}")
            close(anchor.t, step["t"], "loss", f"t of step {k}")
            fast, _ = inner_loop(model, batch, stages, fast, memory)
        else:
            loss = mdlm_loss(model, batch, anchor)
        phi = [part.requires_grad_() for part in fast.tensors()]
        x_t = memdlm.embed(model, batch.x0, anchor.masked)
        with_phi = memdlm.denoising_loss(model, batch, anchor, x_t, fast=fast)
        of_phi = [grad.norm() for grad in torch.autograd.grad(with_phi, phi)]
        memdlm.train_step(model, optimizer, [loss], clip=0)
        of_theta = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        of_all = torch.stack([of_theta, *of_phi]).norm()
        close(loss, step["outer_loss"], "loss", f"outer loss of step {k}")
        close(of_theta, step["outer_grad_norm_base_params_only"], "gradient", f"step {k}: theta")
        close(of_all, step["outer_grad_norm_including_fast_weights"], "gradient", f"step {k}: all")


def read_step(model, memory: Memory, record: Record, key: str) -> tuple:
    """What a training step was given: batch, anchor, stages and phi_0, of which A is recorded."""
    batch = Batch(record[f"{key}input_ids"], record[f"{key}labels"] != -100, None)
    anchor = Anchor(record[f"{key}anchor.t"], record[f"{key}anchor.masked"].bool())
    masks = [record[f"{key}stage{k}.masked"].bool() for k in range(2)]  # K
    assert torch.equal(record[f"{key}anchor.input_ids"], corrupt(batch.x0, anchor.masked, MASK))
    stages = variants.chain(masks, batch.maskable)
    for k, stage in enumerate(stages):
        seen = corrupt(batch.x0, stage.masked, MASK)
        assert torch.equal(record[f"{key}stage{k}.input_ids"], seen)
        weight = 1 / (record[f"{key}stage{k}.t"] + 1e-6)
        close(stage.weight, weight, "loss", f"{key}stage{k}.t")
    start = f"{key}init."
    initial = {name.removeprefix(start): record[name] for name in record if name.startswith(start)}
    return batch, anchor, stages, make_fast(model, initial, memory)
