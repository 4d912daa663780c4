"""Masks recomputed at every step, or kept for several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from tests.helpers import Recorder, random_ids, tiny_lm
from tests.sparsity.sampling import MASK, PROMPT, SAMPLER, decode


def test_masks_are_recomputed_at_every_step_from_that_step() -> None:
    lm, seen = tiny_lm(), Recorder()
    schedule = ((0.0, 0.3), (1.0, 0.9))
    decode(lm, ds.SparsityConfig(schedule=schedule), observers=[seen])
    config = ds.SparsityConfig(schedule=schedule)
    assert [context.step.index for _, _, _, context in seen.masks] == [step for step in range(4) for _ in range(4)]
    for _, values, keep, context in seen.masks:
        assert torch.equal(keep, ds.top_p_mask(values, config.p_at(context.step.index / 3)))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("scope", ["token", "group"])
def test_reused_masks_are_those_of_the_same_positions(cache: Any, scope: Any) -> None:
    """Brute force: a dictionary from absolute position to the mask that was last computed there."""
    lm, seen = tiny_lm(), Recorder()
    sampler = ds.SamplerConfig(gen_length=12, block_length=4, cache=cache)
    config = ds.SparsityConfig(p=0.6, refresh_every=3, scope=scope, group_size=2)
    ds.generate(lm, prompt_ids=PROMPT, sampler=sampler, sparsity=config, observers=[seen])
    known: dict[tuple[ds.Site, int], Tensor] = {}
    reused = 0
    for site, values, keep, context in seen.masks:
        if context.step.index % 3 == 0:
            if scope == "token":
                assert torch.equal(keep, ds.top_p_mask(values, 0.6))
            for token in range(keep.shape[1]):
                known[site, context.start + token] = keep[:, token]
        else:
            for token in range(keep.shape[1]):
                assert torch.equal(keep[:, token], known[site, context.start + token])
                reused += 1
    assert reused


def test_an_autoregressive_step_reuses_the_mask_of_the_last_refresh() -> None:
    lm, seen = tiny_lm("autoregressive"), Recorder()
    config = ds.SparsityConfig(p=0.6, refresh_every=3)
    ds.generate(lm, prompt_ids=PROMPT, sampler=ds.SamplerConfig(gen_length=8), sparsity=config, observers=[seen])
    last: dict[ds.Site, Tensor] = {}
    for site, values, keep, context in seen.masks:
        if context.step.index % 3 == 0:
            assert torch.equal(keep, ds.top_p_mask(values, 0.6))
            last[site] = keep[:, -1:]
        else:
            assert torch.equal(keep, last[site])


def test_a_new_canvas_does_not_reuse_old_masks() -> None:
    lm, config = tiny_lm(), ds.SparsityConfig(p=0.5, refresh_every=4)
    expected = decode(lm, config)
    with ds.sparsify(lm, config) as handle:
        for seed in (7, 8):  # another prompt of the same shape first
            other = random_ids(2, 5, seed=seed)
            ds.generate(lm, prompt_ids=other, sampler=SAMPLER, observers=[handle])
        got = ds.generate(lm, prompt_ids=PROMPT, attention_mask=MASK, sampler=SAMPLER, observers=[handle]).ids
    assert torch.equal(got, expected)
