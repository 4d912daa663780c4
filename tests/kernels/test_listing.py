"""The list of kept channels against a loop, and the plain product over it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.kernels.listing import list_kept
from dllm_sparse.kernels.streaming import Scratch, can_list, stream_matmul


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_the_list_holds_what_some_row_kept_and_nothing_twice(rows: int, width: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.randn(rows, width, generator=generator)
    masked *= torch.rand(rows, width, generator=generator) < density
    length = torch.zeros(1, dtype=torch.int32)
    listed = list_kept(masked, length)
    kept = [channel for channel in range(width) if masked[:, channel].any()]
    assert listed.length is length
    assert listed.rows.dtype == torch.int32
    assert listed.rows[: int(length)].tolist() == kept
    assert sorted(listed.rows.tolist()) == list(range(width))
    assert torch.equal(listed.values[:, : int(length)], masked[:, kept])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_product_over_the_list_equals_the_dense_one_and_reads_nothing_else(activation: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    masked, weight = torch.randn(3, 20, generator=generator), torch.randn(20, 16, generator=generator)
    masked[:, ::3] = 0
    n = 16 if activation is None else 8
    bias, residual = torch.randn(16, generator=generator), torch.randn(3, n, generator=generator)
    options = {"activation": activation, "bias": bias, "residual": residual}
    assert can_list(masked, weight)
    scratch = Scratch(torch.device("cpu"))
    dense = stream_matmul(masked, weight, scratch, **options)
    poisoned = weight.clone()
    poisoned[::3] = torch.nan
    torch.testing.assert_close(stream_matmul(list_kept(masked), poisoned, scratch, **options), dense)
    gate, up = (masked @ weight + bias).chunk(2, -1)
    plain = masked @ weight + bias if activation is None else torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(dense, plain + residual)
