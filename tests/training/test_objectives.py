"""Both objectives against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.training.objectives import masked_diffusion, next_token, stratified_times, weighted_loss

MASK, VOCABULARY = 9, 10


@given(rows=st.integers(1, 64), offset=st.floats(0, 1, exclude_max=True))
def test_times_cover_the_unit_interval_evenly(rows: int, offset: float) -> None:
    times = np.sort(stratified_times(rows, offset, min_time=0.0))
    gaps = np.diff(np.append(times, times[0] + 1))
    assert (times >= 0).all()
    assert (times < 1).all()
    assert np.allclose(gaps, 1 / rows)


def test_times_are_marginally_uniform() -> None:
    draws = np.array([stratified_times(4, offset) for offset in np.random.default_rng(0).random(4000)])
    assert np.allclose(draws.mean(0), 0.5, atol=0.02)
    assert draws.min() >= 1e-3


def batch(rows: int = 6, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, MASK, (rows, length))
    weights = np.ones((rows, length), np.float32)
    weights[:, :3] = 0.0
    weights[:, 10:] = 0.1
    return ids, weights


def test_diffusion_loss_equals_the_formula() -> None:
    ids, weights = batch()
    example = masked_diffusion(ids, weights, mask_token_id=MASK, rng=np.random.default_rng(3), prefix_share=0.5)
    times = stratified_times(6, np.random.default_rng(3).random())
    logits = torch.randn(6, 12, VOCABULARY)
    expected = 0.0
    for row in range(6):
        for column in range(12):
            if example.inputs[row, column] == MASK:
                cross_entropy = -torch.log_softmax(logits[row, column], -1)[ids[row, column]].item()
                expected += weights[row, column] * cross_entropy / times[row]
    got = weighted_loss(logits, torch.from_numpy(example.targets), torch.from_numpy(example.weights))
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_prompts_and_prefixes_are_never_masked() -> None:
    ids, weights = batch(rows=64)
    example = masked_diffusion(ids, weights, mask_token_id=MASK, rng=np.random.default_rng(0), prefix_share=1.0)
    masked = example.inputs == MASK
    assert not masked[:, :3].any()
    assert (example.weights > 0).tolist() == masked.tolist()
    assert (example.inputs[~masked] == ids[~masked]).all()
    assert 0 < example.normaliser < weights.sum()  # what a kept prefix takes away is not divided by either


def test_diffusion_loss_is_unbiased() -> None:
    """For predictions that ignore the input, the expected loss is the plain mean cross entropy."""
    ids, weights = batch()
    logits = torch.randn(6, 12, VOCABULARY, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(ids), reduction="none").numpy()
    mean = (losses * weights).sum() / weights.sum()
    rng = np.random.default_rng(5)
    examples = [masked_diffusion(ids, weights, mask_token_id=MASK, rng=rng) for _ in range(4000)]
    estimates = [(losses * example.weights).sum() / example.normaliser for example in examples]
    assert np.mean(estimates) == pytest.approx(mean, rel=0.05)


def test_next_token_loss_equals_the_formula() -> None:
    ids, weights = batch()
    example = next_token(ids, weights)
    logits = torch.randn(6, 12, VOCABULARY)
    log_p = torch.log_softmax(logits, -1).numpy()
    expected = sum(-weights[b, i + 1] * log_p[b, i, ids[b, i + 1]] for b in range(6) for i in range(11))
    got = weighted_loss(logits, torch.from_numpy(example.targets), torch.from_numpy(example.weights))
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert example.normaliser == pytest.approx(weights[:, 1:].sum())
