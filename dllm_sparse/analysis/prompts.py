"""The prompts used when none are given: beginnings of stories and explanations."""

from __future__ import annotations

from importlib.resources import files

DEFAULT_COUNT = 8
"""How many a report uses by default: half of them, for an answer within a minute on a laptop."""


def bundled_prompts(count: int | None = None) -> list[str]:
    """The first `count` of the sixteen prompts (None: all), in a fixed order."""
    text = files("dllm_sparse.analysis").joinpath("prompts.txt").read_text(encoding="utf-8")
    return text.splitlines()[:count]
