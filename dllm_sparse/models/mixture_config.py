"""The experts of a config.json -> MoEConfig, or an error that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from dllm_sparse.models.config import MoEConfig
from dllm_sparse.models.config_values import check_size, check_type, is_whole
from dllm_sparse.models.families import Family
from dllm_sparse.types import CheckpointError

_KINDS = get_type_hints(MoEConfig)
_LEAST = {"experts": 1, "experts_per_token": 1, "expert_width": 1, "groups": 1, "groups_per_token": 1}
_LEAST |= {"shared_experts": 0, "dense_layers": 0}


def read_mixture(raw: dict[str, Any], family: Family, path: Path) -> MoEConfig:
    """The mixture a config describes; raises CheckpointError for what is missing, no number or contradictory."""
    given = {name: raw[key] for name, key in family.mixture.items() if raw.get(key) is not None}
    values = {"groups": 1, "groups_per_token": 1, "shared_experts": 0, "dense_layers": 0, **family.mixture_defaults}
    for name, value in given.items():
        check_type(_KINDS[name], family.mixture[name], value, path)
        values[name] = float(value) if _KINDS[name] is float else value
    for name, least in _LEAST.items():
        check_size(family.mixture.get(name, name), values.get(name), path, least=least)
    moe = MoEConfig(**values)
    choice = moe.experts // moe.groups * moe.groups_per_token
    if moe.experts % moe.groups or moe.groups_per_token > moe.groups or moe.experts_per_token > choice:
        raise CheckpointError(
            f"{path}: {moe.experts_per_token} experts a token cannot be chosen from {moe.groups_per_token} of "
            f"{moe.groups} groups of {moe.experts} experts"
        )
    layers = raw.get(family.fields["layers"])
    if is_whole(layers) and moe.dense_layers > layers:
        raise CheckpointError(
            f"{path}: {family.mixture['dense_layers']} is {moe.dense_layers}, but the model has {layers} layers"
        )
    return moe
