"""
replaying.py: what a record of the published code is, and how its inner loops, outer losses and training steps are replayed.
Used by test_golden.py, which has the other kinds.
"""

import copy
import json
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import memdlm
from data import Batch
from memdlm import STRATEGIES, Anchor, Memory, Stage, State, corrupt, denoising_loss, embed, inner_loop, make_states, stage_loss
from model import Fast, Transformer, load_llada, published_name, published_tensors

MASK, PAD = 196, 193  # in all recorded models
TOLERANCES = {
    "values": {"rtol": 1e-4, "atol": 1e-4},  # logits and hidden states
    "loss": {"rtol": 1e-4, "atol": 1e-6},
    "fast": {"rtol": 0.0, "atol": 2e-5},
    "unchanged": {"rtol": 0.0, "atol": 1e-7},
    "gradient": {"rtol": 1e-3, "atol": 1e-5},
    "confidence": {"rtol": 0.0, "atol": 1e-4},
}


def close(ours, recorded, kind: str, what: str) -> None:
    ours, recorded = (torch.as_tensor(x).detach() for x in (ours, recorded))
    torch.testing.assert_close(ours, recorded, **TOLERANCES[kind], check_dtype=False, msg=lambda text: f"{what}: {text}")


class Record(dict):
    """A record that knows which of its entries were looked at. The others have not been replayed, whatever they are."""

    def __init__(self, entries):
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
        """Entries that tell how the record was made: nothing to compare."""
        self.seen.update(keys)

    def unknown(self) -> list[str]:
        return [key for key in self if key not in self.seen]

    def finish(self, where: str) -> None:
        assert not self.unknown(), f"{where}: nothing was compared with {self.unknown()}"
        for key, value in super().items():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Record):
                    part.finish(f"{where}.{key}")


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"), object_hook=Record)


@lru_cache
def load(folder: Path) -> Transformer:
    """The checkpoints have no tokenizer that would tell [MASK]. In the published mixtures, the padding token's embedding has
    no gradient; that is left out of model.py, where embeddings are trained in the tiny model alone."""
    model, config = load_llada(folder), read(folder / "config.json")
    model.config.mask_id = MASK
    model.embedding.padding_idx = config.get("pad_token_id") if model.config.moe_layers else None
    return model


FAMILIES = {"moe": "llada_moe", "dense": "llada_dense", "l21": "llada21"}


def model_named(name: str, golden: Path) -> Transformer:
    """dense -> llada_dense/checkpoint, moe_variant -> llada_moe/checkpoint_variant."""
    family, _, suffix = name.partition("_")
    return load(golden / FAMILIES[family] / f"checkpoint_{suffix}".rstrip("_"))


def part(tensors: dict[str, Tensor], model: Transformer, name: str) -> Tensor:
    """The counterpart of a published tensor among `tensors`, which are named as our parameters: one expert of a stack."""
    ours, expert = published_tensors(model)[name]
    return tensors[ours] if expert is None else tensors[ours][expert]


# ---- the inner loop, and the outer loss after it --------------------------------------------------------------------------

STRATEGY = {"pmc": "consistent", "progressive_memory_consistent": "consistent", "pre_only": "pre_anchor_only"}
STRATEGY |= {"no_progressive": "anchor_only", "progressive_memory": "inconsistent"}
LOSS = {"ce": "ce", "distill": "kl", "distill_reverse": "reverse_kl", "mse": "hidden_mse", "cosine": "hidden_cosine"}
TARGETS = {"student_masked": "all", "newly_revealed": "newly_revealed"}
WEIGHTED = {"scheduler": True, "uniform": False}


class Run(NamedTuple):
    """A recorded inner loop, as our functions take it."""

    entry: Record  # of cases.json
    record: Record  # the tensors
    model: Transformer
    batch: Batch
    memory: Memory
    weighted: bool
    fast: Fast  # phi_0
    stages: list[Stage]  # of all epochs


