"""Dream: Qwen2.5 turned bidirectional, position i predicting token i+1."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family
from dllm_sparse.models.families.llama import LLAMA_FIELDS, LLAMA_KEYS

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "Dream": Family(
            name="Dream",
            kind="diffusion",
            fields={**LLAMA_FIELDS, "mask_token_id": "mask_token_id"},
            keys=LLAMA_KEYS,
            fixed={"qkv_bias": True, "output_bias": False, "logit_shift": 1, "text_positions": True},
            defaults={"mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 151643},
            must_be={"use_sliding_window": (False,)},
            tokenizer="Qwen2Tokenizer",
        ),
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "dream-7b": Alias("Dream-org/Dream-v0-Instruct-7B", "Dream", 7.616),
        "dream-7b-base": Alias("Dream-org/Dream-v0-Base-7B", "Dream", 7.616),
        "dream-coder-7b": Alias("Dream-org/Dream-Coder-v0-Instruct-7B", "Dream", 7.616),
    }
)
