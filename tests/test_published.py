"""Replays records of the published MemDLM code: a tiny LLaDA-8B-like model, its inner loop, its outer losses and gradients.

The records (tests/golden/, made by running the published code unmodified, float32, CPU) hold the model, the initial fast
weights, every state the inner loop saw, the fast weights after each stage, and what the outer step computed. Nothing is
drawn here: all randomness is in the record, which is why every draw in memdlm.py is an argument.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import memdlm
from data import Batch
from memdlm import Anchor, Memory
from model import Config, Fast, Transformer

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "memory/cases.json").read_text())
# our name -> the published model's, inside a block
PARTS = {"attention.q": "q_proj", "attention.k": "k_proj", "attention.v": "v_proj", "attention.o": "attn_out"}
PARTS |= {
    "attention_norm": "attn_norm",
    "mlp_norm": "ff_norm",
    "mlp.gate": "ff_proj",
    "mlp.up": "up_proj",
    "mlp.down": "ff_out",
}
NAMES = {f"layers.{i}.{ours}": f"model.transformer.blocks.{i}.{theirs}" for i in range(4) for ours, theirs in PARTS.items()}
NAMES |= {"embedding": "model.transformer.wte", "norm": "model.transformer.ln_f", "output": "model.transformer.ff_out"}


@pytest.fixture
def published(monkeypatch) -> Transformer:
    """The recorded LLaDA-8B-like model in our class: no Canon layer, RoPE on all channels, [MASK] = 196."""
    monkeypatch.setattr(data, "MASK", 196)
    folder = GOLDEN / "llada_dense/checkpoint"
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    sizes = {
        "hidden": config["d_model"],
        "layers": config["n_layers"],
        "heads": config["n_heads"],
        "kv_heads": config["n_heads"],
    }
    sizes |= {"head_dim": config["d_model"] // config["n_heads"], "ffn": config["mlp_hidden_size"], "canon": 0}
    sizes |= {"rope_base": config["rope_theta"], "rotary_fraction": 1.0, "norm_eps": config["rms_norm_eps"]}
    model = Transformer(Config(len(tensors["model.transformer.wte.weight"]), **sizes))
    model.load_state_dict({f"{ours}.weight": tensors.pop(f"{theirs}.weight") for ours, theirs in NAMES.items()})
    assert not tensors, "a recorded weight was not used"
    return model.eval()


def replay(model: Transformer, name: str) -> tuple[dict, dict, Batch, list, Fast, Memory]:
    """The record, and our objects made from it: batch, the two masks, phi_0 and the settings."""
    case, record = CASES[name], load_file(GOLDEN / f"memory/{name}.safetensors")
    initial, theirs = load_file(GOLDEN / "memory" / case["init_file"]), {v: k for k, v in NAMES.items()}
    modules = dict.fromkeys(key.rpartition(".")[0] for key in case["adapter_param_names_in_order"])
    fast = Fast({theirs[m]: (initial[f"{m}.A"][None], initial[f"{m}.B"][None]) for m in modules}, scale=8 / 4)
    settings = case["case"]
    memory = Memory(4, 8.0, settings["lr"], settings["clip"], settings["fraction"], settings["start_scale"], "batch")
    batch = Batch(record["in.input_ids"], record["in.labels"] != -100, None)
    return case, record, batch, [record[f"stage{k}.masked"].bool() for k in (0, 1)], fast, memory


@pytest.mark.parametrize("name", CASES)
def test_inner_loop_equals_the_published_one(published, name):
    """Losses of both stages and every fast weight after each, in training (w = 1/t) and on a prompt (w = 1), Eqs. 6-8."""
    case, record, batch, masks, fast, memory = replay(published, name)
    start, weighted = memdlm.memory_start(published, memory), case["case"]["weight"] == "scheduler"
    for stage, masked in enumerate(masks):
        h = published.run(published.embedding(memdlm.corrupt(batch.x0, masked)), 0, start).detach()
        fast, loss = memdlm.inner_loop(published, batch, [(masked, h)], fast, memory, weighted)
        torch.testing.assert_close(loss.item(), case["stages"][stage]["loss"], rtol=1e-4, atol=0)
        for ours, pair in fast.weights.items():
            for letter, tensor in zip("AB", pair):
                after = record.get(f"stage{stage}.after.{NAMES[ours]}.{letter}")  # absent: this stage does not move it
                if after is not None:
                    torch.testing.assert_close(tensor[0], after, rtol=0, atol=2e-5)


def test_outer_loss_and_gradients_equal_the_published_ones(published):
    """Eqs. 9-10: the loss with phi_2 in place, the plain loss, and both gradients for every weight of the model."""
    case, record, batch, (pre, masked), fast, memory = replay(published, "dense_train_pmc_ce_1layer")
    anchor = Anchor(record["anchor.t"].flatten(), masked)
    losses = {"with_fast_weights": memdlm.memdlm_loss(published, batch, anchor, pre, fast, memory)[0]}
    losses["plain"] = memdlm.mdlm_loss(published, batch, anchor)
    recorded = {"with_fast_weights": "loss_with_fast_weights", "plain": "loss_plain_mdlm"}
    parameters, compared = dict(published.named_parameters()), 0
    for kind, loss in losses.items():
        torch.testing.assert_close(loss.item(), case["outer"][recorded[kind]], rtol=1e-4, atol=0)
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        for ours, theirs in NAMES.items():
            expected = record.get(f"outer.grad_{kind}.{theirs}.weight")
            if expected is not None:
                torch.testing.assert_close(grads[f"{ours}.weight"], expected, rtol=1e-3, atol=1e-5)
                compared += 1
    assert compared == sum(key.startswith("outer.grad") for key in record) > 0, "a recorded gradient was not compared"


def test_pre_anchor_masks_as_many_as_the_published_code(published):
    """In each recorded training row the pre-anchor holds the anchor, and as many tokens as `pre_anchor_count` says."""
    _, _, batch, (pre, masked), _, memory = replay(published, "dense_train_pmc_ce_1layer")
    assert not (masked & ~pre).any()
    for row in range(len(pre)):
        counts = [int(mask[row].sum()) for mask in (masked, batch.maskable)]
        assert memdlm.pre_anchor_count(*counts, memory.start_scale) == int(pre[row].sum())
