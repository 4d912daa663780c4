"""Per-token comparisons of masks and values, and their sums by token class. Tensors in, integer tensors out.

Legend: B rows, T tokens, n features, C token classes, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.analysis.masks import count_kept
from dllm_sparse.analysis.tallies import PER_TOKEN_ONE
from dllm_sparse.types import TokenClass


def overlap(keep: Tensor, kept: Tensor, other: Tensor) -> Tensor:
    """(1, kept, kept in other, intersection, union, Jaccard in units of 2^-30) per token: [B, T, n] -> [B, T, 6] int64.

    `kept` [B, T] counts `keep`; `other` is [B, T, n] or [B, 1, n]. The Jaccard of two empty masks counts as 0.
    """
    kept_other = count_kept(other).expand_as(kept)
    intersection = count_kept(keep & other)
    union = kept + kept_other - intersection
    jaccard = (intersection.double() / union.clamp_min(1) * PER_TOKEN_ONE).round().long()
    return torch.stack((torch.ones_like(kept), kept, kept_other, intersection, union, jaccard), dim=-1)


def relative_change(values: Tensor, earlier: Tensor) -> Tensor:
    """|v - v'| / |v'| per token in the L2 norm, [B, T, n] and [B, T, n] or [B, 1, n] -> [B, T] fp32.

    A token that was all zero before has moved infinitely far unless it still is.
    """
    moved = torch.linalg.vector_norm(values - earlier, dim=-1, dtype=torch.float32)
    size = torch.linalg.vector_norm(earlier, dim=-1, dtype=torch.float32)
    return torch.where(moved == 0, moved, moved / size)


def by_class(columns: Tensor, classes: Tensor) -> Tensor:
    """Sums per row and token class, [B, T, K] and [B, T] int64 -> [B, C, K]; padding stays 0."""
    rows, _, width = columns.shape
    index = classes + torch.arange(rows, device=classes.device)[:, None] * len(TokenClass)
    sums = columns.new_zeros((rows * len(TokenClass), width))
    sums.index_add_(0, index.flatten(), columns.flatten(0, 1))
    sums = sums.view(rows, len(TokenClass), width)
    sums[:, TokenClass.PADDING] = 0
    return sums


def change_histogram(change: Tensor, edges: Tensor, classes: Tensor, counted: Tensor) -> Tensor:
    """Counts [C, E + 1] int64 of changes [B, T] between edges [E], where counted [B, T] is 1; padding stays 0."""
    bins = len(edges) + 1
    index = torch.bucketize(change, edges) + classes * bins
    counts = torch.zeros(len(TokenClass) * bins, dtype=torch.int64, device=change.device)
    counts.index_add_(0, index.flatten(), counted.flatten().long())
    histogram = counts.view(len(TokenClass), bins)
    histogram[TokenClass.PADDING] = 0
    return histogram
