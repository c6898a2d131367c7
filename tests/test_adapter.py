"""
test_adapter.py: outer LoRAs on disk. `peft` must find in our files the very matrices that we trained, and we in its files those
that it trained, under the published modules' names. The published code itself is not needed for that: a tree of nn.Linear with
its names is what `peft` looks at.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from backbones import SETTINGS, VOCABULARY, add_random_lora, published_shapes, toy_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from model import (
    Transformer,
    UserError,
    adapter_tensors,
    count,
    linear_layers,
    load_adapter,
    published_name,
    save_adapter,
)

# transformers and peft warn of what they will change; bitsandbytes, which peft imports, of torch's.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]
RANK, ALPHA = 4, 8.0


@pytest.fixture(params=SETTINGS)
def kind(request) -> str:
    return request.param


class Skeleton(PreTrainedModel):
    """The published model's modules, by name and size, without a forward."""

    config_class = PretrainedConfig

    def __init__(self, kind: str):
        super().__init__(PretrainedConfig())
        self.kind = kind
        for name, shape in published_shapes(SETTINGS[kind]).items():
            path, leaf = name.rsplit(".", 1)
            parent, last = self.parent(path)
            if len(shape) == 2 and shape[0] == VOCABULARY and last not in ("lm_head", "ff_out"):
                parent.add_module(last, nn.Embedding(*shape))
            elif len(shape) == 2 and not (kind == "llada2" and path.endswith("mlp.gate")):
                parent.add_module(last, nn.Linear(shape[1], shape[0], bias=False))
            else:  # norms, biases; LLaDA2's router is a module with a bare matrix
                if not hasattr(parent, last):
                    parent.add_module(last, nn.Module())
                setattr(getattr(parent, last), leaf, nn.Parameter(torch.ones(shape)))

    def parent(self, path: str) -> tuple[nn.Module, str]:
        module, (*parts, last) = self, path.split(".")
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        return module, last

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer.ff_out if self.kind == "llada" else self.lm_head


def of_peft(model: PeftModel) -> dict[str, Tensor]:
    """Published name -> what peft adds to that matrix."""
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items() if layer.scaling}


def of_ours(model: Transformer) -> dict[str, Tensor]:
    """Published name -> what our outer LoRA adds to that matrix: scale * B A."""
    deltas = {}
    for name, layer in linear_layers(model).items():
        if layer.lora_A is not None:
            delta = (layer.lora_scale * layer.lora_B @ layer.lora_A).detach()
            theirs = published_name(model.config, name)
            parts = delta if layer.stack else [delta]
            deltas |= {theirs.replace("{x}", str(x)): part for x, part in enumerate(parts)}
    return deltas


