"""Likelihoods of block-causal models: a chain over blocks, each block's noise behind known tokens."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.analysis.heldout import evaluate, held_out
from dllm_sparse.evaluation.batches import score
from dllm_sparse.evaluation.decoding import default_sampler, greedy_jobs
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.plans import plan
from dllm_sparse.evaluation.requests import Pair, blocks_of
from dllm_sparse.samplers.schedule import block_spans
from tests.helpers import random_ids, tiny_lm

MASK = 39
PAIRS = [
    Pair(tuple(random_ids(1, prompt, seed=prompt)[0].tolist()), tuple(random_ids(1, target, seed=9)[0].tolist()))
    for prompt, target in ((1, 3), (5, 1), (6, 7), (8, 4), (6, 2), (2, 9))
]


def bound(lm: ds.LanguageModel, pair: Pair, block: int) -> float:
    """The exact bound, every mask of every block counted once: L / k times the mean loss of each size k, averaged."""
    whole = torch.tensor(pair.prompt + pair.target)
    cuts = [len(pair.prompt), *(at for at in range(len(pair.prompt) + 1, len(whole)) if at % block == 0), len(whole)]
    total = 0.0
    for begin, end in pairwise(cuts):
        length = end - begin
        for size in range(1, length + 1):
            losses = [loss(lm, whole, begin, end, chosen) for chosen in combinations(range(begin, end), size)]
            total += sum(losses) / len(losses) * length / size / length
    return total


def loss(lm: ds.LanguageModel, whole: Tensor, begin: int, end: int, chosen: tuple[int, ...]) -> float:
    noisy = whole.clone()[:end]
    noisy[list(chosen)] = MASK
    odds = lm.logits(noisy[None])[0].double().log_softmax(-1)
    return float(sum(odds[place, whole[place]] for place in chosen))


def scores(lm: ds.LanguageModel, options: ScoringOptions, *, share: bool) -> list[float]:
    values = [0.0] * len(PAIRS)
    for batch in plan(lm, PAIRS, options, share_prompts=share):
        for owner, value in zip(batch.owners.tolist(), score(lm, batch, options.cfg_scale)[0].tolist(), strict=True):
            values[owner] += value
    return values


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [None, 30])
def test_the_distinct_estimate_is_the_exact_bound_of_short_blocks(share: bool, budget: int | None) -> None:
    lm = tiny_lm(block_length=4)
    options = ScoringOptions(mc_num=64, estimator="distinct", batch_tokens=budget)
    expected = [bound(lm, pair, 4) for pair in PAIRS]
    assert scores(lm, options, share=share) == pytest.approx(expected, rel=1e-4)


def test_the_official_estimator_runs_along_the_chain() -> None:
    lm = tiny_lm(block_length=4)
    expected = [
        sum(
            ds.log_likelihood(lm, list(part.prompt), list(part.target), 8, 8, seed=part.seed(0))
            for part in blocks_of(pair, 4)
        )
        for pair in PAIRS
    ]
    assert scores(lm, ScoringOptions(mc_num=8), share=True) == pytest.approx(expected, rel=1e-4)
    assert scores(lm, ScoringOptions(mc_num=8), share=False) == pytest.approx(expected, rel=1e-4)


def test_many_draws_come_near_the_bound() -> None:
    lm, pair = tiny_lm(block_length=3), PAIRS[2]
    got = ds.log_likelihood(lm, list(pair.prompt), list(pair.target), mc_num=600, batch_size=60)
    assert got == pytest.approx(bound(lm, pair, 3), rel=0.03)


def test_guidance_masks_the_prompt_and_not_the_blocks_before() -> None:
    lm, pair = tiny_lm(block_length=4), Pair(PAIRS[4].prompt, (3, 5, 8))
    options = ScoringOptions(mc_num=8, estimator="distinct", cfg_scale=1.5)
    whole = torch.tensor(pair.prompt + pair.target)
    noisy = torch.stack((whole, whole))
    noisy[:, 8] = MASK  # the second block holds one token: its only mask
    noisy[1, :6] = MASK
    conditional, free = lm.logits(noisy)[:, 8]
    expected = float((free + 2.5 * (conditional - free)).log_softmax(-1)[whole[8]])
    batches = plan(lm, [pair], options, share_prompts=True)
    found = [value for batch in batches for value in score(lm, batch, 1.5)[0].tolist()]
    assert min(abs(value - expected) for value in found) < 1e-4


def test_blocks_before_the_noise_are_known_and_those_behind_unseen() -> None:
    assert block_spans(6, 13, 4) == [(6, 8), (8, 12), (12, 13)]
    assert block_spans(8, 9, 4) == [(8, 9)]
    assert [(len(part.prompt), part.target) for part in blocks_of(Pair((1, 2, 3), (4, 5, 6)), 4)] == [
        (3, (4,)),
        (4, (5, 6)),
    ]


def test_held_out_noise_lies_in_one_block_of_each_window() -> None:
    lm, windows = tiny_lm(block_length=4), random_ids(12, 14)
    data = held_out(lm, windows)
    masked = data.ids == MASK
    assert ((masked.view(12, 14)[:, :12].view(12, 3, 4).any(-1)).sum(1) == 1).all()
    assert not masked[:, 12:].any()
    assert [int(row.nonzero()[0]) // 4 for row in masked] == [0, 1, 2] * 4
    torch.testing.assert_close(data.weights.sum(-1), torch.ones(12))
    assert sorted(masked.sum(1).tolist()) == sorted([1, 2, 3, 4] * 3)
    expected = [
        -sum(float(lm.logits(ids[None])[0, at].log_softmax(-1)[window[at]]) for at in row.nonzero()[:, 0]) / row.sum()
        for ids, window, row in zip(data.ids, windows, masked, strict=True)
    ]
    torch.testing.assert_close(evaluate(lm, data).losses.float(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_generation_tasks_decode_in_the_models_own_blocks() -> None:
    """Of lengths no block divides; a greedy target, too, is decoded as `generate` would."""
    lm, prompt = tiny_lm(block_length=4), PAIRS[2].prompt
    for length in (1, 5, 7):
        alone = ds.generate(lm, prompt_ids=[list(prompt)], sampler=ds.SamplerConfig(gen_length=length))
        pair = Pair(prompt, tuple(alone.ids[0, len(prompt) :].tolist()), greedy=True)
        (job,), _ = greedy_jobs(lm, [pair], ScoringOptions())
        assert torch.equal(ds.generate(lm, prompt_ids=job.prompts, sampler=job.sampler).ids, alone.ids)
        assert default_sampler(lm, length).fitted(lm.config) == ds.SamplerConfig(gen_length=length, block_length=4)
    assert default_sampler(tiny_lm(), 50).block_length == 25
