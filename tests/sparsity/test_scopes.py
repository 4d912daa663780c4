"""Shared masks against brute force, and padding that never counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.sparsity.rules import flattened_top_p_mask, max_p_mask, threshold_mask, top_k_mask
from dllm_sparse.sparsity.scopes import scoped_mask
from dllm_sparse.types import NonFiniteActivations

RULES = {"top_p": ds.top_p_mask, "top_k": top_k_mask, "max_p": max_p_mask, "threshold": threshold_mask}


def context(padding: list[int], tokens: int, start: int = 0) -> ds.StepContext:
    """Rows that begin with `padding[row]` positions of padding."""
    classes = torch.full((len(padding), tokens), ds.TokenClass.PROMPT, dtype=torch.int8)
    for row, count in enumerate(padding):
        classes[row, :count] = ds.TokenClass.PADDING
    return ds.StepContext(ds.Step(0, 1), classes, start)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Values [B, T, n] with ties and zeros, and the padding in front of each row (at least one real token)."""
    rows, tokens, width = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(rows, tokens, width, generator=generator)
    if draw(st.booleans()):
        values = (values * 2).round() / 2
    return values, [draw(st.integers(0, tokens - 1)) for _ in range(rows)]


configs: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda rule, p, size: {"rule": rule, "p": p, "group_size": size},
    st.sampled_from(sorted(RULES)),
    st.sampled_from([0.1, 0.4, 0.8, 0.95]),
    st.integers(1, 5),
)


@given(batches(), configs)
def test_token_scope_is_the_rule_itself(batch: tuple[Tensor, list[int]], values: dict[str, Any]) -> None:
    v, padding = batch
    config = ds.SparsityConfig(scope="token", **values)
    keep = scoped_mask(v, config.p, config, context(padding, v.shape[1]), None)
    assert torch.equal(keep, RULES[config.rule](v, config.p))


@given(batches(), configs)
def test_group_scope_against_a_loop(batch: tuple[Tensor, list[int]], values: dict[str, Any]) -> None:
    v, padding = batch
    config = ds.SparsityConfig(scope="group", **values)
    keep = scoped_mask(v, config.p, config, context(padding, v.shape[1]), None)
    for row, skipped in enumerate(padding):
        real = v[row, skipped:]
        for first in range(0, len(real), config.group_size):
            group = real[first : first + config.group_size]
            summed = torch.zeros(v.shape[-1])
            for token in group:
                if token.abs().sum() > 0:
                    summed += token.abs() / token.abs().sum()
            expected = RULES[config.rule](summed, config.p)
            got = keep[row, skipped + first : skipped + first + config.group_size]
            assert torch.equal(got, expected & (group != 0))


@pytest.mark.parametrize("ties", ["keep", "trim"])
@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
def test_unchecked_masks_are_the_same_and_keep_what_is_not_finite(scope: Any, ties: Any) -> None:
    v = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    config = ds.SparsityConfig(p=0.6, scope=scope, group_size=3, ties=ties)
    where = context([0, 2], 7)
    assert torch.equal(*(scoped_mask(v, 0.6, config, where, None, check=check) for check in (True, False)))
    for bad in (torch.nan, torch.inf):
        v[0, 4, 5] = bad
        assert scoped_mask(v, 0.6, config, where, None, check=False)[0, 4, 5]


@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
@pytest.mark.parametrize(("rule", "p"), [("top_p", 1.0), ("top_k", 1.0), ("max_p", 0.0), ("threshold", 0.0)])
def test_the_identity_keeps_what_is_not_zero(scope: Any, rule: Any, p: float) -> None:
    v = torch.tensor([[[0.5, 0.0, -2.0], [1e-30, 3.0, 0.0]]])
    config = ds.SparsityConfig(rule=rule, p=0.5, scope=scope, group_size=2)  # a schedule may ask for another p
    assert torch.equal(scoped_mask(v, p, config, context([0], 2), None), v != 0)


def test_tokens_trim_their_ties_where_asked() -> None:
    v = torch.ones(1, 2, 4)
    for ties, kept in (("keep", 4), ("trim", 2)):
        config = ds.SparsityConfig(p=0.5, ties=ties)  # type: ignore[arg-type]
        assert scoped_mask(v, 0.5, config, context([0], 2), None).sum(-1).tolist() == [[kept, kept]]


@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
def test_checked_masks_refuse_what_is_not_finite(scope: Any) -> None:
    v = torch.ones(1, 2, 4)
    v[0, 1, 2] = torch.nan
    with pytest.raises(NonFiniteActivations):
        scoped_mask(v, 0.5, ds.SparsityConfig(p=0.5, scope=scope), context([0], 2), None)


@given(batches(), configs)
def test_sequence_scope_is_the_rule_over_the_real_tokens_of_a_row(
    batch: tuple[Tensor, list[int]], values: dict[str, Any]
) -> None:
    v, padding = batch
    config = ds.SparsityConfig(scope="sequence", **values)
    keep = scoped_mask(v, config.p, config, context(padding, v.shape[1]), None)
    for row, skipped in enumerate(padding):
        real = v[row, skipped:]
        if config.rule == "top_p":
            expected = flattened_top_p_mask(real, config.p)
        else:
            expected = RULES[config.rule](real.flatten(), config.p).view(real.shape)
        assert not keep[row, :skipped].any()
        assert torch.equal(keep[row, skipped:], expected & (real != 0))


@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("start", [0, 7])
def test_padding_in_front_changes_no_mask(scope: str, rule: str, start: int) -> None:
    """In a full forward (start 0) and in a cached one whose slice holds no padding of its own."""
    v = torch.randn(1, 9, 10, generator=torch.Generator().manual_seed(3))
    config = ds.SparsityConfig(p=0.5, rule=rule, scope=scope, group_size=4)  # type: ignore[arg-type]
    alone = scoped_mask(v, 0.5, config, context([0], 9, start), None)
    shift = 3 if start == 0 else 0
    padded = torch.cat((torch.full((1, shift, 10), 9.0), v), dim=1)
    got = scoped_mask(padded, 0.5, config, context([shift], 9 + shift, start + 3), None)
    assert torch.equal(got[:, shift:], alone)


@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
def test_a_row_of_padding_only_is_possible(scope: str) -> None:
    """A finished row of an autoregressive batch is one token of padding."""
    v = torch.randn(2, 1, 6)
    config = ds.SparsityConfig(p=0.5, scope=scope)  # type: ignore[arg-type]
    keep = scoped_mask(v, 0.5, config, context([1, 0], 1, 12), None)
    assert keep[1].any()


@given(batches(), st.sampled_from([0.2, 0.8]))
def test_weighted_scores(batch: tuple[Tensor, list[int]], p: float) -> None:
    v, padding = batch
    norms = torch.rand(v.shape[-1], generator=torch.Generator().manual_seed(0)) + 0.1
    config = ds.SparsityConfig(p=p, score="weighted")
    keep = scoped_mask(v, p, config, context(padding, v.shape[1]), norms)
    assert torch.equal(keep, ds.top_p_mask(v.abs() * norms, p))
