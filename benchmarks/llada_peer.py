"""Builds the LLaDA model class of another project's `modeling_llada.py` around our weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peers import import_from, share_weights

import dllm_sparse as ds
from dllm_sparse.models.families.llada import LLADA_FIELDS

_FACTS = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "flash_attention": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "include_qkv_bias": False,
}
"""What every LLaDA checkpoint's config says and ours need not."""


def llada_peer(lm: ds.LanguageModel, folder: Path) -> torch.nn.Module:
    """`folder` holds modeling_llada.py and configuration_llada.py: a checkpoint's folder or a checkout's."""
    modeling = import_from(folder, "modeling_llada", "llada_peer_model")
    own = lm.config.to_dict()
    values: dict[str, Any] = {key: own[field] for field, key in LLADA_FIELDS.items() if key != "head_dim"}
    values |= {**_FACTS, "vocab_size": lm.config.vocab_size, "mlp_ratio": 4}
    values["init_device"] = "meta"
    config = modeling.LLaDAConfig(**values)
    config.use_cache = False  # newer versions of transformers drop the argument, which the model reads
    return share_weights(lm, "llada", lambda: modeling.LLaDAModelLM(config, init_params=False))
