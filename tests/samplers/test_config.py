"""SamplerConfig: what it refuses, and suggestions that work."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dllm_sparse as ds
from dllm_sparse.types import UsageError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gen_length": 0}, "gen_length is 0"),
        ({"block_length": -1}, "block_length is -1"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a number of at least 0"),
        ({"threshold": float("nan")}, "threshold is nan; allowed: 0 to 1"),
        ({"top_p": float("inf")}, "top_p is inf; allowed: above 0, at most 1"),
        ({"factor": float("inf")}, "factor is inf; it must be above 0"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"remasking": "high_confidence"}, "allowed: low_confidence, random"),
        ({"cache": "full"}, "allowed: none, prefix, dual"),
        ({"confidence_dtype": "float16"}, "allowed: model, float32, float64"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"factor": 0.0}, "factor is 0.0"),
        ({"threshold": 0.9, "factor": 1.0}, "give one of them"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ds.SamplerConfig(**values)


@given(st.integers(1, 200), st.integers(1, 200), st.one_of(st.none(), st.integers(0, 300)))
def test_blocks_and_steps_divide_or_the_suggestion_does(gen_length: int, block_length: int, steps: int | None) -> None:
    values: dict[str, Any] = {"gen_length": gen_length, "block_length": block_length, "steps": steps}
    for _ in range(2):  # first the block, then the steps
        try:
            ds.SamplerConfig(**values).check_blocks()
        except UsageError as error:
            suggestion = re.search(r"try (\w+) (\d+)$", str(error))
            if suggestion:
                values[suggestion[1]] = int(suggestion[2])
    config = ds.SamplerConfig(**values)
    config.check_blocks()
    assert config.blocks * config.block_length == gen_length
    assert config.blocks * config.steps_per_block == (config.steps or gen_length)


def test_steps_are_not_planned_when_confidence_decides() -> None:
    assert ds.SamplerConfig(gen_length=32, block_length=8, steps=4, threshold=0.9).steps_per_block == 8
    assert ds.SamplerConfig(gen_length=32, block_length=8, steps=4).steps_per_block == 1


def test_dictionaries_go_round_through_json() -> None:
    config = ds.SamplerConfig(gen_length=64, steps=32, threshold=0.9, cache="dual", seed=3)
    assert ds.SamplerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UsageError, match="unknown sampler option 'length'"):
        ds.SamplerConfig.from_dict({"length": 1})
