"""Checks of what is fast against its plain twin."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from dllm_sparse.doctor.verdicts import NotHere, Wrong, within
from dllm_sparse.kernels import reference
from dllm_sparse.kernels.cpu import CPU_DTYPES, sparse_matvec
from dllm_sparse.kernels.histogram import new_histogram
from dllm_sparse.kernels.packing import can_be_counted, select
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.kernels.streaming import Scratch, can_stream, stream_matmul
from dllm_sparse.sparsity.rules import top_p_mask

_INPUTS, _OUTPUTS = 512, 768
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_P = 0.5
_SECONDS = 60


def masks(device: torch.device) -> str:
    """Top-p masks against sorting in fp64, random rows and rows full of ties: the same entries."""
    rows = _rows(64, torch.Generator().manual_seed(0))
    rows[1::3] = rows[1::3].round()
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 0.5, 0.9, 0.99):
            values = rows.to(dtype)
            kept = top_p_mask(values.to(device), p).cpu()
            if not torch.equal(kept, reference.select(values, p) != 0):
                raise Wrong(f"p={p}, {str(dtype).removeprefix('torch.')}: other entries than sorting in fp64 keeps")
            count += kept.shape[0]
    return f"{count} rows, the entries that sorting in fp64 keeps"


def sparse_products(device: torch.device) -> str:
    """Products that skip masked channels against fp64; what must not be read is NaN."""
    found = []
    for dtype in CPU_DTYPES if device.type == "cpu" else (torch.bfloat16,):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(_INPUTS, _OUTPUTS, generator=generator).to(dtype)
        values = _rows(2, generator).to(dtype)
        masked = reference.select(values, _P)
        truth = masked.double() @ weight.double()
        weight[(masked == 0).all(0)] = torch.nan
        out = sparse_matvec(masked, weight) if device.type == "cpu" else _streamed(values.to(device), weight.to(device))
        error = float((out.double().cpu() - truth).norm() / truth.norm())
        found.append(within(f"relative error in {str(dtype).removeprefix('torch.')}", error, _BOUND[dtype]))
    return "; ".join(found)


def interpreted(device: torch.device) -> str:
    """The GPU kernels in Triton's interpreter against their twins, in a process of its own: it is chosen at import."""
    if not triton_installed():
        raise NotHere("triton is not installed (pip install triton)")
    if not interpreter_loops():
        raise NotHere("the interpreter of triton before 3.9 cannot loop to a loaded bound under numpy 2.4")
    command = [sys.executable, "-m", "dllm_sparse.doctor.interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
    )
    if done.returncode != 0:
        raise Wrong((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout.strip()


def interpreter_loops() -> bool:
    """Whether the installed triton and numpy agree on what a scalar is."""
    before_3_9 = tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9)
    return not (before_3_9 and np.lib.NumpyVersion(np.__version__) >= "2.4.0")


def _rows(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, _INPUTS, generator=generator) * torch.rand(count, _INPUTS, generator=generator)


def _streamed(values: Tensor, weight: Tensor) -> Tensor:
    """Selection, the list of what some row kept, and the product over that list, as captured steps launch them."""
    if not can_stream(values, weight):
        raise NotHere("the streaming kernels need a CUDA GPU and triton")
    guesses, scratch = torch.zeros(len(values), device=values.device), Scratch(values.device)
    p = torch.full((1,), _P, dtype=torch.float64, device=values.device)
    counted = new_histogram(len(values), values.device) if can_be_counted(values) else None
    unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    for _ in range(2):  # without thresholds of a step before, and with them
        if counted is not None:
            counted.lines.zero_()
            values = stream_matmul(values, unit, scratch, histogram=counted)
        listed = select(values, p, guesses, torch.zeros_like(guesses, dtype=torch.int32), histogram=counted).listed
    assert listed is not None
    return stream_matmul(listed, weight, scratch)
