"""The bound of uniform noise against a plain loop over copies, through both entrances."""

from __future__ import annotations

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.evaluation.batches import score
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.plans import plan
from dllm_sparse.evaluation.requests import Pair
from dllm_sparse.samplers.likelihood import stratified_masks
from dllm_sparse.types import UsageError
from tests.models.random_hf import random_denoiser

PAIR = Pair((5, 17, 40, 8), (9, 33, 61, 12, 70))
LONG = Pair((5, 17), tuple(range(20, 31)))  # a canvas of 8 and one of 3


@pytest.fixture(scope="module")
def lm() -> ds.LanguageModel:
    return ds.wrap(random_denoiser())


def plain(lm: ds.LanguageModel, prompt: tuple[int, ...], target: tuple[int, ...], seed: int, copies: int = 6) -> float:
    """transformers' model on every copy alone; one canvas."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    masks = stratified_masks(len(target), copies, generator)
    drawn = torch.randint(96, masks.shape, generator=generator)
    for mask, noise in zip(masks, drawn, strict=True):
        canvas = torch.where(mask, noise, torch.tensor(target))[None]
        logits = lm.transformer.model(input_ids=torch.tensor([prompt]), decoder_input_ids=canvas).logits[0]
        odds = logits.log_softmax(-1)[range(len(target)), list(target)]
        total += float(odds[mask].sum()) * len(target) / int(mask.sum()) / copies
    return total


def test_the_bound_is_that_of_a_plain_loop(lm: ds.LanguageModel) -> None:
    expected = plain(lm, PAIR.prompt, PAIR.target, seed=4)
    found = ds.log_likelihood(lm, list(PAIR.prompt), list(PAIR.target), mc_num=6, batch_size=6, seed=4)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pair", [PAIR, LONG])
def test_tasks_are_scored_by_the_same_bound(lm: ds.LanguageModel, pair: Pair) -> None:
    seed = pair.seed(0)
    expected = ds.log_likelihood(lm, list(pair.prompt), list(pair.target), mc_num=6, batch_size=6, seed=seed)
    for tokens in (4096, 30):  # one forward a canvas, or several
        batches = plan(lm, [pair], ScoringOptions(mc_num=6, batch_tokens=tokens), share_prompts=True)
        found = sum(float(score(lm, batch)[0].sum()) for batch in batches)
        assert found == pytest.approx(expected, rel=1e-4)


def test_what_it_cannot_do_is_said(lm: ds.LanguageModel) -> None:
    with pytest.raises(UsageError, match="no mask token to hide"):
        ds.log_likelihood(lm, [5], [6, 7], mc_num=4, batch_size=4, cfg_scale=1.0)
    with pytest.raises(UsageError, match="monte_carlo only"):
        plan(lm, [PAIR], ScoringOptions(estimator="pseudo"), share_prompts=True)
