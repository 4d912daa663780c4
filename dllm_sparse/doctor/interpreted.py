"""Run as a program under TRITON_INTERPRET=1: selection and the list product, kernels against their plain twins."""

from __future__ import annotations

import sys
import warnings

import torch

from dllm_sparse.doctor.verdicts import Wrong, within
from dllm_sparse.kernels import reference
from dllm_sparse.kernels.gpu.select import mask_kernel
from dllm_sparse.kernels.gpu.stream_matmul import stream_matmul_kernel

_PLAIN = {"WAIT": False, "TRIGGER": False}


def selection() -> str:
    """Top-p of three 16-bit rows, one of them with ties, against sorting in fp64."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).half()
    x[1] = x[1].round()
    guesses, kept = torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    out = torch.full_like(x, torch.nan)
    mask_kernel[(3,)](
        x, x, guesses, kept, out, kept, torch.tensor([0.8], dtype=torch.float64), 40, 0.0,
        BLOCK=64, NORM=False, WORDS=False, **_PLAIN,
    )  # fmt: skip
    if not torch.equal(out, reference.select(x, 0.8)):
        raise Wrong("the selection kernel keeps other entries than sorting in fp64")
    return "selection as sorting in fp64"


def list_product() -> str:
    """SwiGLU of two rows over half of a weight's rows, K in two shares; what is not listed is NaN."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 48, generator=generator), torch.randn(48, 64, generator=generator)
    truth = reference.glu(x[:, ::2] @ weight[::2], "silu")
    weight[1::2] = torch.nan
    packed = torch.full_like(x, torch.nan)
    packed[:, :24] = x[:, ::2]
    rows, length = torch.zeros(48, dtype=torch.int32), torch.tensor([24], dtype=torch.int32)
    rows[:24] = torch.arange(0, 48, 2)
    out = torch.full((2, 32), torch.nan)
    stream_matmul_kernel[(2,)](
        packed, weight, x, x, out, torch.full((256,), torch.nan), torch.zeros(64, dtype=torch.int32),
        rows, length, rows, rows, rows, 2, 32, 48, 64, 2, 3,
        BT=16, BO=16, BN=32, BK=16, GATED=True, ACT=0, LISTED=True, RUNS=0, COUNT=False, HAS_BIAS=False,
        HAS_RESIDUAL=False, ATOMIC=False, SWAP=False, STAGES=1, **_PLAIN,
    )  # fmt: skip
    return within("list product's error", float((out - truth).norm() / truth.norm()), 1e-5)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the interpreter divides by zero where a kernel masks the result
    sys.stdout.write(f"{selection()}; {list_product()}\n")
