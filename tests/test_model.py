"""
test_model.py: the transformer, its two LoRAs, which are exactly the low-rank matrices that they
claim to be, and the files, which are whole or not there.
"""

import pytest
import torch
from slow import merge, one_set, prompts_of, seeded
from teaching import TIGHT, assert_same
from torch.func import functional_call

import data
from lab.tools import read_json, read_tensors, write_json, written_aside
from model import Fast, Linear, UserError, apply_lora, fresh_lora


def random_fast(model, sets: int, B_scale: float = 0.3) -> Fast:
    """Fast weights of the last two layers, with a B that is not zero, as after the inner loop."""
    generator, weights = seeded(7), {}
    for i in (2, 3):
        for name, matrix in model.layers[i].mlp.adaptable().items():
            outputs, inputs = matrix.shape
            A = 0.3 * torch.randn(sets, 3, inputs, generator=generator, dtype=torch.float64)
            B = torch.randn(sets, outputs, 3, generator=generator, dtype=torch.float64)
            weights[f"layers.{i}.mlp.{name}"] = (A, B_scale * B)
    return Fast(weights, 2.0)


@pytest.mark.parametrize("canon", [0, 5], ids=["without canon", "with canon"])
@pytest.mark.parametrize("left", [0, 3], ids=["pads on the right", "pads on the left"])
@torch.no_grad()
def test_padding_changes_no_real_logit(make_model, canon, left):
    """A hidden pad must touch no real token, neither by attention nor by the convolution. On the
    left this also shows that only relative positions count: the tokens stand three places on."""
    model, ids = make_model(torch.float32, canon=canon), prompts_of(2, 9)
    padded = prompts_of(2, 12, seed=4)
    padded[:, left : left + 9] = ids
    mask = torch.zeros(2, 12)
    mask[:, left : left + 9] = 1
    alone, hidden = model(ids), model(padded, mask)[:, left : left + 9]
    torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-4)
    seen = model(padded)[:, left : left + 9]
    assert (seen - alone).abs().max() > 1e-2, "visible pads change nothing: the test sees nothing"


@torch.no_grad()
def test_all_forms_of_a_mask_say_the_same(make_model):
    """(B, T) of numbers or booleans, and (B, 1, T, T) of booleans or of what is added to scores. A
    row of nothing but padding stays finite: a NaN in it would spread to real rows by sums."""
    model, ids, real = make_model(canon=0), prompts_of(3, 9), torch.ones(3, 9, dtype=torch.bool)
    real[0, 7:] = False
    visible = real[:, None, None, :].expand(3, 1, 9, 9)
    added = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    expected = model(ids, real)
    for mask in (real.float(), visible, added):
        torch.testing.assert_close(model(ids, mask)[real], expected[real], **TIGHT)
    torch.testing.assert_close(expected[1:], model(ids[1:]), **TIGHT)
    real[0] = False
    assert model(ids, real).isfinite().all()


@torch.no_grad()
def test_wanted_places_have_the_output_that_they_have_among_all(make_model):
    """The last layer works at the places of `at` alone. They read every place still, each by its
    own row of the mask; a row of the batch may have none, and there may be none at all."""
    model, ids, at = make_model(), prompts_of(6, 9), torch.rand(6, 9, generator=seeded(2)) < 0.4
    at[1], real, fast = False, torch.ones(6, 9), random_fast(model, 3)
    real[0, 7:] = 0
    lower = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    for mask in (None, real, lower, lower.expand(6, 1, 9, 9)):
        for start, stop in ((0, None), (1, 2), (3, 4)):
            h = model.embedding(ids)
            expected = model.run(h, start, stop, mask, fast)
            for wanted in (at, at & False):
                found = model.run(h, start, stop, mask, fast, at=wanted)
                torch.testing.assert_close(found, expected[wanted], **TIGHT)


@torch.no_grad()
def test_every_token_sees_the_ones_after_it(make_model):
    """A denoiser is bidirectional (Sec. 2.1): every position depends on the last."""
    model, ids = make_model(canon=0), prompts_of(1, 8)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % data.EOS
    moved = (model(ids) - model(other)).abs().amax(dim=-1)[0] > 1e-4
    blind = (~moved).nonzero()[:, 0].tolist()
    assert not blind, f"places {blind} do not see the last token: is the attention causal?"


