"""What skipped channels save, against the weights they stand for."""

from __future__ import annotations

import pytest

from dllm_sparse.sparsity.gains import ffn_gain, weights_saved
from tests.helpers import tiny_lm


def test_gains_are_those_of_three_equal_matrices() -> None:
    # x feeds two of the three matrices, the intermediate one.
    gain = ffn_gain({"input": 0.7, "intermediate": 0.5})
    saved = (2 * 0.7 + 0.5) / 3
    assert gain == {
        "ffn_bytes_saved": pytest.approx(saved),
        "ffn_flops_saved": pytest.approx(saved),
        "ffn_speedup_bound": pytest.approx(1 / (1 - saved)),
    }
    assert ffn_gain({}) == {"ffn_bytes_saved": 0, "ffn_flops_saved": 0, "ffn_speedup_bound": 1.0}
    assert ffn_gain({"attention_input": 0.5})["ffn_speedup_bound"] == 1.0
    assert ffn_gain({"input": 1.0, "intermediate": 1.0})["ffn_speedup_bound"] is None  # JSON has no infinity


def test_weights_saved_are_those_behind_each_site() -> None:
    lm = tiny_lm()
    block, config = lm.transformer.blocks[0], lm.config
    behind = {
        "attention_input": block.attention.qkv_proj,
        "attention_output": block.attention.o_proj,
        "input": block.ffn.gate_up_proj,
        "intermediate": block.ffn.down_proj,
    }
    for site, linear in behind.items():
        assert weights_saved(config, {site: 0.5}) == pytest.approx(0.5 * config.layers * linear.weight.numel())
    ffn = block.ffn.gate_up_proj.weight.numel() + block.ffn.down_proj.weight.numel()
    skippable = {"input": 0.3, "intermediate": 0.9}
    saved = weights_saved(config, skippable) / (config.layers * ffn)
    assert ffn_gain(skippable)["ffn_bytes_saved"] == pytest.approx(saved)
