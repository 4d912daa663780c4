"""The prompts a report uses when none are given: sixteen beginnings of stories and explanations."""

from __future__ import annotations

from importlib.resources import files


def bundled_prompts() -> list[str]:
    """The sixteen prompts, in a fixed order."""
    return files("dllm_sparse.analysis").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
