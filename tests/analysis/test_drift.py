import numpy as np
import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.comparisons import change_histogram, relative_change
from dllm_sparse.analysis.drift import TOKEN_GROUPS, Statistics, quantile, ratio
from dllm_sparse.analysis.masks import chance_level, jaccard
from dllm_sparse.analysis.recorder import MaskRecorder
from dllm_sparse.analysis.recording import record
from dllm_sparse.analysis.tallies import TAUS, Column, change_edges
from tests.analysis.brute_force import StoringRecorder

PROMPTS = [[5, 6, 7, 8], [3, 30, 4, 40], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def run(llada):
    sampler = ds.SamplerConfig(gen_length=8, block_length=4)
    fast, slow = MaskRecorder(llada.kind, sampler), StoringRecorder(llada.kind, sampler)
    sparsity = ds.SparsityConfig(p=0.7, sites="intermediate")
    ds.generate(llada, prompt_ids=PROMPTS, sampler=sampler, sparsity=sparsity, observers=(fast, slow))
    return Statistics(fast.counts()), slow


def stacked(slow, step, rows, positions=range(4, 12)):
    """The masks of all layers of some rows at a step, [layers * rows * positions, n]."""
    chosen = [masks for (_, at), masks in slow.masks.items() if at == step]
    return torch.stack([masks[row, place] for masks in chosen for row in rows for place in positions])


def test_similarities_are_jaccards_of_the_stored_masks(run):
    statistics, slow = run
    curve = statistics.curve("intermediate", None, "response")
    first = stacked(slow, 0, range(3))
    for step in range(1, 8):
        now, before = stacked(slow, step, range(3)), stacked(slow, step - 1, range(3))
        assert curve.jaccard.micro[step] == pytest.approx(jaccard(now, before))
        assert curve.jaccard.token_mean[step] == pytest.approx(jaccard(now, before, "token_mean"), abs=1e-8)
        assert curve.drift.micro[step] == pytest.approx(jaccard(now, first))
        density = (now.double().mean() + before.double().mean()) / 2
        assert curve.jaccard.chance[step] == pytest.approx(chance_level(float(density)))
        assert curve.density[step] == pytest.approx(float(now.double().mean()))
    assert np.isnan(curve.jaccard.micro[0])
    assert curve.drift.micro[0] == 1


def test_overall_values_pool_the_steps(run):
    statistics, slow = run
    curve = statistics.curve("intermediate", None, "response")
    masks = [stacked(slow, step, range(3)) for step in range(8)]
    assert curve.jaccard_overall.micro == pytest.approx([jaccard(torch.cat(masks[1:]), torch.cat(masks[:-1]))])
    assert curve.density_overall == pytest.approx(float(torch.cat(masks).double().mean()))


def movements(slow, step, layer):
    """How far each token's values of a layer have moved since the step before, in ascending order."""
    return sorted(
        float((now - slow.values[site, step - 1][cell]).norm() / slow.values[site, step - 1][cell].norm())
        for (site, at), cells in slow.values.items()
        for cell, now in cells.items()
        if site.layer == layer and at == step
    )


def test_movements_are_summed_over_tokens_by_step_and_overall(run):
    statistics, slow = run
    curve = statistics.curve("intermediate", 1, "all")
    steps = [movements(slow, step, 1) for step in range(1, 8)]
    assert np.isnan(curve.moved_median[0])
    for moved, median, high in zip(steps, curve.moved_median[1:], curve.moved_p90[1:], strict=True):
        assert 0.97 * moved[len(moved) // 2 - 1] <= median <= 1.03 * moved[len(moved) // 2]
        assert 0.97 * moved[int(0.9 * len(moved)) - 1] <= high <= 1.03 * moved[int(0.9 * len(moved)) + 1]
    whole = sorted(change for moved in steps for change in moved)
    for tau in TAUS:
        expected = sum(change > tau for change in whole) / len(whole)
        assert curve.moved_overall[f"share_above_{tau:g}"] == pytest.approx(expected)
    assert curve.moved_overall["median"] == pytest.approx(whole[len(whole) // 2], rel=0.05)
    assert curve.moved_overall["p90"] == pytest.approx(whole[int(0.9 * len(whole))], rel=0.1)


def test_unions_of_one_layer_are_its_own(run):
    statistics, slow = run
    layers = [statistics.unions("intermediate", layer) for layer in statistics.counts.layers]
    for layer, unions in zip(statistics.counts.layers, layers, strict=True):
        kept = [
            [cells[row, 4 + 4 * (at // 4) + place] for row in range(3) for place in range(4)]
            for (site, at), cells in slow.masks.items()
            if site.layer == layer
        ]
        assert unions[0].density == pytest.approx(
            float(torch.stack([m for step in kept for m in step]).double().mean())
        )
    assert layers[0][0].density != layers[1][0].density


def test_the_interval_resamples_whole_prompts(run):
    statistics, slow = run
    curve = statistics.curve("intermediate", None, "response")
    own = [jaccard(stacked(slow, 3, [row]), stacked(slow, 2, [row])) for row in range(3)]
    assert min(own) - 1e-9 <= curve.jaccard.low[3] <= curve.jaccard.micro[3] <= curve.jaccard.high[3] <= max(own) + 1e-9
    again = Statistics(statistics.counts).curve("intermediate", None, "response")
    assert np.array_equal(again.jaccard.low, curve.jaccard.low, equal_nan=True)


def test_classes_add_up_to_the_groups(run):
    statistics, _ = run
    assert statistics.token_groups() == list(TOKEN_GROUPS)
    parts = [statistics.curve("intermediate", None, name).count for name in ("masked", "committed", "decoded")]
    assert np.array_equal(sum(parts), statistics.curve("intermediate", None, "response").count)
    assert (statistics.curve("intermediate", None, "all").count == 3 * 12).all()


def test_unions_grow_from_the_density_towards_the_block(run):
    statistics, _ = run
    unions = statistics.unions("intermediate", None)
    assert [union.tokens for union in unions] == [1, 2, 4, None]
    densities = [union.density for union in unions]
    assert densities == sorted(densities)
    assert densities[2] == densities[3]  # the block has 4 tokens
    assert unions[1].independent == pytest.approx(1 - (1 - densities[0]) ** 2)


def test_nothing_is_said_about_what_was_not_seen(llama):
    sampler = ds.SamplerConfig(gen_length=4)
    recorder = MaskRecorder(llama.kind, sampler)
    run = {"prompt_ids": PROMPTS[:1], "sampler": sampler, "sparsity": ds.SparsityConfig()}
    ds.generate(llama, **run, observers=(recorder,))
    statistics = Statistics(recorder.counts())
    assert statistics.token_groups() == ["response", "committed", "prompt", "all"]
    curve = statistics.curve("input", 0, "response")
    assert np.isnan(curve.density[0])  # the prefill feeds the prompt alone
    assert np.isfinite(curve.density[1:]).all()
    assert np.isnan(curve.jaccard.low).all()  # one prompt


def test_quantiles_of_the_histogram_are_close_to_exact_ones():
    generator = torch.Generator().manual_seed(0)
    change = torch.empty(2, 20_000).log_normal_(-3, 1.2, generator=generator)
    classes = torch.full((2, 20_000), 2)
    histogram = change_histogram(change, change_edges(), classes, torch.ones_like(change))
    assert int(histogram.sum()) == change.numel()
    for level in (0.5, 0.9):
        exact = float(change.double().quantile(level))
        assert float(quantile(histogram[2].double().numpy(), level)) == pytest.approx(exact, rel=0.01)
    assert np.isnan(quantile(np.zeros(len(change_edges()) + 1), 0.5))


def test_the_shares_of_movers_are_exact(run):
    statistics, slow = run
    moved = statistics.curve("intermediate", 1, "all").moved_share[0.1][5]
    values = [
        (v, slow.values[site, 4][cell])
        for (site, at), cells in slow.values.items()
        for cell, v in cells.items()
        if site.layer == 1 and at == 5
    ]
    expected = [float((now - old).norm() / old.norm()) > 0.1 for now, old in values]
    assert moved == pytest.approx(sum(expected) / len(expected))


def test_a_token_that_was_zero_has_moved_infinitely_far_or_not_at_all():
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert relative_change(one, zero).item() == torch.inf
    assert relative_change(zero, zero).item() == 0


def test_ratio_of_nothing_is_nan():
    assert np.isnan(ratio(np.array([1.0]), np.array([0.0]))).all()


def test_the_block_of_every_step_is_known(run):
    statistics, _ = run
    assert statistics.counts.blocks == [(step // 4, step % 4) for step in range(8)]
    assert all(bool((tally.steps[..., Column.TOKENS] >= 0).all()) for tally in statistics.counts.sites.values())


def test_observed_masks_are_those_of_dense_decoding(llada):
    sampler, sparsity = ds.SamplerConfig(gen_length=8, block_length=4), ds.SparsityConfig(p=0.6)
    observed = record(llada, PROMPTS, sampler, sparsity, apply=False)
    dense = ds.generate(llada, prompt_ids=PROMPTS, sampler=sampler)
    assert observed.ids == dense.ids[:, 4:].tolist()
    assert record(llada, PROMPTS, sampler, sparsity).ids != observed.ids
    assert 0 < Statistics(observed.counts).curve("input", None, "all").density_overall < 1
