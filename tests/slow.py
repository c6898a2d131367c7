"""
slow.py: MemDLM as one would first write it. Every state goes through the whole model, every logit
is computed, and the memory is what it is defined to be: fast weights added to the matrices,
W + alpha/r B A. What memdlm.py does faster must equal this to 1e-9.

All of it is for one set of fast weights: {"layers.3.mlp.gate": (A (r, in), B (out, r)), ...}.
"""

import torch
from teaching import assert_same
from torch.func import functional_call

import data
import memdlm
from data import Batch
from lab import variants
from memdlm import Anchor, Memory, Stage
from model import Fast, Transformer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts_of(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    """Random ids (rows, length), without EOS and [MASK]."""
    return torch.randint(0, data.EOS, (rows, length), generator=seeded(seed))


# A memory for small models: no clipping, and a set for each sample.
SMALL = {"rank": 3, "alpha": 6.0, "lr": 0.3, "clip": 0.0, "fraction": 0.5, "scope": "sample"}


def by_name(**change) -> Memory:
    """SMALL with other numbers, or with variants by their names: by_name(loss="kl", steps=3)."""
    settings = {variants.setting(name): value for name, value in (SMALL | change).items()}
    return variants.memory_of(settings)


def some_rows(rows: slice, batch: Batch, anchor: Anchor, stages: list[Stage]) -> tuple:
    """A part of a batch without padding, of its anchor and of its stages."""
    part = []
    for stage in stages:
        following = None if stage.following is None else stage.following[rows]
        part.append(Stage(stage.masked[rows], stage.scored[rows], stage.weight[rows], following))
    batch = Batch(batch.x0[rows], batch.maskable[rows], None)
    return batch, Anchor(anchor.t[rows], anchor.masked[rows]), part


def one_set(fast: Fast, i: int = 0) -> dict:
    """Set i of the fast weights."""
    return {name: (A[i], B[i]) for name, (A, B) in fast.weights.items()}


def assert_set_equals(got: Fast, expected: dict, index: int = 0) -> None:
    """Set `index` of fast weights against one set."""
    for name, pair in expected.items():
        for letter, ours, slow in zip("AB", got.weights[name], pair):
            assert_same(ours[index], slow, f"{letter} of {name}, set {index}")


def gradients(model: Transformer, loss: torch.Tensor) -> dict:
    """The gradient of a loss for each parameter of the model."""
    assert loss.requires_grad, "the loss has no graph: is it detached, or made without gradients?"
    names, parameters = zip(*model.named_parameters())
    found = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))
    blind = [name for name, grad in found.items() if grad is None]
    told = "is h, or the prefix under the outer loss, detached?"
    assert not blind, f"the loss sends no gradient to {len(blind)} weights, as {blind[0]}: {told}"
    return found


