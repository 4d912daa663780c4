"""How many tokens a step commits, in plain numbers."""

from __future__ import annotations

from itertools import pairwise

import torch


def transfer_counts(masks: int, steps: int, *, lead: bool = False) -> list[int]:
    """Splits `masks` over `steps` as evenly as integers allow, the first steps taking one more (LLaDA's schedule).

    With `lead` the first of several steps takes one alone, and the others share the rest.
    """
    if lead and masks and steps > 1:
        return [1, *transfer_counts(masks - 1, steps - 1)]
    share, extra = divmod(masks, steps)
    return [share + (index < extra) for index in range(steps)]


def timestep_shares(steps: int, eps: float) -> list[float]:
    """The share of the masks still there that each step commits: 1 - s/t for times from 1 to eps, all at the last.

    Values of fp32 arithmetic, as Dream's: what they are multiplied with is cut to an integer.
    """
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32, device="cpu")
    shares: list[float] = (1 - times[1:] / times[:-1]).tolist()
    return [*shares[:-1], 1.0]


def timestep_count(masks: int, rows: int, share: float) -> int:
    """Tokens every one of `rows` commits of `masks` in all: the mean a row times the share, in fp32, cut off."""
    return int(torch.tensor(masks, device="cpu") / rows * share)


def block_spans(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Positions start..stop cut at the multiples of `length`: [begin, end) of every block's part."""
    cuts = [start, *range((start // length + 1) * length, stop, length), stop]
    return list(pairwise(cuts))
