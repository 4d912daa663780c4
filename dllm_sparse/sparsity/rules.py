"""The mask rules, pure: values in, bool mask out. Exact, whatever the dtype of the values.

top-p keeps the smallest set holding a share p of the L1 mass (arXiv 2509.00454, sec. 3.1). Its threshold is found
by bisection over the ordered bits of |v|: the order of non-negative floats is the order of their bit patterns, so
20 or so masked sums in fp32 replace a sort. Rows where fp32 sums cannot be decisive are sorted, with fp64 sums.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dllm_sparse.kernels.masking import can_mask, mass_mask
from dllm_sparse.kernels.selection import can_select, mass_threshold
from dllm_sparse.types import NonFiniteActivations, UsageError

Ties = Literal["keep", "trim"]

# Low bits of the fp32 pattern that are always zero for values of a narrower type: fewer bisection passes.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13}

# Relative error granted to a sum in fp32 (seen: below 5e-7 up to 19k entries).
_SUM_ERROR = 4e-6

_INFINITY_BITS = 0x7F800000
_NOT_FINITE = "NaN or Inf among the values to be masked"
# Entries up to which a sort (20 us for 576, 150 for 12288) beats the bisection's many calls (500 us).
_SORTED_ENTRIES = 1 << 14

_MOST_SNAPS = 6  # entries tried one by one before a row is sorted


def top_p_mask(v: Tensor, p: float, ties: Ties = "keep") -> Tensor:
    """Smallest set with sum |v_kept| >= p * sum |v|, per row of the last axis: [..., n] -> [..., n] bool.

    Entries equal to the threshold are all kept, or with `ties="trim"` only as many as needed, lowest index first.
    p=1 keeps every nonzero entry, p=0 the largest; an all-zero row keeps nothing.

    Raises UsageError for p outside [0, 1] and NonFiniteActivations for NaN or Inf. Source: arXiv 2509.00454, eq. (1).
    """
    check_fraction("p", p)
    if p < 1.0 and ties == "keep" and can_mask(v):
        keep, bad = mass_mask(v.detach(), p)
        if bool(bad):
            raise NonFiniteActivations(_NOT_FINITE)
        return keep
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
    if threshold == 0:
        if not bool(torch.isfinite(v).all()):
            raise NonFiniteActivations(_NOT_FINITE)
        return v != 0
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
        raise NonFiniteActivations(_NOT_FINITE)
    return total


def _mass_threshold(score: Tensor, p: float, unused_bits: int) -> Tensor:
    """Largest entry t of each row with sum(score[score >= t]) >= p * sum(score): [R, n] -> [R, 1]; Inf for zero rows.

    Rows whose fp32 masses come closer to the target than rounding can tell (or overflow, or are not finite), and rows
    with many entries almost equal to the threshold, are decided by sorting them, with fp64 sums.
    """
    if can_select(score):
        threshold = mass_threshold(score, p * _finite_total(score))
        return threshold.masked_fill_(threshold == 0, torch.inf)
    if score.dtype == torch.float64 or (score.is_cpu and score.numel() <= _SORTED_ENTRIES):
        return _sorted_threshold(score, p)
    total = score.sum(-1, keepdim=True)
    threshold, slack = _search(score, p * total, unused_bits)
    unsure = ~(slack > _SUM_ERROR * total).squeeze(-1)
    if bool(unsure.any()):
        threshold[unsure] = _sorted_threshold(score[unsure], p)
    return threshold


def _sorted_threshold(score: Tensor, p: float) -> Tensor:
    """The threshold by a descending sort and fp64 sums: [R, n] -> [R, 1]; Inf for zero rows."""
    ordered = _descending(score)
    mass = ordered.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    if not bool(torch.isfinite(total).all()):
        _finite_total(score)  # raises, and says why
    place = (mass < p * total).sum(-1, keepdim=True).clamp_max_(score.shape[-1] - 1)
    threshold = ordered.gather(-1, place)
    return threshold.masked_fill_(threshold == 0, torch.inf)


def _descending(score: Tensor) -> Tensor:
    """Rows from large to small. numpy sorts with vector instructions: 4096 entries in 13 us, torch in 200."""
    if score.is_cpu:
        return torch.from_numpy(np.sort(score.numpy(), axis=-1)).flip(-1)
    return score.sort(dim=-1, descending=True).values


def _search(score: Tensor, target: Tensor, unused_bits: int) -> tuple[Tensor, Tensor]:
    """Threshold and slack [R, 1] of fp32 rows: the bits from the top down, then the entries just below what is left.

    The slack is the smaller distance of mass(>= t) and mass(> t) from the target; -Inf where the search gave up.
    """
    kept, product = torch.empty_like(score), torch.empty_like(score)

    def excess(level: Tensor) -> Tensor:
        # A comparison written straight into floats, then times the values: both passes stay vectorised on a CPU.
        torch.ge(score, level, out=kept)
        torch.mul(score, kept, out=product)
        return product.sum(-1, keepdim=True) - target

    # With log2(n) bits of the mantissa known, about one entry is left between the known prefix and the next one.
    open_bits = max(unused_bits, 23 - score.shape[-1].bit_length())
    prefix = torch.zeros_like(target, dtype=torch.int32)
    for bit in range(30, open_bits - 1, -1):
        candidate = prefix | (1 << bit)
        # NaN patterns compare false, and with a target of 0 they must not count as enough mass.
        enough = (excess(candidate.view(torch.float32)) >= 0) & (candidate <= _INFINITY_BITS)
        prefix = torch.where(enough, candidate, prefix)
    high = (prefix + (1 << open_bits)).view(torch.float32)
    above = excess(high)
    threshold, slack = high.clone(), torch.full_like(target, -torch.inf)
    for _ in range(_MOST_SNAPS):
        torch.lt(score, high, out=kept)
        level = torch.mul(score, kept, out=product).amax(-1, keepdim=True)
        mass = excess(level)
        found = (mass >= 0) & (slack == -torch.inf)
        threshold = torch.where(found, level, threshold)
        slack = torch.where(found, torch.minimum(mass, -above), slack)
        if bool((mass >= 0).all()):
            break
        high, above = torch.where(mass >= 0, high, level), torch.where(mass >= 0, above, mass)
    return threshold, slack


def _trimmed(score: Tensor, threshold: Tensor, target: Tensor, *, round_up: bool) -> Tensor:
    """Everything above the threshold, and of its ties just enough (round_up) or at most what reaches the target."""
    above = score > threshold
    missing = target - (score * above).sum(-1, keepdim=True, dtype=torch.float64)
    share = missing / threshold.double()
    count = share.ceil().clamp_min(1) if round_up else share.floor()
    tied = score == threshold
    return above | (tied & (tied.cumsum(-1) <= count))