@pytest.mark.step3
def test_lora_adds_scale_times_B_A_x_of_each_rows_set():
    """Six rows and three sets: rows 0, 1 have set 0, rows 2, 3 set 1, rows 4, 5 set 2."""
    shapes = ((6, 5, 7), (6, 5, 4), (3, 2, 4), (3, 7, 2))
    y, x, A, B = (torch.randn(s, generator=seeded(), dtype=torch.float64) for s in shapes)

    def by_row(set_of, scale: float) -> torch.Tensor:
        sums = [y[i] + scale * x[i] @ A[set_of(i)].T @ B[set_of(i)].T for i in range(6)]
        return torch.stack(sums)

    mistakes = {
        "the factor alpha / r is forgotten": by_row(lambda i: i // 2, 1.0),
        "row i has set i % N, and not i // (rows / N)": by_row(lambda i: i % 3, 2.0),
        "all rows have set 0": by_row(lambda i: 0, 2.0),
        "y, the product with the matrix itself, is left out": by_row(lambda i: i // 2, 2.0) - y,
    }
    leaves = {"y": y, "x": x, "A": A, "B": B}
    for leaf in leaves.values():
        leaf.requires_grad_()
    got = apply_lora(y.clone(), x, A, B, 2.0)
    assert_same(got, by_row(lambda i: i // 2, 2.0), "y + 2 B A x", mistakes)
    assert got.requires_grad, "the result has no graph: nothing could be learnt"
    grads = torch.autograd.grad(got.sum(), [*leaves.values()], allow_unused=True)
    for name, grad in zip(leaves, grads):
        assert grad is not None, f"no gradient reaches {name}: is it detached?"


@pytest.mark.step3
def test_a_fresh_lora_is_kaiming_uniform_and_empty():
    """For a matrix (20, 30), and for five of them: A (..., r, 30) is even between -1/sqrt(30) and
    1/sqrt(30), of variance 1/90; B (..., 20, r) is zero; the generator decides."""
    for stack in ((), (5,)):
        A, B = fresh_lora((*stack, 20, 30), 400, torch.float64, seeded())
        assert (A.shape, B.shape) == ((*stack, 400, 30), (*stack, 20, 400)), "A (r, in), B (out, r)"
        assert (A.dtype, B.dtype) == (torch.float64, torch.float64), "the dtype is an argument"
        assert not B.any(), "B must be zero: then B A = 0, and a fresh LoRA changes nothing"
        assert A.abs().max() <= 30**-0.5, f"|A| up to {A.abs().max():.3f}, and not {30**-0.5:.3f}"
        variance = A.var().item()
        assert variance == pytest.approx(1 / 90, rel=0.05), "uniform has a third of the bound^2"
        assert torch.equal(A, fresh_lora((*stack, 20, 30), 400, torch.float64, seeded())[0])


@pytest.mark.step3
@torch.no_grad()
@pytest.mark.parametrize("sets", [1, 2, 3, 6])
def test_each_set_is_a_low_rank_change_of_its_rows_matrices(model, sets):
    """Row i of 6 computes (W + alpha/r B A) x with set i // (6 / N). If a row met a neighbour's
    set, that would be a leak between samples."""
    ids, fast = prompts_of(6, 5), random_fast(model, sets)
    got = model(ids, fast=fast)
    for i in range(6):
        matrices = merge(model, one_set(fast, i // (6 // sets)), fast.scale)
        expected = functional_call(model, matrices, (ids[i : i + 1],))
        merged = merge(model, one_set(fast, i // (6 // sets)), 1.0)
        mistakes = {
            "the factor alpha / r is forgotten": functional_call(model, merged, (ids[i : i + 1],)),
            "the memory is not added at all": model(ids[i : i + 1]),
        }
        assert_same(got[i : i + 1], expected, f"the logits of row {i} of 6, {sets} sets", mistakes)
    assert (got - model(ids)).abs().max() > 0.1, "these fast weights do nothing"


@pytest.mark.step3
@torch.no_grad()
def test_a_memory_is_empty_at_first_and_forgotten_without_a_trace(model):
    """phi_0 (B = 0, Sec. 3) changes no bit, nor does a fresh outer LoRA; and after a pass with a
    memory, a pass without one is what it was."""
    ids = prompts_of(2, 9)
    before = model(ids)
    assert torch.equal(model(ids, fast=random_fast(model, 2, B_scale=0.0)), before)
    assert not torch.equal(model(ids, fast=random_fast(model, 2)), before)
    assert torch.equal(model(ids), before)
    for layer in linear_layers(model).values():
        layer.add_lora(3, 6.0, 0.0, seeded(2))
    assert torch.equal(model(ids), before)


def linear_layers(model) -> dict[str, Linear]:
    """All matrices but the head's."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    del found["output"]
    return found


@torch.no_grad()
def test_both_loras_are_low_rank_changes_and_add_up(model):
    """W x + alpha/r B A x of the outer LoRA on every linear layer, and of the memory on top: with
    both added to the matrices, and no adapter left, the logits are the same. Dropout of the outer
    LoRA is active in training alone."""
    ids, fast, both, generator = prompts_of(2, 9), random_fast(model, 1), {}, seeded(2)
    for name, layer in linear_layers(model).items():
        layer.add_lora(3, 6.0, 0.5, generator)
        layer.lora_B.normal_(std=0.2, generator=generator)  # as training leaves it
        both[f"{name}.weight"] = layer.weight + 2.0 * layer.lora_B @ layer.lora_A
        both[f"{name}.lora_B"] = torch.zeros_like(layer.lora_B)
    still = model(ids)
    torch.testing.assert_close(still, functional_call(model, both, (ids,)), **TIGHT)
    for name, (A, B) in one_set(fast).items():
        both[f"{name}.weight"] = both[f"{name}.weight"] + fast.scale * B @ A
    torch.testing.assert_close(model(ids, fast=fast), functional_call(model, both, (ids,)), **TIGHT)
    assert not torch.equal(model.train()(ids), still)
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_broken_file_is_named(tmp_path, read):
    """Missing, empty, cut short, or something else under this name: one line."""
    path = tmp_path / "a.file"
    for content in (None, b"", b"{", b"[1]", b"[" * 100_000, b"\xff"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.file") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def write_half(path, fault: BaseException) -> None:
    with written_aside(path) as aside:
        aside.write_text("half of it")
        raise fault


def test_a_file_is_whole_or_not_there(tmp_path):
    """Whatever stops a program while it writes, the good name never holds half a file; and where
    the disk is full, the half does not stay, which may be what has filled it."""
    path = tmp_path / "new folder" / "results.json"
    write_json(path, {"score": 1})
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert read_json(path) == {"score": 1}
    with pytest.raises(UserError, match=r"results\.json"):
        write_half(path, OSError(28, "No space left on device"))
    assert read_json(path) == {"score": 1}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
