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


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_shifted_logits_are_scored_where_they_predict(cfg_scale: float) -> None:
    """Dream: position i predicts token i+1, so the cross-entropy of a masked token is that of the logits before it."""
    lm = tiny_lm(qkv_bias=True, logit_shift=1, text_positions=True)
    masks = stratified_masks(len(TARGET), 4, torch.Generator().manual_seed(3))
    assert len({int(row.sum()) for row in masks}) > 1
    total = 0.0
    for masked in masks:
        canvas = torch.cat((PROMPT, torch.where(masked, torch.tensor(lm.mask_token_id), TARGET)))
        free = canvas.clone()
        free[: len(PROMPT)] = torch.tensor(lm.mask_token_id)
        seen, unseen = lm.logits(canvas[None])[0], lm.logits(free[None])[0]
        logits = unseen + (cfg_scale + 1) * (seen - unseen) if cfg_scale else seen
        for place in masked.nonzero().flatten().tolist():
            before = len(PROMPT) + place - 1
            total += float(logits[before].log_softmax(-1)[TARGET[place]]) * len(TARGET) / int(masked.sum())
    got = ds.log_likelihood(lm, PROMPT, TARGET, mc_num=4, batch_size=4, cfg_scale=cfg_scale, seed=3)
    assert got == pytest.approx(total / 4, rel=1e-5)


def test_a_shifted_model_scores_one_token_exactly_and_the_first_by_itself() -> None:
    lm = tiny_lm(logit_shift=1)
    canvas = torch.cat((PROMPT, torch.tensor([lm.mask_token_id])))
    expected = float(lm.logits(canvas[None])[0, -2].log_softmax(-1)[TARGET[0]])
    assert ds.log_likelihood(lm, PROMPT, TARGET[:1], mc_num=2, batch_size=2) == pytest.approx(expected, rel=1e-5)
    alone = float(lm.logits(canvas[-1:][None])[0, 0].log_softmax(-1)[TARGET[0]])
    assert ds.log_likelihood(lm, [], TARGET[:1], mc_num=2, batch_size=2) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_tokens_the_model_has_not_are_refused(kind: str) -> None:
    lm, options = tiny_lm(kind), {"mc_num": 2, "batch_size": 2}
    for prompt, target, words in (
        ([40], [5], "prompt_ids: there is no token 40; tiny has 0 to 39"),
        ([5], [6, 99999], "target_ids: there is no token 99999"),
        ([5], [-1], "target_ids: there is no token -1"),
    ):
        with pytest.raises(UsageError, match=words):
            ds.log_likelihood(lm, prompt, target, **options)
    with pytest.raises(UsageError, match="ids: there is no token 40"):
        lm.logits(torch.tensor([[3, 40]]))


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_only_ids_on_the_cpu_are_checked(kind: str) -> None:
    """On the meta device no value can be read; reading one on a GPU waits, and ends the capture of a graph."""
    lm = tiny_lm(kind)
    lm.transformer.to("meta")
    assert lm.logits(torch.full((2, 3), 99, device="meta")).shape == (2, 3, 40)
    with pytest.raises(UsageError, match="ids: there is no token 99"):
        lm.logits(torch.full((2, 3), 99))
    with pytest.raises(UsageError, match="target_ids: there is no token 99"):
        ds.log_likelihood(lm, [5], [99])
