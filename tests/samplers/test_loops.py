"""What does not fit a model's context is refused with options that do."""

from __future__ import annotations

import re
from typing import Any

import pytest

import dllm_sparse as ds
from dllm_sparse.samplers.loops import check_context, fitted
from dllm_sparse.types import UsageError
from tests.helpers import tiny_lm
from tests.models.random_hf import random_denoiser

LIMIT = 96
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("diffusion", {}, {"block_length": 8}),
    ("diffusion", {}, {"block_length": 8, "steps": 48}),
    ("diffusion", {}, {"block_length": 8, "threshold": 0.9}),
    ("diffusion", {}, {"remasking": "entropy", "steps": 17}),
    ("diffusion", {}, {"remasking": "entropy", "cache": "prefix", "block_length": 8, "steps": 24}),
    ("diffusion", {"block_length": 8}, {}),
    ("diffusion", {"block_length": 8}, {"steps": 24}),
    ("autoregressive", {}, {}),
]


def follow(lm: ds.LanguageModel, prompt: int, **options: Any) -> None:
    """Takes up the advice, once: nothing may be wrong with it."""
    with pytest.raises(UsageError, match=f"exceeds the context of {lm.config.max_positions}; ") as caught:
        check_context(lm, prompt, fitted(lm, ds.SamplerConfig(**options)))
    advice = str(caught.value).partition("; ")[2]
    better = {name: int(value) for name, value in re.findall(r"(gen_length|block_length|steps) (\d+)", advice)}
    shorter = re.search(r"shorten the prompt to (\d+) tokens", advice)
    assert better or shorter
    if shorter:
        assert 0 < int(shorter[1]) < prompt
        prompt = int(shorter[1])
    check_context(lm, prompt, fitted(lm, ds.SamplerConfig(**{**options, **better})))


@pytest.mark.parametrize(("kind", "facts", "options"), CASES)
def test_the_way_out_works(kind: str, facts: dict[str, Any], options: dict[str, Any]) -> None:
    lm = tiny_lm(kind, **facts, max_positions=LIMIT)
    for gen_length in (24, 48) if "steps" in options else (24, 48, 120):
        for prompt in (LIMIT - 1, LIMIT - 5, LIMIT - 20, LIMIT, LIMIT + 7):
            follow(lm, prompt, gen_length=gen_length, **options)


def test_the_longest_generation_is_named() -> None:
    lm = tiny_lm(max_positions=512)
    for prompt, gen_length, steps, advice in (
        (3, 1024, None, "try gen_length 480"),
        (3, 1024, 256, "try gen_length 480, steps 120"),
        (500, 32, None, "try gen_length 12, block_length 12"),
        (512, 32, None, "shorten the prompt to 480 tokens"),
        (512, 1024, None, "shorten the prompt to 480 tokens, try gen_length 32"),
    ):
        with pytest.raises(UsageError, match=f"; {advice}$"):
            check_context(lm, prompt, ds.SamplerConfig(gen_length=gen_length, steps=steps))
    with pytest.raises(UsageError, match=r"; try gen_length 509 or less$"):
        check_context(tiny_lm("autoregressive", max_positions=512), 3, ds.SamplerConfig(gen_length=1024))


def test_canvases_stay_whole() -> None:
    lm = ds.wrap(random_denoiser())
    limit = lm.config.max_positions
    for prompt, gen_length in ((limit - 20, 32), (limit - 3, 8), (limit, 8)):
        follow(lm, prompt, gen_length=gen_length)
