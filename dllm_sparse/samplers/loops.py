"""Which loop decodes which kind of model, its options as that loop takes them, and what every decoding begins with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers import uniform_noise
from dllm_sparse.samplers.autoregressive import decode_token_by_token
from dllm_sparse.samplers.block_diffusion import denoise_blocks
from dllm_sparse.samplers.canvas import Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.masked_diffusion import denoise
from dllm_sparse.types import Observers, UsageError

Loop = Callable[[LanguageModel, Tensor, Tensor | None, SamplerConfig, Observers], Decoded]
"""Takes what `decode` takes, with options that fit the model and tensors where it is."""


@torch.inference_mode()
def decode(
    lm: LanguageModel,
    prompt: Tensor,
    attention_mask: Tensor | None,
    config: SamplerConfig,
    observers: Observers = (),
) -> Decoded:
    """Decodes behind prompt [B, P] int64 by the model's own loop; `attention_mask` [B, P] is 0 on left padding.

    Raises UsageError for options the model cannot follow or a prompt that does not fit, NonFiniteActivations for NaN
    logits.
    """
    config = fitted(lm, config)
    check_context(lm, prompt.shape[1], config.gen_length)
    mask = None if attention_mask is None else attention_mask.to(lm.device)
    return _loop_of(lm)(lm, prompt.to(lm.device), mask, config, observers)


def _loop_of(lm: LanguageModel) -> Loop:
    if lm.kind == "autoregressive":
        return decode_token_by_token
    if lm.noise == "uniform":
        return uniform_noise.denoise_uniform
    return denoise_blocks if lm.config.attention == "block_causal" else denoise


def fitted(lm: LanguageModel, config: SamplerConfig) -> SamplerConfig:
    """The options with what the model itself decides filled in; raises UsageError for those it cannot follow."""
    for name in ("eos_token_id", "eot_token_id"):
        if (token := getattr(config, name)) is not None:
            lm.check_ids(name, torch.tensor(token))
    if lm.noise == "uniform":
        return uniform_noise.fitted(lm, config)
    return config if lm.kind == "autoregressive" else config.fitted(lm.config)


def check_context(lm: LanguageModel, prompt_length: int, gen_length: int) -> None:
    """Raises UsageError when prompt and generation do not fit the model's context."""
    limit = lm.config.max_positions
    if prompt_length + gen_length > limit:
        room = limit - prompt_length
        advice = f"try gen_length {room} or less" if room > 0 else f"shorten the prompt below {limit} tokens"
        raise UsageError(
            f"prompt of {prompt_length} tokens + gen_length {gen_length} exceeds the context of {limit}; {advice}"
        )


def draws(lm: LanguageModel, config: SamplerConfig) -> bool:
    """Whether decoding is random: rows decoded together then change each other's tokens."""
    return lm.noise == "uniform" or config.draws
