"""
test_model.py: the transformer and its two LoRAs. A denoiser is right if padding, slicing and zero adapters change nothing,
and if an adapter is exactly the low-rank matrix that it claims to be.
"""

import pytest
import torch
from torch.func import functional_call

import data
from model import Fast, Transformer, add_outer_lora, init_weights, rotary_angles, rotate

TIGHT = {"rtol": 0.0, "atol": 1e-10}


def random_ids(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, data.VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_fast(model: Transformer, sets: int, layers=(2, 3), rank: int = 3, zero_B: bool = False) -> Fast:
    """Fast weights with a B that is not zero, as the inner loop leaves them."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for i in layers:
        for name in ("gate", "up", "down"):
            out, inputs = getattr(model.layers[i].mlp, name).weight.shape
            A = torch.randn(sets, rank, inputs, generator=generator, dtype=torch.float64) * 0.3
            B = torch.randn(sets, out, rank, generator=generator, dtype=torch.float64) * 0.3
            weights[f"layers.{i}.mlp.{name}"] = (A, B * 0 if zero_B else B)
    return Fast(weights, 2.0)


# ---- padding and masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canon", [0, 5], ids=["without canon", "with canon"])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_changes_no_real_logit(make_model, side, canon):
    """A hidden pad must not touch a real token, by attention or by the convolution. On the left this also shows that only
    relative positions count: the same tokens stand three places further on."""
    model = make_model(torch.float32, canon=canon)
    ids, pads = random_ids(2, 9), random_ids(2, 3, seed=4)
    real, hidden = torch.ones(2, 9), torch.zeros(2, 3)
    order = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
    padded, mask = torch.cat(order(ids, pads), dim=1), torch.cat(order(real, hidden), dim=1)
    here = slice(3, None) if side == "left" else slice(0, 9)
    alone = model(ids)
    torch.testing.assert_close(model(padded, mask)[:, here], alone, rtol=0, atol=1e-4)
    assert (model(padded)[:, here] - alone).abs().max() > 1e-2, "unhidden pads change nothing: the test sees nothing"


@torch.no_grad()
def test_a_mask_that_hides_nothing_equals_no_mask(model):
    """All ones, as numbers or as booleans, and an additive mask of zeros are three ways to say "everything is visible"."""
    ids = random_ids(2, 9)
    plain = model(ids)
    for mask in (torch.ones(2, 9), torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 1, 9, 9)):
        torch.testing.assert_close(model(ids, mask), plain, **TIGHT, msg=f"mask {mask.dtype} {tuple(mask.shape)}")


@torch.no_grad()
def test_additive_mask_can_say_what_a_padding_mask_says(make_model):
    """(B, 1, T, T) is the general form: with the padded keys' columns at minus infinity it must equal (B, T)."""
    model, ids = make_model(canon=0), random_ids(2, 9)
    mask = torch.ones(2, 9)
    mask[0, 7:] = 0
    additive = torch.zeros(2, 1, 9, 9).masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    real = mask.bool()
    torch.testing.assert_close(model(ids, additive)[real], model(ids, mask)[real], **TIGHT)


@torch.no_grad()
def test_a_row_of_nothing_but_padding_stays_finite(model):
    """Its numbers are never used, but a NaN there would spread through sums and gradients to the real rows."""
    mask = torch.ones(2, 6)
    mask[1] = 0
    assert model(random_ids(2, 6), mask).isfinite().all()


@torch.no_grad()
def test_rows_do_not_see_each_other(model):
    """A batch is only a way to save time: each row's logits are those of the row alone."""
    ids = random_ids(3, 8)
    torch.testing.assert_close(model(ids), torch.cat([model(row[None]) for row in ids]), **TIGHT)


@torch.no_grad()
def test_every_token_sees_the_ones_after_it(make_model):
    """A denoiser is bidirectional (Sec. 2.1). With a causal mask the first token could not know the last."""
    model, ids = make_model(canon=0), random_ids(1, 8)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % data.EOS
    assert (model(ids)[0, 0] - model(other)[0, 0]).abs().max() > 1e-4


# ---- attention and RoPE ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "q/k norm"])
def test_grouped_query_attention_is_attention_with_repeated_heads(make_model, qk_norm):
    """Two key/value heads for four query heads mean that neighbouring query heads share one: copying each twice into an
    ordinary model must give the same logits. Fails when the groups are assigned in another order."""
    grouped = make_model(kv_heads=2, qk_norm=qk_norm)
    full = make_model(kv_heads=4, qk_norm=qk_norm)
    weights = dict(grouped.state_dict())
    for name, w in weights.items():
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            weights[name] = w.view(2, 8, -1).repeat_interleave(2, dim=0).reshape(32, -1)
    full.load_state_dict(weights)
    ids = random_ids(2, 9)
    torch.testing.assert_close(full(ids), grouped(ids), **TIGHT)


def test_rotary_scores_depend_on_the_distance_alone():
    """The point of RoPE: <q at i, k at j> is a function of i - j. Every diagonal of the score matrix is constant."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 6, 8)
    rotary = rotary_angles(6, 8, 100.0, q)
    scores = (rotate(q, rotary) @ rotate(k, rotary).mT)[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), **TIGHT)
    assert scores[0].std() > 1e-3, "scores do not depend on the distance at all"


def test_partial_rotation_leaves_the_other_channels_alone():
    """rotary_fraction 0.5 turns the first half of a head's channels; the rest carries content that has no position."""
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary_angles(6, 4, 100.0, x))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0]), "position 0 is turned by an angle of zero"
    assert (turned[:, :, 1:, :4] - x[:, :, 1:, :4]).abs().amin(dim=-1).max() > 1e-3
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **TIGHT, msg="a rotation keeps lengths")


