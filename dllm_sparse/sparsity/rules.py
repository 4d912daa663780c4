"""The mask rules, pure: values in, bool mask out. Sums are exact to fp64; nothing is sorted.

top-p keeps the smallest set holding a share p of the L1 mass (arXiv 2509.00454, sec. 3.1). Its threshold is found
by bisection over the ordered bits of |v|: the order of non-negative floats is the order of their bit patterns, so
25 or so masked sums in fp32 replace a sort. Rows where fp32 sums cannot be decisive are searched again in fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dllm_sparse.kernels.selection import can_select, mass_threshold
from dllm_sparse.types import NonFiniteActivations, UsageError

Ties = Literal["keep", "trim"]

# Low bits of the fp32 pattern that are always zero for values of a narrower type: fewer bisection passes.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13}

# Relative error granted to a sum in fp32 (seen: below 5e-7 up to 19k entries). fp64 rows pay a needless second search.
_SUM_ERROR = 4e-6


def top_p_mask(v: Tensor, p: float, ties: Ties = "keep") -> Tensor:
    """Smallest set with sum |v_kept| >= p * sum |v|, per row of the last axis: [..., n] -> [..., n] bool.

    Entries equal to the threshold are all kept, or with `ties="trim"` only as many as needed, lowest index first.
    p=1 keeps every nonzero entry, p=0 the largest; an all-zero row keeps nothing.

    Raises UsageError for p outside [0, 1] and NonFiniteActivations for NaN or Inf. Source: arXiv 2509.00454, eq. (1).
    """
    check_fraction("p", p)
    score = _scores(v)
    if p == 1.0 or not score.numel():
        _finite_total(score)
        return score > 0
    rows = score.reshape(-1, score.shape[-1])
    threshold = _mass_threshold(rows, p, _UNUSED_BITS.get(v.dtype, 0))
    keep = rows >= threshold if ties == "keep" else _trimmed(rows, threshold, p * _finite_total(rows), round_up=True)
    return keep.view(score.shape)


def top_k_mask(v: Tensor, fraction: float) -> Tensor:
    """The int(n * fraction) largest |v| of each row, ties at the last one kept; exact zeros are never kept."""
    check_fraction("top_k's p (the kept fraction)", fraction)
    score = _scores(v)
    _finite_total(score)
    count = int(score.shape[-1] * fraction)
    if count == score.shape[-1]:
        return score > 0
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    smallest_kept = score.kthvalue(score.shape[-1] - count + 1, dim=-1, keepdim=True).values
    return (score >= smallest_kept) & (score > 0)


def max_p_mask(v: Tensor, p: float) -> Tensor:
    """Entries with |v| >= p * max |v| of their row; p=0 keeps every nonzero entry."""
    check_fraction("p", p)
    score = _scores(v)
    _finite_total(score)
    return (score >= p * score.amax(-1, keepdim=True)) & (score > 0)


def threshold_mask(v: Tensor, threshold: float) -> Tensor:
    """Entries with |v| >= threshold (an absolute magnitude, >= 0); 0 keeps every nonzero entry."""
    if not threshold >= 0:
        raise UsageError(f"the threshold is {threshold}; it is a magnitude and must be at least 0")
    score = _scores(v)
    _finite_total(score)
    return (score >= threshold) & (score > 0)


def flattened_top_p_mask(v: Tensor, p: float) -> Tensor:
    """The published LLaDA rule: ONE mask over the last two axes [..., T, n], kept mass at most p (never empty).

    Keeps the largest entries while their cumulated share stays <= p, at least one; ties lowest flat index first.
    p=1 keeps everything, and so does an all-zero input at any p. Source: papers' LLaDA scripts (per sequence, not per
    token), kept to reproduce published figures.
    """
    check_fraction("p", p)
    flat = _scores(v).flatten(-2)
    rows = flat.reshape(-1, flat.shape[-1])
    total = _finite_total(rows)
    if p == 1.0:
        return torch.ones_like(v, dtype=torch.bool)
    threshold = _mass_threshold(rows, p, _UNUSED_BITS.get(v.dtype, 0))
    keep = _trimmed(rows, threshold, p * total, round_up=False)
    first = rows == rows.amax(-1, keepdim=True)
    first &= first.cumsum(-1) == 1
    keep = torch.where(keep.any(-1, keepdim=True), keep, first) | (total == 0)
    return keep.view(v.shape)


def check_fraction(name: str, value: float) -> None:
    """Raises UsageError unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} is {value}; allowed: 0 to 1 (for example 0.8)")


