"""The formulas on active sets, pure: bool masks or counts in, numbers out.

A mask is [..., T, n] bool: T tokens, n features, True where the value is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm_sparse.types import UsageError

Average = Literal["micro", "token_mean"]
Floats = NDArray[np.float64]


def jaccard(mask_a: Tensor, mask_b: Tensor, average: Average = "micro") -> float:
    """Similarity |A and B| / |A or B| of two masks of equal shape [..., T, n].

    `micro` divides the summed intersections by the summed unions; `token_mean` is the mean of the tokens' own values,
    tokens that keep nothing in either mask left out. NaN where no union has an entry. Raises UsageError for other
    averages or for shapes that differ.
    """
    if average not in ("micro", "token_mean"):
        raise UsageError(f"average is {average!r}; allowed: micro, token_mean")
    if mask_a.shape != mask_b.shape:
        raise UsageError(f"masks of shapes {list(mask_a.shape)} and {list(mask_b.shape)} cannot be compared")
    a, b = mask_a.bool(), mask_b.bool()
    intersection, union = count_kept(a & b), count_kept(a | b)
    if average == "micro":
        total = int(union.sum())
        return int(intersection.sum()) / total if total else float("nan")
    return float((intersection.double() / union)[union > 0].mean())


def count_kept(mask: Tensor) -> Tensor:
    """Kept entries of each token, [..., n] bool -> [...] int64."""
    return mask.count_nonzero(-1)


@overload
def chance_level(density: float) -> float: ...
@overload
def chance_level(density: Floats) -> Floats: ...
def chance_level(density: float | Floats) -> float | Floats:
    """Jaccard of two independent masks of the same density d in [0, 1]: d / (2 - d)."""
    return density / (2 - density)


@overload
def chance_corrected(value: float, chance: float) -> float: ...
@overload
def chance_corrected(value: Floats, chance: Floats) -> Floats: ...
def chance_corrected(value: float | Floats, chance: float | Floats) -> float | Floats:
    """(J - J0) / (1 - J0): 0 for independent masks, 1 for equal ones. The chance level must be below 1."""
    return (value - chance) / (1 - chance)


def independent_union(density: float, tokens: int) -> float:
    """Density of the union of the masks of `tokens` independent tokens: 1 - (1 - d)^T."""
    return 1 - (1 - density) ** tokens


def half_life(corrected: Sequence[float | None]) -> float | None:
    """Steps until a chance-corrected drift curve that starts at 1 first falls to 1/2, interpolated.

    `corrected[t]` is the value t steps after the reference; missing values are skipped. None if 1/2 is never reached.
    """
    before: tuple[int, float] | None = None
    for step, value in enumerate(corrected):
        if value is None or not np.isfinite(value):
            continue
        if value <= 0.5:
            if before is None or before[1] == value:
                return float(step)
            at, above = before
            return at + (step - at) * (above - 0.5) / (above - value)
        before = (step, value)
    return None


def window_unions(keep: Tensor, valid: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """For each T of `sizes`: kept channels in the union of T neighbouring masks, and how many such unions there are.

    keep [B, T, n] and valid [B, T] bool -> per size a pair of [B] int64 (summed kept, windows). Windows are disjoint,
    complete, aligned to the last token and count only where every token is valid. `sizes` are powers of two in
    ascending order from 1, for each union is built from two of the size before.
    """
    results = []
    for index, size in enumerate(sizes):
        assert size == 1 << index
        if index:
            odd = keep.shape[1] % 2
            keep = keep[:, odd::2] | keep[:, 1 + odd :: 2]
            valid = valid[:, odd::2] & valid[:, 1 + odd :: 2]
        results.append(((count_kept(keep) * valid).sum(-1), valid.sum(-1)))
    return results


def consensus_mask(keep: Tensor, counted: Tensor) -> Tensor:
    """The channels that the counted tokens keep most often, as many as one token keeps on average.

    keep [B, T, n], counted [B, T] bool -> [B, 1, n] bool; of equally frequent channels the lowest index is kept.
    """
    frequency = (keep & counted.unsqueeze(-1)).sum(1)
    tokens = counted.sum(-1).clamp_min(1)
    size = (frequency.sum(-1) / tokens).round().long()
    order = frequency.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(keep.shape[-1], device=keep.device).expand_as(order)
    chosen = torch.zeros_like(frequency, dtype=torch.bool).scatter_(-1, order, rank < size.unsqueeze(-1))
    return chosen.unsqueeze(1)
