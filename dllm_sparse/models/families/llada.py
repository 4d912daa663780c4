"""LLaDA, LLaDA-1.5 and iLLaDA: a Llama stack under other names, every position seeing every other."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families.family import Alias, Family, KeyMap

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
    }
)

ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "llada-8b": Alias("GSAI-ML/LLaDA-8B-Instruct", "llada", 8.02),
        "llada-8b-base": Alias("GSAI-ML/LLaDA-8B-Base", "llada", 8.02),
        "llada-1.5": Alias("GSAI-ML/LLaDA-1.5", "llada", 8.02),
        "illada-8b": Alias("GSAI-ML/iLLaDA-8B-Instruct", "llada", 7.62),
        "illada-8b-base": Alias("GSAI-ML/iLLaDA-8B-Base", "llada", 7.62),
    }
)
