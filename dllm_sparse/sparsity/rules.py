"""The mask rules, pure: values in, bool mask out. Exact, whatever the dtype of the values.

top-p keeps the smallest set holding a share p of the L1 mass (arXiv 2509.00454, sec. 3.1). On a CPU its threshold is
found by sorting, with fp64 sums: numpy sorts with vector instructions, three times as fast as a bisection over masked
sums. On a GPU it is bisected by one program a row (`kernels/`).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dllm_sparse.kernels.masking import can_mask, mass_mask
from dllm_sparse.kernels.selection import can_select, mass_threshold
from dllm_sparse.types import NonFiniteActivations, UsageError

Ties = Literal["keep", "trim"]

_NOT_FINITE = "NaN or Inf among the values to be masked"
_BLOCK = 1 << 15  # entries sorted and summed at once, so that they stay in a core's cache


def top_p_mask(v: Tensor, p: float, ties: Ties = "keep", *, check: bool = True) -> Tensor:
    """Smallest set with sum |v_kept| >= p * sum |v|, per row of the last axis: [..., n] -> [..., n] bool.

    Entries equal to the threshold are all kept, or with `ties="trim"` only as many as needed, lowest index first.
    p=1 keeps every nonzero entry, p=0 the largest; an all-zero row keeps nothing. With `check=False` and p below 1
    nothing waits for the device: what is not finite is then kept, so that it goes on to where it is noticed.

    Raises UsageError for p outside [0, 1], other `ties` or a value without an axis, NonFiniteActivations for NaN or
    Inf. Source: arXiv 2509.00454, eq. (1).
    """
    check_fraction("p", p)
    if ties not in get_args(Ties):
        raise UsageError(f"ties is {ties!r}; allowed: {', '.join(get_args(Ties))}")
    if not v.dim():
        raise UsageError("a single number has no mask; give values [..., n] along an axis")
    if p < 1.0 and ties == "keep" and can_mask(v):
        keep, bad = mass_mask(v.detach(), p)
        if not check:
            return keep | (bad != 0)
        if bool(bad):
            raise NonFiniteActivations(_NOT_FINITE)
        return keep
    score = _scores(v)
    if p == 1.0 or not score.numel():
        _total(score)
        return score > 0
    rows = score.reshape(-1, score.shape[-1])
    threshold = _mass_threshold(rows, p, check=check)
    if ties == "keep":
        return (rows < threshold).logical_not_().view(score.shape)  # not `>=`: a NaN is kept
    total = _total(rows, check=check)
    return (_trimmed(rows, threshold, p * total, round_up=True) | ~torch.isfinite(total)).view(score.shape)


def top_k_mask(v: Tensor, fraction: float) -> Tensor:
    """The int(n * fraction) largest |v| of each row, ties at the last one kept; exact zeros are never kept."""
    check_fraction("top_k's p (the kept fraction)", fraction)
    score = _scores(v)
    _total(score)
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
    _total(score)
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
    _total(score)
    return score >= threshold


def flattened_top_p_mask(v: Tensor, p: float, *, check: bool = True) -> Tensor:
    """The published LLaDA rule: ONE mask over the last two axes [..., T, n], kept mass at most p (never empty).

    Keeps the largest entries while their cumulated share stays <= p, at least one; ties lowest flat index first.
    p=1 keeps everything, and so does an all-zero input at any p; `check` as in `top_p_mask`. Source: papers' LLaDA
    scripts (per sequence, not per token), kept to reproduce published figures.
    """
    check_fraction("p", p)
    flat = _scores(v).flatten(-2)
    rows = flat.reshape(-1, flat.shape[-1])
    total = _total(rows, check=check)
    if p == 1.0:
        return torch.ones_like(v, dtype=torch.bool)
    threshold = _mass_threshold(rows, p, check=check)
    keep = _trimmed(rows, threshold, p * total, round_up=False)
    first = rows == rows.amax(-1, keepdim=True)
    first &= first.cumsum(-1) == 1
    keep = torch.where(keep.any(-1, keepdim=True), keep, first) | (total == 0) | ~torch.isfinite(total)
    return keep.view(v.shape)


def check_fraction(name: str, value: float) -> None:
    """Raises UsageError unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} is {value}; allowed: 0 to 1 (for example 0.8)")


def _scores(v: Tensor) -> Tensor:
    """|v| in fp32, or in fp64 for fp64 input; both hold every narrower value exactly."""
    return v.detach().abs().to(torch.float64 if v.dtype == torch.float64 else torch.float32)


def _total(score: Tensor, *, check: bool = True) -> Tensor:
    """Row sums [..., 1] in fp64. A NaN or Inf anywhere makes its row's sum non-finite, so this is also the check."""
    total = score.sum(-1, keepdim=True, dtype=torch.float64)
    if check and not bool(torch.isfinite(total).all()):
        if bool(torch.isfinite(score).all()):
            raise UsageError("float64 values whose sum overflows; scale them down")
        raise NonFiniteActivations(_NOT_FINITE)
    return total


def _mass_threshold(score: Tensor, p: float, *, check: bool) -> Tensor:
    """Largest entry t of each row with sum(score[score >= t]) >= p * sum(score), [R, n] -> [R, 1].

    Inf for a row of zeros; unchecked, NaN for one with a NaN.
    """
    if can_select(score):
        total = _total(score, check=check)
        threshold = mass_threshold(score, p * total)
        return threshold.masked_fill_(threshold == 0, torch.inf).masked_fill_(total.isnan(), torch.nan)
    rows = max(_BLOCK // score.shape[-1], 1) if score.is_cpu else len(score)
    return torch.cat([_sorted_threshold(part, p, check=check) for part in torch.split(score, rows)])


def _sorted_threshold(score: Tensor, p: float, *, check: bool) -> Tensor:
    """The threshold by a descending sort, in which NaN come first, and fp64 sums: [R, n] -> [R, 1]."""
    ordered = _descending(score)
    mass = ordered.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    if check and not bool(torch.isfinite(total).all()):
        _total(score)  # raises, and says why
    place = (mass < p * total).sum(-1, keepdim=True).clamp_max_(score.shape[-1] - 1)
    threshold = ordered.gather(-1, place)
    return threshold.masked_fill_(threshold == 0, torch.inf)


def _descending(score: Tensor) -> Tensor:
    """Rows from large to small. numpy sorts with vector instructions: 4096 entries in 13 us, torch in 200."""
    if score.is_cpu:
        return torch.from_numpy(np.sort(score.numpy(), axis=-1)).flip(-1)
    return score.sort(dim=-1, descending=True).values


def _trimmed(score: Tensor, threshold: Tensor, target: Tensor, *, round_up: bool) -> Tensor:
    """Everything above the threshold, and of its ties just enough (round_up) or at most what reaches the target."""
    above = score > threshold
    missing = target - (score * above).sum(-1, keepdim=True, dtype=torch.float64)
    share = missing / threshold.double()
    count = share.ceil().clamp_min(1) if round_up else share.floor()
    tied = score == threshold
    return above | (tied & (tied.cumsum(-1) <= count))
