"""Work that nothing in a forward waits for: small kernels that would each hold up a step for microseconds."""

from __future__ import annotations

import torch


class Aside:
    """`with aside:` launches on a second stream of a GPU, behind what was launched before; on a CPU it does nothing.

    In a capture it becomes a branch of the graph. What it reads must be kept until `join`: memory that is let go may be
    written before the branch has read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._inside: torch.cuda.StreamContext | None = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._inside = torch.cuda.stream(self._stream)
            self._inside.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: object) -> None:
        if self._inside is not None:
            self._inside.__exit__(*exception)
            self._inside = None

    def join(self) -> None:
        """What is launched from now on waits for the work aside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
