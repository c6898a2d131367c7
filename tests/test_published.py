"""
test_published.py: the core's numbers are those of the published code, which was run unmodified on a
tiny model of LLaDA-8B's architecture (tests/golden/README.md). tests/full_scale/test_golden.py
replays many more records, and uses the `check_...` functions of this file for its tables.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import memdlm
import sample
from data import Batch
from lab import variants
from memdlm import Anchor, Memory
from model import Config, Fast, Transformer, UserError, init_weights

GOLDEN = Path(__file__).parent / "golden"


def read(name: str):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def check_layers(table: dict) -> None:
    """The first adapted layer. (The sign of a published fraction is about another loss.)"""
    assert table["columns"] == ["n_layers", "inner_layer_fraction", "first_adapted_layer"]
    for layers, fraction, first in table["rows"]:
        memory = Memory(fraction=abs(fraction))
        if first == layers:
            with pytest.raises(UserError):
                memory.first_layer(layers)
        else:
            assert memory.first_layer(layers) == first, (layers, fraction)


def check_pre_anchor(table: dict) -> None:
    """How many tokens x_tpre masks. In float64 some counts would be one off."""
    columns = ["start_scale", "n_maskable", "n_anchor_masked", "n_pre_anchor_masked"]
    assert table["columns"] == columns
    differing = table["differs_from_floor_of_scale_times_count"]
    for scale, maskable, masked, pre, *_ in [*table["rows"], *differing]:
        count = memdlm.pre_anchor_count(torch.tensor(masked), torch.tensor(maskable), scale)
        assert count == pre, (scale, maskable, masked)
    assert all(pre != floor == int(scale * masked) for scale, _, masked, pre, floor in differing)


def check_states(table: list[dict]) -> None:
    """How many tokens each of K states masks, and the weight that follows from it."""
    for row in table:
        places = torch.arange(row["n_maskable"] + 3)[None]  # three more are not maskable
        maskable, masked = places < row["n_maskable"], places < row["n_anchor_masked"]
        memory = variants.memory_of({"memory_steps": row["K"], "start_scale": row["start_scale"]})
        anchor = Anchor(torch.ones(1), masked)
        stages = memdlm.make_stages(anchor, maskable, memory, torch.Generator())
        assert [stage.masked.sum() for stage in stages] == row["n_masked_per_stage"], row
        weights = torch.cat([stage.weight for stage in stages])
        assert_close(weights, 1 / (torch.tensor(row["t_per_stage"]) + 1e-6), rtol=1e-4, atol=1e-6)


def check_loss_weight(table: dict) -> None:
    """w(t) = 1 / (t + 1e-6) is the factor of a masked token's loss; a share 1 - t stays visible."""
    model = init_weights(Transformer(Config(9, mask_id=8)), torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool), None)
    masked = batch.x0 == 5
    nll = -model(memdlm.corrupt(batch.x0, masked, 8)).log_softmax(-1)[0, 5, 5]
    for t, alpha, weight in zip(table["t"], table["alpha"], table["weight"], strict=True):
        loss = memdlm.mdlm_loss(model, batch, Anchor(torch.tensor([t]), masked))
        assert (loss * 8 / nll).item() == pytest.approx(weight, rel=1e-4), t  # 8 are maskable
        assert 1 - t == pytest.approx(alpha, abs=1e-4)


CHECKS = {
    "layer_selection": check_layers,
    "pmc_pre_anchor_count": check_pre_anchor,
    "pmc_multi_stage_counts": check_states,
    "linear_scheduler": check_loss_weight,
}


@pytest.mark.parametrize("name", CHECKS)
def test_tables(name):
    CHECKS[name]({**read("memory/tables.json"), **read("memory_tables.json")}[name])


@pytest.mark.step7(first=True)
def test_commit_schedules():
    """As even as whole numbers allow, the larger ones first."""
    for key, quotas in read("sampler/num_transfer_tokens.json")["llada"].items():
        tokens, steps = map(int, key.split(","))
        ours = sample.commit_schedule(tokens, steps)
        assert ours == quotas, f"{tokens} tokens in {steps} steps are {quotas}, not {ours}"


MODULES = {"wte": "embedding", "ln_f": "norm", "ff_out": "output"}  # published name -> ours
IN_LAYER = {
    "attn_norm": "attention_norm",
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "attn_out": "attention.o",
    "ff_norm": "mlp_norm",
    "ff_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "ff_out": "mlp.down",
}


