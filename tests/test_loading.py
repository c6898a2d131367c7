"""
test_loading.py: published checkpoints. Loading is right if each tensor ends up in its own place, once, and every place is
filled; whatever is in the way of that is one error that says what to do, and never weights left at random.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import (
    DENSE,
    HIDDEN,
    LAYERS,
    MASK,
    MOE,
    SETTINGS,
    VOCABULARY,
    published_shapes,
    random_tensors,
    toy_batch,
    write_checkpoint,
    write_tensors,
)
from running import ROOT
from safetensors.torch import load_file, save_file

from model import (
    ARCHITECTURES,
    BACKBONES,
    NO,
    YES,
    Config,
    Linear,
    UserError,
    count,
    linear_layers,
    load_llada,
    on_meta,
    published_tensors,
    random_llada,
    read_llada_config,
)


@pytest.fixture(params=SETTINGS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    """A checkpoint in three shards that the test may spoil."""
    return write_checkpoint(tmp_path / "checkpoint", kind, shards=3)


# ---- every tensor once, every parameter set ------------------------------------------------------------------------------


def test_every_tensor_goes_to_its_own_place(kind, folder):
    """All tensors differ; each of them is found in the model under the name that belongs to it, and the model has no other."""
    model, tensors = load_llada(folder), random_tensors(SETTINGS[kind])
    state, found = model.state_dict(), set()
    for theirs, (ours, x) in published_tensors(model).items():
        assert torch.equal(state[ours] if x is None else state[ours][x], tensors[theirs]), theirs
        found.add((ours, x))
    assert len(found) == len(tensors) == len(published_tensors(model))
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in tensors.values())
    assert not any(t.is_meta for t in state.values())
    assert not model.training


def test_names_follow_the_architecture():
    """Spot checks of the names that are easily mixed up: the dense gate is ff_proj, the router is called gate."""
    names = {kind: published_tensors(on_meta(read_llada_config(c, (), Path()))) for kind, c in SETTINGS.items()}
    assert names["llada"]["model.transformer.blocks.2.ff_proj.weight"] == ("layers.2.mlp.gate.weight", None)
    assert names["llada"]["model.transformer.blocks.2.ff_out.weight"] == ("layers.2.mlp.down.weight", None)
    assert names["llada"]["model.transformer.ff_out.weight"] == ("output.weight", None)
    assert names["llada-moe"]["model.layers.1.mlp.gate.weight"] == ("layers.1.mlp.router.weight", None)
    assert names["llada-moe"]["model.layers.1.mlp.experts.5.up_proj.weight"] == ("layers.1.mlp.experts.up.weight", 5)
    assert names["llada-moe, rich"]["model.layers.1.shared_expert.up_proj.weight"][0] == "layers.1.mlp.shared.up.weight"
    assert names["llada-moe, rich"]["model.layers.0.mlp.gate_proj.weight"][0] == "layers.0.mlp.gate.weight"
    assert names["llada2"]["model.layers.1.mlp.gate.expert_bias"] == ("layers.1.mlp.router_bias", None)


def test_shards_and_one_file_are_the_same(kind, folder, tmp_path):
    sharded, single = load_llada(folder), load_llada(write_checkpoint(tmp_path / "single", kind))
    assert sharded.config == single.config
    assert all(torch.equal(t, single.state_dict()[name]) for name, t in sharded.state_dict().items())


@torch.no_grad()
def test_the_model_answers_as_the_issue_says(folder):
    """model(ids, attention_mask=None) -> logits (B, T, V), finite and different from place to place."""
    model, ids = load_llada(folder), toy_batch()[0].x0
    logits = model(ids)
    assert logits.shape == (*ids.shape, VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)), logits)


def test_a_checkpoint_says_itself_which_architecture_it_is(tmp_path):
    """LLaDA-8B and LLaDA-MoE both call themselves "llada": experts among the settings or the tensors make the difference."""
    read = lambda c, names=(): read_llada_config(c, names, Path("config.json")).architecture  # noqa: E731
    assert read(DENSE) == "llada"
    assert read(MOE) == read(MOE | {"model_type": "lladamoe"}) == "llada-moe"
    assert read(SETTINGS["llada2"]) == read(SETTINGS["llada2"] | {"model_type": "llada2_moe_veomni"}) == "llada2"
    without = {key: value for key, value in MOE.items() if key != "num_experts"}
    with pytest.raises(UserError, match="num_experts is missing"):
        read(without, ["model.layers.0.mlp.experts.0.up_proj.weight"])


def test_weights_come_in_the_dtype_asked_for(kind, folder):
    """bfloat16 halves everything but LLaDA2's router and the routers' biases, which decide in float32 as published."""
    model = load_llada(folder, dtype=torch.bfloat16)
    exact = {name for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert all(t.dtype in (torch.bfloat16, torch.float32) for t in model.state_dict().values())
    routers = {f"layers.{i}.mlp.router.weight" for i in (1, 2)} if kind == "llada2" else set()
    biases = {f"layers.{i}.mlp.router_bias" for i in (1, 2)} if kind in ("llada2", "llada-moe, rich") else set()
    assert exact == routers | biases
    full = load_llada(folder).state_dict()
    assert all(torch.equal(t, full[name].to(t.dtype)) for name, t in model.state_dict().items())
    assert model(toy_batch()[0].x0).isfinite().all()


# ---- what is in the way --------------------------------------------------------------------------------------------------


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def rewrite(folder: Path, change) -> None:
    """One file with all tensors after `change` (a function of their dict)."""
    for path in folder.glob("model*"):
        path.unlink()
    tensors = random_tensors(json.loads((folder / "config.json").read_text()))
    change(tensors)
    write_tensors(folder, tensors)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


INDEX, ROUTER = "model.safetensors.index.json", "model.layers.1.mlp.gate.weight"
HEAD, EXPERT = "lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def tensors(change):
    """Spoils the tensors themselves: one file with what is left after `change` (a function of their dict)."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        changed = random_tensors(MOE)
        change(changed)
        write_tensors(folder, changed)

    return spoil


