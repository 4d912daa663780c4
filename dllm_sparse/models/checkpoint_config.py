"""config.json of a checkpoint -> Family and TransformerConfig, or an error that names the field."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from dllm_sparse.models.config import ACTIVATION_NAMES, Activation, RopeScaling, TransformerConfig
from dllm_sparse.models.config_values import LARGEST, check_size, check_type
from dllm_sparse.models.families import FAMILIES, Family
from dllm_sparse.models.mixture_config import read_mixture
from dllm_sparse.types import CheckpointError, UnsupportedArchitecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""By their names in configs and options."""

_KINDS = get_type_hints(TransformerConfig)


def read_config(folder: Path) -> tuple[Family, TransformerConfig, torch.dtype]:
    """The family, the architecture and the stored dtype of a checkpoint folder.

    Raises CheckpointError for an unreadable or contradictory config, UnsupportedArchitecture for another family.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    family = family_of(raw, path)
    for name, allowed in family.must_be.items():
        if name in raw and raw[name] not in allowed:
            raise UnsupportedArchitecture(f"{path}: {name} is {raw[name]!r}; only {allowed[0]!r} is supported")
    values = {name: raw[key] for name, key in family.fields.items() if raw.get(key) is not None}
    if family.mixture:
        values["moe"] = read_mixture(raw, family, path)
    generation = folder / "generation_config.json"
    if generation.exists():
        ids = _read_json(generation)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if ids.get(name) is not None:
                values[name] = ids[name]
    values = {**values, **family.fixed}
    _complete(values, raw, family, path)
    try:
        config = TransformerConfig(causal=family.kind == "autoregressive", **values)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return family, config, _stored_dtype(raw, path)


def _stored_dtype(raw: dict[str, Any], path: Path) -> torch.dtype:
    """The type the checkpoint was saved in; bfloat16 where its config says nothing (LLaDA's)."""
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    name = raw.get(key)
    known = DTYPES.get(str(name).removeprefix("torch."))
    if name is not None and known is None:
        raise CheckpointError(f"{path}: {key} is {name!r}; expected {', '.join(DTYPES)}, or none for bfloat16")
    return known or torch.bfloat16


def family_of(raw: dict[str, Any], path: Path) -> Family:
    """The family of a config.json's content. A mixture of experts is not a dense family, whatever its model_type."""
    model_type = str(raw.get("model_type", ""))
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else model_type or "unknown"
    experts = raw.get("num_experts") or raw.get("num_local_experts") or raw.get("n_routed_experts")
    for key, family in FAMILIES.items():
        if model_type == (family.model_type or key) and bool(experts) == bool(family.mixture):
            return family
    known = ", ".join(f"{family.name} ({family.model_type or key})" for key, family in FAMILIES.items())
    detail = " with experts" if experts else ""
    raise UnsupportedArchitecture(f"{path}: {architecture} (model_type {model_type!r}){detail}; supported: {known}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _complete(values: dict[str, Any], raw: dict[str, Any], family: Family, path: Path) -> None:
    """Fills what a config may leave out and turns every field into the type TransformerConfig has."""
    values.setdefault("vocab_size", raw.get("vocab_size"))
    _token_lists(values)
    _rope(values, raw, family, path)
    for name, value in values.items():
        check_type(_KINDS[name], family.fields.get(name, name), value, path)
        values[name] = float(value) if _KINDS[name] is float else value
    for name in ("vocab_size", "width", "layers", "heads", "ffn_width", "max_positions"):
        check_size(family.fields[name], values.get(name), path)
    values.setdefault("kv_heads", values["heads"])
    for name, default in family.defaults.items():
        if not name.endswith("_token_id") or default < values["vocab_size"]:
            values.setdefault(name, default)
    values.setdefault("head_dim", values["width"] // values["heads"])
    _check_heads(values, family, path)
    if values.get("block_length") is not None:
        check_size(family.fields["block_length"], values["block_length"], path)
    activation = ACTIVATION_NAMES.get(values.get("activation", "silu"), values.get("activation", "silu"))
    if activation not in get_args(Activation):
        raise UnsupportedArchitecture(
            f"{path}: activation {activation!r}; supported: {', '.join(get_args(Activation))}"
        )
    values["activation"] = activation
    window = raw.get("sliding_window")
    if window and raw.get("use_sliding_window", True):
        check_size("sliding_window", window, path)
        values["max_positions"] = min(values["max_positions"], window)
    _token_ids(values, family, path)


def _check_heads(values: dict[str, Any], family: Family, path: Path) -> None:
    """Sizes of heads, how many of them share keys and values, and what positions rotate."""
    for name in ("kv_heads", "head_dim"):
        check_size(family.fields[name], values[name], path)
    heads, kv_heads, features = values["heads"], values["kv_heads"], values["head_dim"]
    if features % 2 or heads * features > LARGEST:
        raise CheckpointError(f"{path}: {heads} heads of {features} features; expected an even size")
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} heads cannot share {kv_heads} key/value heads")
    share = values.get("partial_rotary", 1.0)
    rotated = int(features * min(share, 2.0))
    if rotated % 2 or not 2 <= rotated <= features:
        raise CheckpointError(
            f"{path}: {family.fields['partial_rotary']} is {share}; of the {features} features of a head it must "
            "rotate an even number, at least 2"
        )


def _rope(values: dict[str, Any], raw: dict[str, Any], family: Family, path: Path) -> None:
    """rope_theta and scaling from `rope_theta` + `rope_scaling` or from transformers 5's `rope_parameters`."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{path}: rope scaling is {scaling!r}; expected a JSON object")
    if "rope_theta" in scaling:
        values["rope_theta"] = scaling["rope_theta"]
    if "partial_rotary" in family.fields and "partial_rotary_factor" in scaling:
        values["partial_rotary"] = scaling["partial_rotary_factor"]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return
    if kind not in ("linear", "llama3"):  # yarn, dynamic, longrope
        raise UnsupportedArchitecture(f"{path}: rope scaling {kind!r}; supported: default, linear, llama3")
    try:
        values["rope_scaling"] = RopeScaling(
            kind="linear" if kind == "linear" else "llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            original_max_positions=int(scaling.get("original_max_position_embeddings", 8192)),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: rope scaling {scaling!r} is incomplete ({error!r})") from error
    numbers = [value for value in asdict(values["rope_scaling"]).values() if not isinstance(value, str)]
    if not all(0 < value <= LARGEST for value in numbers):
        raise CheckpointError(f"{path}: rope scaling {scaling!r}; expected positive numbers up to {LARGEST}")


def _token_lists(values: dict[str, Any]) -> None:
    """Several ends of text: the first is the end-of-text token, the others stop, too."""
    eos = values.get("eos_token_id")
    if isinstance(eos, list):
        values["eos_token_id"] = eos[0] if eos else None
        values["stop_token_ids"] = tuple(eos[1:])


def _token_ids(values: dict[str, Any], family: Family, path: Path) -> None:
    for name in [name for name in values if name.endswith("_token_id")]:
        value = values[name]
        # Llama writes pad_token_id -1 or null for "none".
        if value is not None and not 0 <= value < values["vocab_size"]:
            if name == "mask_token_id":
                raise CheckpointError(
                    f"{path}: mask_token_id {value} is outside the vocabulary of {values['vocab_size']}"
                )
            values[name] = None
    if family.kind == "diffusion" and values.get("mask_token_id") is None:
        raise CheckpointError(f"{path}: a {family.name} checkpoint must name its mask_token_id")
