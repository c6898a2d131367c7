"""Toy checkpoints of the three families, in the published layout: config.json, safetensors, and the tokenizer of tests/golden.

The names and shapes of the tensors are written out here once more, from the published code: were they taken from model.py, a
wrong name there would be wrong on both sides."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import data
from memdlm import Anchor, Memory, init_fast
from model import Config, Fast, Transformer, add_outer_lora, on_meta, read_llada_config

TOKENIZER = Path(__file__).parent / "golden" / "checkpoint"
HIDDEN, LAYERS, VOCABULARY, MASK = 32, 3, 576, 525  # [MASK] as in the tokenizer

DENSE = {"model_type": "llada", "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48}
DENSE |= {"embedding_size": VOCABULARY, "vocab_size": VOCABULARY - 1, "mask_token_id": MASK, "rope_theta": 500_000.0}
DENSE |= {"rms_norm_eps": 1e-5, "activation_type": "silu", "block_type": "llama", "block_group_size": 1, "clip_qkv": None}
DENSE |= {"layer_norm_type": "rms", "layer_norm_with_affine": True, "rope": True, "rope_full_precision": True}
DENSE |= dict.fromkeys(("alibi", "weight_tying", "include_bias", "include_qkv_bias", "input_emb_norm", "scale_logits"), False)

SHARED = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
SHARED |= {"vocab_size": VOCABULARY, "num_experts_per_tok": 2, "hidden_act": "silu", "rope_scaling": None}
SHARED |= {"tie_word_embeddings": False}

MOE = SHARED | {"model_type": "llada", "num_experts": 8, "expert_intermediate_size": 16, "dense_intermediate_size": 48}
MOE |= {"moe_layer_freq": [1] * LAYERS, "qk_layernorm": True, "rms_norm_eps": 1e-5, "rope_theta": 50_000}
MOE |= {"partial_rotary_factor": 1, "shared_expert_intermediate_size": None, "moe_router_enable_expert_bias": False}
MOE |= {"norm_topk_prob": False, "moe_router_score_function": "softmax", "routed_scaling_factor": 1, "clip_qkv": None}
MOE |= {"router_num_group": None, "router_topk_group": None, "attention_bias": False}
# All that a LLaDA-MoE may have besides: a dense layer, a shared expert, a router bias, RoPE on half of each head.
RICH = MOE | {"moe_layer_freq": [0] + [1] * (LAYERS - 1), "shared_expert_intermediate_size": 24, "partial_rotary_factor": 0.5}
RICH |= {"moe_router_enable_expert_bias": True}

LLADA2 = SHARED | {"model_type": "llada2_moe", "num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 48}
LLADA2 |= {"first_k_dense_replace": 1, "num_shared_experts": 1, "use_qk_norm": True, "head_dim": 8, "rms_norm_eps": 1e-6}
LLADA2 |= {"partial_rotary_factor": 0.5, "rotary_dim": 4, "rope_theta": 600_000, "n_group": 4, "topk_group": 2}
LLADA2 |= {"score_function": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "router_dtype": "fp32"}
LLADA2 |= {"moe_router_enable_expert_bias": True, "use_rmsnorm": True, "use_bias": False, "use_qkv_bias": False}

SETTINGS = {"llada": DENSE, "llada-moe": MOE, "llada-moe, rich": RICH, "llada2": LLADA2}
MIXTURES = [kind for kind in SETTINGS if kind != "llada"]


def feed_forward(prefix: str, ffn: int, hidden: int) -> dict[str, tuple]:
    """gate_proj, up_proj and down_proj of one network."""
    shapes = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    return {f"{prefix}.{part}.weight": shape for part, shape in shapes.items()}


def dense_shapes(c: dict) -> dict[str, tuple]:
    """LLaDA-8B: the head is called ff_out, and so is one matrix of every block."""
    hidden, ffn, vocabulary = c["d_model"], c["mlp_hidden_size"], c["embedding_size"]
    kv = hidden // c["n_heads"] * c["n_kv_heads"]
    shapes = {f"model.transformer.{name}.weight": (vocabulary, hidden) for name in ("wte", "ff_out")}
    shapes["model.transformer.ln_f.weight"] = (hidden,)
    parts = {"attn_norm": (hidden,), "ff_norm": (hidden,), "q_proj": (hidden, hidden), "k_proj": (kv, hidden)}
    parts |= {"v_proj": (kv, hidden), "attn_out": (hidden, hidden), "ff_proj": (ffn, hidden), "up_proj": (ffn, hidden)}
    parts |= {"ff_out": (hidden, ffn)}
    blocks = range(c["n_layers"])
    return shapes | {f"model.transformer.blocks.{i}.{name}.weight": shape for i in blocks for name, shape in parts.items()}


def mixture_shapes(c: dict) -> dict[str, tuple]:
    """LLaDA-MoE and LLaDA2."""
    hidden, heads, kv_heads, new = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], "n_group" in c
    size = c.get("head_dim") or hidden // heads
    embedding = "model.word_embeddings" if new else "model.embed_tokens"
    shapes = {f"{name}.weight": (c["vocab_size"], hidden) for name in (embedding, "lm_head")} | {"model.norm.weight": (hidden,)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        if new:
            parts = {"query_key_value": ((heads + 2 * kv_heads) * size, hidden), "dense": (hidden, heads * size)}
            parts |= {"query_layernorm": (size,), "key_layernorm": (size,)}
            shapes |= {f"{layer}.attention.{name}.weight": shape for name, shape in parts.items()}
            dense, ffn, expert = i < c["first_k_dense_replace"], c["intermediate_size"], c["moe_intermediate_size"]
            shared, shared_name, bias = c["num_shared_experts"] * expert, "mlp.shared_experts", "mlp.gate.expert_bias"
        else:
            parts = {"q_proj": (heads * size, hidden), "k_proj": (kv_heads * size, hidden), "v_proj": (kv_heads * size, hidden)}
            parts |= {"o_proj": (hidden, heads * size), "q_norm": (size,), "k_norm": (size,)}
            shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in parts.items()}
            dense, ffn, expert = not c["moe_layer_freq"][i], c["dense_intermediate_size"], c["expert_intermediate_size"]
            shared, shared_name, bias = c["shared_expert_intermediate_size"], "shared_expert", "mlp.expert_bias"
        if dense:
            shapes |= feed_forward(f"{layer}.mlp", ffn, hidden)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (c["num_experts"], hidden)
        for x in range(c["num_experts"]):
            shapes |= feed_forward(f"{layer}.mlp.experts.{x}", expert, hidden)
        shapes |= feed_forward(f"{layer}.{shared_name}", shared, hidden) if shared else {}
        shapes |= {f"{layer}.{bias}": (c["num_experts"],)} if c["moe_router_enable_expert_bias"] else {}
    return shapes


def published_shapes(settings: dict) -> dict[str, tuple]:
    return (dense_shapes if "d_model" in settings else mixture_shapes)(settings)


def random_tensor(name: str, shape: tuple, generator: torch.Generator) -> Tensor:
    """Random everywhere, norms and biases too, and large enough that no layer is a small correction of the one before."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise if "bias" in name else 1 + 0.2 * noise
    return noise if shape[0] == VOCABULARY and "lm_head" not in name else 1.5 * noise * shape[-1] ** -0.5