def edited(file: str, change):
    """Spoils a JSON file."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value["weight_map"] if file == INDEX else value)
        (folder / file).write_text(json.dumps(value))

    return spoil


def index(change):
    return edited(INDEX, change)


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def shard(change):
    """Spoils the file of the first shard."""
    return lambda folder: change(folder / "model-00001-of-00003.safetensors")


def swap_files(files: dict) -> None:
    other = next(name for name in files if files[name] != files[HEAD])
    files[HEAD], files[other] = files[other], files[HEAD]


def in_two_shards(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path) | {HEAD: torch.ones(VOCABULARY, HIDDEN)}, path)


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


# fault -> (how it comes about, what the error must say)
FAULTS = {
    "a tensor is missing": (tensors(lambda t: t.pop(ROUTER)), f"1 tensors missing.*{ROUTER}.*0 not used"),
    "a tensor is left over": (tensors(lambda t: t.update(odd=torch.ones(2))), "0 tensors missing.*1 not used.*odd"),
    "one was renamed": (tensors(lambda t: t.update(odd=t.pop(ROUTER))), f"missing.*{ROUTER}.*not used.*odd"),
    "a tensor is misshapen": (
        tensors(lambda t: t.update({ROUTER: t[ROUTER].T.contiguous()})),
        rf"{ROUTER} has shape \[32, 8\], not \[8, 32\]",
    ),
    "an expert is misshapen": (
        tensors(lambda t: t.update({EXPERT: torch.ones(16)})),
        rf"{EXPERT} has shape \[16\], not \[16, 32\]",
    ),
    "a tensor is there twice": (in_two_shards, f"{HEAD} is in model-00001-of-00003.safetensors already"),
    "a shard is cut off": (shard(lambda p: p.write_bytes(p.read_bytes()[:-1000])), "damaged or cut off.*download it again"),
    "a shard is empty": (shard(lambda p: p.write_bytes(b"")), "00001-of-00003.safetensors is damaged or cut off"),
    "a shard is a pointer of Git LFS": (shard(lambda p: p.write_text("version https://git-lfs.github.com")), "damaged"),
    "the index names an absent file": (shard(Path.unlink), "00001-of-00003.safetensors is missing: the index names it"),
    "the index names a file elsewhere": (index(lambda m: m.update(odd="../x.safetensors")), "is missing: the index names it"),
    "the index misses a tensor": (index(lambda m: m.pop(ROUTER)), f"disagree about 1 tensors, e.g. {ROUTER}"),
    "the index has one too many": (index(lambda m: m.update(odd=m[ROUTER])), "disagree about 1 tensors, e.g. odd"),
    "the index mixes up two files": (index(swap_files), "disagree about 2 tensors"),
    "the index is a list": (text(INDEX, '{"weight_map": ["a"]}'), "weight_map must name a file"),
    "the index is empty": (text(INDEX, "{}"), "tensors missing"),
    "the index is not JSON": (text(INDEX, "{"), "cannot read"),
    "there are no weights": (no_weights, "model.safetensors is missing.*no index either"),
    "there is no config.json": (lambda f: (f / "config.json").unlink(), "is no checkpoint: it has no config.json"),
    "config.json is not JSON": (text("config.json", "{"), "cannot read.*config.json"),
    "config.json is a list": (text("config.json", "[]"), "config.json: it must hold a JSON object"),
    "config.json is empty": (text("config.json", "{}"), "model_type 'None' is not a LLaDA model"),
    "another model": (edited("config.json", lambda c: c.update(model_type="llama")), "model_type 'llama' is not a LLaDA"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_checkpoint_is_one_error_that_says_what_is_wrong(tmp_path, fault):
    folder = write_checkpoint(tmp_path / "checkpoint", "llada-moe", shards=3)
    spoil, named = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_llada(folder)
    assert re.search(named, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


ONLY = [(kind, key) for kind, other in ARCHITECTURES.items() for key in other.only]


@pytest.mark.parametrize(("kind", "key"), ONLY, ids=["-".join(pair) for pair in ONLY])
def test_a_setting_that_this_code_does_not_have_is_refused(kind, key):
    """An unknown router, activation, rope scaling, clip_qkv, tied embeddings, ...: never a silent default. What the code does
    is accepted, and so is a config.json without the key."""
    values = ARCHITECTURES[kind].only[key]
    other = {NO: [True, {"type": "yarn"}, 8.0], YES: [False]}.get(values, ["other", 2])
    for bad in other:
        with pytest.raises(UserError, match=f"^config.json: {key} = .* is not supported"):
            read_llada_config(SETTINGS[kind] | {key: bad}, (), Path("config.json"))
    for good in values:
        read_llada_config(SETTINGS[kind] | {key: good}, (), Path("config.json"))
    read_llada_config({name: value for name, value in SETTINGS[kind].items() if name != key}, (), Path("config.json"))


NEEDED = {
    "llada": "d_model n_layers n_heads mlp_hidden_size rope_theta rms_norm_eps",
    "llada-moe": "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts_per_tok rope_theta rms_norm_eps "
    "moe_layer_freq qk_layernorm expert_intermediate_size dense_intermediate_size",
    "llada2": "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts num_experts_per_tok rope_theta "
    "rms_norm_eps first_k_dense_replace use_qk_norm moe_intermediate_size intermediate_size n_group topk_group "
    "routed_scaling_factor",
}
NEEDED = [(kind, key) for kind, keys in NEEDED.items() for key in keys.split()]


@pytest.mark.parametrize(("kind", "key"), NEEDED, ids=["-".join(pair) for pair in NEEDED])
def test_a_size_that_is_missing_or_is_no_size_is_named(kind, key):
    """Nothing is assumed about a size, and "64", -1 or null are none."""
    without = {name: value for name, value in SETTINGS[kind].items() if name != key}
    with pytest.raises(UserError, match=f"^config.json: {key} is missing"):
        read_llada_config(without, (), Path("config.json"))
    for bad in ("64", -1, None, [1]):
        if (key, bad) in (("moe_layer_freq", [1]), ("moe_layer_freq", "64"), ("first_k_dense_replace", -1)):
            continue  # a list it may be; where the dense layers are shows in the tensors' names
        with pytest.raises(UserError, match=r"^config.json: .* (usable|does not go with)"):
            read_llada_config(without | {key: bad}, (), Path("config.json"))


def test_sizes_that_contradict_each_other_are_refused():
    for kind, changes in (
        ("llada", {"n_kv_heads": 3}),
        ("llada-moe", {"num_experts_per_tok": 9}),
        ("llada-moe", {"partial_rotary_factor": 2}),
        ("llada2", {"n_group": 3}),
        ("llada2", {"topk_group": 0}),
        ("llada2", {"num_experts_per_tok": 5}),  # two groups of two are kept
        ("llada2", {"rotary_dim": 8}),
    ):
        with pytest.raises(UserError, match=r"^config.json: .* (usable|does not go with|contradicts)"):
            read_llada_config(SETTINGS[kind] | changes, (), Path("config.json"))


# ---- memory --------------------------------------------------------------------------------------------------------------

# The pages of a mapped file count, too. A baseline is taken after the imports and one loaded toy. (Not ru_maxrss: that starts
# with the parent's.)
MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from safetensors.torch import load_file
from model import load_llada

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(kind))

load_llada({toy!r})
before = memory("VmRSS")
if {greedy}:
    files = [load_file(path) for path in Path({folder!r}).glob("*.safetensors")]
    copies = [{{name: t.clone() for name, t in file.items()}} for file in files]
model = load_llada({folder!r})
print(sum(t.nbytes for t in model.state_dict().values()), memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_memory_of_loading_is_the_weights_and_one_shard(tmp_path):
    """120 MB in 8 shards, experts of one stack spread over all of them. A loader that held a second copy is measured too:
    the bound would catch it."""
    changes = {"hidden_size": 256, "expert_intermediate_size": 256, "num_hidden_layers": 8, "moe_layer_freq": [1] * 8}
    folder = write_checkpoint(tmp_path / "large", "llada-moe", shards=8, **changes, num_experts=16)
    toy, shard = write_checkpoint(tmp_path / "toy", "llada-moe"), max(p.stat().st_size for p in folder.glob("*.safetensors"))
    peaks = {}
    for greedy in (False, True):
        script = MEASURE.format(root=str(ROOT), toy=str(toy), folder=str(folder), greedy=greedy)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        weights, peaks[greedy] = map(int, done.stdout.split())
    assert weights > 100e6
    assert shard < 0.2 * weights
    margin = 0.1 * weights
    assert weights <= peaks[False] <= weights + shard + margin
    assert peaks[True] > weights + shard + 5 * margin


# ---- NF4 -----------------------------------------------------------------------------------------------------------------


def test_four_bits_reach_every_linear_layer_but_the_head(kind, folder):
    """Experts included; LLaDA2's router stays in float32, as published; norms, embedding and head stay as they are."""
    model, full = load_llada(folder, load_4bit=True), load_llada(folder)
    packed = {name for name, m in model.named_modules() if isinstance(m, Linear) and m.quantized is not None}
    assert packed == set(linear_layers(model))
    left = {name for name, m in model.named_modules() if isinstance(m, Linear)} - packed
    assert left == {"output"} | ({f"layers.{i}.mlp.router" for i in (1, 2)} if kind == "llada2" else set())
    stacks = [name for name in packed if "experts" in name]
    assert len(stacks) == {"llada": 0, "llada-moe": 9, "llada-moe, rich": 6, "llada2": 6}[kind]
    shapes = published_shapes(SETTINGS[kind])
    matrices = sum(len(s) == 2 for s in shapes.values()) - 2 - (2 if kind == "llada2" else 0)  # embedding, head, routers
    assert count(linear_layers(model).values()) == matrices
    for name, module in full.named_modules():
        if isinstance(module, Linear) and name in packed:
            unpacked = model.get_submodule(name).unpacked(torch.float32)
            error = (unpacked - module.weight).norm() / module.weight.norm()
            assert 0.05 < error < 0.15, name
    others = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in packed}
    assert all(torch.equal(t, full.state_dict()[n]) for n, t in others.items())


