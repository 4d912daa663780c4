"""A Transformer as a checkpoint folder other programs read: config, keys and tokenizer files of LLaDA or Llama."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from dllm_sparse.files import write_bytes, write_json, write_text
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.families import FAMILIES
from dllm_sparse.models.recorded import write_sums
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.models.weights import expected_slots
from dllm_sparse.types import UnsupportedArchitecture

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What the official classes read besides the fields of the family table; values of LLaDA-8B and of Llama 3.
_LLADA_FACTS: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
    "use_cache": False,
}
_LLAMA_FACTS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "use_cache": True,
}
_FACTS = {"llada": _LLADA_FACTS, "llama": _LLAMA_FACTS}


def export_model(
    transformer: Transformer,
    folder: Path,
    family: str,
    tokenizer: Tokenizer | None = None,
    special_tokens: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes weights, config, tokenizer and SHA256SUMS into `folder`, each file atomically; returns the folder.

    `family` is "llada" or "llama"; `special_tokens` maps bos, eos, pad and mask to their text. A tied head is left out,
    as both official classes expect. Raises UnsupportedArchitecture for what the family cannot hold.
    """
    if family not in _FACTS:
        raise UnsupportedArchitecture(f"cannot write family {family!r}; possible: {', '.join(_FACTS)}")
    config = transformer.config
    if (
        config.qk_norm
        or config.logit_shift
        or config.rope_scaling
        or config.partial_rotary != 1
        or config.block_length is not None
        or config.moe is not None
        or config.causal != (FAMILIES[family].kind == "autoregressive")
    ):
        raise UnsupportedArchitecture(f"the {family} format cannot hold this model: {config}")
    tensors = {}
    for key, value in expected_slots(transformer, FAMILIES[family]):
        if not (config.tied and FAMILIES[family].keys.get(key) == "head.weight"):
            tensors[key] = value.detach().to("cpu", dtype).contiguous().clone()
    files = [write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))]
    files.append(write_json(folder / "config.json", config_json(config, family, dtype)))
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids = {key: value for key, value in ids.items() if value is not None}
    files.append(write_json(folder / "generation_config.json", ids))
    if tokenizer is not None:
        files.append(write_text(folder / "tokenizer.json", tokenizer.to_str()))
        described = _tokenizer_json(config, special_tokens or {})
        files.append(write_json(folder / "tokenizer_config.json", described))
    write_sums(folder, files)
    return folder


def config_json(config: TransformerConfig, family: str, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json as the family's official class writes it."""
    values: dict[str, Any] = {"model_type": family, **_FACTS[family]}
    for name, key in FAMILIES[family].fields.items():
        value = getattr(config, name)
        if value is not None:
            values[key] = value
    if family == "llada":
        values["vocab_size"] = config.vocab_size
        values["mlp_ratio"] = config.ffn_width // config.width
    values["dtype"] = str(dtype).removeprefix("torch.")
    return dict(sorted(values.items()))


def _tokenizer_json(config: TransformerConfig, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    named = {f"{role}_token": text for role, text in special_tokens.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
        **named,
    }