def trained_by_peft(kind: str, folder: Path, seed: int = 0, **options) -> dict[str, Tensor]:
    """An adapter that `peft` has made, randomised and saved: the folder's deltas."""
    options = {"target_modules": "all-linear", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05} | options
    model, generator = get_peft_model(Skeleton(kind), LoraConfig(**options)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return of_peft(model)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert delta.abs().max() > 0.01, name
        torch.testing.assert_close(delta, theirs[name].to(delta), rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


# ---- there and back ------------------------------------------------------------------------------------------------------


def test_an_all_linear_adapter_of_peft_loads_here(kind, tmp_path):
    """Module by module: peft adapts what we adapt, and each matrix changes by the same amount. The released MemDLM adapters
    are of this form."""
    theirs = trained_by_peft(kind, tmp_path)
    model = toy_model(kind, torch.float32)
    names = load_adapter(model, tmp_path)
    assert names == list(linear_layers(model))
    assert len(theirs) == count(linear_layers(model).values())
    assert_same(of_ours(model), theirs)
    assert all(layer.lora_dropout == 0.05 for layer in linear_layers(model).values())


def test_the_head_is_never_adapted_nor_llada2s_router(kind, tmp_path):
    """LLaDA-8B's head and a matrix of each block are both called ff_out. LLaDA-MoE's router is a linear layer."""
    adapted = set(trained_by_peft(kind, tmp_path))
    assert not adapted & {"lm_head", "model.transformer.ff_out"}
    routers = {name for name in adapted if name.endswith("mlp.gate")}
    moe = {f"model.layers.{i}.mlp.gate" for i in ((0, 1, 2) if kind == "llada-moe" else (1, 2))}
    assert routers == (moe if kind in ("llada-moe", "llada-moe, rich") else set())
    if kind == "llada":
        assert {f"model.transformer.blocks.{i}.ff_out" for i in range(3)} <= adapted


def test_an_adapter_of_ours_loads_in_peft(kind, tmp_path):
    """Same modules, same change, no missing or unexpected key."""
    model = add_random_lora(toy_model(kind, torch.float32), RANK)
    save_adapter(model, tmp_path, RANK, ALPHA, 0.05, "some/backbone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(Skeleton(kind), tmp_path)
    assert_same(of_ours(model), of_peft(loaded))
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (RANK, ALPHA, 0.05)
    assert config.base_model_name_or_path == "some/backbone"
    head = loaded.base_model.model.get_output_embeddings()
    assert type(head) is nn.Linear


def test_saving_and_loading_here_gives_equal_bits(kind, tmp_path):
    model, other = add_random_lora(toy_model(kind, torch.float32), RANK), toy_model(kind, torch.float32)
    save_adapter(model, tmp_path, RANK, ALPHA, 0.05, "some/backbone")
    load_adapter(other, tmp_path)
    before, after = adapter_tensors(model), adapter_tensors(other)
    assert before.keys() == after.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(torch.equal(part, after[name][0]) for name, (part, _) in before.items())
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids), other(ids))
    assert not torch.allclose(other(ids), toy_model(kind, torch.float32)(ids), atol=1e-3)


def test_an_adapter_of_a_bfloat16_or_four_bit_backbone_is_kept_in_float32(tmp_path):
    """A step of 2e-5 must not be rounded away."""
    model = add_random_lora(toy_model("llada-moe", torch.bfloat16), RANK)
    save_adapter(model, tmp_path, RANK, ALPHA, 0.0, "b")
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    other = toy_model("llada-moe", torch.bfloat16)
    load_adapter(other, tmp_path)
    assert_same(of_ours(other), of_ours(model))


# ---- adapters of a part --------------------------------------------------------------------------------------------------

ATTENTION = {
    "llada": "q_proj k_proj v_proj attn_out",
    "llada-moe": "q_proj k_proj v_proj o_proj",
    "llada2": "query_key_value dense",
}


@pytest.mark.parametrize("kind", ATTENTION, indirect=True)
def test_an_adapter_of_the_attention_alone_leaves_the_rest_without(kind, tmp_path):
    theirs = trained_by_peft(kind, tmp_path, target_modules=ATTENTION[kind].split())
    model = toy_model(kind, torch.float32)
    names = load_adapter(model, tmp_path)
    assert_same(of_ours(model), theirs)
    assert all(".attention." in name for name in names)
    assert len(names) == 3 * len([m for m in ("qkv", "q", "k", "v", "o") if hasattr(model.layers[0].attention, m)])
    assert all((layer.lora_A is None) == (name not in names) for name, layer in linear_layers(model).items())


def test_an_adapter_of_some_layers_and_experts_changes_nothing_else(tmp_path):
    """Experts of a stack share one tensor here: those that the adapter does not name keep their weights to the bit."""
    wanted = ["model.layers.1.mlp.experts.2.up_proj", "model.layers.1.mlp.experts.5.up_proj", "model.layers.2.mlp.gate"]
    theirs = trained_by_peft("llada-moe", tmp_path, target_modules=wanted)
    model = toy_model("llada-moe", torch.float32)
    assert load_adapter(model, tmp_path) == ["layers.1.mlp.experts.up", "layers.2.mlp.router"]
    ours = of_ours(model)
    assert_same({name: ours.pop(name) for name in wanted}, theirs)
    assert all(math.prod(delta.shape) and (delta == 0).all() for delta in ours.values())
    assert len(ours) == 6


# ---- what does not fit ---------------------------------------------------------------------------------------------------


def in_config(**changes):
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def in_tensors(change):
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FAULTS = {
    "DoRA": (in_config(use_dora=True), "use_dora = True is not supported"),
    "rank-stabilised": (in_config(use_rslora=True), "use_rslora = True is not supported"),
    "ranks of their own": (in_config(rank_pattern={"q_proj": 8}), "rank_pattern = .* is not supported"),
    "alphas of their own": (in_config(alpha_pattern={"q_proj": 8}), "alpha_pattern = .* is not supported"),
    "whole modules": (in_config(modules_to_save=["lm_head"]), "modules_to_save = .* is not supported"),
    "biases": (in_config(bias="all"), "bias = 'all' is not supported"),
    "another method": (in_config(peft_type="IA3"), "peft_type = 'IA3' is not supported"),
    "no rank": (in_config(r=None), "r or lora_alpha is missing"),
    "another rank": (in_config(r=RANK + 1), "does not fit this backbone: 0 tensors have no place, .* no fit"),
    "a wrong shape": (in_tensors(lambda t: t.update({NAME: torch.ones(RANK, 7)})), "1 no fit: .*q_proj.lora_A"),
    "a tensor too many": (in_tensors(lambda t: t.update(odd=torch.ones(2))), "1 tensors have no place, 0 no fit: odd"),
    "an adapted head": (
        in_tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(RANK, 32)})),
        "1 tensors have no place.*lm_head",
    ),
    "an expert too many": (
        in_tensors(lambda t: t.update({NAME.replace("self_attn.q", "mlp.experts.8.up"): torch.ones(RANK, 32)})),
        "1 tensors have no place.*experts.8",
    ),
    "no tensors": (in_tensors(dict.clear), "it is empty"),
    "half a pair": (in_tensors(lambda t: t.pop(NAME)), "lora_A.weight is missing"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing in"),
    "no file": (lambda f: (f / "adapter_model.safetensors").unlink(), "there is no file .*adapter_model.safetensors"),
    "a file cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "cannot read .*adapter_model.safetensors",
    ),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read .*adapter_config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_error(tmp_path, fault):
    """A LoRA that means something else, or that belongs to another backbone, is refused: half an adapter would go unnoticed."""
    spoil, named = FAULTS[fault]
    save_adapter(add_random_lora(toy_model("llada-moe", torch.float32), RANK), tmp_path, RANK, ALPHA, 0.0, "b")
    spoil(tmp_path)
    with pytest.raises(UserError, match=named) as error:
        load_adapter(toy_model("llada-moe", torch.float32), tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_adapter_of_another_backbone_is_refused(tmp_path):
    save_adapter(add_random_lora(toy_model("llada2", torch.float32), RANK), tmp_path, RANK, ALPHA, 0.0, "b")
    with pytest.raises(UserError, match="does not fit this backbone"):
        load_adapter(toy_model("llada", torch.float32), tmp_path)
