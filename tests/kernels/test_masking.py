"""The one-pass top-p mask against the CPU's rule: in Triton's interpreter at small sizes, on a GPU at real ones."""

from __future__ import annotations

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.kernels.masking import can_mask, mass_mask
from tests.helpers import interpreted
from tests.kernels.test_selection import rows

WIDTHS = (1, 63, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of scores with signs, [7, width]; subnormal ones in fp32 only, huge ones as far as the type goes."""
    v = rows(width)
    if dtype != torch.float32:
        v[3] = v[0].round(decimals=1)
        v[4] = v[0] * (1e4 if dtype == torch.float16 else 1e30)
    return (v * torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0)).to(dtype)


def check(device: str, widths: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        for width in widths:
            v = values(width, dtype)
            for p in (0.0, 0.5, 0.9999):
                keep, bad = mass_mask(v.to(device), p)
                assert int(bad) == 0
                assert torch.equal(keep.cpu(), ds.top_p_mask(v, p)), (dtype, width, p)
            # Rows that are part of wider ones, as the up projection's are.
            part = torch.cat((v, -v), dim=-1)[..., width:]
            assert torch.equal(mass_mask(part.to(device), 0.5)[0].cpu(), ds.top_p_mask(v, 0.5))
            for wrong in (float("nan"), float("inf"), float("-inf")):
                broken = v.clone()
                broken[2, -1] = wrong
                assert int(mass_mask(broken.to(device), 0.5)[1]) != 0


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    poisoned = "import torch; torch.use_deterministic_algorithms(True)"  # fresh masks are all True
    interpreted(f"{poisoned}; from tests.kernels.test_masking import check; check('cpu', {WIDTHS})")


def test_not_used_where_it_cannot_run() -> None:
    assert not can_mask(torch.ones(2, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_the_gpu() -> None:
    check("cuda", (*WIDTHS, 224, 672, 4096, 12288, 18944))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_rule_refuses_what_is_not_finite() -> None:
    v = torch.ones(4, 64, device="cuda")
    v[1, 3] = float("nan")
    with pytest.raises(ds.NonFiniteActivations):
        ds.top_p_mask(v, 0.8)
