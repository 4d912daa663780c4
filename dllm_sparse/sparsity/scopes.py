"""Which values share a mask: every token alone, consecutive groups of tokens, or a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.rules import flattened_top_p_mask, max_p_mask, threshold_mask, top_k_mask, top_p_mask
from dllm_sparse.types import StepContext, TokenClass


def scoped_mask(v: Tensor, p: float, config: SparsityConfig, context: StepContext, norms: Tensor | None) -> Tensor:
    """The mask [B, T, n] bool of values [B, T, n] under a configuration; padding never influences another token.

    `norms` [n] weighs the scores (|v_j| * norms_j). Exact zeros are never kept.
    """
    score = v if norms is None else v.abs().float() * norms
    if config.is_identity(p):
        _rule_mask(score[..., :1, :], p, config)  # still refuses NaN and Inf in the cheapest way it can
        return _checked_nonzero(score)
    if config.scope == "token":
        return _rule_mask(score, p, config)
    real = (context.token_class != TokenClass.PADDING).unsqueeze(-1)
    if config.scope == "sequence":
        return _sequence_mask(score * real, p, config) & (score != 0)
    return _group_mask(score * real, p, config, context) & (score != 0)


def _checked_nonzero(score: Tensor) -> Tensor:
    return threshold_mask(score, 0.0)


def _rule_mask(score: Tensor, p: float, config: SparsityConfig) -> Tensor:
    if config.rule == "top_p":
        return top_p_mask(score, p, ties=config.ties)
    if config.rule == "top_k":
        return top_k_mask(score, p)
    if config.rule == "max_p":
        return max_p_mask(score, p)
    return threshold_mask(score, p)


def _sequence_mask(score: Tensor, p: float, config: SparsityConfig) -> Tensor:
    if config.rule == "top_p":
        return flattened_top_p_mask(score, p)
    return _rule_mask(score.flatten(1), p, config).view(score.shape)


def _group_mask(score: Tensor, p: float, config: SparsityConfig, context: StepContext) -> Tensor:
    """One mask per `group_size` tokens, selected on the sum of the tokens' L1-normalised scores.

    Groups are counted from each row's first real token, so left padding changes nothing.
    """
    batch, tokens, width = score.shape
    magnitude = score.abs().float()
    share = magnitude / magnitude.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    real = context.token_class != TokenClass.PADDING
    first = (
        real.int().argmax(-1, keepdim=True) if context.start == 0 else torch.zeros_like(real[:, :1], dtype=torch.int64)
    )
    place = torch.arange(context.start, context.start + tokens, device=score.device) - first
    group = place.clamp_min(0) // config.group_size
    group = group - group.amin(-1, keepdim=True)
    index = group.unsqueeze(-1).expand(-1, -1, width)
    summed = torch.zeros(batch, int(group.max()) + 1, width, device=score.device)
    summed.scatter_add_(1, index, share)
    return _rule_mask(summed, p, config).gather(1, index)
