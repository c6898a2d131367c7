"""
backbones.py: small random checkpoints of the three published architectures, and models, batches and
fast weights of their sizes. Names and shapes of tensors are written out here once more, from the
published code: were they taken from full_scale/, a wrong one would be wrong on both sides.
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
from full_scale.checkpoints import add_outer_lora, on_meta
from full_scale.configs import read_llada_config
from memdlm import Anchor, Memory, init_fast
from model import Fast, Transformer, UserError

TOKENIZER = Path(__file__).parents[1] / "golden" / "checkpoint"
HIDDEN, LAYERS, VOCABULARY, MASK = 32, 3, 576, 525  # [MASK] as in the tokenizer

DENSE = {
    "model_type": "llada",
    "d_model": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 48,
    "embedding_size": VOCABULARY,
    "vocab_size": VOCABULARY - 1,
    "mask_token_id": MASK,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
MIXTURE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000,
}
MOE = MIXTURE | {
    "model_type": "llada",
    "expert_intermediate_size": 16,
    "dense_intermediate_size": 48,
    "moe_layer_freq": [1] * LAYERS,
    "qk_layernorm": True,
}
# All that a LLaDA-MoE may have besides.
RICH = MOE | {
    "moe_layer_freq": [0, 1, 1],
    "shared_expert_intermediate_size": 24,
    "partial_rotary_factor": 0.5,
    "moe_router_enable_expert_bias": True,
}
LLADA2 = MIXTURE | {
    "model_type": "llada2_moe",
    "head_dim": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
}
SETTINGS = {"llada": DENSE, "llada-moe": MOE, "llada-moe, rich": RICH, "llada2": LLADA2}
MIXTURES = [kind for kind in SETTINGS if kind != "llada"]


# ---- checkpoints -----------------------------------------------------------------------------

# Published name -> shape, in the letters of `sizes`. {i} stands for the layer, {x} for the expert.
DENSE_SHAPES = """
model.transformer.wte                    V D
model.transformer.ff_out                 V D
model.transformer.ln_f                   D
model.transformer.blocks.{i}.attn_norm   D
model.transformer.blocks.{i}.ff_norm     D
model.transformer.blocks.{i}.q_proj      D D
model.transformer.blocks.{i}.k_proj      K D
model.transformer.blocks.{i}.v_proj      K D
model.transformer.blocks.{i}.attn_out    D D
model.transformer.blocks.{i}.ff_proj     F D
model.transformer.blocks.{i}.up_proj     F D
model.transformer.blocks.{i}.ff_out      D F
"""
MIXTURE_SHAPES = """
lm_head                                      V D
model.norm                                   D
model.layers.{i}.input_layernorm             D
model.layers.{i}.post_attention_layernorm    D
model.layers.{i}.mlp.gate_proj               F D
model.layers.{i}.mlp.up_proj                 F D
model.layers.{i}.mlp.down_proj               D F
model.layers.{i}.mlp.gate                    X D
model.layers.{i}.mlp.experts.{x}.gate_proj   E D
model.layers.{i}.mlp.experts.{x}.up_proj     E D
model.layers.{i}.mlp.experts.{x}.down_proj   D E
"""
MOE_SHAPES = """
model.embed_tokens                             V D
model.layers.{i}.self_attn.q_proj              D D
model.layers.{i}.self_attn.k_proj              K D
model.layers.{i}.self_attn.v_proj              K D
model.layers.{i}.self_attn.o_proj              D D
model.layers.{i}.self_attn.q_norm              H
model.layers.{i}.self_attn.k_norm              H
model.layers.{i}.mlp.expert_bias               Z
model.layers.{i}.shared_expert.gate_proj       S D
model.layers.{i}.shared_expert.up_proj         S D
model.layers.{i}.shared_expert.down_proj       D S
"""
LLADA2_SHAPES = """
model.word_embeddings                          V D
model.layers.{i}.attention.query_key_value     A D
model.layers.{i}.attention.dense               D D
model.layers.{i}.attention.query_layernorm     H
model.layers.{i}.attention.key_layernorm       H
model.layers.{i}.mlp.gate.expert_bias          Z
model.layers.{i}.mlp.shared_experts.gate_proj  S D
model.layers.{i}.mlp.shared_experts.up_proj    S D
model.layers.{i}.mlp.shared_experts.down_proj  D S
"""


def sizes(c: dict, layer: int) -> dict[str, int]:
    """What the letters stand for in that layer. 0: it has no tensor with this letter."""
    if "d_model" in c:
        keys = c["d_model"] // c["n_heads"] * c["n_kv_heads"]
        return {"V": c["embedding_size"], "D": c["d_model"], "K": keys, "F": c["mlp_hidden_size"]}
    head = c["hidden_size"] // c["num_attention_heads"]
    keys = c["num_key_value_heads"] * head
    found = {"V": c["vocab_size"], "D": c["hidden_size"], "K": keys, "H": head}
    found["A"] = c["hidden_size"] + 2 * keys
    if "moe_layer_freq" in c:
        mixture, dense = c["moe_layer_freq"][layer], c["dense_intermediate_size"]
        expert, shared = c["expert_intermediate_size"], c.get("shared_expert_intermediate_size", 0)
    else:
        mixture, dense = layer >= c["first_k_dense_replace"], c["intermediate_size"]
        expert = shared = c["moe_intermediate_size"]
    if not mixture:
        return found | {"F": dense, "X": 0, "E": 0, "S": 0, "Z": 0}
    biased = c["num_experts"] if c.get("moe_router_enable_expert_bias") else 0
    return found | {"F": 0, "X": c["num_experts"], "E": expert, "S": shared, "Z": biased}


def published_shapes(c: dict) -> dict[str, tuple]:
    """Every tensor of a checkpoint with these settings: name -> shape."""
    table = MIXTURE_SHAPES + (MOE_SHAPES if "moe_layer_freq" in c else LLADA2_SHAPES)
    if "d_model" in c:
        table = DENSE_SHAPES
    shapes, layers = {}, c["n_layers"] if "d_model" in c else c["num_hidden_layers"]
    for line in filter(None, table.splitlines()):
        name, *letters = line.split()
        name += "" if "bias" in name else ".weight"
        for i in range(layers) if "{i}" in name else [0]:
            size = sizes(c, i)
            shape = tuple(size[letter] for letter in letters)
            if 0 not in shape:
                for x in range(size["X"]) if "{x}" in name else [0]:
                    shapes[name.replace("{i}", str(i)).replace("{x}", str(x))] = shape
    return shapes


def random_tensor(name: str, shape: tuple, generator: torch.Generator) -> Tensor:
    """Random, norms and biases too, and so large that every layer changes much."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise if "bias" in name else 1 + 0.2 * noise
    if shape[0] == VOCABULARY and "lm_head" not in name:
        return noise
    return 1.5 * noise * shape[-1] ** -0.5


def random_tensors(settings: dict, seed: int = 0) -> dict[str, Tensor]:
    """Published name -> tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = published_shapes(settings)
    return {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}


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


def write_checkpoint(folder: Path, kind: str, shards: int = 1, seed: int = 0, **changes) -> Path:
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


# ---- models, batches and fast weights without files ------------------------------------------


def toy_model(kind: str, dtype=torch.float64, seed: int = 0, **changes) -> Transformer:
    """A model of the sizes of a key of SETTINGS, in eval mode."""
    config = read_llada_config(SETTINGS[kind] | changes, (), Path("config.json"))
    config.mask_id = MASK
    model = on_meta(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(random_tensor(name, tuple(tensor.shape), generator))
    return model.to(dtype).eval()


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


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