def assert_gradients_equal(model, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """Two losses are equal, and so are their gradients for every parameter."""
    assert_same(loss, expected, "the loss")
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in theirs:
        assert_same(ours[name], theirs[name], f"the gradient of {name}")


def merge(model: Transformer, weights: dict, scale: float) -> dict:
    """The matrices with the memory in them: {"layers.3.mlp.gate.weight": W + scale * B A, ...}."""
    merged = {}
    for name, (A, B) in weights.items():
        merged[f"{name}.weight"] = model.get_parameter(f"{name}.weight") + scale * B @ A
    return merged


def outputs(model, matrices: dict, batch: Batch, masked: torch.Tensor | None) -> tuple:
    """The final norm's output (B, T, D) and log p (B, T, V) for x_0 masked by `masked`, or for the
    clean x_0. matrices: what takes the place of some of the model's."""
    ids, caught = batch.x0.clone(), []
    if masked is not None:
        ids[masked] = data.MASK
    hook = model.norm.register_forward_hook(lambda module, inputs, output: caught.append(output))
    logits = functional_call(model, matrices, (ids, batch.attention_mask))
    hook.remove()
    return caught[0], logits.log_softmax(-1)


def nll(model, matrices: dict, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
    """-log p(x_0) at the masked places, zero elsewhere: (B, T)."""
    _, logp = outputs(model, matrices, batch, masked)
    return -logp.gather(2, batch.x0[..., None])[..., 0] * masked


def token_loss(name: str, student: tuple, teacher: tuple, target: torch.Tensor) -> torch.Tensor:
    """An inner loss (Fig. 6) at M places, by its definition. A side is (hidden states, log p)."""
    (h, logp), (teacher_h, teacher_logp) = student, teacher
    if name == "ce":
        return -logp.gather(1, target[:, None])[:, 0]
    if name == "kl":
        return (teacher_logp.exp() * (teacher_logp - logp)).sum(1)
    if name == "reverse_kl":
        return (logp.exp() * (logp - teacher_logp)).sum(1)
    if name == "hidden_mse":
        return ((h - teacher_h) ** 2).mean(1)
    length, teacher_length = (h * h).sum(1).sqrt(), (teacher_h * teacher_h).sum(1).sqrt()
    return 1 - (h * teacher_h).sum(1) / (length * teacher_length)


def stage_sums(model, matrices: dict, batch, stage: Stage, loss="ce"):
    """Each row's sum of weighted losses, (B,). The teacher sees the next state, or after the last
    one the clean tokens; it is a constant."""
    student, sums = outputs(model, matrices, batch, stage.masked), []
    teacher = student if loss == "ce" else outputs(model, matrices, batch, stage.following)
    teacher = [part.detach() for part in teacher]
    for row, places in enumerate(stage.scored):
        sides = [[part[row, places] for part in side] for side in (student, teacher)]
        losses = token_loss(loss, *sides, batch.x0[row, places])
        sums.append(stage.weight[row] * losses.sum())
    return torch.stack(sums)


def clipped(grads: list[torch.Tensor], memory: Memory) -> list[torch.Tensor]:
    """Each no longer than memory.clip, by its own norm or by that of all; 0 means no limit."""
    norms = [grad.norm().item() for grad in grads]
    if memory.norms is variants.global_norm:
        norms = [sum(norm**2 for norm in norms) ** 0.5] * len(norms)
    limit = memory.clip
    return [g * (limit / norm) if 0 < limit < norm else g for g, norm in zip(grads, norms)]


def inner_loop(model, batch, stages, fast: Fast, memory: Memory, second_order=False):
    """Eqs. 6-8 for set 0 of `fast`: its fast weights after all stages. With second_order they are
    functions of the model's weights, through every step."""
    phi = [part[0].detach() for part in fast.tensors()]

    def by_name(parts: list) -> dict:
        """Parts in the order of `fast.tensors` -> name -> A, B. A is fixed in a full-rank one."""
        pairs = zip(parts[::2], parts[1::2])
        if memory.kind is not Fast:
            pairs = ((A[0], B) for (A, _), B in zip(fast.weights.values(), parts))
        return dict(zip(fast.weights, pairs))

    name = memory.loss.keywords["kind"] if memory.loss else "ce"
    for stage in stages * memory.epochs:
        leaves = [part if part.requires_grad else part.requires_grad_() for part in phi]
        matrices = merge(model, by_name(leaves), fast.scale)
        sums = stage_sums(model, matrices, batch, stage, name)
        loss = sums.sum() / stage.scored.sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=second_order)
        phi = [p - memory.lr * grad for p, grad in zip(leaves, clipped(grads, memory))]
        if not second_order:
            phi = [part.detach() for part in phi]
    return by_name(phi)


def outer_loss(model, batch: Batch, anchor: Anchor, matrices: dict) -> torch.Tensor:
    """Eq. 2, and with the memory in the matrices Eq. 9."""
    by_row = nll(model, matrices, batch, anchor.masked).sum(1)
    return (by_row * (1 / (anchor.t + 1e-6))).sum() / batch.maskable.sum()


def with_prefixes(model, batch, stages: list[Stage], memory: Memory) -> list[Stage]:
    """The stages, each with what the first adapted layer reads."""
    hs = [memdlm.prefix(model, batch, stage.masked, memory).detach() for stage in stages]
    return [stage._replace(h=h) for stage, h in zip(stages, hs)]
