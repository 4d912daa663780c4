"""DATA ONLY: the families this package runs natively, and the names people call their checkpoints by.

A family is one file here with its tables: `FAMILIES` by `model_type` and `ALIASES`. Adding one is adding a file and
naming it below.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dllm_sparse.models.families import dream, llada, llada2, llada_moe, llama, qwen, sdar
from dllm_sparse.models.families.family import Alias, Family, KeyMap

__all__ = ["ALIASES", "BUNDLED", "FAMILIES", "Alias", "Family", "KeyMap"]

_FILES = (llada, llada_moe, llada2, dream, sdar, llama, qwen)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {key: family for file in _FILES for key, family in file.FAMILIES.items()}
)
ALIASES: Mapping[str, Alias] = MappingProxyType(
    {name: alias for file in _FILES for name, alias in file.ALIASES.items()}
)

BUNDLED = ("tiny-diffusion", "tiny-ar")
