"""Tiny random checkpoints in the key layout and with the config.json of the published ones.

Tensors are written here key by key, from the published layouts and not from the package's own key maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json and tensors."""

SPECIAL = {"eos_token_id": 249, "pad_token_id": 249}
"""As in the golden checkpoints: vocabulary 256, mask 250."""


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Normal weights that keep values near 1; norms near ones, biases near zeros; nothing is tested on constants."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
        tensors[key] = values * scale + (1.0 if "norm" in key else 0.0)
    return tensors


def frame_shapes(config: Mapping[str, Any], embedding: str = "embed_tokens") -> dict[str, tuple[int, ...]]:
    """What lies around the layers: embedding, last norm, head."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    return {
        f"model.{embedding}.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }


def norm_shapes(root: str, width: int) -> dict[str, tuple[int, ...]]:
    """The two norms of one layer."""
    return {f"{root}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}


def glu_shapes(prefix: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The three projections of one GLU."""
    return {
        f"{prefix}.gate_proj.weight": (inner, width),
        f"{prefix}.up_proj.weight": (inner, width),
        f"{prefix}.down_proj.weight": (width, inner),
    }


def llada_moe(**changes: Any) -> Checkpoint:
    """LLaDA-MoE: 2 layers, 6 experts of which a token sees 2, softmax router, per-head norms of queries and keys."""
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 24,
        "dense_intermediate_size": 48,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [1, 1],
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": None,
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "qk_layernorm": True,
        "partial_rotary_factor": 1,
        "rope_theta": 50000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "vocab_size": 256,
        "mask_token_id": 250,
        "torch_dtype": "bfloat16",
        **SPECIAL,
        **changes,
    }
    width, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    shapes = frame_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}"
        shapes |= norm_shapes(root, width)
        shapes |= {f"{root}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{root}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes[f"{root}.mlp.gate.weight"] = (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            shapes |= glu_shapes(f"{root}.mlp.experts.{expert}", width, config["expert_intermediate_size"])
    return config, random_tensors(shapes)


def llada2(**changes: Any) -> Checkpoint:
    """LLaDA2: a dense layer, then 2 with 8 experts in 4 groups, of which a token sees 3 from 2 groups and a shared one.

    Heads are wider than the width divided by their number; half of their features are rotated.
    """
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "output_router_logits": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "norm_head": False,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 3,
        "tie_word_embeddings": False,
        "vocab_size": 256,
        "mask_token_id": 250,
        "torch_dtype": "bfloat16",
        **SPECIAL,
        **changes,
    }
    return config, random_tensors(llada2_shapes(config))


def llada2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaDA2 checkpoint."""
    width, head, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    shapes = frame_shapes(config, "word_embeddings")
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}"
        shapes |= norm_shapes(root, width)
        shapes |= {f"{root}.attention.{name}_layernorm.weight": (head,) for name in ("query", "key")}
        shapes[f"{root}.attention.query_key_value.weight"] = ((heads + 2 * config["num_key_value_heads"]) * head, width)
        shapes[f"{root}.attention.dense.weight"] = (width, heads * head)
        if layer < config["first_k_dense_replace"]:
            shapes |= glu_shapes(f"{root}.mlp", width, config["intermediate_size"])
            continue
        shapes[f"{root}.mlp.gate.weight"] = (config["num_experts"], width)
        shapes[f"{root}.mlp.gate.expert_bias"] = (config["num_experts"],)
        inner = config["moe_intermediate_size"]
        if config["num_shared_experts"]:
            shapes |= glu_shapes(f"{root}.mlp.shared_experts", width, inner * config["num_shared_experts"])
        for expert in range(config["num_experts"]):
            shapes |= glu_shapes(f"{root}.mlp.experts.{expert}", width, inner)
    return shapes


def sdar(**changes: Any) -> Checkpoint:
    """SDAR: Qwen3's layout, 2 layers, blocks of 4; heads are wider than the width divided by their number."""
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "max_position_embeddings": 256,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": 256,
        "mask_token_id": 250,
        "torch_dtype": "bfloat16",
        **SPECIAL,
        **changes,
    }
    shapes = qwen3_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        shapes |= glu_shapes(f"model.layers.{layer}.mlp", config["hidden_size"], config["intermediate_size"])
    return config, random_tensors(shapes)


def sdar_moe(**changes: Any) -> Checkpoint:
    """SDAR with experts: Qwen3-MoE's layout, 6 experts of which a token sees 2, their weights renormalised."""
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    layers = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    config = {**sdar()[0], "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", **experts, **layers}
    config |= changes
    shapes, width = qwen3_shapes(config), config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}.mlp"
        shapes[f"{root}.gate.weight"] = (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            shapes |= glu_shapes(f"{root}.experts.{expert}", width, config["moe_intermediate_size"])
    return config, random_tensors(shapes)


def qwen3_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """All tensors of Qwen3's layout but those of its FFNs."""
    width, head = config["hidden_size"], config["head_dim"]
    rows = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    shapes = frame_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}"
        shapes |= norm_shapes(root, width)
        shapes |= {f"{root}.self_attn.{name}_proj.weight": (heads * head, width) for name, heads in rows.items()}
        shapes[f"{root}.self_attn.o_proj.weight"] = (width, rows["q"] * head)
        shapes |= {f"{root}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
    return shapes
