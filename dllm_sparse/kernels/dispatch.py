"""Which backend computes a sparse FFN, and when it pays. An explicit request that cannot run raises; `auto` falls back.

The break-even points are measured (benchmarks/cpu_sparse.py); the rule is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dllm_sparse.kernels.cpu import CPU_DTYPES
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.types import BackendUnavailable

CPU_MOST_TOKENS = 4
"""Beyond this many tokens the masks of a forward together need nearly every row: dense is faster at any density."""

CPU_CALL_SECONDS = 60e-6
"""What finding the nonzero values and preparing the bags costs beyond the call of a dense product."""


@dataclass(frozen=True, slots=True)
class CpuCost:
    """Weights a thread multiplies per second in a dense product of one token, and the factors sparse products pay on
    each: skipping inputs (`sparse_matvec`), picking outputs (`wanted_outputs`)."""

    dense_rate: float
    skipping: float
    picking: float


CPU_COSTS: Mapping[torch.dtype, CpuCost] = MappingProxyType(
    {torch.float32: CpuCost(3.5e9, 1.55, 1.4), torch.bfloat16: CpuCost(5.0e9, 1.25, 1.9)}
)

LISTING_LIMIT = ((1, 0.85), (2, 0.84), (4, 0.82), (8, 0.8), (16, 0.75), (32, 0.65), (64, 0.3))
"""(most rows, share of the channels some row kept) up to which reading only those beats reading all, on an H200
(`bench kernels`; above 32 rows estimated)."""


HYSTERESIS = 0.05
"""How far a density must be on the other side of the break-even before a choice once made is changed."""

MEASURED_FOR = 32
"""Generations after which a choice not to mask, which leaves nothing to count, is tried anew: a capture is then less
than 1 % of what they took."""

RECAPTURE_SHARE = 0.1
"""Changed choices, as a share of all, that are worth capturing a step again (which takes as long as dozens of them)."""


def listing_pays(rows: int, density: float) -> bool:
    """True where a GPU product of few rows is faster over the list of kept channels than over the whole weight."""
    return density <= next((limit for most, limit in LISTING_LIMIT if rows <= most), 0.0)


def still_pays(rows: int, density: float, listing: bool) -> bool:
    """`listing_pays` for a captured step that lists, or does not, and may be captured again.

    That is asked between generations alone: the host has just waited for the counts, nothing is in flight, and
    capturing costs as much as dozens of steps, so that a change within a generation would not be paid back by it. The
    choice changes what is read, never which values are masked.
    """
    return listing_pays(rows, density - HYSTERESIS if listing else density + HYSTERESIS)


def union_density(kept: Tensor, first_union: Tensor, first_kept: Tensor) -> Tensor:
    """The share of channels some row keeps, where rows keep a share `kept` each, by one forward that measured both.

    Rows are taken to overlap as they did there: as independent ones would, of a number that makes that union.
    """
    nearly = 1 - 1e-6
    others = torch.log1p(-first_union.clamp_max(nearly)) / torch.log1p(-first_kept.clamp(1e-6, nearly))
    return 1 - (1 - kept.clamp_max(nearly)) ** others


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run for a requested one; raises BackendUnavailable with the reason."""
    on_cpu = device.type == "cpu" and dtype in CPU_DTYPES
    if name == "reference":
        return "reference"
    if name == "auto":
        return "cpu" if on_cpu else "reference"
    if name == "cpu":
        if on_cpu:
            return "cpu"
        given = f"{str(dtype).removeprefix('torch.')} on {device.type}"
        raise BackendUnavailable(f"backend 'cpu' needs float32 or bfloat16 on a CPU, not {given}; use --backend auto")
    if device.type != "cuda":
        raise BackendUnavailable(f"backend 'triton' needs a CUDA GPU, not {device.type}; use --backend auto")
    if dtype not in (torch.bfloat16, torch.float16):
        given = str(dtype).removeprefix("torch.")
        raise BackendUnavailable(f"backend 'triton' needs bfloat16 or float16 weights, not {given}; use --backend auto")
    if not triton_installed():
        raise BackendUnavailable("backend 'triton' needs the package triton (pip install triton)")
    return "triton"


def cpu_pays(
    share: float, tokens: int, weights: int, dtype: torch.dtype, threads: int, *, picking: bool = False
) -> bool:
    """True where `sparse_matvec` (or with `picking` `wanted_outputs`) should beat the dense product.

    `share` is the part of the `weights` that one token needs, summed over the tokens. The dense product of up to four
    tokens is taken to cost what one token costs, so the doubt goes to dense.
    """
    cost = CPU_COSTS[dtype]
    dense = weights / (cost.dense_rate * threads)
    factor = cost.picking if picking else cost.skipping
    return tokens <= CPU_MOST_TOKENS and dense * factor * share + CPU_CALL_SECONDS < dense
