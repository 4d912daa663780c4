"""The mask rules against exact rational arithmetic, over all float types and sixty orders of magnitude."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.sparsity.rules import flattened_top_p_mask, max_p_mask, threshold_mask, top_k_mask
from dllm_sparse.types import NonFiniteActivations, UsageError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rounding(total: Fraction) -> Fraction:
    """Sums are formed in fp64: a cut closer to its target than this may fall on either side."""
    return total / 10**13 + Fraction(5e-324)


fractions = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0]), st.floats(0, 1))
magnitudes = st.one_of(
    st.just(0.0),
    st.sampled_from([1.0, 0.5, 0.25, 3.0]),  # ties
    st.floats(0, 4),
    st.floats(1e-30, 1e30),
    st.floats(0, 1e-38),  # denormal in fp32 and bf16
)


@st.composite
def vectors(draw: st.DrawFn, least: int = 1) -> Tensor:
    """A vector [n] of any float type, signs mixed, finite after the cast."""
    dtype = draw(st.sampled_from(DTYPES))
    largest = torch.finfo(dtype).max
    values = draw(st.lists(magnitudes, min_size=least, max_size=40))
    signs = draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(values), max_size=len(values)))
    clipped = [sign * min(value, largest) for sign, value in zip(signs, values, strict=True)]
    return torch.tensor(clipped, dtype=torch.float64).to(dtype)


def exact(v: Tensor) -> list[Fraction]:
    return [Fraction(abs(value)) for value in v.double().tolist()]


def is_smallest_set(v: Tensor, keep: Tensor, p: float, ties: str) -> bool:
    """The definition, in rational arithmetic: enough mass, and not enough without its smallest member (or ties)."""
    weights, chosen = exact(v), keep.tolist()
    total = sum(weights)
    kept = [weight for weight, inside in zip(weights, chosen, strict=True) if inside]
    if total == 0:
        return not kept
    dropped = [weight for weight, inside in zip(weights, chosen, strict=True) if not inside]
    least = min(kept)
    is_upper = not dropped or (max(dropped) < least if ties == "keep" else max(dropped) <= least)
    spare = least * (kept.count(least) if ties == "keep" else 1)
    enough = sum(kept) >= Fraction(p) * total - rounding(total)
    needed = len(kept) == kept.count(least) if p == 0 else sum(kept) - spare < Fraction(p) * total + rounding(total)
    return is_upper and enough and needed


@given(vectors(), fractions)
@example(torch.tensor([1e-45, 2e-45, 5e-45]), 0.7)
@example(torch.tensor([3e38, 3e38, 3e38]), 0.5)  # the sum overflows fp32
@example(torch.tensor([1.0] + [1e-8] * 30), 0.99999999)
def test_top_p_is_the_smallest_set_with_the_mass(v: Tensor, p: float) -> None:
    keep = ds.top_p_mask(v, p)
    assert keep.dtype == torch.bool
    assert keep.shape == v.shape
    assert is_smallest_set(v, keep, p, "keep")


@given(vectors(), fractions)
@example(torch.full((8,), 5e-324, dtype=torch.float64), 0.5)
@example(torch.full((10,), 0.1), 0.3)
@example(torch.ones(7), 0.5)  # three and a half of seven equal ones: four
def test_trimmed_ties_keep_the_lowest_indices(v: Tensor, p: float) -> None:
    keep, trimmed = ds.top_p_mask(v, p), ds.top_p_mask(v, p, ties="trim")
    assert is_smallest_set(v, trimmed, p, "trim") or p == 1.0
    assert not (trimmed & ~keep).any()
    if trimmed.any():
        tied = v.abs() == v.abs()[trimmed].min()
        inside = trimmed[tied].tolist()
        assert inside == sorted(inside, reverse=True)
        assert torch.equal(trimmed[~tied], keep[~tied])


@given(vectors(), fractions, fractions)
def test_top_p_grows_with_p(v: Tensor, p: float, q: float) -> None:
    low, high = sorted((p, q))
    assert not (ds.top_p_mask(v, low) & ~ds.top_p_mask(v, high)).any()


@given(vectors())
def test_the_ends_of_top_p(v: Tensor) -> None:
    assert torch.equal(ds.top_p_mask(v, 1.0), v != 0)
    assert torch.equal(ds.top_p_mask(v, 0.0), (v.abs() == v.abs().max()) & (v != 0))


@given(st.lists(vectors(), min_size=1, max_size=4), fractions, st.sampled_from(["keep", "trim"]))
def test_rows_do_not_influence_each_other(rows: list[Tensor], p: float, ties: str) -> None:
    width = max(len(row) for row in rows)
    stacked = torch.stack([torch.nn.functional.pad(row.double(), (0, width - len(row))) for row in rows])
    whole = ds.top_p_mask(stacked[None], p, ties=ties)
    assert whole.shape == (1, len(rows), width)
    for row, keep in zip(stacked, whole[0], strict=True):
        assert torch.equal(ds.top_p_mask(row, p, ties=ties), keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_equals_a_float64_sort_on_wide_layers(dtype: torch.dtype, p: float) -> None:
    """LLaDA-8B's width, where the fp32 sums of the search round and bf16 values tie by the hundred."""
    generator = torch.Generator().manual_seed(1)
    v = (torch.randn(6, 12288, generator=generator) ** 3).to(dtype)
    ordered = v.double().abs().sort(-1, descending=True).values
    cumulated = ordered.cumsum(-1)
    first = (cumulated >= p * cumulated[:, -1:]).int().argmax(-1, keepdim=True)
    assert torch.equal(ds.top_p_mask(v, p), v.double().abs() >= ordered.gather(-1, first))