def random_tensors(settings: dict, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, generator) for name, shape in published_shapes(settings).items()}


def cut(tensors: dict[str, Tensor], shards: int) -> list[dict[str, Tensor]]:
    """In pieces of about equal size; a stack's experts end up in different files."""
    names = sorted(tensors, key=lambda name: (len(name), name))
    return [{name: tensors[name] for name in names[i::shards]} for i in range(shards)]


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or numbered files and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i, part in enumerate(cut(tensors, shards), 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_checkpoint(folder: Path, kind: str, shards: int = 1, seed: int = 0, **changes) -> Path:
    """A whole checkpoint; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[kind] | changes
    (folder / "config.json").write_text(json.dumps(settings))
    write_tensors(folder, random_tensors(settings, seed), shards)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


def toy_config(kind: str, **changes) -> Config:
    config = read_llada_config(SETTINGS[kind] | changes, (), Path("config.json"))
    config.mask_id = MASK
    return config


def toy_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> Transformer:
    """The same sizes without files, in eval mode."""
    model, generator = on_meta(toy_config(kind, **changes)).to_empty(device="cpu"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(random_tensor(name, tuple(tensor.shape), generator))
    return model.to(dtype).eval()


def add_random_lora(model: Transformer, rank: int = 4, dropout: float = 0.0, seed: int = 5) -> Transformer:
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
    noise = {name: 0.2 * torch.randn(B.shape, generator=generator).to(B) for name, (_, B) in fast.weights.items()}
    return Fast({name: (A, noise[name]) for name, (A, _) in fast.weights.items()}, fast.scale)


def toy_batch(rows: int = 4, length: int = 12, seed: int = 1) -> tuple[data.Batch, Anchor]:
    """Rows with prompts of 2, 3, ... tokens, and an anchor that masks at least one token of each."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, MASK, (rows, length), generator=generator)
    maskable = torch.arange(length)[None] >= torch.arange(2, 2 + rows)[:, None]
    masked = (torch.rand(x0.shape, generator=generator) < 0.4) & maskable
    masked[:, -1] = True
    return data.Batch(x0, maskable, None), Anchor(torch.linspace(0.2, 0.7, rows), masked)


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
