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
    check_context(lm, prompt.shape[1], config)
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


def check_context(lm: LanguageModel, prompt_length: int, config: SamplerConfig) -> None:
    """Raises UsageError, with a working suggestion, when prompt and generation do not fit the model's context."""
    limit = lm.config.max_positions
    if prompt_length + config.gen_length > limit:
        raise UsageError(
            f"prompt of {prompt_length} tokens + gen_length {config.gen_length} exceeds the context of {limit}; "
            + _way_out(lm, config, prompt_length)
        )


def _way_out(lm: LanguageModel, config: SamplerConfig, prompt_length: int) -> str:
    """The longest generation that fits, in blocks and steps the sampler takes; else how long the prompt may be."""
    limit, block = lm.config.max_positions, _divisor(lm, config)
    room = limit - prompt_length
    if 0 < room < block and lm.noise == "mask":
        return f"try gen_length {room}, block_length {room}"
    if room < block:
        kept = next(length for length in (config.gen_length, block, 1) if length < limit)
        shorter = f"shorten the prompt to {limit - kept} tokens"
        return shorter if kept == config.gen_length else f"{shorter}, try gen_length {kept}"
    length = room // block * block
    blocks = 1 if config.block_length == config.gen_length else -(-length // config.block_length)
    if lm.kind == "diffusion" and config.steps is not None and config.steps % blocks:
        return f"try gen_length {length}, steps {config.steps // config.blocks * blocks}"
    return f"try gen_length {length}" + (" or less" if block == 1 else "")


def _divisor(lm: LanguageModel, config: SamplerConfig) -> int:
    """What a length must be a multiple of: the blocks of a masked diffusion model, or a canvas."""
    whole = config.by_timesteps and config.cache == "none"  # the canvas is one block, however long
    return 1 if lm.kind == "autoregressive" or lm.config.block_length is not None or whole else config.block_length


def draws(lm: LanguageModel, config: SamplerConfig) -> bool:
    """Whether decoding is random: rows decoded together then change each other's tokens."""
    return lm.noise == "uniform" or config.draws
