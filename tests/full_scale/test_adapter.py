"""
test_adapter.py: outer LoRAs on disk. `peft` must find in our files the matrices that we trained,
and we in its files those that it trained.
"""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from backbones import SETTINGS, add_random_lora, random_tensors, refused, toy_model
from commands import checkpoints, refusal
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import toys
from transformers import PretrainedConfig, PreTrainedModel

from full_scale import backbone
from full_scale.adapters import load_adapter, save_adapter
from full_scale.backbone import note_training
from full_scale.checkpoints import count, linear_layers, published_name
from model import Transformer

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, about themselves
RANK, ALPHA = 4, 8.0


class Skeleton(PreTrainedModel):
    """The published model's modules, by name and size: `peft` looks at no more than that."""

    config_class = PretrainedConfig

    def __init__(self, kind: str):
        super().__init__(PretrainedConfig())
        self.kind = kind
        for name, tensor in random_tensors(SETTINGS[kind]).items():
            path, shape = name.split("."), tensor.shape
            leaf, router = path.pop(), kind == "llada2" and name.endswith("mlp.gate.weight")
            bare = len(shape) == 1 or "wte" in name or "embed" in name or router
            last = None if bare else path.pop()
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            if bare:  # no nn.Linear, so that peft's all-linear passes it by
                parent.register_parameter(leaf, nn.Parameter(torch.ones(shape)))
            else:
                parent.add_module(last, nn.Linear(shape[1], shape[0], bias=False))

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer.ff_out if self.kind == "llada" else self.lm_head


def of_peft(model: PeftModel) -> dict[str, Tensor]:
    """Published name -> what peft adds to that matrix."""
    deltas = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.scaling:
            deltas[name] = layer.get_delta_weight("default").detach()
    return deltas


def of_ours(model: Transformer) -> dict[str, Tensor]:
    """Published name -> what our outer LoRA adds to that matrix: scale * B A."""
    deltas = {}
    for name, layer in linear_layers(model).items():
        if layer.lora_A is not None:
            delta = (layer.lora_scale * layer.lora_B @ layer.lora_A).detach()
            theirs = published_name(model.config, name)
            for x, part in enumerate(delta if "{x}" in theirs else [delta]):
                deltas[theirs.replace("{x}", str(x))] = part
    return deltas


def trained_by_peft(kind: str, folder: Path, **options) -> dict[str, Tensor]:
    """Saves an adapter that `peft` has made, randomised; returns its deltas."""
    defaults = {"target_modules": "all-linear", "r": RANK, "lora_alpha": ALPHA}
    model = get_peft_model(Skeleton(kind), LoraConfig(**defaults | options, lora_dropout=0.05))
    generator = torch.Generator().manual_seed(0)
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
        torch.testing.assert_close(delta, theirs[name].to(delta), rtol=1e-5, atol=1e-6)


STARTS = [True, False, "gaussian", "orthogonal", "mica", "eva"]


@pytest.mark.parametrize(("kind", "start"), list(zip([*SETTINGS, "llada", "llada2"], STARTS)))
def test_an_all_linear_adapter_of_peft_loads_here(kind, start, tmp_path):
    """Module by module: peft adapts what we adapt, and each matrix changes by the same amount,
    whichever A and B training started from, as long as W was left alone. The released MemDLM
    adapters are of this form. Neither the head nor LLaDA2's router is adapted."""
    theirs = trained_by_peft(kind, tmp_path, init_lora_weights=start)
    model = toy_model(kind, torch.float32)
    assert load_adapter(model, tmp_path) == list(linear_layers(model))
    assert len(theirs) == count(linear_layers(model).values())
    assert_same(of_ours(model), theirs)
    assert all(layer.lora_dropout == 0.05 for layer in linear_layers(model).values())
    assert not theirs.keys() & {"lm_head", "model.transformer.ff_out"}
    assert any(name.endswith("mlp.gate") for name in theirs) == kind.startswith("llada-moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_of_ours_loads_in_peft_and_here(kind, dtype, tmp_path):
    """In peft: the same modules, the same change, no missing or unexpected key. Here: equal bits.
    It is in float32 whatever the backbone is: a step of 2e-5 must not be rounded away. It is all
    that is trained (Sec. 4.1)."""
    model = add_random_lora(toy_model(kind, dtype), RANK)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    save_adapter(model, tmp_path, RANK, ALPHA, 0.05, "some/backbone")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(Skeleton(kind), tmp_path)
    assert_same(of_ours(model), of_peft(loaded))
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (RANK, ALPHA, 0.05)
    assert config.base_model_name_or_path == "some/backbone"
    assert type(loaded.base_model.model.get_output_embeddings()) is nn.Linear
    other, ids = toy_model(kind, dtype), torch.arange(10)[None]
    plain = other(ids)
    load_adapter(other, tmp_path)
    assert torch.equal(model(ids), other(ids))
    assert not torch.allclose(other(ids), plain, atol=1e-3)


def test_an_adapter_of_some_layers_and_experts_changes_nothing_else(tmp_path):
    """Experts of a stack share one tensor here: those that the adapter does not name keep their
    weights to the bit, and layers that it does not name get no LoRA."""
    experts = [f"model.layers.1.mlp.experts.{x}.up_proj" for x in (2, 5)]
    wanted = [*experts, "model.layers.2.mlp.gate", "model.layers.0.self_attn.o_proj"]
    theirs = trained_by_peft("llada-moe", tmp_path, target_modules=wanted)
    model = toy_model("llada-moe", torch.float32)
    names = ["layers.0.attention.o", "layers.1.mlp.experts.up", "layers.2.mlp.router"]
    assert load_adapter(model, tmp_path) == names
    ours = of_ours(model)
    assert_same({name: ours.pop(name) for name in theirs}, theirs)
    assert len(ours) == 6
    assert all((delta == 0).all() for delta in ours.values())


PEFT, ONES = "base_model.model.", torch.ones(RANK, 32)
HEAD = f"{PEFT}lm_head.lora_A.weight"
NAME = f"{PEFT}model.layers.0.self_attn.q_proj.lora_A.weight"
EXPERT = f"{PEFT}model.layers.0.mlp.experts.8.up_proj.lora_A.weight"
# What is put into adapter_config.json, or among the tensors (None: it is missing), and what the
# error must name.
FAULTS = [
    ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights = 'pissa_niter_4'"),
    ({"use_dora": True}, {}, "use_dora = True"),
    ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save = "),
    ({"rank_pattern": {"q_proj": 2}}, {}, "rank_pattern = "),
    ({"bias": "all"}, {}, "bias = 'all'"),
    ({"peft_type": "IA3"}, {}, "peft_type = 'IA3'"),
    ({"use_tomorrow": True}, {}, "use_tomorrow = True"),
    ({"r": True}, {}, "r = True"),
    ({"r": 10**7}, {}, "does not fit this backbone"),
    ({"lora_alpha": float("nan")}, {}, "lora_alpha = nan"),
    ({"lora_dropout": 1}, {}, "lora_dropout = 1"),
    ({}, {NAME: torch.ones(RANK, 7)}, f"{NAME} has the shape [4, 7], but must have [4, 32]"),
    ({}, {NAME: ONES.int()}, f"{NAME} is of the type I32, not of F64"),
    ({}, {NAME: ONES.bool()}, f"{NAME} is of the type BOOL, not of F64"),
    ({}, {NAME: None}, NAME),
    ({}, {HEAD: ONES}, "lm_head"),
    ({}, {EXPERT: ONES}, "experts.8"),
    ({}, None, "it is empty"),
]


@pytest.mark.parametrize(("settings", "tensors", "named"), FAULTS, ids=range(len(FAULTS)))
def test_what_does_not_fit_is_one_error(tmp_path, settings, tensors, named):
    """Half an adapter, or one of another backbone, would go unnoticed. PiSSA and OLoRA start from
    another W, which is not in the adapter."""
    model, weights = toy_model("llada-moe", torch.float32), tmp_path / "adapter_model.safetensors"
    save_adapter(add_random_lora(model, RANK), tmp_path, RANK, ALPHA, 0.0, "b")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    kept = {} if tensors is None else load_file(weights) | tensors
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, weights)
    said = refused(load_adapter, toy_model("llada-moe", torch.float32), tmp_path)
    assert str(tmp_path) in said
    assert named in said