def settings(case: Record) -> tuple[Memory, bool]:
    """The published settings as ours, and whether the inner loss is weighted by 1/t."""
    hidden, loss = LOSS[case["hidden_type"]], case["loss_type"]
    loss = hidden if loss == "distill_hidden" else LOSS[loss]
    assert case["temperature"] == 1 or "kl" not in loss, "distillation has no temperature here"
    assert (case["norm"], case["pad_unmask"]) == ("token", "none")
    assert case["data"].startswith(("train", "infer"))
    case.about("anchor", "anchor_seed", "sync")  # how the states were drawn, and on how many processes
    memory = Memory(case.get("rank", 4), case.get("alpha", 8.0), case["lr"], case["clip"], case["fraction"], scope="batch")
    memory = replace(memory, start_scale=case["start_scale"], steps=case["num_steps"], epochs=case["epochs"], loss=loss)
    memory = replace(memory, strategy=STRATEGY[case["strategy"]], targets=TARGETS[case["mask_mode"]])
    return memory, WEIGHTED[case["weight"]]


def make_fast(model: Transformer, tensors: dict[str, Tensor], memory: Memory) -> Fast:
    """Published `<module>.A` and `.B`, one pair for each expert -> our fast weights: a pair for each stack, one set."""
    stacks: dict = defaultdict(lambda: ({}, {}))
    for name, tensor in tensors.items():
        module, _, letter = name.rpartition(".")
        ours, expert = published_tensors(model)[f"{module}.weight"]
        stacks[ours.removesuffix(".weight")]["AB".index(letter)][expert] = tensor

    def stacked(parts: dict[int | None, Tensor]) -> Tensor:
        one = parts[None] if None in parts else torch.stack([parts[x] for x in range(model.config.experts)])
        return one[None]

    weights = {name: (stacked(A), stacked(B)) for name, (A, B) in stacks.items()}
    assert all(A.shape[-2] == memory.rank for A, _ in weights.values())
    return Fast(weights, memory.alpha / memory.rank)


def fast_part(fast: Fast, model: Transformer, name: str) -> Tensor:
    """The reverse for one published name."""
    module, _, letter = name.rpartition(".")
    tensors = {f"{ours}.weight": pair["AB".index(letter)][0] for ours, pair in fast.weights.items()}
    return part(tensors, model, f"{module}.weight")


def make_run(folder: Path, entry: Record, record: Record) -> Run:
    case, names = entry["case"], entry["adapter_param_names_in_order"]
    memory, weighted = settings(case)
    model, x0, labels = model_named(case["model"], folder.parent), record["in.input_ids"], record["in.labels"]
    batch = Batch(x0, labels != -100, record.get("in.attention_mask"))
    assert torch.equal(labels[batch.maskable], x0[batch.maskable])
    initial = load_file(folder / entry["init_file"])
    fast = make_fast(model, {name: initial[name] for name in names}, memory)
    leaves = {ours: published_name(model.config, ours).rpartition(".")[2] for ours in memdlm.adapted_layers(model, memory)}
    adapted = {ours for ours, leaf in leaves.items() if leaf in case["targets"].split(",")}
    assert fast.weights.keys() == adapted, "other matrices are adapted"
    stages = [make_stage(record, f"stage{k}.", batch, memory, weighted) for k in range(len(entry["stages"]))]
    once = len(STRATEGIES[memory.strategy](Anchor(torch.ones(1), batch.maskable), batch.maskable, memory, torch.Generator()))
    assert len(stages) == once * memory.epochs
    entry.about("model_training_flag_after_adapt", "min_router_topk_margin_over_all_forwards")
    return Run(entry, record, model, batch, memory, weighted, fast, stages)


def make_stage(record: Record, key: str, batch: Batch, memory: Memory, weighted: bool) -> Stage:
    """What student and teacher see is what our masks make of the clean tokens; the weight is that of the stage's t."""
    masked, following = (None if m is None else m.bool() for m in (record[f"{key}masked"], record.get(f"{key}next_masked")))
    t, teacher = record[f"{key}t"], torch.zeros_like(masked) if following is None else following
    assert torch.equal(record[f"{key}input_ids"], corrupt(batch.x0, masked, MASK))
    if memory.loss != "ce":
        assert torch.equal(record[f"{key}teacher_input_ids"], corrupt(batch.x0, teacher, MASK))
    weights = (1 / (t + 1e-6) if weighted else torch.ones_like(t))[:, None].expand(batch.x0.shape)
    close(weights, record[f"{key}loss_weights"], "loss", f"{key}loss_weights")
    return Stage(masked, following, t)


