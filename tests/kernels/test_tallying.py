"""The one-pass tally of a mask against its plain twins: in Triton's interpreter and on a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dllm_sparse.analysis.exploitable import union_counts
from dllm_sparse.kernels.tallying import LONG, SHORT, can_tally, tally
from dllm_sparse.types import TokenClass
from tests.helpers import interpreted

SHAPES = ((1, 1, 5), (3, 7, 20), (2, 32, 33), (3, 70, 20))


def check(device: str, shapes: tuple[tuple[int, int, int], ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for (rows, tokens, width), density in (*product(shapes, (0.3,)), (shapes[2], 0.0), (shapes[2], 1.0)):
        keep = torch.rand(rows, tokens, width, generator=generator) < density
        classes = torch.randint(1, len(TokenClass), (rows, tokens), generator=generator).to(torch.int8)
        classes[-1, : tokens // 3] = TokenClass.PADDING
        found = tally(keep.to(device), classes.to(device))
        real = classes != TokenClass.PADDING
        for kind in TokenClass:
            counted = (classes == kind) & real
            assert int(found.tokens[kind]) == int(counted.sum())
            assert int(found.kept[kind]) == int(keep[counted].sum())
        unions = found.unions.cpu() * torch.tensor([1, width])
        assert torch.equal(unions, union_counts(keep, real, (SHORT, LONG)))
        assert torch.equal(found.union.cpu(), keep[real].any(0))
    nothing = tally(
        torch.ones(1, 3, 5, dtype=torch.bool, device=device), torch.zeros(1, 3, dtype=torch.int8).to(device)
    )
    assert not any(part.any() for part in nothing)  # padding alone


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    interpreted(f"from tests.kernels.test_tallying import check; check('cpu', {SHAPES})")


def test_not_used_where_it_cannot_run() -> None:
    assert not can_tally(torch.ones(1, 2, 8, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_the_gpu() -> None:
    check("cuda", (*SHAPES, (100, 56, 672), (2, 300, 12288)))
