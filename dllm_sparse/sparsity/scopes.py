"""Which values share a mask: every token alone, consecutive groups of tokens, or a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.rules import flattened_top_p_mask, max_p_mask, threshold_mask, top_k_mask, top_p_mask
from dllm_sparse.types import StepContext, TokenClass


def scoped_mask(
    v: Tensor, p: float, config: SparsityConfig, context: StepContext, norms: Tensor | None, *, check: bool = True
) -> Tensor:
    """The mask [B, T, n] bool of values [B, T, n] under a configuration; padding never influences another token.

    `norms` [n] weighs the scores (|v_j| * norms_j). Exact zeros are never kept. `check=False` (for rule top_p alone)
    waits for nothing and keeps NaN and Inf where it meets them.
    """
    score = v if norms is None else v.abs().float() * norms
    if config.is_identity(p):
        return threshold_mask(score, 0.0)
    if config.scope == "token":
        return _rule_mask(score, p, config, check=check)
    real = context.token_class != TokenClass.PADDING
    shared = _sequence_mask if config.scope == "sequence" else _group_mask
    return shared(score, p, config, real, check=check) & (score != 0) & real.unsqueeze(-1)


def _rule_mask(score: Tensor, p: float, config: SparsityConfig, *, check: bool = True) -> Tensor:
    if config.rule == "top_p":
        return top_p_mask(score, p, ties=config.ties, check=check)
    assert check
    if config.rule == "top_k":
        return top_k_mask(score, p)
    if config.rule == "max_p":
        return max_p_mask(score, p)
    return threshold_mask(score, p)


def _sequence_mask(score: Tensor, p: float, config: SparsityConfig, real: Tensor, *, check: bool) -> Tensor:
    """The rule over all real tokens of a batch row at once; padding keeps nothing."""
    if config.rule == "top_p":
        # Zeros add no mass and are dropped by the caller, so padded rows need no loop.
        return flattened_top_p_mask(score.masked_fill(~real.unsqueeze(-1), 0.0), p, check=check)
    keep = torch.zeros_like(score, dtype=torch.bool)
    for row, counted in enumerate(real):
        values = score[row, counted]
        keep[row, counted] = _rule_mask(values.flatten(), p, config).view(values.shape)
    return keep


def _group_mask(score: Tensor, p: float, config: SparsityConfig, real: Tensor, *, check: bool) -> Tensor:
    """One mask per `group_size` tokens, selected on the sum of the tokens' L1-normalised scores.

    Groups are counted from each row's first real token of the forward, so left padding changes nothing. Their tokens
    are brought together before they are summed: a scattered sum on a GPU has no order.
    """
    batch, tokens, width = score.shape
    size = min(config.group_size, tokens)
    groups = -(-tokens // size)
    magnitude = score.abs().float() * real.unsqueeze(-1)
    share = magnitude / magnitude.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    first = real.int().argmax(-1, keepdim=True)
    member = torch.arange(groups * size, device=score.device) + first
    there = (member < tokens).unsqueeze(-1)
    member = member.clamp_max(tokens - 1).unsqueeze(-1).expand(-1, -1, width)
    summed = (share.gather(1, member) * there).view(batch, groups, size, width).sum(2)
    group = (torch.arange(tokens, device=score.device) - first).clamp_min(0) // size
    return _rule_mask(summed, p, config, check=check).gather(1, group.unsqueeze(-1).expand(-1, -1, width))
