"""`--block-length`: models and rules with blocks of their own must not replace, unsaid, one that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_sparse.types import UsageError

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig


def block_length_or_default(asked: int | None) -> int:
    """What was asked for, in tokens, else the sampler's default."""
    from dllm_sparse.samplers.config import SamplerConfig

    return SamplerConfig().block_length if asked is None else asked


def fit(lm: LanguageModel, sampler: SamplerConfig, asked: int | None) -> SamplerConfig:
    """The options as this model takes them; `asked` is the --block-length that was given.

    Raises UsageError for what the model cannot decode, and where its blocks are not those that were asked for: the
    sampler alone cannot tell its default, which gives way, from the same number on purpose.
    """
    from dllm_sparse.samplers.loops import fitted

    own = fitted(lm, sampler)
    if asked is not None and asked != own.block_length:
        raise UsageError(
            f"--block-length is {asked}, but {lm.name} decodes in blocks of {own.block_length} tokens here; "
            "leave --block-length out"
        )
    return own
