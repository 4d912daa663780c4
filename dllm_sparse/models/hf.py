"""`wrap` and the transformers engine: any causal LM with a GLU, a plain MLP or packed experts becomes a LanguageModel,
and so does DiffusionGemma.

Safetensors only; no remote code. Native families run in the native engine unless `engine="transformers"` is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import nn

from dllm_sparse.models.config import ACTIVATION_NAMES, Activation, MoEConfig
from dllm_sparse.models.hooked import HookedConfig, HookedTransformer
from dllm_sparse.models.hooked_denoiser import DENOISERS, HookedDenoiser, find_denoiser_ffns
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.layouts import find_ffns
from dllm_sparse.models.tokenizers import tokenizer_reader
from dllm_sparse.types import CheckpointError, UnsupportedArchitecture

DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")
"""Values of `device` that spread a model over the GPUs, and over CPU memory where they are full (accelerate)."""

_DEFAULT_POSITIONS = 2048  # of models without a position limit (ALiBi): their usual training length
_POSITION_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")


def wrap(
    model: Any,
    tokenizer: Any = None,
    name: str | None = None,
    *,
    revision: str | None = None,
    read_tokenizer: Callable[[], Any] | None = None,
) -> LanguageModel:
    """A transformers LM already in memory, on whatever devices, as a LanguageModel; its weights stay its own.

    Works under accelerate (`device_map="auto"`, offloading). Raises UnsupportedArchitecture where no FFN is found.
    """
    text = model.config.get_text_config(decoder=True)
    denoises = model.config.model_type in DENOISERS
    found = _find(model, text)
    model.eval()
    network = (HookedDenoiser if denoises else HookedTransformer)(model, _describe(model, text), found)
    title = name or getattr(model.config, "_name_or_path", "") or text.model_type
    return LanguageModel(
        title,
        "diffusion" if denoises else "autoregressive",
        network.config,
        network,
        tokenizer,
        family=text.model_type,
        revision=revision,
        read_tokenizer=read_tokenizer,
        engine="transformers",
    )


def load_with_transformers(
    name: str, folder: Path, device: torch.device | str, dtype: torch.dtype | None, revision: str | None
) -> LanguageModel:
    """Loads a checkpoint folder through transformers. `device` may be one of DEVICE_MAPS; dtype None is the stored one.

    Raises UnsupportedArchitecture before any weight is read, CheckpointError for missing, extra or unreadable weights.
    """
    from transformers.utils import logging

    config = known_config(folder)
    if config is None:
        raise UnsupportedArchitecture(f"{folder}: transformers knows no causal LM of this kind")
    _check_structure(config, folder)
    place: Any = device if device in DEVICE_MAPS else {"": device}
    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": place, "config": config}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = _class_of(config).from_pretrained(
            str(folder), trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it ({error})") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if wrong := sorted(info["missing_keys"]) or sorted(info["unexpected_keys"]):
        kind = "missing" if info["missing_keys"] else "unexpected"
        raise CheckpointError(f"{folder}: {kind} tensors: {', '.join(wrong[:3])}")
    model.requires_grad_(False)
    reader = tokenizer_reader(folder, "autoregressive")
    return wrap(model, name=name, revision=revision, read_tokenizer=reader)


def known_config(folder: Path) -> Any:
    """transformers' own configuration of a folder, or None where it knows no causal LM or DENOISERS class for it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, KeyError, OSError):
        return None
    return config if _class_of(config) is not None else None


def _class_of(config: Any) -> Any:
    """The class of transformers that runs a configuration as a language model; None where there is none."""
    import transformers

    if title := DENOISERS.get(config.model_type):
        return getattr(transformers, title)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def _find(model: Any, text: Any) -> Any:
    """The FFNs, as the network of this kind of model takes them."""
    if model.config.model_type in DENOISERS:
        return find_denoiser_ffns(model, text)
    return find_ffns(model, text.model_type, text.num_hidden_layers, text.hidden_size)


def _check_structure(config: Any, folder: Path) -> None:
    """Builds the model without memory and looks for its FFNs."""
    with torch.device("meta"):
        empty = _class_of(config)(config)
    try:
        _find(empty, config.get_text_config(decoder=True))
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{folder}: {error}") from None


def _describe(model: Any, text: Any) -> HookedConfig:
    """The facts other parts ask for, in the native config's terms."""
    generation = getattr(model, "generation_config", None)
    eos = _ids(getattr(generation, "eos_token_id", None)) or _ids(getattr(text, "eos_token_id", None))
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    attention = _first_layer(text)
    limits = (getattr(text, name, None) for name in _POSITION_NAMES)
    return HookedConfig(
        vocab_size=int(text.vocab_size),
        width=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(attention, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(attention, "head_dim", None) or text.hidden_size // max(heads, 1)),
        ffn_width=_ffn_width(text),
        max_positions=int(next((limit for limit in limits if limit), _DEFAULT_POSITIONS)),
        causal=model.config.model_type not in DENOISERS,
        activation=_activation(text),
        bos_token_id=next(iter(_ids(getattr(text, "bos_token_id", None))), None),
        eos_token_id=next(iter(eos), None),
        stop_token_ids=tuple(eos[1:]),
        pad_token_id=next(iter(_ids(getattr(text, "pad_token_id", None))), None),
        architecture=type(model).__name__,
        parameter_count=_count(model),
        moe=_mixture(text),
        canvas_length=int(getattr(model.config, "canvas_length", None) or 0),
    )


def _first_layer(text: Any) -> Any:
    """The configuration of the first layer, where layers differ: transformers then refuses to speak for all."""
    own = getattr(text, "per_layer_config", None)
    return own[0] if own else text


def _mixture(text: Any) -> MoEConfig | None:
    """The experts of a transformers config; their router and what lies beside them stay the model's own affair."""
    names = {"experts": ("num_local_experts", "num_experts"), "chosen": ("num_experts_per_tok", "top_k_experts")}
    found = {key: next((v for n in tried if (v := getattr(text, n, None))), 0) for key, tried in names.items()}
    if not found["experts"]:
        return None
    width = _ffn_width(text)
    return MoEConfig(experts=int(found["experts"]), experts_per_token=int(found["chosen"] or 1), expert_width=width)


def _ffn_width(text: Any) -> int:
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    width = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    return int(width or 4 * text.hidden_size)


def _activation(text: Any) -> Activation:
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    name = next((value for key in names if isinstance(value := getattr(text, key, None), str)), "silu")
    name = ACTIVATION_NAMES.get(name, name)
    return name if name in get_args(Activation) else "gelu"  # type: ignore[return-value]


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in (value if isinstance(value, (list, tuple)) else [value]) if int(item) >= 0]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
