"""Layer-wise instruments: ranks of known activations, single-layer curves, allocations, and experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.experts import by_layer, heatmap, interpolated
from dllm_sparse.analysis.heldout import LossProbe, evaluate, held_out
from dllm_sparse.analysis.layers import (
    allocate,
    allocated_curve,
    layer_sensitivity,
    loss_curve,
    rank_windows,
    site_ranks,
    weight_scores,
)
from dllm_sparse.types import UsageError
from tests.helpers import Recorder, own_words, random_ids, tiny_lm
from tests.models.random_hf import random_model

WINDOWS = random_ids(60, 20, seed=9)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_ranks_are_those_of_the_recorded_activations(kind: str) -> None:
    """One SVD over the dense values of a whole pass, whatever the batches."""
    lm = tiny_lm(kind)
    data = held_out(lm, WINDOWS)
    recorder = Recorder()
    for sites in ("input", "gate", "up", "intermediate"):
        evaluate(lm, data, ds.SparsityConfig(p=0.5, sites=sites), (recorder,), apply=False)  # type: ignore[arg-type]
    values = {
        site: torch.cat([v.flatten(0, 1) for s, v, _, _ in recorder.masks if s == site]) for site, *_ in recorder.masks
    }
    ranks = site_ranks(lm, data)
    assert len(ranks) == len(values) == 8
    for found in ranks:
        x = values[ds.Site(found.layer, found.site)]  # type: ignore[arg-type]
        assert (found.tokens, found.width) == tuple(x.shape)
        assert found.rank == pytest.approx(ds.effective_rank(x), rel=1e-6)
        assert found.to_dict()["normalised"] == pytest.approx(ds.effective_rank(x, normalised=True), rel=1e-6)


def test_the_published_protocol_depends_on_the_batch_and_is_marked_so() -> None:
    lm = tiny_lm()
    data = held_out(lm, WINDOWS)
    plain, published = site_ranks(lm, data), site_ranks(lm, data, published=True)
    assert [rank.published for rank in plain] == [None] * 8
    for exact, batched in zip(plain, published, strict=True):
        assert exact.rank == batched.rank
        assert batched.published == pytest.approx(exact.rank, rel=1e-4)  # one batch: the same matrix, in fp32
    small = site_ranks(lm, data[:3], published=True)
    assert all(rank.published is not None and rank.published <= 60 for rank in small)


def test_layers_may_be_taken_in_several_passes() -> None:
    lm = tiny_lm()
    data = held_out(lm, WINDOWS)
    assert site_ranks(lm, data, memory=1) == site_ranks(lm, data)
    assert rank_windows(lm, 20) == 5  # 24 features wide: 100 tokens


def test_the_curve_brackets_its_crossing() -> None:
    lm = tiny_lm()
    data = own_words(lm, held_out(lm, WINDOWS))
    curve = loss_curve(LossProbe(lm, data), ds.SparsityConfig(), retain=0.9, evaluations=8)
    value, crossed = curve.critical(0.9)
    assert crossed
    assert curve.kept[0] == 1.0
    low, high, share = curve.bracket(0.9)
    assert curve.kept[low] >= 0.9 > curve.kept[high]
    between = curve.sparsity[low] + share * (curve.sparsity[high] - curve.sparsity[low])
    assert between == pytest.approx(value)
    assert curve.to_dict(0.9)["critical"] == value


def test_one_layer_tolerates_more_than_both() -> None:
    lm = tiny_lm()
    data = own_words(lm, held_out(lm, WINDOWS))
    both = loss_curve(LossProbe(lm, data), ds.SparsityConfig(), retain=0.9).critical(0.9)[0]
    alone = [curve.critical(0.9)[0] for curve in layer_sensitivity(LossProbe(lm, data), ds.SparsityConfig(), 0.9)]
    assert len(alone) == 2
    assert max(alone) > both


def test_allocations_keep_the_mean_and_the_order() -> None:
    knobs = allocate([0.1, 0.4, 0.2, 0.9], total=0.8)
    assert np.mean(knobs) == pytest.approx(0.8)
    assert list(np.argsort(knobs)) == [0, 2, 1, 3]
    assert max(knobs) <= 0.9 + 1e-12
    assert allocate([0.3, 0.3], 0.7) == (0.7, 0.7)
    assert allocate([0.1, 0.9], 1.0) == (1.0, 1.0)
    with pytest.raises(UsageError, match="0 to 1"):
        allocate([1.0], 1.2)


def test_an_allocation_runs_with_its_own_knob_in_every_layer() -> None:
    lm = tiny_lm()
    data = held_out(lm, WINDOWS)
    curve = allocated_curve(LossProbe(lm, data), ds.SparsityConfig(), [0.0, 1.0], retain=0.9)
    rows = {row["layer"]: row["sparsity"] for row in curve.counts[1]["by_layer"] if row["site"] == "input"}
    assert rows[0] > rows[1]  # layer 1 has the higher score, hence the higher p
    assert curve.sparsity[0] < 0.01


def test_weight_scores_are_1_for_equal_neurons() -> None:
    lm = tiny_lm()
    weight = lm.transformer.ffns[0].down_proj.weight
    weight.copy_(weight / weight.norm(dim=0))
    scores = weight_scores(lm)
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert scores[1] < 0.999


def test_experts_are_summarised_under_both_averages() -> None:
    rows = [
        {"layer": 0, "site": "input", "expert": e, "tokens": t, "entries": 4 * t, "sparsity": s}
        for e, t, s in [(0, 100, 0.50), (1, 50, 0.52), (2, 25, 0.54), (3, 25, 0.51), (5, 20, 0.95), (6, 2, 0.0)]
    ]
    (found,) = by_layer(rows, experts=8)
    assert found.token_weighted == pytest.approx(sum(r["tokens"] * r["sparsity"] for r in rows) / 222)
    assert found.unweighted == pytest.approx(np.mean([r["sparsity"] for r in rows]))
    assert found.outliers == (5,)  # expert 6 heard two tokens: too few to be called anything
    counts = np.array([100, 50, 25, 25, 0, 20, 2, 0])
    assert found.routing_cv == pytest.approx(counts.std() / counts.mean())
    table = heatmap(rows, "input")
    assert table.shape == (1, 7)
    assert np.isnan(table[0, 4])
    assert table[0, 5] == 0.95
    assert heatmap(rows, "input", "tokens")[0, 0] == 100


def test_interpolated_rows_lie_between_two_settings() -> None:
    low = [{"layer": 0, "site": "input", "expert": 1, "tokens": 5, "entries": 20, "sparsity": 0.2}]
    high = [{**low[0], "sparsity": 0.6}]
    assert interpolated(low, high, 0.25)[0]["sparsity"] == pytest.approx(0.3)


def test_a_mixture_of_experts_end_to_end() -> None:
    lm = ds.wrap(random_model("olmoe"))
    data = own_words(lm, held_out(lm, WINDOWS + 3))
    curve = loss_curve(LossProbe(lm, data), ds.SparsityConfig(), retain=0.9, evaluations=5)
    low, high, share = curve.bracket(0.9)
    rows = interpolated(curve.counts[low]["by_expert"], curve.counts[high]["by_expert"], share)
    layers = by_layer(rows, lm.config.experts)
    assert [(found.layer, found.site) for found in layers] == [
        (layer, site) for layer in range(2) for site in ("input", "intermediate")
    ]
    value = curve.critical(0.9)[0]
    assert min(f.token_weighted for f in layers) <= value <= max(f.token_weighted for f in layers)
    with pytest.raises(UsageError, match="dense FFNs"):
        weight_scores(lm)
    assert site_ranks(lm, data) == []
