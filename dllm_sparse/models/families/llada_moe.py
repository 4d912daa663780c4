"""LLaDA-MoE: every FFN is a softmax router over experts; the same `model_type` as LLaDA."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family, KeyMap
from dllm_sparse.models.families.llama import LLAMA_FIELDS, LLAMA_KEYS

EXPERT_KEYS: KeyMap = MappingProxyType(
    {
        "model.layers.{i}.mlp.gate.weight": "blocks.{i}.ffn.router.weight",
        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "blocks.{i}.ffn.experts.gate_up_proj[{e}]#0",
        "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "blocks.{i}.ffn.experts.gate_up_proj[{e}]#1",
        "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "blocks.{i}.ffn.experts.down_proj[{e}]",
    }
)

LLADA_MOE_KEYS: KeyMap = MappingProxyType(
    {
        **{key: target for key, target in LLAMA_KEYS.items() if ".mlp." not in key and not key.endswith(".bias")},
        **EXPERT_KEYS,
    }
)

LLADA_MOE_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        **LLAMA_FIELDS,
        "ffn_width": "dense_intermediate_size",
        "qk_norm": "qk_layernorm",
        "mask_token_id": "mask_token_id",
    }
)

LLADA_MOE_MIXTURE: Mapping[str, str] = MappingProxyType(
    {
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_width": "expert_intermediate_size",
        "renormalise": "norm_topk_prob",
        "routed_scaling": "routed_scaling_factor",
    }
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llada_moe": Family(
            name="LLaDA-MoE",
            kind="diffusion",
            model_type="llada",
            fields=LLADA_MOE_FIELDS,
            keys=LLADA_MOE_KEYS,
            mixture=LLADA_MOE_MIXTURE,
            defaults={"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892},
            must_be={
                "moe_router_score_function": ("softmax", None),
                "moe_router_enable_expert_bias": (False, None),
                "router_num_group": (None, 0, 1),
                "shared_expert_intermediate_size": (None, 0),
                "num_shared_experts": (None, 0),
                "partial_rotary_factor": (1, None),
                "clip_qkv": (None,),
                "attention_bias": (False, None),
            },
        ),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "llada-moe-7b": Alias("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", "llada_moe", 7.36),
        "llada-moe-7b-base": Alias("inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada_moe", 7.36),
    }
)