def replay_stage(run: Run, k: int, fast: Fast) -> Fast:
    """One step of the inner loop: its loss, per row and in all, every gradient's norm, every fast weight after it."""
    (model, batch, memory, weighted), stage, entry = run[2:6], run.stages[k], run.entry["stages"][k]
    (state,) = make_states(model, batch, [stage], memory)
    where = memdlm.TARGETS[memory.targets](stage)
    assert torch.equal(where, run.record[f"stage{k}.loss_mask"].bool())
    assert stage.masked.sum(1).tolist() == entry["n_masked_per_row"]
    assert where.sum() == entry["n_loss_positions"]
    close(stage.t, entry["t"], "loss", f"stage {k}: t")
    compare_rows(run, state, fast, run.record[f"stage{k}.weighted_token_loss"], where)
    compare_gradients(run, state, fast, entry)
    after, loss = inner_loop(model, batch, [state], fast, replace(memory, epochs=1), weighted)
    close(loss.item(), entry["loss"], "loss", f"stage {k}: loss")
    for name in run.entry["adapter_param_names_in_order"]:
        recorded = run.record.get(f"stage{k}.after.{name}")  # only of what has changed
        before, kind = fast_part(fast, model, name), "unchanged" if recorded is None else "fast"
        close(fast_part(after, model, name), before if recorded is None else recorded, kind, f"stage {k}: {name}")
    return after


def compare_rows(run: Run, state: State, fast: Fast, recorded: Tensor, where: Tensor) -> None:
    """With a set of fast weights for each row, all of them equal, the loss comes out row by row."""
    rows = len(where)
    sets = Fast({name: tuple(p.expand(rows, *p.shape[1:]) for p in pair) for name, pair in fast.weights.items()}, fast.scale)
    loss = stage_loss(run.model, run.batch, state, sets, run.memory, run.weighted)
    close(loss * where.sum(1), recorded.sum(1), "loss", "weighted_token_loss by row")
    assert not recorded[~where].any()


def compare_gradients(run: Run, state: State, fast: Fast, entry: Record) -> None:
    """Norms before clipping, how many of them are clipped, and the norm of all."""
    leaves = Fast({name: tuple(p.clone().requires_grad_() for p in pair) for name, pair in fast.weights.items()}, fast.scale)
    flat = [p for pair in leaves.weights.values() for p in pair]
    grads = torch.autograd.grad(stage_loss(run.model, run.batch, state, leaves, run.memory, run.weighted).sum(), flat)
    grads = Fast(dict(zip(leaves.weights, zip(grads[::2], grads[1::2]))), fast.scale)
    recorded = entry["grad_norm_per_param_before_clip"]
    norms = {name: fast_part(grads, run.model, name).norm().item() for name in run.entry["adapter_param_names_in_order"]}
    assert norms.keys() == recorded.keys()
    for name, norm in recorded.items():
        close(norms[name], norm, "gradient", f"gradient of {name}")
    close(np.linalg.norm(list(norms.values())), entry["grad_norm_global_before_clip"], "gradient", "gradient of all")
    assert sum(norm > run.memory.clip > 0 for norm in norms.values()) == entry["n_params_clipped"]


def recorded_anchor(run: Run) -> Anchor | None:
    """The recorded draw. The strategy with masks of its own has none; where a prompt is written, t is nominal."""
    if "anchor.masked" not in run.record:
        return None if run.memory.strategy == "inconsistent" else Anchor(run.stages[0].t, run.stages[-1].masked)
    masked, t = run.record["anchor.masked"].bool(), run.record.get("anchor.t")
    assert torch.equal(run.record["anchor.input_ids"], corrupt(run.batch.x0, masked, MASK))
    nominal = torch.full((len(masked),), run.entry["case"]["prompt_mask_ratio"])
    return Anchor(nominal if t is None else t.flatten(), masked)