def _scores(v: Tensor) -> Tensor:
    """|v| in fp32, or in fp64 for fp64 input; both hold every narrower value exactly."""
    return v.detach().abs().to(torch.float64 if v.dtype == torch.float64 else torch.float32)


def _finite_total(score: Tensor) -> Tensor:
    """Row sums [..., 1] in fp64. A NaN or Inf anywhere makes its row's sum non-finite, so this is also the check."""
    total = score.sum(-1, keepdim=True, dtype=torch.float64)
    if not bool(torch.isfinite(total).all()):
        if bool(torch.isfinite(score).all()):
            raise UsageError("float64 values whose sum overflows; scale them down")
        raise NonFiniteActivations("NaN or Inf among the values to be masked")
    return total


def _mass_threshold(score: Tensor, p: float, unused_bits: int) -> Tensor:
    """Largest entry t of each row with sum(score[score >= t]) >= p * sum(score): [R, n] -> [R, 1]; Inf for zero rows.

    Found in the dtype of the scores. Rows whose masses come closer to the target than rounding can tell (or overflow,
    or are not finite) are searched again with fp64 sums.
    """
    if can_select(score):
        threshold = mass_threshold(score, p * _finite_total(score))
        return threshold.masked_fill_(threshold == 0, torch.inf)
    total = score.sum(-1, keepdim=True)
    threshold, slack = _bisect(score, p * total, unused_bits)
    unsure = ~(slack > _SUM_ERROR * total).squeeze(-1)
    if bool(unsure.any()):
        rows = score[unsure]
        threshold[unsure] = _bisect(rows, p * _finite_total(rows), 0)[0]
    return threshold.masked_fill_(threshold == 0, torch.inf)


def _bisect(score: Tensor, target: Tensor, unused_bits: int) -> tuple[Tensor, Tensor]:
    """Threshold and slack [R, 1] by bisection on the bit patterns, sums in the dtype of `target`.

    Invariant: mass(>= low) >= target > mass(>= high). The slack is the smaller distance of the two from the target.
    """
    integer = torch.int64 if score.dtype == torch.float64 else torch.int32
    largest = score.amax(-1, keepdim=True).view(integer) >> unused_bits
    # Dropping everything below (sum - target) / n can never drop too much; halved to be safe from rounding.
    floor = (score.sum(-1, keepdim=True, dtype=target.dtype) - target) / (2 * score.shape[-1])
    low = torch.minimum(floor.to(score.dtype).view(integer) >> unused_bits, largest).clamp_min(0)
    high = largest + 1
    kept, product = torch.empty_like(score), torch.empty_like(score)
    above, below = torch.full_like(target, torch.inf), target.clone()
    for _ in range(int((high - low).max()).bit_length()):
        middle = low + ((high - low) >> 1)
        # A comparison written straight into floats, then times the values: both passes stay vectorised on a CPU.
        torch.ge(score, (middle << unused_bits).view(score.dtype), out=kept)
        torch.mul(score, kept, out=product)
        excess = product.sum(-1, keepdim=True, dtype=target.dtype) - target
        enough = (excess >= 0) & (middle <= largest)
        above = torch.where(enough, excess, above)
        below = torch.where(enough, below, -excess)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (low << unused_bits).view(score.dtype), torch.minimum(above, below)


def _trimmed(score: Tensor, threshold: Tensor, target: Tensor, *, round_up: bool) -> Tensor:
    """Everything above the threshold, and of its ties just enough (round_up) or at most what reaches the target."""
    above = score > threshold
    missing = target - (score * above).sum(-1, keepdim=True, dtype=torch.float64)
    share = missing / threshold.double()
    count = share.ceil().clamp_min(1) if round_up else share.floor()
    tied = score == threshold
    return above | (tied & (tied.cumsum(-1) <= count))
