"""
test_loading.py: published checkpoints. Loading is right if each tensor ends up in its own place,
once, and every place is filled. Whatever is in the way of that is one error that says what to do,
and it comes before time and memory are spent.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import (
    HIDDEN,
    LAYERS,
    MASK,
    MOE,
    SETTINGS,
    VOCABULARY,
    random_tensors,
    refused,
    write_checkpoint,
    write_tensors,
)
from safetensors.torch import load_file, save_file

from full_scale.checkpoints import linear_layers, load_llada, published_tensors, random_llada
from full_scale.configs import ARCHITECTURES, read_llada_config
from full_scale.experts import ExpertLinear4bit, Linear4bit
from model import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path("config.json")


@pytest.fixture(params=SETTINGS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    """A checkpoint in three shards."""
    return write_checkpoint(tmp_path / "checkpoint", kind, shards=3)


# ---- every tensor once, every parameter set --------------------------------------------------


def test_every_tensor_goes_to_its_own_place(kind, folder, tmp_path):
    """And no other is found there. How they are spread over files makes no difference."""
    model, tensors = load_llada(folder), random_tensors(SETTINGS[kind])
    state, places = model.state_dict(), published_tensors(model)
    assert places.keys() == tensors.keys()
    for name, (ours, expert) in places.items():
        assert torch.equal(state[ours] if expert is None else state[ours][expert], tensors[name])
    assert len(set(places.values())) == len(tensors)
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in tensors.values())
    assert not model.training
    single = load_llada(write_checkpoint(tmp_path / "one", kind)).state_dict()
    assert all(torch.equal(tensor, single[name]) for name, tensor in state.items())


def test_a_checkpoint_says_itself_which_architecture_it_is():
    """LLaDA-8B and LLaDA-MoE both call themselves "llada": experts make the difference."""

    def read(settings: dict, names=(), **changes) -> str:
        return read_llada_config(settings | changes, names, CONFIG).architecture

    assert read(SETTINGS["llada"]) == "llada"
    assert read(MOE) == read(MOE, model_type="lladamoe") == "llada-moe"
    assert read(SETTINGS["llada2"], model_type="llada2_moe_veomni") == "llada2"
    names = ["model.layers.0.mlp.experts.0.up_proj.weight"]
    with pytest.raises(UserError, match="num_experts is missing"):
        read({key: value for key, value in MOE.items() if key != "num_experts"}, names)


def test_weights_come_in_the_dtype_asked_for(kind, folder):
    """Only LLaDA2's router and the routers' biases stay in float32: they decide, as published."""
    half, full = load_llada(folder, dtype=torch.bfloat16).state_dict(), load_llada(folder)
    exact = {name for name, t in half.items() if t.dtype == torch.float32}
    routers = {f"layers.{i}.mlp.router.weight" for i in (1, 2) if kind == "llada2"}
    biased = kind in ("llada2", "llada-moe, rich")
    assert exact == routers | {f"layers.{i}.mlp.router_bias" for i in (1, 2) if biased}
    for name, tensor in full.state_dict().items():
        assert torch.equal(half[name], tensor.to(half[name].dtype))


# ---- spoilt files ----------------------------------------------------------------------------

INDEX, ROUTER = "model.safetensors.index.json", "model.layers.1.mlp.gate.weight"
HEAD, EXPERT = "lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
SHARD, SECOND = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))


def remove_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def tensors(changes: dict):
    """One file with other tensors; None: that one is missing."""

    def spoil(folder: Path) -> None:
        remove_weights(folder)
        changed = random_tensors(MOE) | changes
        write_tensors(folder, {name: t for name, t in changed.items() if t is not None})

    return spoil


def text(file: str, content: str):
    """A file has another content."""
    return lambda folder: (folder / file).write_text(content)


def config(**changes):
    """Other settings in config.json, for the same tensors."""
    return text("config.json", json.dumps(MOE | changes))


def head_in_two_shards(folder: Path) -> None:
    for path in (folder / SHARD, folder / SECOND):
        save_file(load_file(path) | {HEAD: torch.ones(VOCABULARY, HIDDEN)}, path)


def cut_off(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1000])


LONG = json.dumps({"weight_map": {"a": "x" * 5000}})
OTHER = json.dumps({"weight_map": {"odd": SHARD}})
INTEGERS = torch.ones(16, 32, dtype=torch.int8)
# fault -> (how it comes about, what the error must name)
FAULTS = {
    "a tensor is missing": (tensors({ROUTER: None}), [ROUTER, "1 tensors missing"]),
    "a tensor is left over": (tensors({"odd": torch.ones(2)}), ["1 not used", "odd"]),
    "a tensor is turned": (tensors({ROUTER: torch.ones(32, 8)}), [ROUTER, "[32, 8]", "[8, 32]"]),
    "an expert is misshapen": (tensors({EXPERT: torch.ones(16)}), [EXPERT, "[16]", "[16, 32]"]),
    "an expert is quantized": (tensors({EXPERT: INTEGERS}), [EXPERT, "I8"]),
    "a tensor is there twice": (head_in_two_shards, [HEAD, "already"]),
    "a shard is cut off": (cut_off, [SHARD, "damaged", "download it again"]),
    "a shard is missing": (lambda f: (f / SHARD).unlink(), [SHARD, "is missing"]),
    "the index names a file elsewhere": (text(INDEX, '{"weight_map": {"a": "../b"}}'), ["../b"]),
    "the index names a very long file": (text(INDEX, LONG), [INDEX, "xxx"]),
    "the index names other tensors": (text(INDEX, OTHER), ["disagree"]),
    "the index is a list": (text(INDEX, '{"weight_map": ["a"]}'), [INDEX, "weight_map"]),
    "there are no weights": (remove_weights, ["model.safetensors is missing"]),
    "there is no config.json": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config.json is nested deeply": (text("config.json", "[" * 200_000), ["config.json"]),
    "another model": (config(model_type="llama"), ["model_type 'llama'"]),
    "too many layers": (config(num_hidden_layers=999, moe_layer_freq=[1] * 999), ["999 layers"]),
    "too many experts": (config(num_experts=9_999), ["9999 experts", "8"]),
    "a larger vocabulary": (config(vocab_size=9_999_999), [HEAD, "[9999999, 32]"]),
    "a wider model": (config(hidden_size=4_000_000), ["4000000"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_checkpoint_is_one_error_that_says_what_is_wrong(tmp_path, fault):
    folder = write_checkpoint(tmp_path / "checkpoint", "llada-moe", shards=3)
    spoil, named = FAULTS[fault]
    spoil(folder)
    said = refused(load_llada, folder)
    assert str(folder) in said
    assert all(part in said for part in named), said


# ---- config.json -----------------------------------------------------------------------------

SWITCHES = [(kind, key) for kind, known in ARCHITECTURES.items() for key in known["switches"]]


@pytest.mark.parametrize(("kind", "key"), SWITCHES, ids=map("-".join, SWITCHES))
def test_a_switch_that_this_code_does_not_have_is_refused(kind, key):
    """An unknown activation, rope scaling, clip_qkv, ...: never a silent default. What the code
    does is accepted, and so is a config.json without the key."""
    values = ARCHITECTURES[kind]["switches"][key]
    for bad in (True, False, 8.0, "other", {"type": "yarn"}):
        if bad not in values:
            said = refused(read_llada_config, SETTINGS[kind] | {key: bad}, (), CONFIG)
            assert said.startswith(f"config.json: {key} = ")
    without = {name: value for name, value in SETTINGS[kind].items() if name != key}
    for good in [{key: value} for value in values] + [{}]:
        read_llada_config(without | good, (), CONFIG)


NEEDED = {
    "llada": "d_model n_layers n_heads mlp_hidden_size rope_theta rms_norm_eps",
    "llada-moe": "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts_per_tok "
    "rope_theta rms_norm_eps moe_layer_freq qk_layernorm expert_intermediate_size "
    "dense_intermediate_size",
    "llada2": "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts "
    "num_experts_per_tok rope_theta rms_norm_eps first_k_dense_replace use_qk_norm n_group "
    "moe_intermediate_size intermediate_size topk_group routed_scaling_factor",
}
NEEDED = [(kind, key) for kind, keys in NEEDED.items() for key in keys.split()]
NO_SIZE = ["64", -1, None, [2], {}, float("nan"), float("inf"), 1e30, 10**30, "x" * 5000]


@pytest.mark.parametrize(("kind", "key"), NEEDED, ids=map("-".join, NEEDED))
def test_a_size_that_is_missing_or_is_no_size_is_named(kind, key):
    """Nothing is assumed about a size, and no damaged number is computed with."""
    without = {name: value for name, value in SETTINGS[kind].items() if name != key}
    assert refused(read_llada_config, without, (), CONFIG) == f"config.json: {key} is missing."
    for bad in NO_SIZE:
        said = refused(read_llada_config, without | {key: bad}, (), CONFIG)
        assert said.startswith(f"config.json: {key} = "), bad


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llada", {"n_kv_heads": 3}),
        ("llada", {"mask_token_id": VOCABULARY}),
        ("llada-moe", {"num_experts_per_tok": 9}),
        ("llada-moe", {"partial_rotary_factor": 2}),
        ("llada2", {"num_shared_experts": 10**9}),
        ("llada2", {"n_group": 3}),
        ("llada2", {"n_group": 0, "first_k_dense_replace": 3}),  # no layer has experts
        ("llada2", {"num_experts_per_tok": 5}),  # two groups of two are kept
        ("llada2", {"rotary_dim": 8}),
    ],
)
def test_impossible_sizes_and_those_that_contradict_each_other_are_refused(kind, changes):
    said = refused(read_llada_config, SETTINGS[kind] | changes, (), CONFIG)
    assert said.startswith("config.json: ")


# The pages of a mapped file count, too. The baseline is taken after the imports and one loaded toy.
# (Not ru_maxrss: that starts with the parent's.)
MEASURE = """
import sys
from pathlib import Path
from full_scale.checkpoints import load_llada

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