def our_name(published: str) -> str:
    """model.transformer.blocks.3.ff_proj.weight -> layers.3.mlp.gate.weight."""
    *_, module, leaf = published.split(".")
    if ".blocks." not in published:
        return f"{MODULES[module]}.{leaf}"
    return f"layers.{published.split('.')[3]}.{IN_LAYER[module]}.{leaf}"


@pytest.fixture(scope="module")
def dense():
    sizes = {"hidden": 64, "layers": 4, "ffn": 160, "canon": 0, "rope_base": 5e5}
    model = Transformer(Config(199, mask_id=196, rotary_fraction=1.0, **sizes))
    weights = {}
    for path in (GOLDEN / "llada_dense/checkpoint").glob("*.safetensors"):
        weights |= {our_name(name): tensor for name, tensor in load_file(path).items()}
    model.load_state_dict(weights)
    return model.eval()


def test_inner_loop_outer_loss_and_gradients(dense):
    """Eqs. 6 to 10 on one batch: losses, fast weights after both stages, gradients of theta with
    the memory in place and without one."""
    name = "dense_train_pmc_ce_1layer"
    entry = read("memory/cases.json")[name]
    record = load_file(GOLDEN / f"memory/{name}.safetensors")
    batch = Batch(record["in.input_ids"], record["in.labels"] != -100, None)
    anchor = Anchor(record["anchor.t"], record["anchor.masked"].bool())
    stages = variants.chain([record["stage0.masked"].bool(), anchor.masked], batch.maskable)
    memory = Memory(rank=4, alpha=8.0, fraction=0.25)
    start = load_file(GOLDEN / "memory" / entry["init_file"])
    start = {our_name(name): tensor[None] for name, tensor in start.items()}
    matrices = memdlm.adapted_matrices(dense, memory)
    fast = Fast({name: (start[f"{name}.A"], start[f"{name}.B"]) for name in matrices}, scale=2.0)

    after, _ = memdlm.inner_loop(dense, batch, stages, fast, memory)
    for name in entry["adapter_param_names_in_order"]:
        matrix, _, letter = our_name(name).rpartition(".")
        ours = dict(zip("AB", after.weights[matrix]))[letter][0]
        assert_close(ours, record[f"stage1.after.{name}"], rtol=0, atol=2e-5)

    loss, inner = memdlm.memdlm_loss(dense, batch, anchor, stages, fast, memory)
    recorded = [stage["loss"] for stage in entry["stages"]]
    assert inner[:, 0].tolist() == pytest.approx(recorded, rel=1e-4)
    plain = memdlm.mdlm_loss(dense, batch, anchor)
    assert loss.item() == pytest.approx(entry["outer"]["loss_with_fast_weights"], rel=1e-4)
    assert plain.item() == pytest.approx(entry["outer"]["loss_plain_mdlm"], rel=1e-4)
    names = [name for name, _ in dense.named_parameters()]
    for kind, ours in {"with_fast_weights": loss, "plain": plain}.items():
        grads = dict(zip(names, torch.autograd.grad(ours, list(dense.parameters()))))
        start = f"outer.grad_{kind}."
        for key in [key for key in record if key.startswith(start)]:
            grad = grads[our_name(key.removeprefix(start))]
            assert_close(grad, record[key], rtol=1e-3, atol=1e-5)


def test_answers_of_llada_generate(dense):
    """Greedy answers of LLaDA's generate.py, with blocks, guidance and padding on the left."""
    traces = read("sampler/traces.json")["traces"]
    for trace in [trace for trace in traces if trace["sampler"] == "LLaDA generate.py"]:
        prompts, length, mask = torch.tensor(trace["prompts"]), trace["gen_length"], None
        if trace["attention_mask"] is not None:
            mask = torch.tensor([row + [1] * length for row in trace["attention_mask"]])
        blocks = sample.plan_blocks(length, trace["steps"], trace["block_length"])
        scale = trace["cfg_scale"]
        ours = sample.generate(dense, prompts, blocks, cfg_scale=scale, attention_mask=mask)
        expected = [row[len(prompts[0]) :] for row in trace["output_ids"]]
        assert ours.tolist() == expected, trace["name"]
