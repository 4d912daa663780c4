"""Which loop decodes which kind of model, and its sampler options as that loop takes them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers import uniform_noise
from dllm_sparse.samplers.autoregressive import decode
from dllm_sparse.samplers.block_diffusion import denoise_blocks
from dllm_sparse.samplers.canvas import Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.masked_diffusion import denoise
from dllm_sparse.types import Observers


class Loop(Protocol):
    """Decodes behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding."""

    def __call__(
        self,
        lm: LanguageModel,
        prompt: Tensor,
        attention_mask: Tensor | None = None,
        config: SamplerConfig | None = None,
        observers: Observers = (),
    ) -> Decoded:
        """See each loop."""
        ...


def loop_of(lm: LanguageModel) -> Loop:
    """The loop that decodes this model."""
    if lm.kind == "autoregressive":
        return decode
    if lm.noise == "uniform":
        return uniform_noise.denoise_uniform
    return denoise_blocks if lm.config.attention == "block_causal" else denoise


def fitted(lm: LanguageModel, config: SamplerConfig) -> SamplerConfig:
    """The options with what the model itself decides filled in; raises UsageError for those it cannot follow."""
    if lm.noise == "uniform":
        return uniform_noise.fitted(lm, config)
    return config if lm.kind == "autoregressive" else config.fitted(lm.config)


def draws(lm: LanguageModel, config: SamplerConfig) -> bool:
    """Whether decoding is random: rows decoded together then change each other's tokens."""
    return lm.noise == "uniform" or config.draws
