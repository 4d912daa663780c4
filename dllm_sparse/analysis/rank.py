"""Effective rank of activations, exact and streaming: memory O(n^2) in the features, none in the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.types import NonFiniteActivations, UsageError


def effective_rank(x: Tensor, normalised: bool = False) -> float:
    """exp of the entropy of the normalised singular values of x [tokens, n] (Roy & Vetterli 2007); 1 <= value <= rank.

    `normalised=True` divides by the number of features n, as the published figures do. Computed in fp64 from the
    singular values themselves; not centred. Raises UsageError for anything but a non-empty matrix, NonFiniteActivations
    for NaN or Inf.
    """
    if x.dim() != 2 or not x.numel():
        raise UsageError(f"effective_rank takes a matrix [tokens, n] with entries; got shape {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteActivations("NaN or Inf in the matrix whose effective rank was asked for")
    rank = rank_from_singular_values(torch.linalg.svdvals(x.detach().double()))
    return rank / x.shape[1] if normalised else rank


def rank_from_singular_values(singular_values: Tensor) -> float:
    """Effective rank of a spectrum [k] >= 0; 0 for an all-zero one."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    share = singular_values / total
    return float(torch.special.entr(share).sum().exp())


def batch_rank(x: Tensor) -> float:
    """The published protocol for one batch x [tokens, n]: fp32 SVD, 1e-10 added to every singular value.

    Depends on the batch: at most min(tokens, n). Kept to reproduce published figures (arXiv 2509.00454's code).
    """
    return rank_from_singular_values(torch.linalg.svdvals(x.detach().float()) + 1e-10)


class StreamingRank:
    """Effective rank over any number of batches: accumulates the Gram matrix [n, n] in fp64.

    The result does not depend on how the tokens were split. Singular values below ~1e-8 of the largest drown in the
    squaring; their share of the entropy is below 1e-6.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Takes in the token vectors x [..., n]."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float64)
        self.gram += rows.T @ rows
        self.tokens += rows.shape[0]

    def merge(self, other: StreamingRank) -> None:
        """Adds another stream's tokens."""
        self.gram += other.gram
        self.tokens += other.tokens

    def value(self) -> float:
        """The effective rank of everything taken in so far."""
        if not bool(torch.isfinite(self.gram).all()):
            raise NonFiniteActivations("NaN or Inf among the activations whose effective rank was asked for")
        return rank_from_singular_values(torch.linalg.eigvalsh(self.gram).clamp_min(0).sqrt())
