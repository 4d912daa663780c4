"""DATA ONLY: the architectures of public checkpoints, to measure speed with random weights where no weights are.

Facts of each checkpoint's config.json; the parameter counts agree with `families.ALIASES` (tested).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.config import MoEConfig, RopeScaling, TransformerConfig
from dllm_sparse.types import UsageError

SHAPES: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        "llada-8b": TransformerConfig(
            vocab_size=126464,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=32,
            head_dim=128,
            ffn_width=12288,
            max_positions=4096,
            causal=False,
            rope_theta=500000.0,
            mask_token_id=126336,
            bos_token_id=126080,
            eos_token_id=126081,
            eot_token_id=126348,
            pad_token_id=126081,
        ),
        "llada-moe-7b": TransformerConfig(
            vocab_size=157184,
            width=2048,
            layers=16,
            heads=16,
            kv_heads=16,
            head_dim=128,
            ffn_width=8192,
            max_positions=8192,
            causal=False,
            rope_theta=50000.0,
            qk_norm=True,
            moe=MoEConfig(experts=64, experts_per_token=8, expert_width=1024),
            mask_token_id=156895,
            eos_token_id=156892,
            pad_token_id=156892,
        ),
        "dream-7b": TransformerConfig(
            vocab_size=152064,
            width=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            head_dim=128,
            ffn_width=18944,
            max_positions=131072,
            causal=False,
            norm_eps=1e-6,
            rope_theta=1000000.0,
            qkv_bias=True,
            logit_shift=1,
            text_positions=True,
            mask_token_id=151666,
            bos_token_id=151665,
            eos_token_id=151643,
            pad_token_id=151643,
        ),
        "llama-3.1-8b": TransformerConfig(
            vocab_size=128256,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            ffn_width=14336,
            max_positions=131072,
            causal=True,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=8.0),
            bos_token_id=128000,
            eos_token_id=128001,
        ),
        "llama-3.2-1b": TransformerConfig(
            vocab_size=128256,
            width=2048,
            layers=16,
            heads=32,
            kv_heads=8,
            head_dim=64,
            ffn_width=8192,
            max_positions=131072,
            causal=True,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=32.0),
            tied=True,
            bos_token_id=128000,
            eos_token_id=128001,
        ),
        "qwen2.5-7b": TransformerConfig(
            vocab_size=152064,
            width=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            head_dim=128,
            ffn_width=18944,
            max_positions=131072,
            causal=True,
            norm_eps=1e-6,
            rope_theta=1000000.0,
            qkv_bias=True,
            bos_token_id=151643,
            eos_token_id=151643,
        ),
        "qwen3-8b": TransformerConfig(
            vocab_size=151936,
            width=4096,
            layers=36,
            heads=32,
            kv_heads=8,
            head_dim=128,
            ffn_width=12288,
            max_positions=40960,
            causal=True,
            norm_eps=1e-6,
            rope_theta=1000000.0,
            qk_norm=True,
            bos_token_id=151643,
            eos_token_id=151645,
        ),
        "smollm2-135m": TransformerConfig(
            vocab_size=49152,
            width=576,
            layers=30,
            heads=9,
            kv_heads=3,
            head_dim=64,
            ffn_width=1536,
            max_positions=8192,
            causal=True,
            rope_theta=100000.0,
            tied=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    }
)


def shape_config(name: str) -> TransformerConfig:
    """The architecture of a public checkpoint; raises UsageError for an unknown one."""
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]
