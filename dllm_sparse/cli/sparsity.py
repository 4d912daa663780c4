"""Parsing of sparsity options that are not plain values."""

from __future__ import annotations

from dllm_sparse.types import UsageError


def parse_schedule(text: str | None) -> tuple[tuple[float, float], ...] | None:
    """`0:0.7,1:0.9` -> ((0.0, 0.7), (1.0, 0.9)); raises UsageError for anything else."""
    if text is None:
        return None
    try:
        points = [tuple(float(part) for part in point.split(":")) for point in text.split(",")]
        return tuple((at, p) for at, p in points)
    except ValueError as error:
        raise UsageError(f"--p-schedule is {text!r}; expected fraction:p points such as 0:0.7,1:0.9") from error