def test_empty_inputs_have_empty_masks() -> None:
    for shape in ((0,), (0, 5), (2, 0, 5), (3, 0)):
        assert ds.top_p_mask(torch.zeros(shape), 0.5).shape == shape


@given(vectors(), fractions)
def test_top_k_against_a_sort(v: Tensor, fraction: float) -> None:
    count = int(len(v) * fraction)
    weights = exact(v)
    least = sorted(weights, reverse=True)[count - 1] if count else None
    expected = [least is not None and weight >= least and weight > 0 for weight in weights]
    assert top_k_mask(v, fraction).tolist() == expected


def test_everything_by_top_k_is_every_nonzero_entry() -> None:
    assert top_k_mask(torch.tensor([0.5, 0.0, -2.0]), 1.0).tolist() == [True, False, True]


@given(vectors(), fractions)
@example(torch.tensor([1.0, 0.5, 0.25, 0.0]), 0.5)
@example(torch.tensor([1.0, 0.5, 0.25, 0.0]), 1.0)
@example(torch.tensor([1.0, 0.5, 0.25, 0.0]), 0.0)
def test_max_p_against_numpy(v: Tensor, p: float) -> None:
    kind = np.float64 if v.dtype == torch.float64 else np.float32
    weights = np.abs(v.double().numpy().astype(kind))
    assert max_p_mask(v, p).tolist() == ((weights >= kind(p) * weights.max()) & (weights > 0)).tolist()


@given(vectors(), st.floats(0, 2, width=32))
@example(torch.tensor([1.0, 0.5, 0.25, 0.0]), 1.0)
@example(torch.tensor([1.0, 0.5, 0.25, 0.0]), 0.5)
@example(torch.tensor([1.0, 0.5, 0.25, 0.0]), 0.0)
def test_threshold_against_exact_comparison(v: Tensor, threshold: float) -> None:
    expected = [weight >= Fraction(threshold) and weight > 0 for weight in exact(v)]
    assert threshold_mask(v, threshold).tolist() == expected


