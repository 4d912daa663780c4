"""Clocks and their summaries, in one place: CUDA events where there is a GPU, the wall clock elsewhere.

Shared machines and boost clocks make means useless: every figure is a median with its 20 and 80 % quantiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Median with the 20 and 80 % quantiles of `samples` measurements, in the unit of what was measured."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """Summarises at least one measurement."""
        return cls(statistics.median(values), quantile(values, 0.2), quantile(values, 0.8), len(values))

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready values."""
        return asdict(self)

    def text(self, digits: int = 2) -> str:
        """`median [low, high]`."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the measurements lie, interpolated between neighbours; share in [0, 1]."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class Stopwatch:
    """Marks in the order of the work on one device. A mark costs an event on a GPU and never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> int:
        """Marks this point of the current stream (or of the wall clock) and returns its number."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def milliseconds(self, begin: int, end: int) -> float:
        """Milliseconds between two marks; waits for the device."""
        first, last = self._marks[begin], self._marks[end]
        if isinstance(first, float):
            assert isinstance(last, float)
            return (last - first) * 1e3
        assert isinstance(last, torch.cuda.Event)
        last.synchronize()
        return float(first.elapsed_time(last))


def time_calls(
    variants: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 7, warm_up: int = 1
) -> dict[str, Timing]:
    """Milliseconds of each variant's call. The variants take turns, so that a slow spell hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + repeats):
        for name, run in variants.items():
            watch = Stopwatch(device)
            begin = watch.mark()
            run()
            milliseconds = watch.milliseconds(begin, watch.mark())
            if turn >= warm_up:
                times[name].append(milliseconds)
    return {name: Timing.of(values) for name, values in times.items()}


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call captured as a CUDA graph; calling the result replays it. Without launches, kernels show.

    The result keeps `run` and the tensors it refers to alive: the graph reads their addresses.
    """
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compile and allocate outside the capture
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(run: Callable[[], object] = run) -> None:
        graph.replay()

    return replay