def compare_drawing(run: Run, anchor: Anchor | None) -> None:
    """Ours draws states of the recorded sizes and times, in which what is visible stays visible. (The size of the first is
    random where the masks are its own: of 20 draws the largest leaves room for all states after it.)"""
    maskable, memory, own = run.batch.maskable, run.memory, run.memory.strategy == "inconsistent"
    if own and run.entry["case"]["prompt_mask_ratio"] != 0.2:
        return  # where ours always ends
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    draws = [STRATEGIES[memory.strategy](anchor, maskable, memory, generator) for generator in generators]
    recorded = run.stages[: len(draws[0])]
    for k, (drawn, stage) in enumerate(zip(draws[0], recorded)):
        close(drawn.t, stage.t, "loss", f"t of state {k} as drawn")
        sizes = torch.stack([states[k].masked.sum(1) for states in draws]).amax(0).minimum(recorded[0].masked.sum(1))
        assert (own and k == 0) or sizes.tolist() == stage.masked.sum(1).tolist(), f"state {k} as drawn"
    for stages in (draws[0], recorded):
        states = [stage.masked for stage in stages] + ([anchor.masked] if memory.strategy == "pre_anchor_only" else [])
        following = [stage.following for stage in stages if stage.following is not None]
        assert len(following) == len(states) - 1
        assert all(torch.equal(mask, after) for mask, after in zip(following, states[1:]))
        assert not any((after & ~mask).any() for mask, after in zip([maskable, *states], states)), "not nested"
        assert own or (memory.strategy, memory.steps) == ("consistent", 1) or torch.equal(states[-1], anchor.masked)


