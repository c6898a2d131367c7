"""
test_loading.py: published checkpoints. Loading is right if each tensor ends up in its own place,
once, and every place is filled. Whatever is in the way of that is one error that says what to do,
before time and memory are spent. The hub is never reached here.
"""

import builtins
import json
import os
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from backbones import (
    HIDDEN,
    LAYERS,
    MOE,
    SETTINGS,
    TOKENIZER,
    VOCABULARY,
    random_tensors,
    refused,
    toy_model,
    write_checkpoint,
    write_tensors,
)
from commands import run_python
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from full_scale import checkpoints
from full_scale.checkpoints import fetch, find_checkpoint, linear_layers, load_llada, random_llada
from full_scale.configs import ARCHITECTURES, KNOWN, read_llada_config
from full_scale.experts import ExpertLinear4bit, Linear4bit
from lab import tools

CONFIG = Path("config.json")
EVERY = pytest.mark.parametrize("kind", SETTINGS)


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    """A checkpoint in three shards."""
    return write_checkpoint(tmp_path / "checkpoint", kind, shards=3)


# Names that none of the recorded checkpoints in tests/golden has.
OF_RICH = """model.layers.0.mlp.gate_proj.weight model.layers.0.mlp.up_proj.weight
model.layers.0.mlp.down_proj.weight model.layers.1.shared_expert.gate_proj.weight
model.layers.1.shared_expert.up_proj.weight model.layers.1.shared_expert.down_proj.weight
model.layers.1.mlp.expert_bias""".split()


@EVERY
def test_every_tensor_goes_to_its_own_place_in_the_dtype_asked_for(kind, folder, tmp_path):
    """How they are spread over files makes no difference. In bfloat16, LLaDA2's router alone and
    the routers' biases stay in float32: they decide, as published."""
    made, model = toy_model(kind, torch.float32).state_dict(), load_llada(folder)
    single = load_llada(write_checkpoint(tmp_path / "one", kind))
    for state in (model.state_dict(), single.state_dict()):
        assert state.keys() == made.keys()
        assert all(torch.equal(tensor, made[name]) for name, tensor in state.items())
    assert not model.training
    assert set(OF_RICH) <= random_tensors(SETTINGS["llada-moe, rich"]).keys()
    half = load_llada(folder, dtype=torch.bfloat16).state_dict()
    exact = {name for name, t in half.items() if t.dtype == torch.float32}
    routers = {f"layers.{i}.mlp.router.weight" for i in (1, 2) if kind == "llada2"}
    biased = kind in ("llada2", "llada-moe, rich")
    assert exact == routers | {f"layers.{i}.mlp.router_bias" for i in (1, 2) if biased}
    for name, tensor in made.items():
        assert torch.equal(half[name], tensor.to(half[name].dtype))


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
    return lambda folder: (folder / file).write_text(content)


def config(**changes):
    """Other settings in config.json, for the same tensors."""
    return text("config.json", json.dumps(MOE | changes))


def head_in_two_shards(folder: Path) -> None:
    for path in (folder / SHARD, folder / SECOND):
        save_file(load_file(path) | {HEAD: torch.ones(VOCABULARY, HIDDEN)}, path)


