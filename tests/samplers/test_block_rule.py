"""How long a block of a block-causal model takes at least, which captured steps do not wait to hear."""

from __future__ import annotations

from typing import Any

import pytest

import dllm_sparse as ds
from dllm_sparse.samplers.block_rule import BlockRule
from tests.helpers import tiny_lm


@pytest.mark.parametrize("steps", [None, 6, 16])
@pytest.mark.parametrize("minimal_topk", [1, 3])
def test_so_many_steps_are_sure_as_the_quotas_need_for_the_masks(steps: int | None, minimal_topk: int) -> None:
    lm = tiny_lm(block_length=8)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "steps": steps, "minimal_topk": minimal_topk}
    rule = BlockRule(lm, ds.SamplerConfig(**options))
    for masks in range(1, 9):
        left, taken = masks, 0
        while left > 0:
            left -= rule.quotas[taken]
            taken += 1
        assert rule.sure_steps(masks) == taken
    assert BlockRule(lm, ds.SamplerConfig(**options, threshold=0.3)).sure_steps(8) == 1
