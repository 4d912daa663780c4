import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.analysis.masks import (
    chance_corrected,
    chance_level,
    consensus_mask,
    half_life,
    independent_union,
    jaccard,
    window_unions,
)
from dllm_sparse.types import UsageError

CASES = json.loads((Path(__file__).parents[1] / "golden" / "topp.json").read_text())["jaccard"]


def bits(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_jaccard_equals_the_published_definition(case):
    a, b = bits(case["mask_a"]), bits(case["mask_b"])
    for average, expected in (("micro", case["micro"]), ("token_mean", case["token_mean_excluding_empty"])):
        value = jaccard(a, b, average=average)
        if expected is None:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(expected, abs=1e-6)


def test_jaccard_says_what_it_cannot_compare():
    with pytest.raises(UsageError, match="micro, token_mean"):
        jaccard(torch.ones(1, 4), torch.ones(1, 4), average="macro")
    with pytest.raises(UsageError, match=r"\[1, 4\] and \[2, 4\]"):
        jaccard(torch.ones(1, 4), torch.ones(2, 4))


@given(st.floats(0.05, 0.95))
def test_independent_masks_are_at_chance(density):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(40, 5000, generator=generator) < density for _ in range(2))
    assert chance_corrected(jaccard(a, b), chance_level(density)) == pytest.approx(0, abs=0.02)
    assert chance_corrected(1.0, chance_level(density)) == 1


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([1.0, 0.75, 0.5], 2.0),
        ([1.0, 0.8, 0.4], 1.75),
        ([1.0, None, 0.4, 0.3], 1 + 2 / 3 - 0.0),
        ([1.0, 0.9, 0.8], None),
        ([0.4], 0.0),
        ([], None),
    ],
)
def test_half_life_is_the_first_crossing_of_one_half(curve, expected):
    assert half_life(curve) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("tokens", [1, 5, 8, 13])
def test_window_unions_equal_the_plain_loop(tokens):
    generator = torch.Generator().manual_seed(tokens)
    keep = torch.rand(2, tokens, 17, generator=generator) < 0.3
    valid = torch.rand(2, tokens, generator=generator) < 0.9
    sizes = [size for size in (1, 2, 4, 8) if size <= tokens]
    for size, (kept, windows) in zip(sizes, window_unions(keep, valid, sizes), strict=True):
        for row in range(2):
            spans = [slice(end - size, end) for end in range(tokens, size - 1, -size)]
            counted = [span for span in spans if bool(valid[row, span].all())]
            assert int(windows[row]) == len(counted)
            assert int(kept[row]) == sum(int(keep[row, span].any(0).sum()) for span in counted)


def test_consensus_keeps_the_most_frequent_channels():
    keep = bits(["1100", "1010", "1010"])[None]
    counted = torch.tensor([[True, True, True]])
    assert consensus_mask(keep, counted).tolist() == [[[True, False, True, False]]]
    assert consensus_mask(keep, counted & torch.tensor([[True, False, False]])).tolist() == [
        [[True, True, False, False]]
    ]


def test_independent_union_is_the_product_rule():
    assert independent_union(0.5, 2) == 0.75
    assert np.isclose(independent_union(0.367, 4), 0.839, atol=1e-3)


def test_tokens_own_values_are_divided_in_fp64():
    keep, other = bits(["100", "110"]), bits(["111", "111"])
    assert jaccard(keep, other, "token_mean") == (1 / 3 + 2 / 3) / 2
    assert jaccard(bits(["100"]), bits(["111"]), "token_mean") == 1 / 3
