"""Log-likelihoods: exact where they can be, seeded where they are sampled."""

from __future__ import annotations

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.samplers.likelihood import stratified_masks
from dllm_sparse.types import UsageError
from tests.helpers import random_ids, tiny_lm

PROMPT, TARGET = random_ids(1, 6, seed=1)[0], random_ids(1, 5, seed=2)[0]


def test_autoregressive_is_the_sum_of_next_token_log_probabilities() -> None:
    lm = tiny_lm("autoregressive")
    expected = 0.0
    for place, token in enumerate(TARGET.tolist()):
        logits = lm.logits(torch.cat((PROMPT, TARGET[:place]))[None])[0, -1]
        expected += float(logits.log_softmax(-1)[token])
    assert ds.log_likelihood(lm, PROMPT, TARGET) == pytest.approx(expected, rel=1e-5)
    assert ds.log_likelihood(lm, PROMPT.tolist(), TARGET.tolist(), mc_num=3, seed=9) == pytest.approx(
        expected, rel=1e-5
    )


def test_autoregressive_without_a_prompt_starts_from_bos() -> None:
    lm = tiny_lm("autoregressive")
    bos = torch.tensor([lm.config.bos_token_id])
    assert ds.log_likelihood(lm, [], TARGET) == ds.log_likelihood(lm, bos, TARGET)
    with pytest.raises(UsageError, match="BOS"):
        ds.log_likelihood(tiny_lm("autoregressive", bos_token_id=None, eos_token_id=None), [], TARGET)


def test_diffusion_of_one_token_is_exact() -> None:
    lm = tiny_lm()
    canvas = torch.cat((PROMPT, torch.tensor([lm.mask_token_id])))
    expected = float(lm.logits(canvas[None])[0, -1].log_softmax(-1)[TARGET[0]])
    for seed in (0, 1):
        got = ds.log_likelihood(lm, PROMPT, TARGET[:1], mc_num=2, batch_size=2, seed=seed)
        assert got == pytest.approx(expected, rel=1e-5)


def test_diffusion_of_two_tokens_averages_to_the_exact_bound() -> None:
    """Mask counts 1 and 2 are equally likely; of one mask, both places are: the mean over all draws is known."""
    lm = tiny_lm(seed=2)
    target = TARGET[:2]

    def masked_losses(hidden: tuple[int, ...]) -> float:
        canvas = torch.cat((PROMPT, target))
        canvas[[len(PROMPT) + place for place in hidden]] = lm.mask_token_id
        log_probabilities = lm.logits(canvas[None])[0, len(PROMPT) :].log_softmax(-1)
        return float(sum(log_probabilities[place, target[place]] for place in hidden))

    bound = 0.5 * masked_losses((0, 1)) + 0.5 * 0.5 * 2 * (masked_losses((0,)) + masked_losses((1,)))
    # Stratification makes the mask counts exact in every batch; only the places of single masks are left to chance.
    values = [ds.log_likelihood(lm, PROMPT, target, mc_num=512, batch_size=64, seed=seed) for seed in range(3)]
    spread = abs(masked_losses((0,)) - masked_losses((1,))) / (256**0.5)
    assert spread > 0
    assert all(abs(value - bound) < 5 * spread for value in values)
    assert len(set(values)) > 1  # two seeds may draw the same number of each mask
    assert ds.log_likelihood(lm, PROMPT, target, mc_num=512, batch_size=64, seed=1) == values[1]


def test_mask_counts_are_spread_evenly() -> None:
    masks = stratified_masks(8, 8, torch.Generator().manual_seed(0))
    assert sorted(masks.sum(-1).tolist()) == list(range(1, 9))


def test_nothing_to_score_is_certain_and_nonsense_is_refused() -> None:
    lm = tiny_lm()
    assert ds.log_likelihood(lm, PROMPT, []) == 0.0
    with pytest.raises(UsageError, match=r"mc_num 10 is not a multiple of batch_size 4; try mc_num \d+"):
        ds.log_likelihood(lm, PROMPT, TARGET, mc_num=10, batch_size=4)
    with pytest.raises(UsageError, match="context 96"):
        ds.log_likelihood(lm, random_ids(1, 95)[0], TARGET)
    with pytest.raises(UsageError, match="1-D"):
        ds.log_likelihood(lm, random_ids(2, 3), TARGET)