OTHER = json.dumps({"weight_map": {"odd": SHARD}})
INTEGERS = torch.ones(16, 32, dtype=torch.int8)
# fault -> (how it comes about, what the error must name)
FAULTS = {
    "a tensor is missing": (tensors({ROUTER: None}), [ROUTER, "1 tensors missing"]),
    "a tensor is left over": (tensors({"odd": torch.ones(2)}), ["1 not used", "odd"]),
    "a tensor is turned": (
        tensors({ROUTER: torch.ones(32, 8)}),
        [ROUTER, "shape [32, 8], but must have [8, 32]"],
    ),
    "an expert is turned": (tensors({EXPERT: torch.ones(32, 16)}), [EXPERT, "[32, 16]"]),
    "an expert is quantized": (tensors({EXPERT: INTEGERS}), [EXPERT, "of the type I8, not of F64"]),
    "a tensor is there twice": (head_in_two_shards, [HEAD, "already"]),
    "a shard is cut off": (lambda f: os.truncate(f / SHARD, 999), [SHARD, "download it again"]),
    "a shard is missing": (lambda f: (f / SHARD).unlink(), [SHARD, "is missing"]),
    "the index names a file elsewhere": (text(INDEX, '{"weight_map": {"a": "../b"}}'), ["../b"]),
    "the index names other tensors": (text(INDEX, OTHER), ["disagree"]),
    "the index is a list": (text(INDEX, '{"weight_map": ["a"]}'), [INDEX, "weight_map"]),
    "there are no weights": (remove_weights, ["model.safetensors is missing"]),
    "there is no config.json": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config.json is nested deeply": (text("config.json", "[" * 200_000), ["config.json"]),
    "another model": (config(model_type="llama"), ["model_type 'llama'"]),
    "too many layers": (config(num_hidden_layers=999, moe_layer_freq=[1] * 999), ["999 layers"]),
    "too many experts": (config(num_experts=9_999), ["9999 experts", "8"]),
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


def a_directory(path: Path, monkeypatch) -> None:
    path.unlink()
    path.mkdir()


def a_file_of_another_user(path: Path, monkeypatch) -> None:
    refusing = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(builtins, "open", refusing)


def on_a_mount_without_mapping(path: Path, monkeypatch) -> None:
    refusing = mock.Mock(side_effect=OSError("No such device (os error 19)"))
    for module in (checkpoints, tools):
        monkeypatch.setattr(module, "safe_open", refusing)


@pytest.mark.parametrize(
    "happens", [a_directory, a_file_of_another_user, on_a_mount_without_mapping]
)
def test_a_file_that_cannot_be_read_here_is_not_called_missing_or_damaged(
    tmp_path, monkeypatch, happens
):
    """Nobody shall download 15 GB again, or delete a checkpoint, for a file that is in order: that
    is not the user's, or lies where no file can be mapped into memory."""
    path = write_checkpoint(tmp_path / "checkpoint", "llada") / "model.safetensors"
    happens(path, monkeypatch)
    for read in (checkpoints.tensor_names, tools.read_tensors):
        said = refused(read, path)
        assert said.startswith(f"{path} cannot be read here: ")
        assert not any(word in said for word in ("download", "elete", "missing", "damaged"))


NOT_NEEDED = """model_type n_kv_heads num_key_value_heads head_dim mask_token_id embedding_size
num_shared_experts partial_rotary_factor moe_router_enable_expert_bias""".split()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_setting_that_this_code_does_not_have_is_named(kind):
    """An unknown activation, clip_qkv, ...: never a silent default. What the code
    does is accepted, and so is a config.json without the key. A size must be there and be one:
    nothing is assumed about it, and no damaged number is computed with."""
    names = ["layers.0.mlp.experts.0.up_proj.weight"] if kind == "llada-moe" else []
    other = {"llada": "llada", "llada-moe": "lladamoe", "llada2": "llada2_moe_veomni"}[kind]
    renamed = read_llada_config(SETTINGS[kind] | {"model_type": other}, (), CONFIG)
    assert renamed.architecture == kind
    for key, values in ARCHITECTURES[kind]["switches"].items():
        without = {name: value for name, value in SETTINGS[kind].items() if name != key}
        for bad in (True, False, 8.0, "other", {"type": "yarn"}):
            if bad not in values:
                said = refused(read_llada_config, without | {key: bad}, (), CONFIG)
                assert said.startswith(f"config.json: {key} = ")
        for good in [{key: value} for value in values] + [{}]:
            read_llada_config(without | good, (), CONFIG)
    for key in SETTINGS[kind].keys() - NOT_NEEDED - {kind == "llada" and "vocab_size"}:
        without = {name: value for name, value in SETTINGS[kind].items() if name != key}
        said = refused(read_llada_config, without, names, CONFIG)
        assert said == f"config.json: {key} is missing."
        for bad in ["64", -1, None, [2], {}, float("nan"), float("inf"), 1e30, 10**30, "x" * 5000]:
            said = refused(read_llada_config, without | {key: bad}, names, CONFIG)
            assert said.startswith(f"config.json: {key} = "), bad


# Which settings of a config.json are read for their value, by architecture and for all of them.
READ = {
    "llada": "embedding_size vocab_size d_model n_layers n_heads n_kv_heads mlp_hidden_size",
    "llada-moe": """vocab_size hidden_size num_hidden_layers num_attention_heads head_dim
        num_key_value_heads num_experts num_experts_per_tok moe_router_enable_expert_bias
        qk_layernorm dense_intermediate_size expert_intermediate_size moe_layer_freq
        shared_expert_intermediate_size""",
    "llada2": """vocab_size hidden_size num_hidden_layers num_attention_heads head_dim
        num_key_value_heads num_experts num_experts_per_tok moe_router_enable_expert_bias
        use_qk_norm intermediate_size moe_intermediate_size n_group topk_group
        routed_scaling_factor first_k_dense_replace num_shared_experts""",
}
READ_BY_ALL = "model_type mask_token_id rms_norm_eps rope_theta partial_rotary_factor rotary_dim"
ROPE = ["rope_parameters", "rope_scaling"]  # as is what stands inside of these
# Settings of related models that change what they compute.
OTHERS = """sliding_window layer_types rotary_pct rope_interleaved embedding_layer_norm norm_after
attention_multiplier logits_scaling residual_multiplier final_logit_softcapping is_causal is_decoder
quantization_config pruned_heads per_layer_config num_nextn_predict_layers attention_dropout
embedding_dropout residual_dropout output_dropout add_cross_attention zero_expert_num""".split()
ODD = [True, 1, 0.5, "odd", [1], {"odd": 1}]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_setting_is_read_or_without_effect_or_refused_by_name(kind):
    """There is no fourth kind. Those in "ignored" stand there for a reason, and change no field;
    one that nobody has heard of may be off, but must not be on: it could be what the model needs.
    That holds for the names that another architecture has for its own settings, too."""
    plain, known = SETTINGS[kind], ARCHITECTURES[kind]
    expected = read_llada_config(plain, (), CONFIG)
    read = {*READ[kind].split(), *READ_BY_ALL.split()}
    assert read == {"model_type", "rotary_dim", *known["read"], *known["sizes"].values()}
    ignored = [key for why, keys in KNOWN["ignored"].items() for key in keys]
    assert not {*ignored} & {*read, *known["switches"], *ROPE}
    for key in ignored:
        for value in ODD:
            assert read_llada_config(plain | {key: value}, (), CONFIG) == expected, key
    elsewhere = {key for other in READ.values() for key in other.split()} - {"num_experts"}
    for key in {*OTHERS, *elsewhere, "use_tomorrow"} - read - {*known["switches"]}:
        for value in ODD:
            said = refused(read_llada_config, plain | {key: value}, (), CONFIG)
            assert said.startswith(f"config.json: {key} = "), said
        for off in (None, False, 0, 0.0, [], {}):
            assert read_llada_config(plain | {key: off}, (), CONFIG) == expected


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_config_that_transformers_has_saved_in_full_is_read(kind):
    """All that its base class writes by itself is known, in the installed version."""
    written = PretrainedConfig(dtype="bfloat16", architectures=["LLaDA"]).to_dict()
    written |= {"tie_word_embeddings": False}  # the models' own class says so
    saved = json.loads(json.dumps(written | SETTINGS[kind]))
    assert read_llada_config(saved, (), CONFIG) == read_llada_config(SETTINGS[kind], (), CONFIG)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
PLAIN = {"rope_type": "default", "rope_theta": 7_000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rope_is_read_from_its_old_and_its_new_place_alike(kind):
    """transformers 5 moves the settings of RoPE into rope_parameters. Read from the old place
    alone, they would be missing without a word: YaRN left out, or every channel turned."""
    old = {key: PLAIN[key] for key in ("rope_theta", "partial_rotary_factor")}
    bare = {key: value for key, value in SETTINGS[kind].items() if key not in old}
    expected = read_llada_config(bare | old, (), CONFIG)
    assert (expected.rope_base, expected.rotary_fraction) == (7_000.0, 0.5)
    for name in ROPE:
        for both in ({}, old, {"partial_rotary_factor": None}):
            for inner in (PLAIN, old, old | {"type": "default", "factor": None}):
                assert read_llada_config(bare | both | {name: inner}, (), CONFIG) == expected
        split = {"rope_theta": 7_000.0, name: {"partial_rotary_factor": 0.5}}
        assert read_llada_config(bare | split, (), CONFIG) == expected


NOT_PLAIN = [
    (YARN, "rope_type = 'yarn'"),
    (PLAIN | YARN, "rope_type = 'yarn'"),
    ({"type": "linear", "factor": 2.0}, "type = 'linear'"),
    ({"rope_type": "default", "type": "dynamic"}, "type = 'dynamic'"),
    ({"rope_type": ["default"]}, "rope_type = ['default']"),
    ({"factor": 4.0}, "factor = 4.0"),
    ({"full_attention": PLAIN}, "full_attention = "),
    ({"rope_theta": 3}, "rope_theta = 3"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_rope_but_the_plain_one_is_refused_by_name(kind):
    """Stretched angles, angles by layer, and two places that do not agree."""
    settings = {"partial_rotary_factor": 0.5, **SETTINGS[kind]}
    for name in ROPE:
        for inner, named in NOT_PLAIN:
            said = refused(read_llada_config, settings | {name: inner}, (), CONFIG)
            assert said.startswith(f"config.json: {name}: {named}"), said
        for odd in (True, 8.0, "yarn", ["yarn"]):
            said = refused(read_llada_config, settings | {name: odd}, (), CONFIG)
            assert said.startswith(f"config.json: {name} = "), said


IMPOSSIBLE = [
    ("llada", {"n_kv_heads": 3}),
    ("llada", {"mask_token_id": VOCABULARY}),
    ("llada-moe", {"num_experts_per_tok": 9}),
    ("llada-moe", {"partial_rotary_factor": 2}),
    ("llada2", {"num_shared_experts": 10**9}),
    ("llada2", {"n_group": 3}),
    ("llada2", {"n_group": 0, "first_k_dense_replace": 3}),  # no layer has experts
    ("llada2", {"num_experts_per_tok": 5}),  # two groups of two are kept
    ("llada2", {"rotary_dim": 8}),
]


@pytest.mark.parametrize(("kind", "changes"), IMPOSSIBLE)
def test_impossible_sizes_and_those_that_contradict_each_other_are_refused(kind, changes):
    said = refused(read_llada_config, SETTINGS[kind] | changes, (), CONFIG)
    assert said.startswith("config.json: ")


# The first model is a toy: the second one's peak is above that. Pages of a mapped file count, too.
MEASURE = """
import sys
from pathlib import Path
from full_scale.checkpoints import load_llada
for folder in sys.argv[1:]:
    model = load_llada(folder)
    print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_memory_of_loading_is_the_weights_and_one_shard(tmp_path):
    """120 MB in 8 shards, over which the experts of a stack are spread."""
    wide = {"hidden_size": 256, "expert_intermediate_size": 256, "num_experts": 16}
    deep = {"num_hidden_layers": 8, "moe_layer_freq": [1] * 8}
    large = write_checkpoint(tmp_path / "large", "llada-moe", shards=8, **wide, **deep)
    toy = write_checkpoint(tmp_path / "toy", "llada-moe")
    done = run_python("-c", MEASURE, toy, large)
    assert done.returncode == 0, done.stderr
    before, after = (1024 * int(line) for line in done.stdout.split())
    shards = [path.stat().st_size for path in large.glob("*.safetensors")]
    assert 0.9 * sum(shards) <= after - before <= 1.1 * sum(shards) + max(shards)


@EVERY
def test_four_bits_reach_every_linear_layer_but_the_head(kind, folder):
    """Experts included; all else stays as it is. Output and gradient are those of a model that has
    the unpacked weights as its own. A number takes 4.127 bits: 4, and a scale for each 64, itself
    kept in 8 bits."""
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
    layer = ExpertLinear4bit(torch.randn(8, 256, 256, dtype=torch.bfloat16))
    held = [layer.weight, layer.state.absmax, layer.state.state2.absmax]
    bits = 8 * sum(tensor.nbytes for tensor in held) / 8 / 256 / 256
    assert bits == pytest.approx(4.127, abs=0.02)


@EVERY
def test_random_weights_need_a_config_and_nothing_else(kind, folder):
    """--random-weights: the sizes of a config.json; the same seed gives the same weights."""
    remove_weights(folder)
    model, again, other = (random_llada(str(folder), seed=seed) for seed in (0, 0, 1))
    state, sizes = model.state_dict(), toy_model(kind).state_dict()
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in sizes.items()}
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(model.output.weight, other.output.weight)
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.05)
    four = linear_layers(random_llada(str(folder), dtype=torch.bfloat16, load_4bit=True))
    assert all(isinstance(layer, Linear4bit) for layer in four.values())


def test_random_weights_of_an_impossible_size_are_refused(tmp_path):
    """The sizes are each possible, but nothing holds their product."""
    huge = {"num_hidden_layers": 999, "moe_layer_freq": [1] * 999, "num_experts": 9_999}
    config(**huge, hidden_size=4_000_000, expert_intermediate_size=4_000_000)(tmp_path)
    assert "more than any machine holds" in refused(random_llada, str(tmp_path))


@pytest.mark.parametrize("name", ["absent", "llada-9b", "a/b/c", "x" * 5000])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name):
    said = refused(find_checkpoint, name)
    assert f"no folder {name[:200]}" in said
    assert "llada-8b, llada-moe" in said


def test_without_network_the_user_is_told_which_files_to_put_where(monkeypatch, tmp_path):
    """Nothing listens on port 9: the real client fails, quickly."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = refused(find_checkpoint, "llada-moe")
    assert said.startswith("cannot download inclusionAI/LLaDA-MoE-7B-A1B-Base")
    assert "config.json, *.safetensors, model.safetensors.index.json, tokenizer*.json" in said
    assert "huggingface.co/inclusionAI/LLaDA-MoE-7B-A1B-Base into a folder" in said


NO_DOWNLOAD = [
    (errors.GatedRepoError, "gated: accept its terms on its page and log in"),
    (errors.RepositoryNotFoundError, "no dataset a/b that you may read"),
    (errors.HfHubHTTPError, "cannot download a/b (HfHubHTTPError: 403"),
]


@pytest.mark.parametrize(("kind", "named"), NO_DOWNLOAD)
def test_a_download_that_is_refused_is_one_line_with_a_way_out(monkeypatch, kind, named):
    error = kind.__new__(kind)  # the client's errors want a response to be constructed
    error.args = ("403 Client Error\nsee the page",)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error))
    said = refused(fetch, "a/b", ["b.json"], "dataset")
    assert named in said
    assert "fetch b.json from https://huggingface.co/datasets/a/b into a folder" in said


def test_without_huggingface_hub_only_downloads_fail(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(TOKENIZER)
    assert find_checkpoint(".").resolve() == find_checkpoint(TOKENIZER) == TOKENIZER
    assert "pip install huggingface_hub" in refused(find_checkpoint, "a/b")


def test_a_download_fetches_what_is_read_and_nothing_else(monkeypatch, tmp_path):
    """A short name stands for its repository; modelling code and other formats stay on the hub. A
    repository without the file that was asked for is refused."""
    client = mock.Mock(return_value=str(TOKENIZER))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    assert find_checkpoint("llada-8b") == find_checkpoint("a/b") == TOKENIZER
    assert [call.args for call in client.mock_calls] == [("GSAI-ML/LLaDA-8B-Base",), ("a/b",)]
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    others = ["modeling_llada.py", "README.md", "pytorch_model.bin", "model.gguf"]
    wanted = client.call_args.kwargs["allow_patterns"]
    assert list(filter_repo_objects([*files, *others], allow_patterns=wanted)) == files
    client.return_value = str(tmp_path)
    assert "a/b on the hub has no b.json" in refused(fetch, "a/b", ["b.json"], "dataset")
