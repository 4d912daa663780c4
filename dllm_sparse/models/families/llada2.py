"""LLaDA2.0 and LLaDA2.1: block-causal, a dense layer first, then a sigmoid router over groups beside shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family, KeyMap
from dllm_sparse.models.families.llada_moe import EXPERT_KEYS
from dllm_sparse.models.families.llama import LLAMA_FIELDS

LLADA2_KEYS: KeyMap = MappingProxyType(
    {
        "model.word_embeddings.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
        "model.layers.{i}.input_layernorm.weight": "blocks.{i}.attention_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ffn_norm.weight",
        "model.layers.{i}.attention.query_key_value.weight": "blocks.{i}.attention.qkv_proj.weight",
        "model.layers.{i}.attention.query_key_value.bias": "blocks.{i}.attention.qkv_proj.bias",
        "model.layers.{i}.attention.dense.weight": "blocks.{i}.attention.o_proj.weight",
        "model.layers.{i}.attention.dense.bias": "blocks.{i}.attention.o_proj.bias",
        "model.layers.{i}.attention.query_layernorm.weight": "blocks.{i}.attention.q_norm.weight",
        "model.layers.{i}.attention.key_layernorm.weight": "blocks.{i}.attention.k_norm.weight",
        "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.ffn.gate_up_proj.weight#0",
        "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.ffn.gate_up_proj.weight#1",
        "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.ffn.down_proj.weight",
        **EXPERT_KEYS,
        "model.layers.{i}.mlp.gate.expert_bias": "blocks.{i}.ffn.router.bias",
        "model.layers.{i}.mlp.shared_experts.gate_proj.weight": "blocks.{i}.ffn.shared.gate_up_proj.weight#0",
        "model.layers.{i}.mlp.shared_experts.up_proj.weight": "blocks.{i}.ffn.shared.gate_up_proj.weight#1",
        "model.layers.{i}.mlp.shared_experts.down_proj.weight": "blocks.{i}.ffn.shared.down_proj.weight",
    }
)

LLADA2_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        **{name: key for name, key in LLAMA_FIELDS.items() if name != "mlp_bias"},
        "qkv_bias": "use_qkv_bias",
        "output_bias": "use_bias",
        "qk_norm": "use_qk_norm",
        "partial_rotary": "partial_rotary_factor",
        "block_length": "block_size",
        "mask_token_id": "mask_token_id",
    }
)

LLADA2_MIXTURE: Mapping[str, str] = MappingProxyType(
    {
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "shared_experts": "num_shared_experts",
        "dense_layers": "first_k_dense_replace",
        "groups": "n_group",
        "groups_per_token": "topk_group",
        "routed_scaling": "routed_scaling_factor",
    }
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llada2_moe": Family(
            name="LLaDA2.0, LLaDA2.1",
            kind="diffusion",
            fields=LLADA2_FIELDS,
            keys=LLADA2_KEYS,
            mixture=LLADA2_MIXTURE,
            # The official class's own, where a config leaves them out.
            mixture_defaults={
                "router": "sigmoid",
                "expert_bias": True,
                "renormalise": True,
                "groups": 8,
                "groups_per_token": 4,
                "routed_scaling": 2.5,
            },
            fixed={"float32_logits": True},
            defaults={
                "qk_norm": True,
                "partial_rotary": 0.5,
                "block_length": 32,
                "mask_token_id": 156895,
                "eos_token_id": 156892,
                "pad_token_id": 156892,
            },
            must_be={
                "score_function": ("sigmoid", None),
                "moe_router_enable_expert_bias": (True, None),
                "norm_topk_prob": (True, None),
                "norm_head": (False, None),
                "use_sliding_window": (False, None),
            },
            sites="experts as in LLaDA-MoE; the shared ones are one more FFN of their layer; the first layer is dense",
        ),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "llada2.0-mini": Alias("inclusionAI/LLaDA2.0-mini", "llada2_moe", 16.26),
        "llada2.1-mini": Alias("inclusionAI/LLaDA2.1-mini", "llada2_moe", 16.26),
    }
)
