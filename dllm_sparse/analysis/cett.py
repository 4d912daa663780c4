"""CETT: the share of an FFN's output lost by dropping its weakest neurons, and the threshold that loses a given share.

Source: Sparsing Law (arXiv 2411.02335), eq. 3 and app. F; the neuron norm is that of ReLU^2 Wins (arXiv 2402.03804).
Shapes: T tokens, D width, F FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.types import NonFiniteActivations, UsageError


@dataclass(frozen=True, slots=True)
class CettResult:
    """Neurons with ||n_i|| <= threshold are dropped; `sparsity` is the share of (token, neuron) pairs dropped, `cett`
    the mean over tokens of the relative L2 error this causes."""

    threshold: float
    sparsity: float
    cett: float


def neuron_outputs(gate_weight: Tensor, up_weight: Tensor, x: Tensor, activation: str = "silu") -> Tensor:
    """Intermediate values act(W_g x) * (W_u x): [F, D], [F, D], [T, D] -> [T, F]."""
    return ACTIVATIONS[activation](x @ gate_weight.T) * (x @ up_weight.T)


def cett_threshold(
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    x: Tensor,
    cett: float = 0.2,
    activation: str = "silu",
) -> CettResult:
    """The largest neuron-norm threshold whose CETT stays at or below a target, for one gated FFN.

    gate_weight and up_weight are [F, D], down_weight is [D, F], x is [T, D]. Computed in fp64 over all T * F candidate
    thresholds by bisection; where CETT is not monotone in the threshold this is one of its crossings. Exact zeros are
    dropped at any target. Raises UsageError for a target outside [0, 1] or an unknown activation, NonFiniteActivations
    for NaN or Inf.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    gate_weight, up_weight, down_weight, x = (t.detach().double() for t in (gate_weight, up_weight, down_weight, x))
    return threshold_for_cett(neuron_outputs(gate_weight, up_weight, x, activation), down_weight, cett)


def threshold_for_cett(intermediate: Tensor, down_weight: Tensor, cett: float) -> CettResult:
    """The same for intermediate values [T, F] already at hand, in their dtype."""
    if not 0 <= cett <= 1:
        raise UsageError(f"cett is {cett}; allowed: 0 to 1 (for example 0.2)")
    norms = intermediate.abs() * down_weight.norm(dim=0)
    if not bool(torch.isfinite(norms).all()):
        raise NonFiniteActivations("NaN or Inf among the neurons' outputs whose CETT was asked for")
    candidates = torch.unique(torch.cat((norms.new_zeros(1), norms.flatten())))
    low, high = 0, len(candidates)  # candidates[low] is within the target, candidates[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        within = mean_tail_error(intermediate, down_weight, norms, candidates[middle]) <= cett
        low, high = (middle, high) if within else (low, middle)
    return cett_at(intermediate, down_weight, float(candidates[low]))


def cett_at(intermediate: Tensor, down_weight: Tensor, threshold: float) -> CettResult:
    """CETT and sparsity of intermediate values [T, F] at a given threshold."""
    norms = intermediate.abs() * down_weight.norm(dim=0)
    level = norms.new_tensor(threshold)
    error = mean_tail_error(intermediate, down_weight, norms, level)
    return CettResult(threshold, float((norms <= level).double().mean()), float(error))


def mean_tail_error(intermediate: Tensor, down_weight: Tensor, norms: Tensor, threshold: Tensor) -> Tensor:
    """Mean over tokens of ||sum of dropped neurons|| / ||FFN(x)||; a token whose output is zero counts as 0."""
    whole = (intermediate @ down_weight.T).norm(dim=-1)
    dropped = ((intermediate * (norms <= threshold)) @ down_weight.T).norm(dim=-1)
    return relative_error(dropped, whole)


def relative_error(dropped: Tensor, whole: Tensor) -> Tensor:
    """Mean over tokens of ||dropped|| / ||whole|| from the two norms [T]; a token whose output is zero counts as 0."""
    return torch.where(whole > 0, dropped / whole, torch.zeros_like(whole)).mean()
