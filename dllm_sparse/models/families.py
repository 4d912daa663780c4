"""DATA ONLY: the families this package runs natively, and the names people call their checkpoints by.

A family says how its config.json reads and what its tensors are called; adding a dense family is adding a table.
Key maps go from checkpoint name to parameter name. `{i}` is the layer, `{e}` the expert whose weights are `[{e}]` of a
packed parameter; `#k` is the k-th part of a fused one (query, key, value of `qkv_proj`; gate, up of `gate_up_proj`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from dllm_sparse.types import Kind

KeyMap = Mapping[str, str]

LLADA_KEYS: KeyMap = MappingProxyType(
    {
        "model.transformer.wte.weight": "embedding.weight",
        "model.transformer.ln_f.weight": "norm.weight",
        "model.transformer.ff_out.weight": "head.weight",
        "model.transformer.blocks.{i}.q_proj.weight": "blocks.{i}.attention.qkv_proj.weight#0",
        "model.transformer.blocks.{i}.k_proj.weight": "blocks.{i}.attention.qkv_proj.weight#1",
        "model.transformer.blocks.{i}.v_proj.weight": "blocks.{i}.attention.qkv_proj.weight#2",
        "model.transformer.blocks.{i}.q_proj.bias": "blocks.{i}.attention.qkv_proj.bias#0",
        "model.transformer.blocks.{i}.k_proj.bias": "blocks.{i}.attention.qkv_proj.bias#1",
        "model.transformer.blocks.{i}.v_proj.bias": "blocks.{i}.attention.qkv_proj.bias#2",
        "model.transformer.blocks.{i}.attn_out.weight": "blocks.{i}.attention.o_proj.weight",
        "model.transformer.blocks.{i}.attn_norm.weight": "blocks.{i}.attention_norm.weight",
        "model.transformer.blocks.{i}.ff_norm.weight": "blocks.{i}.ffn_norm.weight",
        "model.transformer.blocks.{i}.ff_proj.weight": "blocks.{i}.ffn.gate_up_proj.weight#0",
        "model.transformer.blocks.{i}.up_proj.weight": "blocks.{i}.ffn.gate_up_proj.weight#1",
        "model.transformer.blocks.{i}.ff_out.weight": "blocks.{i}.ffn.down_proj.weight",
    }
)

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

LLADA_MOE_KEYS: KeyMap = MappingProxyType(
    {
        **{key: target for key, target in LLAMA_KEYS.items() if ".mlp." not in key and not key.endswith(".bias")},
        "model.layers.{i}.mlp.gate.weight": "blocks.{i}.ffn.router.weight",
        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "blocks.{i}.ffn.experts.gate_up_proj[{e}]#0",
        "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "blocks.{i}.ffn.experts.gate_up_proj[{e}]#1",
        "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "blocks.{i}.ffn.experts.down_proj[{e}]",
    }
)

LLADA_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "embedding_size",  # rows of the stored matrix; config.vocab_size may be smaller
        "width": "d_model",
        "layers": "n_layers",
        "heads": "n_heads",
        "kv_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "ffn_width": "mlp_hidden_size",
        "max_positions": "max_sequence_length",
        "activation": "activation_type",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "qkv_bias": "include_qkv_bias",
        "output_bias": "include_bias",
        "mlp_bias": "include_bias",
        "tied": "weight_tying",
        "mask_token_id": "mask_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "eot_token_id": "eot_token_id",
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


SDAR_FIELDS: Mapping[str, str] = MappingProxyType(
    {**LLAMA_FIELDS, "mask_token_id": "mask_token_id", "block_length": "block_size"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one `model_type` is read. `fixed` overrides config fields, `must_be` lists the only values supported.

    `mixture` names the config field of each `MoEConfig` field and makes this the family of that type's models with
    experts, `mixture_fixed` the facts a config leaves out. `model_type` is the key in `FAMILIES` where it says nothing.
    `tokenizer` is transformers' class for the folder's files, where the checkpoints name one of their own remote code.
    """

    name: str
    kind: Kind
    fields: Mapping[str, str]
    keys: KeyMap
    model_type: str = ""
    mixture: Mapping[str, str] = field(default_factory=dict)
    mixture_fixed: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tokenizer: str | None = None
    sites: str = "FFN input after the norm; gate, up and intermediate of a GLU"


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llada": Family(
            name="LLaDA",
            kind="diffusion",
            fields=LLADA_FIELDS,
            keys=LLADA_KEYS,
            # Ids the checkpoints' own config leaves out (LLaDA-8B); a config that names them wins.
            defaults={"mask_token_id": 126336, "bos_token_id": 126080, "eot_token_id": 126348},
            must_be={
                "block_type": ("llama",),
                "layer_norm_type": ("rms",),
                "rope": (True,),
                "alibi": (False,),
                "multi_query_attention": (None, False),
                "attention_layer_norm": (False,),
                "input_emb_norm": (False,),
                "scale_logits": (False,),
                "bias_for_layer_norm": (False,),
                "block_group_size": (1,),
            },
        ),
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
            sites="input of every expert after the norm; gate, up and intermediate of its GLU; the router sees x as is",
        ),
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
        "llama": Family(name="Llama, SmolLM", kind="autoregressive", fields=LLAMA_FIELDS, keys=LLAMA_KEYS),
        "mistral": Family(name="Mistral", kind="autoregressive", fields=LLAMA_FIELDS, keys=LLAMA_KEYS),
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