def replay_outer(run: Run, anchor: Anchor) -> None:
    """Eqs. 9-10: the loss with phi_K in place and the plain one, in every normalisation, and both gradients."""
    (model, batch, memory), outer, parameters = run[2:5], run.entry["outer"], dict(run.model.named_parameters())
    stages, losses = run.stages[: len(run.stages) // memory.epochs], {}
    assert run.weighted, "the outer loss has weights 1/t"
    for norm in memdlm.NORMS:
        suffix = "" if norm == "token" else f"_norm_{norm}"
        losses[norm, "with_fast_weights"] = memdlm.memdlm_loss(model, batch, anchor, stages, run.fast, memory, norm)[0]
        losses[norm, "plain"] = memdlm.mdlm_loss(model, batch, anchor, norm)
        close(losses[norm, "with_fast_weights"], outer[f"loss_with_fast_weights{suffix}"], "loss", f"{norm}, with phi")
        close(losses[norm, "plain"], outer[f"loss_plain_mdlm{suffix}"], "loss", f"{norm}, plain")
    names = {key.partition(".grad_")[2].partition(".")[2] for key in run.record if key.startswith("outer.grad_")}
    assert names, "no gradient is recorded"
    for kind in ("with_fast_weights", "plain"):
        grads = torch.autograd.grad(losses["token", kind], list(parameters.values()), materialize_grads=True)
        for name in names:
            ours = part(dict(zip(parameters, grads)), model, name)
            close(ours, run.record[f"outer.grad_{kind}.{name}"], "gradient", f"gradient {kind} of {name}")


def replay_memory(folder: Path, name: str, entries: Record) -> None:
    """A whole inner loop, stage by stage and at once; then what came after it."""
    assert name in entries, "cases.json has no entry for these tensors"
    run = make_run(folder, entries[name], Record(load_file(folder / f"{name}.safetensors")))
    fast, once = run.fast, len(run.stages) // run.memory.epochs
    for k in range(len(run.stages)):
        fast = replay_stage(run, k, fast)
    states = make_states(run.model, run.batch, run.stages[:once], run.memory)
    whole, losses = inner_loop(run.model, run.batch, states, run.fast, run.memory, run.weighted)
    close(losses[:, 0], [stage["loss"] for stage in run.entry["stages"]], "loss", "all losses")
    for ours, pair in whole.weights.items():
        for one, other in zip(pair, fast.weights[ours]):
            close(one, other, "fast", f"{ours}, all stages at once")
    anchor, outer = recorded_anchor(run), run.entry["case"]["outer"]
    assert outer == ("outer" in run.entry)
    if outer:
        replay_outer(run, anchor)
    compare_drawing(run, anchor)
    run.entry.finish(name)
    run.record.finish(name)


def replay_start(path: Path) -> None:
    """phi_0: A uniform within 1/sqrt(in), B = 0. Its numbers are compared by the cases that name the file."""
    for name, tensor in load_file(path).items():
        assert tensor.abs().max() <= (0 if name.endswith(".B") else tensor.shape[1] ** -0.5), name


# ---- training steps -------------------------------------------------------------------------------------------------------

OPTIMIZER = "AdamW(betas=(0.9,0.999), eps=1e-8, weight_decay=0), no gradient clipping, base parameters only"


def replay_training(table: Record, golden: Path) -> None:
    """Steps of AdamW on all weights of the model, with the memory and without it, on the same anchors."""
    record = Record(load_file(golden / "memory/three_outer_steps.safetensors"))
    config = table["config"]
    assert (WEIGHTED[config["weight"]], config["norm"]) == (True, "token")
    memory = Memory(config["rank"], config["alpha"], config["inner_lr"], config["clip"], config["fraction"], scope="batch")
    memory = replace(memory, start_scale=config["start_scale"], steps=config["K"])
    memory = replace(memory, strategy=STRATEGY[config["strategy"]], loss=LOSS[config["loss"]])
    for kind, final in {"with_memory": "final.", "plain_mdlm_same_anchors": "final_plain."}.items():
        model = copy.deepcopy(load(golden / config["model"].partition(",")[0]))
        replay_steps(model, memory, table[kind], record, kind == "with_memory")
        parameters = dict(model.named_parameters())
        for name, norm in table[kind]["final_param_l2"].items():
            close(part(parameters, model, name).norm(), norm, "loss", f"final norm of {name}")
        for key in [key for key in record if key.startswith(final)]:
            close(part(parameters, model, key.removeprefix(final)), record[key], "fast", key)
    table.finish("three_outer_steps")
    record.finish("three_outer_steps")


def replay_steps(model: Transformer, memory: Memory, run: Record, record: Record, remember: bool) -> None:
    assert run["optimizer"] == OPTIMIZER
    optimizer = torch.optim.AdamW(model.parameters(), run["lr"], (0.9, 0.999), 1e-8, weight_decay=0)
    for k, step in enumerate(run["steps"]):
        batch, anchor, stages, fast = read_step(model, memory, record, f"step{k}.")
        if remember:
            loss, inner = memdlm.memdlm_loss(model, batch, anchor, stages, fast, memory)
            close(inner[:, 0], step["inner_losses"], "loss", f"inner losses of step {k}")
            close(anchor.t, step["t"], "loss", f"t of step {k}")
            fast = inner_loop(model, batch, make_states(model, batch, stages, memory), fast, memory)[0]
        else:
            loss = memdlm.mdlm_loss(model, batch, anchor)
        phi = [p.requires_grad_() for pair in fast.weights.values() for p in pair]
        with_phi = denoising_loss(model, batch, anchor, embed(model, batch.x0, anchor.masked), fast)
        optimizer.zero_grad()
        norms = [g.norm() for g in torch.autograd.grad(with_phi, phi)]
        loss.backward()
        ours = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        close(loss, step["outer_loss"], "loss", f"outer loss of step {k}")
        close(ours, step["outer_grad_norm_base_params_only"], "gradient", f"gradient of step {k}")
        norms = torch.stack([ours, *norms]).norm()
        close(norms, step["outer_grad_norm_including_fast_weights"], "gradient", f"gradient of step {k}, phi's too")
        optimizer.step()


def read_step(model: Transformer, memory: Memory, record: Record, key: str) -> tuple[Batch, Anchor, list[Stage], Fast]:
    batch = Batch(record[f"{key}input_ids"], record[f"{key}labels"] != -100, None)
    anchor = Anchor(record[f"{key}anchor.t"], record[f"{key}anchor.masked"].bool())
    masks = [record[f"{key}stage{k}.masked"].bool() for k in range(memory.steps)]
    stages = memdlm.chain(masks, batch.maskable)
    for name, mask in {"anchor": anchor.masked, **{f"stage{k}": mask for k, mask in enumerate(masks)}}.items():
        assert torch.equal(record[f"{key}{name}.input_ids"], corrupt(batch.x0, mask, MASK))
    for k, stage in enumerate(stages):
        close(stage.t, record[f"{key}stage{k}.t"], "loss", f"{key}stage{k}.t")
    tensors = {name.removeprefix(f"{key}init."): record[name] for name in record if name.startswith(f"{key}init.")}
    for name in list(tensors):  # B = 0 is not recorded
        module = name.removesuffix(".A")
        rows = len(part(model.state_dict(), model, f"{module}.weight"))
        tensors[f"{module}.B"] = torch.zeros(rows, memory.rank)
    return batch, anchor, stages, make_fast(model, tensors, memory)