def test_four_bits_compute_with_the_unpacked_weights(kind, folder):
    """Output and gradient are those of a model that has the unpacked weights as its own."""
    model, plain = load_llada(folder, load_4bit=True), load_llada(folder).requires_grad_(False)
    for name, layer in linear_layers(plain).items():
        layer.weight.copy_(model.get_submodule(name).unpacked(torch.float32))
    x, direction = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(1)), torch.randn(2, 6, HIDDEN)
    results = []
    for each in (model, plain):
        leaf = x.clone().requires_grad_()
        y = each.run(leaf, 0, LAYERS)
        results.append((y.detach(), torch.autograd.grad(y, leaf, direction)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_four_bits_take_a_quarter_of_bfloat16():
    """4.127 bits a number: 4, and a scale for each 64, itself kept in 8 bits."""
    layer = Linear(256, 256, experts=8)
    layer.quantize(torch.randn(8, 256, 256, dtype=torch.bfloat16))
    packed, state = layer.quantized
    held = [packed, state.absmax, state.state2.absmax]
    assert sum(t.nbytes for t in held) * 8 / 8 / 256 / 256 == pytest.approx(4.127, abs=0.02)
    assert layer.weight.data_ptr() == packed.data_ptr()  # and nothing of the bfloat16 weight is left


# ---- random weights at real size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("llada-8b", 8.02), ("llada-moe", 7.36), ("llada2.1-mini", 16.26)])
def test_the_real_sizes_have_the_published_number_of_parameters(name, billions):
    """8B, 7B-A1B and 16B-A1.4B, made without memory for them."""
    model = on_meta(Config(**BACKBONES[name][1]))
    assert sum(t.numel() for t in model.state_dict().values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert len(published_tensors(model)) == len({*published_tensors(model)})


def test_random_weights_need_a_config_and_nothing_else(kind, folder):
    """--random-weights: the sizes of a folder's config.json, the same weights for the same seed, on any device and dtype."""
    for path in folder.glob("model*"):
        path.unlink()
    model, again, other = (random_llada(str(folder), seed=seed) for seed in (0, 0, 1))
    shapes = {name: tuple(t.shape) for name, t in load_llada(write_checkpoint(folder, kind)).state_dict().items()}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert not torch.equal(model.output.weight, other.output.weight)
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model(torch.full((1, 4), MASK)).isfinite().all()
    four = random_llada(str(folder), dtype=torch.bfloat16, load_4bit=True)
    assert all(layer.quantized is not None for layer in linear_layers(four).values())


def test_random_weights_of_a_wrong_name_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent is neither llada-8b, .* nor a folder with a config.json"):
        random_llada(str(tmp_path / "absent"))
