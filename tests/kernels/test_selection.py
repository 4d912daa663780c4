"""The GPU threshold search against its plain twin: in Triton's interpreter at small sizes, on a GPU at real ones."""

from __future__ import annotations

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.kernels.selection import MAX_ROW, can_select, mass_threshold
from tests.helpers import interpreted

WIDTHS = (1, 63, 300, MAX_ROW + 5)


def rows(width: int) -> torch.Tensor:
    """Ordinary, all-zero, tied, denormal, huge, one-hot and constant rows of scores, [7, width]."""
    score = torch.randn(7, width, generator=torch.Generator().manual_seed(width)).abs()
    score[1] = 0
    score[2] = score[2].round()
    score[3] *= 1e-40
    score[4] *= 1e30
    score[5, 1:] = 0
    score[6] = 0.5
    return score


def expected(score: torch.Tensor, p: float) -> torch.Tensor:
    """The threshold by sorting in fp64."""
    ordered = score.double().sort(dim=-1, descending=True).values
    place = (ordered.cumsum(-1) < p * score.double().sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return ordered.gather(-1, place.clamp_max(score.shape[-1] - 1)).float()


def check(device: str, widths: tuple[int, ...]) -> None:
    for width in widths:
        score = rows(width)
        for p in (0.0, 0.95):
            target = p * score.sum(-1, keepdim=True, dtype=torch.float64)
            found = mass_threshold(score.to(device), target.to(device)).cpu()
            assert torch.equal(found, expected(score, p)), (width, p)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    interpreted(f"from tests.kernels.test_selection import check; check('cpu', {WIDTHS})")


def test_not_used_where_it_cannot_run() -> None:
    assert not can_select(torch.ones(2, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_the_gpu() -> None:
    check("cuda", (*WIDTHS, 4096, 12288, 18944))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_equal_the_cpu_rule(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    v = (torch.randn(1000, 4096, generator=generator) * torch.randn(4096, generator=generator).exp()).to(dtype)
    for p in (0.3, 0.8, 0.97):
        assert torch.equal(ds.top_p_mask(v.cuda(), p).cpu(), ds.top_p_mask(v, p))
