"""Rotary position embedding: inverse frequencies and the tables made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.models.config import TransformerConfig


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """Inverse frequencies [rotary_dim / 2] in fp32, with Llama 3.1's or linear scaling applied."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device="cpu").float() / config.rotary_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * torch.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_tables(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [..., T, rotary_dim] fp32, for integer positions [..., T]."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