BUNDLED = ("tiny-diffusion", "tiny-ar")


class Alias(NamedTuple):
    """A short name's hub repository, its family key and its parameters in billions (for the memory column)."""

    repository: str
    family: str
    billions: float


ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "llada-8b": Alias("GSAI-ML/LLaDA-8B-Instruct", "llada", 8.02),
        "llada-8b-base": Alias("GSAI-ML/LLaDA-8B-Base", "llada", 8.02),
        "llada-1.5": Alias("GSAI-ML/LLaDA-1.5", "llada", 8.02),
        "llada-moe-7b": Alias("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", "llada_moe", 7.36),
        "llada-moe-7b-base": Alias("inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada_moe", 7.36),
        "illada-8b": Alias("GSAI-ML/iLLaDA-8B-Instruct", "llada", 7.62),
        "illada-8b-base": Alias("GSAI-ML/iLLaDA-8B-Base", "llada", 7.62),
        "dream-7b": Alias("Dream-org/Dream-v0-Instruct-7B", "Dream", 7.616),
        "dream-7b-base": Alias("Dream-org/Dream-v0-Base-7B", "Dream", 7.616),
        "dream-coder-7b": Alias("Dream-org/Dream-Coder-v0-Instruct-7B", "Dream", 7.616),
        "llama-2-7b": Alias("meta-llama/Llama-2-7b-hf", "llama", 6.74),
        "llama-3.1-8b": Alias("meta-llama/Llama-3.1-8B", "llama", 8.03),
        "llama-3.1-8b-instruct": Alias("meta-llama/Llama-3.1-8B-Instruct", "llama", 8.03),
        "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B", "llama", 1.24),
        "llama-3.2-3b": Alias("meta-llama/Llama-3.2-3B", "llama", 3.21),
        "sdar-1.7b-chat": Alias("JetLM/SDAR-1.7B-Chat", "sdar", 1.721),
        "sdar-4b-chat": Alias("JetLM/SDAR-4B-Chat", "sdar", 4.022),
        "sdar-8b-chat": Alias("JetLM/SDAR-8B-Chat", "sdar", 8.191),
        "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M", "llama", 0.1345),
        "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M", "llama", 0.3618),
        "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B", "llama", 1.711),
        "mistral-7b": Alias("mistralai/Mistral-7B-v0.3", "mistral", 7.25),
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
