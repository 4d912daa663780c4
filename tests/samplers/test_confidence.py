"""The pure decisions of a step, against re-statements of the published rules in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.samplers.confidence import (
    choose_tokens,
    keep_likely,
    pick_by_budget,
    pick_by_factor,
    pick_by_quota,
    pick_by_rank,
    pick_by_threshold,
    sureness,
    token_probabilities,
)

# Confidences of one row; None is a position that does not compete. Distinct: the order of ties is not defined.
rows = st.lists(st.one_of(st.none(), st.floats(0, 1, width=32, allow_subnormal=False)), min_size=1, max_size=12).filter(
    lambda row: len({value for value in row if value is not None}) == sum(value is not None for value in row)
)


def ranking(row: list[float | None]) -> list[int]:
    """Competing positions, most confident first."""
    return sorted((at for at, value in enumerate(row) if value is not None), key=lambda at: -(row[at] or 0.0))


def tensor(row: list[float | None]) -> torch.Tensor:
    return torch.tensor([[-math.inf if value is None else value for value in row]])


def picked(mask: torch.Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


@given(rows, st.integers(0, 14))
def test_quota(row: list[float | None], quota: int) -> None:
    assert picked(pick_by_quota(tensor(row), [quota])) == sorted(ranking(row)[:quota])


@given(rows, st.floats(0, 1, width=32))
def test_threshold(row: list[float | None], threshold: float) -> None:
    order = ranking(row)
    expected = {*order[:1], *(at for at in order if row[at] is not None and row[at] >= threshold)}
    assert picked(pick_by_threshold(tensor(row), threshold)) == sorted(expected)


@given(rows, st.floats(0, 1, width=32), st.integers(0, 14))
def test_budget(row: list[float | None], threshold: float, budget: int) -> None:
    order = ranking(row)[:budget]
    expected = sorted({*order[:1], *(at for at in order if (row[at] or 0.0) >= threshold)})
    assert picked(pick_by_budget(tensor(row), threshold, [budget])) == expected
    assert picked(pick_by_rank(tensor(row), torch.tensor([budget]), threshold)) == expected


@given(rows, st.floats(0.1, 5))
def test_factor(row: list[float | None], factor: float) -> None:
    """Fast-dLLM: limits -1, then 1 - factor/(i+2); stop at the first below; 0 and the last index are raised by one."""
    order = ranking(row)
    count = len(order) - 1
    for index, at in enumerate(order):
        limit = -1 if index == 0 else 1 - factor / (index + 2)
        if (row[at] or 0.0) < limit:
            count = index
            break
    if count in (0, len(order) - 1):
        count += 1
    assert picked(pick_by_factor(tensor(row), factor)) == sorted(order[: max(count, 0)])


def test_the_second_best_must_reach_two_thirds_at_factor_1() -> None:
    for second, expected in ((0.7, [0, 2]), (0.66, [0])):
        assert picked(pick_by_factor(torch.tensor([[0.9, 0.1, second, 0.05]]), 1.0)) == expected


def test_rows_are_decided_apart() -> None:
    confidence = torch.tensor([[0.9, 0.2, 0.8], [-math.inf, -math.inf, -math.inf], [0.1, 0.3, 0.2]])
    assert pick_by_quota(confidence, [2, 1, 1]).tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    assert pick_by_threshold(confidence, 0.5).tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    apart = torch.cat([pick_by_factor(row[None], 0.5) for row in confidence])
    assert torch.equal(pick_by_factor(confidence, 0.5), apart)
    assert apart.sum(-1).tolist() == [1, 0, 1]
    assert torch.equal(
        pick_by_factor(confidence, 3.0), torch.cat([pick_by_factor(row[None], 3.0) for row in confidence])
    )


def test_ranks_pick_what_quotas_pick_and_the_lowest_of_equals() -> None:
    confidence = torch.tensor([[0.9, 0.2, 0.8, 0.1], [-math.inf, 0.3, -math.inf, -math.inf], [0.1, 0.4, 0.3, 0.2]])
    for quota in ([2, 1, 1], [0, 2, 3], [4, 0, 4]):
        expected = pick_by_quota(confidence, quota)
        assert torch.equal(pick_by_rank(confidence, torch.tensor(quota)), expected)
    tied = torch.tensor([[0.1] + [0.5] * 500])
    assert pick_by_rank(tied, torch.tensor([200]))[0].nonzero().flatten().tolist() == list(range(1, 201))


def test_greedy_choice_is_the_argmax() -> None:
    logits = torch.randn(2, 3, 7)
    assert torch.equal(choose_tokens(logits, 0.0, None), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_tempered_softmax(temperature: float) -> None:
    """argmax exp(l) / (-log u)^T = argmax l/T - log(-log u), Gumbel noise: frequencies within five standard errors."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    draws = 20000
    uniform = torch.rand((1, draws, 5), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = choose_tokens(logits.expand(1, draws, 5), temperature, uniform)
    expected = (logits.double() / temperature).softmax(-1)
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((tokens[0].bincount(minlength=5) / draws - expected).abs() < 5 * error).all()


def test_probabilities_are_formed_in_the_type_asked_for() -> None:
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens = logits.argmax(-1)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        got = token_probabilities(logits, tokens, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, logits.to(dtype).softmax(-1).amax(-1))


def test_only_likely_tokens_keep_their_logits() -> None:
    shares = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.3, 0.4, 0.0, 0.3]])
    logits = (shares + 1e-20).log()

    def kept(**options: float | int) -> list[list[bool]]:
        left = keep_likely(logits, **options)  # type: ignore[arg-type]
        assert torch.equal(left, logits.where(left.isfinite(), -torch.inf))
        return left.isfinite().tolist()

    assert kept() == kept(top_p=1.0) == kept(top_k=9) == [[True] * 4] * 2
    assert kept(top_p=0.6) == [[True, False, True, False], [True, True, False, False]]
    assert kept(top_p=0.9) == [[True, False, True, True], [True, True, False, True]]
    assert kept(top_k=1) == [[True, False, False, False], [False, True, False, False]]
    assert kept(top_k=2) == [[True, False, True, False], [True, True, False, True]]  # ties stay
    assert kept(top_p=0.6, top_k=1) == kept(top_k=1)


def test_measures_of_sureness() -> None:
    shares, tokens = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]]), torch.tensor([[2, 1]])
    entropy = [sum(p * math.log(p) for p in row if p) for row in shares[0].tolist()]
    assert sureness(shares, tokens, "entropy")[0].tolist() == pytest.approx(entropy, abs=1e-6)
    assert sureness(shares, tokens, "topk_margin")[0].tolist() == pytest.approx([0.5, 0.0])
    assert sureness(shares, tokens, "maskgit_plus")[0].tolist() == pytest.approx([0.1, 0.5])
