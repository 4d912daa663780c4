"""Captures a function over static tensors once and replays it; on a CPU it just calls it, so that tests can."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Replayed:
    """`run()` does what `body()` does, as one CUDA graph. `body` must not synchronise or depend on host values.

    `settle` runs once, between the first, plain run and the capture. Captures share `pool`, so that several shapes of
    one model hold one set of intermediate buffers.
    """

    def __init__(
        self,
        body: Callable[[], None],
        device: torch.device,
        pool: Any = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self._body, self._device, self._pool, self._settle = body, device, pool, settle
        self._graph: torch.cuda.CUDAGraph | None = None

    def forget(self) -> None:
        """The body has changed: the next call runs plainly and captures again."""
        self._graph = None

    def run(self) -> None:
        """Replays; the first call runs plainly, which compiles kernels and sizes workspaces, and then captures."""
        if self._graph is not None:
            self._graph.replay()
            return
        if self._device.type != "cuda":
            self._body()
            if self._settle is not None:
                self._settle()
                self._settle = None
            return
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._body()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._settle is not None:
            self._settle()
        # cuBLAS works in a buffer that PyTorch keeps per stream and that others may free (torch.compile's graphs do):
        # without one, the capture takes it from its own pool, where it stays mapped as long as the graph lives.
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        with (
            _without_collection(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._body()
        self._graph = graph


@contextmanager
def _without_collection() -> Iterator[None]:
    """Frees what is unreachable now and nothing meanwhile: an old graph must not be destroyed during a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
