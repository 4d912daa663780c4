"""Llama, SmolLM and Mistral; most other families read their config or their tensors by these tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family, KeyMap

LLAMA_KEYS: KeyMap = MappingProxyType(
    {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
        "model.layers.{i}.input_layernorm.weight": "blocks.{i}.attention_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ffn_norm.weight",
        "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.qkv_proj.weight#0",
        "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.qkv_proj.weight#1",
        "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.qkv_proj.weight#2",
        "model.layers.{i}.self_attn.q_proj.bias": "blocks.{i}.attention.qkv_proj.bias#0",
        "model.layers.{i}.self_attn.k_proj.bias": "blocks.{i}.attention.qkv_proj.bias#1",
        "model.layers.{i}.self_attn.v_proj.bias": "blocks.{i}.attention.qkv_proj.bias#2",
        "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.o_proj.weight",
        "model.layers.{i}.self_attn.o_proj.bias": "blocks.{i}.attention.o_proj.bias",
        "model.layers.{i}.self_attn.q_norm.weight": "blocks.{i}.attention.q_norm.weight",
        "model.layers.{i}.self_attn.k_norm.weight": "blocks.{i}.attention.k_norm.weight",
        "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.ffn.gate_up_proj.weight#0",
        "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.ffn.gate_up_proj.weight#1",
        "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.ffn.down_proj.weight",
        "model.layers.{i}.mlp.gate_proj.bias": "blocks.{i}.ffn.gate_up_proj.bias#0",
        "model.layers.{i}.mlp.up_proj.bias": "blocks.{i}.ffn.gate_up_proj.bias#1",
        "model.layers.{i}.mlp.down_proj.bias": "blocks.{i}.ffn.down_proj.bias",
    }
)

LLAMA_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_width": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "tied": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    }
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(name="Llama, SmolLM", kind="autoregressive", fields=LLAMA_FIELDS, keys=LLAMA_KEYS),
        "mistral": Family(name="Mistral", kind="autoregressive", fields=LLAMA_FIELDS, keys=LLAMA_KEYS),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "llama-2-7b": Alias("meta-llama/Llama-2-7b-hf", "llama", 6.74),
        "llama-3.1-8b": Alias("meta-llama/Llama-3.1-8B", "llama", 8.03),
        "llama-3.1-8b-instruct": Alias("meta-llama/Llama-3.1-8B-Instruct", "llama", 8.03),
        "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B", "llama", 1.24),
        "llama-3.2-3b": Alias("meta-llama/Llama-3.2-3B", "llama", 3.21),
        "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M", "llama", 0.1345),
        "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M", "llama", 0.3618),
        "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B", "llama", 1.711),
        "mistral-7b": Alias("mistralai/Mistral-7B-v0.3", "mistral", 7.25),
    }
)
