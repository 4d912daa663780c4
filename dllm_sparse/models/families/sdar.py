"""SDAR: Qwen3 and Qwen3-MoE turned block-causal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dllm_sparse.models.families.family import Alias, Family
from dllm_sparse.models.families.llada_moe import LLADA_MOE_KEYS
from dllm_sparse.models.families.llama import LLAMA_FIELDS, LLAMA_KEYS

SDAR_FIELDS: Mapping[str, str] = MappingProxyType(
    {**LLAMA_FIELDS, "mask_token_id": "mask_token_id", "block_length": "block_size"}
)

# The chat checkpoints' configs name neither mask nor block; a config that does wins.
SDAR_DEFAULTS: Mapping[str, Any] = MappingProxyType({"head_dim": 128, "mask_token_id": 151669, "block_length": 4})

SDAR_MIXTURE: Mapping[str, str] = MappingProxyType(
    {
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "renormalise": "norm_topk_prob",
    }
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sdar": Family(
            name="SDAR",
            kind="diffusion",
            fields=SDAR_FIELDS,
            keys=LLAMA_KEYS,
            fixed={"qk_norm": True},
            defaults=SDAR_DEFAULTS,
            must_be={"use_sliding_window": (False,)},
        ),
        "sdar_moe": Family(
            name="SDAR-MoE",
            kind="diffusion",
            fields=SDAR_FIELDS,
            keys=LLADA_MOE_KEYS,
            mixture=SDAR_MIXTURE,
            fixed={"qk_norm": True},
            defaults=SDAR_DEFAULTS,
            must_be={
                "use_sliding_window": (False,),
                "attention_bias": (False, None),
                "decoder_sparse_step": (1, None),
                "mlp_only_layers": ([], None),
            },
        ),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "sdar-1.7b-chat": Alias("JetLM/SDAR-1.7B-Chat", "sdar", 1.721),
        "sdar-4b-chat": Alias("JetLM/SDAR-4B-Chat", "sdar", 4.022),
        "sdar-8b-chat": Alias("JetLM/SDAR-8B-Chat", "sdar", 8.191),
        "sdar-30b-a3b-chat": Alias("JetLM/SDAR-30B-A3B-Chat", "sdar_moe", 30.53),
    }
)
