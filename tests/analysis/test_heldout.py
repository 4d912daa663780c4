"""Held-out loss against plain computations, and what a window is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import dllm_sparse as ds
from dllm_sparse.analysis.heldout import evaluate, held_out, windows_of
from dllm_sparse.types import NonFiniteActivations, UsageError
from tests.helpers import random_ids, tiny_lm

WINDOWS = random_ids(70, 32, seed=4)


def test_the_autoregressive_loss_is_the_mean_next_token_loss() -> None:
    lm = tiny_lm("autoregressive")
    logits = lm.logits(WINDOWS)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten())
    point = evaluate(lm, held_out(lm, WINDOWS))
    assert point.loss == pytest.approx(float(expected), rel=1e-5)
    assert point.counts is None
    total = sum(ds.log_likelihood(lm, window[:1], window[1:]) for window in WINDOWS[:3])
    assert float(point.losses[:3].sum()) == pytest.approx(-total / 31, rel=1e-5)


def test_the_diffusion_loss_scores_masked_positions_alone() -> None:
    lm = tiny_lm()
    data = held_out(lm, WINDOWS)
    masked = data.ids == lm.mask_token_id
    assert torch.equal(data.ids[~masked], WINDOWS[~masked])
    assert torch.equal(masked, data.weights > 0)
    sizes = masked.sum(-1)
    assert len(sizes.unique()) == 32  # spread evenly over 1..L
    nats = F.cross_entropy(lm.logits(data.ids).transpose(1, 2), WINDOWS, reduction="none")
    expected = ((nats * masked).sum(-1) / sizes).double()
    torch.testing.assert_close(evaluate(lm, data).losses, expected, rtol=1e-5, atol=1e-6)


def test_masks_do_not_depend_on_the_model_or_the_setting() -> None:
    first, second = held_out(tiny_lm(), WINDOWS), held_out(tiny_lm(seed=5), WINDOWS)
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, held_out(tiny_lm(), WINDOWS, seed=1).ids)


def test_sparsity_is_measured_and_the_identity_costs_nothing() -> None:
    lm = tiny_lm()
    data = held_out(lm, WINDOWS)
    dense, identity = evaluate(lm, data), evaluate(lm, data, ds.SparsityConfig(p=1.0))
    assert torch.equal(dense.losses, identity.losses)
    masked = evaluate(lm, data, ds.SparsityConfig(p=0.5))
    assert masked.counts is not None
    assert masked.counts.summary()["mean"] > 0.5
    assert masked.loss != dense.loss


def test_windows_are_cut_from_the_texts_end_to_end(toy: object) -> None:
    lm = ds.load(str(toy), device="cpu")
    assert lm.tokenizer is not None
    texts = ["abcdefgh", "ijklmnop", "qrst"]
    whole = [token for text in texts for token in lm.tokenizer(text)["input_ids"]]
    assert windows_of(lm, texts, 3, 6).flatten().tolist() == whole[:18]
    assert windows_of(lm, texts, 99, 6).shape == (len(whole) // 6, 6)
    with pytest.raises(UsageError, match="two windows of 64 are needed"):
        windows_of(lm, texts, 4, 64)
    with pytest.raises(UsageError, match="allowed: 2 to"):
        windows_of(lm, texts, 4, 1)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    lm = tiny_lm()
    lm.transformer.head.weight[3] = math.nan
    with pytest.raises(NonFiniteActivations, match="logits at step 0, behind"):
        evaluate(lm, held_out(lm, WINDOWS[:4]))