PROGRAMS = {
    "sample": f"--backbone {toys() / 'llada'} --prompt x --device cpu",
    "eval_niah": f"--backbone {toys() / 'llada'} --out {toys() / 'none'} --tasks niah_single_1 "
    "--lengths 330 --samples 1 --device cpu",
}


def early(program: str, flags: list, capsys) -> str:
    """What a program says that must refuse before it reads any weights."""
    read = mock.Mock(side_effect=AssertionError("it went on to read the weights"))
    with mock.patch.object(backbone, "load_llada", read):
        return refusal(program, flags, capsys)


WRONG = {
    "memory_rank": [0, "x", "4", 1.5, True, None, [4]],
    "memory_steps": [0, 1_000_000_000, 1e9],
    "memory_epochs": [1_000_000_000],
    "memory_lr": [-1, float("nan"), float("inf"), "0.1"],
    "memory_fraction": [None, 0, 2],
    "memory_strategy": ["random", None, {}],
    "memory_loss": ["mse"],
    "start_scale": [0.5],
    "max_length": [0, -5, "long"],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_settings_beside_an_adapter_are_checked_as_flags_are(tmp_path, capsys, name):
    """training.json comes from others: a wrong one is a line that names it, before anything is
    loaded, and not a traceback, an endless loop, or a memory that nobody has asked for."""
    adapter = Path(shutil.copytree(toys() / "memdlm", tmp_path / "adapter"))
    for value in WRONG[name]:
        note_training(adapter, {"method": "memdlm", name: value})
        for program, flags in PROGRAMS.items():
            said = early(program, [*flags.split(), "--adapter", adapter, "--memory"], capsys)
            assert f"training.json: {name} = " in said, value


def test_an_adapter_that_cannot_be_used_is_said_before_any_weights_are_read(tmp_path, capsys):
    """Not after the row of the base, which may have taken hours."""
    adapter = Path(shutil.copytree(toys() / "memdlm", tmp_path / "adapter"))
    save_adapter(add_random_lora(toy_model("llada2", torch.float32), 4), adapter, 4, 8.0, 0.0, "b")
    for program, usual in PROGRAMS.items():
        said = early(program, [*usual.split(), "--adapter", adapter], capsys)
        assert "does not fit this backbone" in said


TOO_MUCH = {
    "--cache --cfg-scale 1": "--cache is not for --cfg-scale",
    "--plain --prompt=": "--prompt is empty",
}


@pytest.mark.parametrize("flags", TOO_MUCH)
def test_what_sample_cannot_do_is_said_before_any_weights_are_read(capsys, flags):
    usual = [*PROGRAMS["sample"].split(), *flags.split()]
    assert TOO_MUCH[flags] in early("sample", usual, capsys)
    for more in ("--cfg-scale 1", "--edit-threshold 0.9 --temperature 1"):
        usual = ["--backbone", checkpoints()["llada2"], "--prompt", "x", *more.split()]
        assert more.split()[0] in early("sample", usual, capsys)
