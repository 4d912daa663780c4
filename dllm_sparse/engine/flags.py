"""Flags the device leaves for the host, read without holding up the launches."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Flags:
    """Reads a small device tensor as it was behind a step, while later steps may already be running.

    On a GPU every copy goes to pinned memory behind an event of its own; on a CPU the same calls just copy. At most two
    copies may wait to be read.
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._copies = deque(torch.empty_like(source, device="cpu", pin_memory=source.is_cuda) for _ in range(2))
        self._posted: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def post(self) -> None:
        """Copies what the work launched so far leaves; does not wait."""
        target = self._copies[0]
        self._copies.rotate()
        target.copy_(self._source, non_blocking=True)
        event = None
        if self._source.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._posted.append((target, event))

    def read(self) -> list[bool]:
        """The oldest copy not read yet; waits for the work in front of it alone."""
        values, event = self._posted.popleft()
        if event is not None:
            event.synchronize()
        return [bool(value) for value in values.tolist()]

    def forget(self) -> int:
        """Drops what was posted and not read; returns how many copies that were."""
        dropped = len(self._posted)
        self._posted.clear()
        return dropped
