"""What `sparsify` would refuse, refused before hours are spent on what comes first."""

from __future__ import annotations

from collections.abc import Iterable

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.moe import check_listener
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.sparsifier import Sparsifier


def check_masks(lm: LanguageModel, configs: Iterable[SparsityConfig]) -> None:
    """Raises UsageError for masks that this model's FFNs cannot take, BackendUnavailable for a backend."""
    for config in configs:
        handle = Sparsifier(lm, config)
        if lm.config.experts:
            check_listener(handle)
