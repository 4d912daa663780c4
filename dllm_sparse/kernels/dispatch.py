"""Which backend computes a sparse FFN, and when it pays. An explicit request that cannot run raises; `auto` falls back.

The break-even points are measured (benchmarks/cpu_sparse.py); the rule is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from dllm_sparse.kernels.cpu import CPU_DTYPES
from dllm_sparse.types import BackendUnavailable

CPU_MOST_TOKENS = 4
"""Beyond this many tokens the masks of a forward together need nearly every row: dense is faster at any density."""

CPU_KEPT_LIMIT: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 0.55, torch.bfloat16: 0.6})
"""Kept values of all tokens, as a multiple of the inputs, up to which skipping beats the dense product."""

CPU_LEAST_WEIGHTS = 1 << 19
"""Weights of a layer below which the 30 us of finding the nonzero values cost more than they save."""


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
        raise BackendUnavailable("backend 'triton' needs a CUDA GPU and the model is on the CPU; use --backend auto")
    raise BackendUnavailable("backend 'triton' cannot run here: this version has no GPU gather kernels; use auto")


def cpu_pays(kept: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """True where `sparse_matvec` beats the dense product: `kept` nonzero values of [tokens, inputs]."""
    if tokens > CPU_MOST_TOKENS or inputs * outputs < CPU_LEAST_WEIGHTS:
        return False
    return kept <= CPU_KEPT_LIMIT[dtype] * inputs