# ---- one model cut into pieces ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cut", [0, 0.5, 1, 2, 2.5, 3.5, 4])
def test_prefix_then_suffix_is_the_whole_forward(model, cut):
    """Training shares a prefix between stage 2 and the outer loss; that is only right if a cut anywhere changes nothing."""
    ids, mask, fast = random_ids(2, 9), torch.ones(2, 9), random_fast(model, 2)
    mask[1, 6:] = 0
    h = model.run(model.embedding(ids), 0, cut, mask, fast)
    assert torch.equal(model.head(model.run(h, cut, 4, mask, fast)), model(ids, mask, fast))


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 1.5, 3, 3.5])
def test_reading_at_some_positions_is_running_and_picking_them(model, start):
    """Losses and sampling need the last layer at masked positions alone; which rows are asked for must not change them."""
    h, mask, fast = model.embedding(random_ids(4, 9)), torch.ones(4, 9), random_fast(model, 2)
    mask[1, 6:] = 0
    where = (torch.rand(4, 9, generator=torch.Generator().manual_seed(6)) < 0.4) & mask.bool()
    assert torch.equal(model.read(h, start, where, mask, fast), model.run(h, start, 4, mask, fast)[where])


@torch.no_grad()
def test_head_on_some_rows_is_those_rows_of_the_head(model):
    """The head runs on masked rows only, which saves most of its cost; rows must not influence each other."""
    h = torch.randn(3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    chosen = torch.rand(3, 7, generator=torch.Generator().manual_seed(6)) < 0.4
    torch.testing.assert_close(model.head(h[chosen]), model.head(h)[chosen], **TIGHT)


def test_fresh_weights_follow_the_generator(make_model):
    """Two runs with one seed must start from the same base, and with another seed from another one."""
    a, b, c = (init_weights(make_model(seed=9), torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding.weight"], c["embedding.weight"])


# ---- fast weights: phi -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fast_weights_with_zero_B_change_no_bit(model):
    """phi_0 = 0 (Sec. 3): before its first step the memory must be no memory at all."""
    ids = random_ids(2, 9)
    assert torch.equal(model(ids, fast=random_fast(model, 2, zero_B=True)), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("sets", [1, 2, 3, 6])
def test_each_set_of_fast_weights_is_a_low_rank_change_of_its_rows_matrices(model, merged, sets):
    """Row i of 6 computes (W + alpha/r B A) x with set i // (6 / N). Fails when a row meets a neighbour's memory: that
    would be a leak between samples."""
    ids, fast = random_ids(6, 5), random_fast(model, sets)
    got = model(ids, fast=fast)
    for i in range(6):
        expected = functional_call(model, merged(model, fast, i // (6 // sets)), (ids[i : i + 1],))
        torch.testing.assert_close(got[i : i + 1], expected, **TIGHT, msg=f"row {i} of {sets} sets")
    assert (got - model(ids)).abs().max() > 0.1, "these fast weights do nothing"


@torch.no_grad()
def test_only_named_matrices_are_adapted(model):
    """Fast weights live in the last layers (Sec. 4.1): what comes before layer 2 must not see a memory of layers 2 and 3."""
    h, fast = model.embedding(random_ids(2, 9)), random_fast(model, 2)
    assert torch.equal(model.run(h, 0, 2, None, fast), model.run(h, 0, 2))
    assert not torch.equal(model.run(h, 2, 4, None, fast), model.run(h, 2, 4))


@torch.no_grad()
def test_without_fast_weights_the_model_is_bit_exact_again(model):
    """Forgetting is letting go of a dictionary: nothing of one prompt's memory may stay behind for the next."""
    ids = random_ids(2, 9)
    before, weights = model(ids), {name: w.clone() for name, w in model.state_dict().items()}
    assert not torch.equal(model(ids, fast=random_fast(model, 2)), before)
    assert torch.equal(model(ids), before)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


# ---- outer LoRA: theta on a frozen backbone --------------------------------------------------------------------------------


def with_lora(model: Transformer, dropout: float = 0.0, zero_B: bool = False) -> tuple[Transformer, list[str]]:
    generator = torch.Generator().manual_seed(2)
    names = add_outer_lora(model, rank=3, alpha=6.0, dropout=dropout, generator=generator)
    if not zero_B:
        for name in names:
            B = model.get_parameter(f"{name}.lora_B")
            B.data.copy_(0.2 * torch.randn(B.shape, generator=generator))
    return model.double(), names


@torch.no_grad()
def test_outer_lora_with_zero_B_changes_no_bit(model):
    """Fine-tuning must start exactly at the pretrained model, or the three rows would not be compared from one base."""
    ids = random_ids(2, 9)
    before = model(ids)
    assert torch.equal(with_lora(model, zero_B=True)[0](ids), before)


@torch.no_grad()
def test_outer_lora_is_a_low_rank_change_of_the_matrices(model):
    """W x + alpha/r B A x, on every adapted matrix: the same as W + alpha/r B A."""
    model, names = with_lora(model)
    ids, plain = random_ids(2, 9), {}
    for name in names:
        A, B = (model.get_parameter(f"{name}.lora_{x}") for x in "AB")
        plain |= {f"{name}.weight": model.get_parameter(f"{name}.weight") + 2.0 * B @ A, f"{name}.lora_B": torch.zeros_like(B)}
    torch.testing.assert_close(model(ids), functional_call(model, plain, (ids,)), **TIGHT)


def test_outer_lora_trains_its_own_matrices_and_nothing_else(model):
    """theta is the outer LoRA alone, on attention and feed-forward of every layer, never on the output head (Sec. 4.1)."""
    model, names = with_lora(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{x}" for name in names for x in "AB"}
    parts = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")
    assert set(names) == {f"layers.{i}.{part}" for i in range(4) for part in parts}
    model(random_ids(2, 9)).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == (name in trained), name


@torch.no_grad()
def test_outer_lora_dropout_is_active_in_training_only(model):
    """In eval mode two calls agree bit for bit, and with the undropped model; in train mode they differ. The published code
    leaves dropout on while it writes a prompt, which makes the memory random."""
    torch.manual_seed(0)
    model, _ = with_lora(model, dropout=0.5)
    ids = random_ids(2, 9)
    still = model(ids)
    assert torch.equal(model(ids), still)
    assert not torch.equal(model.train()(ids), still)
    assert not torch.equal(model(ids), model(ids))
    for layer in model.layers:
        for module in layer.modules():
            if getattr(module, "lora_A", None) is not None:
                module.lora_dropout = 0.0
    assert torch.equal(model(ids), still)


@torch.no_grad()
def test_both_loras_add_up(model, merged):
    """Fast weights on top of an outer LoRA: neither may replace or scale the other."""
    model, _ = with_lora(model)
    ids, fast = random_ids(2, 9), random_fast(model, 1)
    torch.testing.assert_close(model(ids, fast=fast), functional_call(model, merged(model, fast, 0), (ids,)), **TIGHT)
