"""How many tokens a step commits, in plain integers."""

from __future__ import annotations


def transfer_counts(masks: int, steps: int) -> list[int]:
    """Splits `masks` over `steps` as evenly as integers allow, the first steps taking one more (LLaDA's schedule)."""
    share, extra = divmod(masks, steps)
    return [share + (index < extra) for index in range(steps)]
