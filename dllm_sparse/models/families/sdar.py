"""SDAR: Qwen3 turned block-causal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family
from dllm_sparse.models.families.llama import LLAMA_FIELDS, LLAMA_KEYS

SDAR_FIELDS: Mapping[str, str] = MappingProxyType(
    {**LLAMA_FIELDS, "mask_token_id": "mask_token_id", "block_length": "block_size"}
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sdar": Family(
            name="SDAR",
            kind="diffusion",
            fields=SDAR_FIELDS,
            keys=LLAMA_KEYS,
            fixed={"qk_norm": True},
            # The chat checkpoints name neither; a config that does wins.
            defaults={"head_dim": 128, "mask_token_id": 151669, "block_length": 4},
            must_be={"use_sliding_window": (False,)},
        ),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "sdar-1.7b-chat": Alias("JetLM/SDAR-1.7B-Chat", "sdar", 1.721),
        "sdar-4b-chat": Alias("JetLM/SDAR-4B-Chat", "sdar", 4.022),
        "sdar-8b-chat": Alias("JetLM/SDAR-8B-Chat", "sdar", 8.191),
    }
)
