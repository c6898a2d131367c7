"""
slow.py: what several test files share. The method the slow way: full forwards on explicit matrices W + scale * B A, every logit
computed, one set of fast weights; what memdlm.py does faster must equal this to 1e-9. And a generation that is looked at
pass by pass.
"""

import torch
from torch.func import functional_call

import data
from data import Batch
from memdlm import Anchor, Memory, State, chain, make_states
from model import Fast, Transformer
from sample import generate

TIGHT = {"rtol": 0.0, "atol": 1e-9}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_nll(model, weights: dict, batch: Batch, masked: torch.Tensor) -> torch.Tensor:
    """-log p(x0) at every position (B, T), zero where not masked, from logits of the whole sequence."""
    ids = batch.x0.clone()
    ids[masked] = data.MASK
    logits = functional_call(model, weights, (ids, batch.attention_mask))
    return -logits.log_softmax(-1).gather(2, batch.x0[..., None])[..., 0] * masked


def slow_matrices(model, fast: dict, scale: float) -> dict:
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") + scale * B @ A for name, (A, B) in fast.items()}


def slow_inner_loop(model, batch, masks, fast: Fast, memory: Memory, weighted=True, create_graph=False) -> dict:
    """SGD on one shared set: {name: (A, B)}. With create_graph, a graph through all steps: the second-order memory."""
    weights = {name: (A[0], B[0]) for name, (A, B) in fast.weights.items()}
    for masked in masks:
        leaves = [p if create_graph and p.requires_grad else p.detach().requires_grad_() for ab in weights.values() for p in ab]
        weights = dict(zip(weights, zip(leaves[::2], leaves[1::2])))
        nll = slow_nll(model, slow_matrices(model, weights, fast.scale), batch, masked)
        t = masked.sum(1) / batch.maskable.sum(1)  # in float32, as the method has it: noise levels are not exact numbers
        w = 1 / (t + 1e-6) if weighted else torch.ones(len(masked))
        loss = (w.double()[:, None] * nll).sum() / masked.sum()
        moved = []
        for p, g in zip(leaves, torch.autograd.grad(loss, leaves, create_graph=create_graph)):
            norm = g.norm().item()
            moved.append(p - memory.lr * g * (memory.clip / norm if 0 < memory.clip < norm else 1.0))
        weights = dict(zip(weights, zip(moved[::2], moved[1::2])))
    return weights


def slow_outer_loss(model, batch, anchor: Anchor, weights: dict) -> torch.Tensor:
    w = (1 / (anchor.t + 1e-6)).double()  # t and w are float32 numbers
    return (w[:, None] * slow_nll(model, weights, batch, anchor.masked)).sum() / batch.maskable.sum()


def one_row(batch: Batch, i: int) -> Batch:
    hidden = None if batch.attention_mask is None else batch.attention_mask[i : i + 1]
    return Batch(batch.x0[i : i + 1], batch.maskable[i : i + 1], hidden)


def one_set(fast: Fast, i: int) -> Fast:
    return Fast({name: (A[i : i + 1], B[i : i + 1]) for name, (A, B) in fast.weights.items()}, fast.scale)


def states_of(model, batch: Batch, masks: list, memory: Memory) -> list[State]:
    """The inner loop's states for masks that follow each other, the last one followed by none."""
    return make_states(model, batch, chain(masks, batch.maskable), memory)


def assert_fast_equal(got: Fast, expected: dict, index: int = 0, note: str = "") -> None:
    for name, (A, B) in expected.items():
        torch.testing.assert_close(got.weights[name][0][index], A, **TIGHT, msg=f"{note} {name}.A")
        torch.testing.assert_close(got.weights[name][1][index], B, **TIGHT, msg=f"{note} {name}.B")


def gradients(model, loss: torch.Tensor) -> dict:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


# ---- generation, looked at ---------------------------------------------------------------------------------------------------


def prompts_of(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, data.EOS, (rows, length), generator=seeded(seed))


def record(model, prompts, length, **options) -> tuple[list[torch.Tensor], int]:
    """The canvas before the first and after every pass, and how many forward passes the model really made."""
    canvases, passes = [], []
    hook = model.layers[0].attention.register_forward_hook(lambda *_: passes.append(1))
    response = generate(model, prompts, length, watch=lambda canvas: canvases.append(canvas.clone()), **options)
    hook.remove()
    end = prompts.shape[1] + length  # LLaDA2 decodes the last block to its end
    assert torch.equal(canvases[-1][:, prompts.shape[1] : end], response)
    return canvases, len(passes)


def sharpened(model: Transformer) -> Transformer:
    """A model that is sure of itself: with random weights every probability would be near 1 / vocabulary."""
    with torch.no_grad():
        model.output.weight.mul_(3.0)
    return model
