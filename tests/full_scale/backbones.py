"""
backbones.py: small random models of the three published architectures, their checkpoints, and
batches and fast weights for them.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data import Batch
from full_scale.checkpoints import add_outer_lora, on_meta, published_tensors
from full_scale.configs import read_llada_config
from memdlm import Anchor, Memory, init_fast
from model import Fast, Transformer, UserError

TOKENIZER = Path(__file__).parents[1] / "golden" / "checkpoint"
HIDDEN, LAYERS, VOCABULARY, MASK = 32, 3, 576, 525  # [MASK] as in the tokenizer

DENSE = {"model_type": "llada", "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4}
DENSE |= {"n_kv_heads": 2, "mlp_hidden_size": 48, "embedding_size": VOCABULARY}
DENSE |= {"vocab_size": VOCABULARY - 1, "mask_token_id": MASK}
DENSE |= {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
MIXTURE = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
MIXTURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 50_000}
MIXTURE |= {"num_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
MOE = MIXTURE | {"model_type": "llada", "moe_layer_freq": [1] * LAYERS, "qk_layernorm": True}
MOE |= {"expert_intermediate_size": 16, "dense_intermediate_size": 48}
# All that a LLaDA-MoE may have besides.
RICH = MOE | {"moe_layer_freq": [0, 1, 1], "shared_expert_intermediate_size": 24}
RICH |= {"partial_rotary_factor": 0.5, "moe_router_enable_expert_bias": True}
LLADA2 = MIXTURE | {"model_type": "llada2_moe", "head_dim": 8, "num_shared_experts": 1}
LLADA2 |= {"moe_intermediate_size": 16, "intermediate_size": 48, "first_k_dense_replace": 1}
LLADA2 |= {"n_group": 4, "topk_group": 2, "moe_router_enable_expert_bias": True}
LLADA2 |= {"routed_scaling_factor": 2.5, "use_qk_norm": True, "partial_rotary_factor": 0.5}
SETTINGS = {"llada": DENSE, "llada-moe": MOE, "llada-moe, rich": RICH, "llada2": LLADA2}
MIXTURES = [kind for kind in SETTINGS if kind != "llada"]


def random_tensor(name: str, shape: tuple, generator: torch.Generator) -> Tensor:
    """Random, norms and biases too, and so large that every layer changes much."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise if "bias" in name else 1 + 0.2 * noise
    return noise if shape[0] == VOCABULARY else 1.5 * noise * shape[-1] ** -0.5


def random_model(settings: dict, dtype=torch.float64, seed: int = 3) -> Transformer:
    """A random model for the settings of a config.json, in eval mode."""
    config = read_llada_config(settings, (), Path("config.json"))
    config.mask_id = MASK
    model = on_meta(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(random_tensor(name, tuple(tensor.shape), generator))
    return model.to(dtype).eval()


def toy_model(kind: str, dtype=torch.float64, seed: int = 3, **changes) -> Transformer:
    """A model of the sizes of a key of SETTINGS: the one in its checkpoint."""
    return random_model(SETTINGS[kind] | changes, dtype, seed)


def add_random_lora(model: Transformer, rank=4, dropout=0.0, seed=5) -> Transformer:
    """An outer LoRA as it is after training: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    add_outer_lora(model, rank, 2.0 * rank, dropout, generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def random_fast(model: Transformer, memory: Memory, sets: int, seed: int = 6) -> Fast:
    """phi as the inner loop leaves it: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    fast = init_fast(model, memory, sets, generator)
    weights = {}
    for name, (A, B) in fast.weights.items():
        weights[name] = A, 0.2 * torch.randn(B.shape, generator=generator).to(B)
    return Fast(weights, fast.scale)


def toy_batch(rows: int = 4, length: int = 12, seed: int = 1) -> tuple[Batch, Anchor]:
    """Rows with prompts of 2, 3, ... tokens, and an anchor that masks a token of each at least."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, MASK, (rows, length), generator=generator)
    maskable = torch.arange(length)[None] >= torch.arange(2, 2 + rows)[:, None]
    masked = (torch.rand(x0.shape, generator=generator) < 0.4) & maskable
    masked[:, -1] = True
    return Batch(x0, maskable, None), Anchor(torch.linspace(0.2, 0.7, rows), masked)


def random_tensors(settings: dict, seed: int = 3) -> dict[str, Tensor]:
    """The tensors of a checkpoint with these settings: published name -> tensor. (That the names
    are right shows where test_golden.py replays real_configs.json.)"""
    model, tensors = random_model(settings, torch.float32, seed), {}
    for name, (ours, expert) in published_tensors(model).items():
        tensor = model.state_dict()[ours]
        tensors[name] = tensor if expert is None else tensor[expert].clone()
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """model.safetensors; or numbered files that share a stack's experts, and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors, key=lambda name: (len(name), name))
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def write_checkpoint(folder: Path, kind: str, shards: int = 1, seed: int = 3, **changes) -> Path:
    """A whole checkpoint of a key of SETTINGS; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[kind] | changes
    (folder / "config.json").write_text(json.dumps(settings))
    write_tensors(folder, random_tensors(settings, seed), shards)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


def refused(load, *arguments) -> str:
    """The error with which this must fail: one line, not a long one, and quickly."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        load(*arguments)
    assert time.monotonic() - started < 20
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)
