"""Qwen2, Qwen2.5 and Qwen3: Llama with biased or normalised queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family
from dllm_sparse.models.families.llama import LLAMA_FIELDS, LLAMA_KEYS

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2": Family(
            name="Qwen2, Qwen2.5",
            kind="autoregressive",
            fields=LLAMA_FIELDS,
            keys=LLAMA_KEYS,
            fixed={"qkv_bias": True, "output_bias": False},
            must_be={"use_sliding_window": (False,)},
        ),
        "qwen3": Family(
            name="Qwen3",
            kind="autoregressive",
            fields=LLAMA_FIELDS,
            keys=LLAMA_KEYS,
            fixed={"qk_norm": True},
            defaults={"head_dim": 128},
            must_be={"use_sliding_window": (False,)},
        ),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B", "qwen2", 0.494),
        "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B", "qwen2", 1.544),
        "qwen2.5-3b": Alias("Qwen/Qwen2.5-3B", "qwen2", 3.086),
        "qwen2.5-7b": Alias("Qwen/Qwen2.5-7B", "qwen2", 7.616),
        "qwen2.5-7b-instruct": Alias("Qwen/Qwen2.5-7B-Instruct", "qwen2", 7.616),
        "qwen2.5-14b": Alias("Qwen/Qwen2.5-14B", "qwen2", 14.77),
        "qwen2.5-32b": Alias("Qwen/Qwen2.5-32B", "qwen2", 32.76),
        "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "qwen3", 0.596),
        "qwen3-4b": Alias("Qwen/Qwen3-4B", "qwen3", 4.022),
        "qwen3-8b": Alias("Qwen/Qwen3-8B", "qwen3", 8.191),
    }
)