load_llada(sys.argv[1])
before = memory("VmRSS")
model = load_llada(sys.argv[2])
print(sum(t.nbytes for t in model.state_dict().values()), memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_memory_of_loading_is_the_weights_and_one_shard(tmp_path):
    """120 MB in 8 shards, over which the experts of a stack are spread."""
    wide = {"hidden_size": 256, "expert_intermediate_size": 256, "num_experts": 16}
    deep = {"num_hidden_layers": 8, "moe_layer_freq": [1] * 8}
    large = write_checkpoint(tmp_path / "large", "llada-moe", shards=8, **wide, **deep)
    toy = write_checkpoint(tmp_path / "toy", "llada-moe")
    command = [sys.executable, "-c", MEASURE, str(toy), str(large)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    shard = max(path.stat().st_size for path in large.glob("*.safetensors"))
    assert weights > 100e6
    assert weights <= peak <= weights + shard + 0.1 * weights


# ---- NF4 -------------------------------------------------------------------------------------


def test_four_bits_reach_every_linear_layer_but_the_head(kind, folder):
    """Experts included; all else stays as it is. Output and gradient are those of a model that has
    the unpacked weights as its own."""
    model, plain = load_llada(folder, load_4bit=True), load_llada(folder).requires_grad_(False)
    packed = linear_layers(model)
    assert all(isinstance(layer, Linear4bit) for layer in packed.values())
    for name, tensor in plain.state_dict().items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(model.state_dict()[name], tensor)
    for name, layer in linear_layers(plain).items():
        unpacked = packed[name].unpack(torch.float32)
        assert 0.05 < (unpacked - layer.weight).norm() / layer.weight.norm() < 0.15, name
        layer.weight.copy_(unpacked)
    h, direction = torch.randn(2, 2, 6, HIDDEN, generator=torch.Generator().manual_seed(1))
    results = []
    for each in (model, plain):
        leaf = h.clone().requires_grad_()
        y = each.run(leaf, 0, LAYERS)
        results.append((y.detach(), torch.autograd.grad(y, leaf, direction)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_four_bits_take_a_quarter_of_bfloat16():
    """4.127 bits a number: 4, and a scale for each 64, itself kept in 8 bits."""
    layer = ExpertLinear4bit(torch.randn(8, 256, 256, dtype=torch.bfloat16))
    held = [layer.weight, layer.state.absmax, layer.state.state2.absmax]
    bits = 8 * sum(tensor.nbytes for tensor in held)
    assert bits / 8 / 256 / 256 == pytest.approx(4.127, abs=0.02)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


# ---- random weights --------------------------------------------------------------------------


def test_random_weights_need_a_config_and_nothing_else(kind, folder):
    """--random-weights: the sizes of a config.json; the same seed gives the same weights."""
    loaded = load_llada(folder).state_dict()
    remove_weights(folder)
    model, again, other = (random_llada(str(folder), seed=seed) for seed in (0, 0, 1))
    state = model.state_dict()
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in loaded.items()}
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(model.output.weight, other.output.weight)
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model(torch.full((1, 4), MASK)).shape == (1, 4, VOCABULARY)
    four = linear_layers(random_llada(str(folder), dtype=torch.bfloat16, load_4bit=True))
    assert all(isinstance(layer, Linear4bit) for layer in four.values())


def test_random_weights_of_a_wrong_name_or_an_impossible_size_are_refused(tmp_path):
    """The sizes are each possible, but nothing holds their product."""
    assert "neither llada-8b" in refused(random_llada, str(tmp_path / "absent"))
    huge = {"num_hidden_layers": 999, "moe_layer_freq": [1] * 999, "num_experts": 9_999}
    config(**huge, hidden_size=4_000_000, expert_intermediate_size=4_000_000)(tmp_path)
    assert "more than any machine holds" in refused(random_llada, str(tmp_path))
