"""The CPU's sparse product against its plain twin, and the rule that says when it pays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dllm_sparse.kernels.cpu import sparse_matvec, wanted_outputs
from dllm_sparse.kernels.dispatch import cpu_pays, resolve_backend
from dllm_sparse.kernels.storage import by_input, by_output, store_by_input
from dllm_sparse.types import BackendUnavailable

CPU = torch.device("cpu")


def relative_rms(found: Tensor, truth: Tensor) -> float:
    difference = (found.double() - truth).pow(2).mean().sqrt()
    return float(difference / truth.pow(2).mean().sqrt().clamp_min(1e-30))


def product_case(
    tokens: int, inputs: int, outputs: int, density: float, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, inputs, generator=generator).to(dtype)
    values *= torch.rand(tokens, inputs, generator=generator) < density
    weight = torch.randn(inputs, outputs, generator=generator).to(dtype)
    return values, weight


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads while a test runs, hence so many bags a token."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (1, 1), (7, 13), (33, 50), (129, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_equals_the_dense_product_in_fp64(
    dtype: torch.dtype, bound: float, inputs: int, outputs: int, tokens: int, threads: int
) -> None:
    values, weight = product_case(tokens, inputs, outputs, 0.5, dtype)
    found = sparse_matvec(values, weight)
    assert (found.shape, found.dtype) == ((tokens, outputs), dtype)
    assert relative_rms(found, values.double() @ weight.double()) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_wanted_outputs_are_the_only_ones_computed(
    dtype: torch.dtype, bound: float, tokens: int, density: float, threads: int
) -> None:
    x, weight = product_case(tokens, 37, 50, 1.0, dtype)
    by_row = weight.t().contiguous()
    wanted = torch.rand(tokens, 50, generator=torch.Generator().manual_seed(1)) < density
    by_row[~wanted.any(0)] = torch.nan
    found = wanted_outputs(x, by_row, wanted)
    assert (found.shape, found.dtype) == ((tokens, 50), dtype)
    assert relative_rms(found, torch.where(wanted, x.double() @ weight.double(), 0)) <= bound
    assert not found[~wanted].any()


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_any_shape_and_density(tokens: int, inputs: int, outputs: int, density: float, seed: int) -> None:
    values, weight = product_case(tokens, inputs, outputs, density, torch.float32, seed)
    torch.testing.assert_close(sparse_matvec(values, weight), values @ weight, rtol=1e-4, atol=1e-4)


def test_rows_without_a_nonzero_value_are_zero(threads: int) -> None:
    values, weight = product_case(4, 20, 12, 0.5, torch.float32)
    values[0] = values[2] = 0.0
    found = sparse_matvec(values, weight)
    assert not found[[0, 2]].any()
    assert torch.equal(found[[1, 3]], sparse_matvec(values[[1, 3]], weight))
    assert not sparse_matvec(torch.zeros(4, 20), weight).any()


def test_negative_zeros_are_zeros_and_equal_values_all_count() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = sparse_matvec(torch.tensor([[2.0, -0.0, 2.0]]), weight)
    torch.testing.assert_close(found[0], 2 * (weight[0] + weight[2]))


def test_rows_of_the_weight_that_no_value_needs_are_never_read(threads: int) -> None:
    values, weight = product_case(2, 30, 16, 0.4, torch.float32)
    unneeded = ~values.any(0)
    assert unneeded.any()
    clean = sparse_matvec(values, weight)
    weight[unneeded] = torch.nan
    assert torch.equal(sparse_matvec(values, weight), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storing_by_input_changes_order_only(dtype: torch.dtype) -> None:
    linear = nn.Linear(12, 20).to(dtype).requires_grad_(False)
    before, x = linear.weight.clone(), torch.randn(3, 12).to(dtype)
    expected = linear(x)
    with torch.inference_mode():
        store_by_input(linear)
    assert linear.weight.shape == (20, 12)
    assert not linear.weight.is_inference()
    assert torch.equal(linear.weight, before)
    assert by_input(linear).is_contiguous()
    torch.testing.assert_close(linear(x), expected)
    place = linear.weight.data_ptr()
    store_by_input(linear)
    assert linear.weight.data_ptr() == place  # a second call copies nothing
    assert by_output(linear).is_contiguous()
    assert torch.equal(linear.weight, before)


def test_auto_skips_only_where_it_pays() -> None:
    weights = 4096 * 12288
    for threads in (1, 2):
        assert cpu_pays(0.5, 1, weights, torch.float32, threads)
        assert cpu_pays(0.5, 4, weights, torch.float32, threads)  # an eighth of each of four tokens
        assert not cpu_pays(0.9, 1, weights, torch.float32, threads)
        assert not cpu_pays(0.01, 5, weights, torch.float32, threads)
        assert cpu_pays(0.6, 1, weights, torch.bfloat16, threads)
        assert not cpu_pays(0.6, 1, weights, torch.bfloat16, threads, picking=True)
    # A layer of 0.9M weights: too little for two threads to win back the calls.
    assert cpu_pays(0.25, 1, 1536 * 576, torch.float32, 1)
    assert not cpu_pays(0.5, 1, 1536 * 576, torch.float32, 2)
    assert not cpu_pays(0.05, 1, 24 * 16, torch.float32, 1)


def test_what_an_explicit_backend_needs() -> None:
    assert resolve_backend("cpu", CPU, torch.bfloat16) == "cpu"
    assert resolve_backend("auto", CPU, torch.float64) == "reference"
    for device, dtype in ((CPU, torch.float64), (CPU, torch.float16), (torch.device("cuda"), torch.float32)):
        with pytest.raises(BackendUnavailable, match="backend 'cpu' needs float32 or bfloat16 on a CPU"):
            resolve_backend("cpu", device, dtype)