@given(st.lists(vectors(), min_size=1, max_size=3), fractions)
def test_flattened_top_p_against_exact_sums(rows: list[Tensor], p: float) -> None:
    width = max(len(row) for row in rows)
    v = torch.stack([torch.nn.functional.pad(row.double(), (0, width - len(row))) for row in rows])
    keep = flattened_top_p_mask(v, p)
    weights, total = exact(v.flatten()), sum(exact(v.flatten()))
    if p == 1.0 or total == 0:
        assert keep.all()
        return
    order = sorted(range(len(weights)), key=lambda index: (-weights[index], index))
    sums = np.cumsum([weights[index] for index in order])
    fits = [mass <= Fraction(p) * total for mass in sums]
    count = max(fits.index(False), 1)
    chosen = keep.flatten()[order].tolist()
    number = sum(chosen)
    assert chosen == sorted(chosen, reverse=True)
    assert number == count or all(
        abs(sums[place] - Fraction(p) * total) < rounding(total)
        for place in range(min(number, count), max(number, count))
    )


@pytest.mark.parametrize("p", [0.01, 0.4, 0.8, 1.0])
def test_flattened_masks_of_a_batch_are_those_of_its_rows(p: float) -> None:
    """Rows apart that need the first of two ties, that are full of zeros, or none of this."""
    rows = torch.tensor([[[5.0, 5.0, 0.0], [1.0, 0.5, 0.0]], [[0.0] * 3] * 2, [[6.0, 2.0, 3.0], [4.0, 1.0, 0.0]]])
    keep = flattened_top_p_mask(rows, p)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, torch.stack([flattened_top_p_mask(row, p) for row in rows]))
    assert keep[1].all()
    if p == 0.01:
        assert keep[0].flatten().nonzero().tolist() == [[0]]
        assert keep[2].flatten().nonzero().tolist() == [[0]]
    if p == 1.0:
        assert keep.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    v = torch.ones(2, 3, 8, dtype=dtype)
    v[1, 2, 5] = bad
    for p in (0.0, 0.5, 1.0):
        for rule in (ds.top_p_mask, top_k_mask, max_p_mask, threshold_mask, flattened_top_p_mask):
            with pytest.raises(NonFiniteActivations, match=r"^NaN or Inf among the values to be masked$"):
                rule(v, p)


def test_values_whose_sum_overflows_are_refused_with_advice() -> None:
    with pytest.raises(UsageError, match=r"^float64 values whose sum overflows; scale them down$"):
        ds.top_p_mask(torch.full((4,), 1e308, dtype=torch.float64), 0.5)


def test_trimmed_ties_are_counted_in_fp64() -> None:
    """fp32 sums of what is above the ties would be off by more than a tie."""
    v = torch.tensor([2.0**24, 1.5, 1.5, 1.5] + [1.0] * 10)
    target = 2.0**24 + 4.5 + 4.75
    assert int(ds.top_p_mask(v, target / (2.0**24 + 14.5), ties="trim").sum()) == 4 + 5


@pytest.mark.parametrize("p", [-0.1, 1.1, 80, math.nan])
def test_a_fraction_outside_0_to_1_is_refused_with_an_example(p: float) -> None:
    for rule in (ds.top_p_mask, top_k_mask, max_p_mask, flattened_top_p_mask):
        name = r"top_k's p \(the kept fraction\)" if rule is top_k_mask else "p"
        with pytest.raises(UsageError, match=rf"^{name} is {p}; allowed: 0 to 1 \(for example 0.8\)$"):
            rule(torch.ones(4), p)


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_a_negative_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="at least 0"):
        threshold_mask(torch.ones(4), threshold)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_other_ties_and_values_without_an_axis_are_refused(p: float) -> None:
    with pytest.raises(UsageError, match=r"^ties is 'foo'; allowed: keep, trim$"):
        ds.top_p_mask(torch.ones(3), p, ties="foo")  # type: ignore[arg-type]
    for ties in ("keep", "trim"):
        with pytest.raises(UsageError, match="a single number has no mask"):
            ds.top_p_mask(torch.tensor(1.0), p, ties=ties)  # type: ignore[arg-type]
