"""`bench kernels`: one FFN layer, dense by cuBLAS against sparse by ours, selection included, weights rotated.

Everything runs inside CUDA graphs over several layers' weights, so that neither launches nor the L2 cache flatter
anything. Rows share their large channels, which makes the union density of the masks what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.bench.floors import Rates
from dllm_sparse.bench.machine import machine
from dllm_sparse.bench.timing import Timing, graphed, time_calls
from dllm_sparse.kernels import reference
from dllm_sparse.kernels.histogram import LINE, Histogram
from dllm_sparse.kernels.listing import Listed
from dllm_sparse.kernels.packing import can_be_counted, mark_words, select
from dllm_sparse.kernels.streaming import Scratch, add_norm, glu, on_gpu, stream_matmul
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.types import BackendUnavailable

SCHEMA = "dllm-sparse/bench-kernels@1"
EPS = 1e-5
LAYERS = 16
"""Layers whose weights are rotated: many times the L2 cache, and enough to share out what a graph's launch costs."""


def bench_ffn(
    config: TransformerConfig, tokens: int, density: float, rates: Rates, device: torch.device, repeats: int = 15
) -> dict[str, Any]:
    """Microseconds of one FFN layer for `tokens` rows whose masks together keep `density` of the channels of each site.

    `dense`: RMSNorm, gate|up, activation, down, by cuBLAS in the better of both weight layouts. `sparse`: RMSNorm with
    selection, gate|up over the kept rows, selection, down over the kept rows. Raises BackendUnavailable off a GPU.
    """
    layer = _Layer(config, tokens, density, device)
    variants = {
        "dense": graphed(layer.dense(by_input=True), device),
        "dense_by_output": graphed(layer.dense(by_input=False), device),
        "sparse": graphed(layer.sparse, device),
        "selection": graphed(layer.selection, device),
        "norm_and_activation": graphed(layer.norm_and_activation, device),
    }
    times = {name: _scaled(timing) for name, timing in time_calls(variants, device, repeats, warm_up=3).items()}
    dense = min(times["dense"].median, times["dense_by_output"].median)
    weights = 3 * config.width * config.ffn_width * 2
    measured = layer.measured_density()
    floor = weights * measured / rates.bandwidth * 1e6
    return {
        "schema": SCHEMA,
        "tokens": tokens,
        "density": density,
        "measured_density": measured,
        "microseconds": {name: timing.to_dict() for name, timing in times.items()},
        "speed_up": dense / times["sparse"].median,
        "dense_floor": weights / rates.bandwidth * 1e6,
        "sparse_floor": floor,
        "share_of_floor": floor / times["sparse"].median,
        "error": layer.errors(),
        "machine": machine(device),
    }


def _scaled(timing: Timing) -> Timing:
    """Milliseconds of all layers as microseconds of one."""
    factor = 1e3 / LAYERS
    return Timing(timing.median * factor, timing.low * factor, timing.high * factor, timing.samples)


class _Layer:
    """Weights, inputs and state of the measured layers."""

    def __init__(self, config: TransformerConfig, tokens: int, density: float, device: torch.device) -> None:
        width, inner = config.width, config.ffn_width
        self.activation = config.activation
        if not on_gpu(torch.empty(0, dtype=torch.bfloat16, device=device)):
            raise BackendUnavailable("bench kernels needs a CUDA GPU with triton")
        self.scratch = Scratch(device)
        self.gate_up = [self._weight(width, 2 * inner, device) for _ in range(LAYERS)]
        self.down = [self._weight(inner, width, device) for _ in range(LAYERS)]
        self.norm = torch.ones(width, device=device, dtype=torch.bfloat16)
        # Channels have scales of their own, which tokens share, as in a model. Every layer has rows of its own: the
        # threshold before is a guess, as it is from step to step.
        scales = torch.randn(width, device=device).exp()
        self.x = [(torch.randn(tokens, width, device=device) * scales).bfloat16() for _ in range(LAYERS)]
        self.guesses = torch.zeros((2, tokens), device=device)
        self.kept = torch.zeros((2, tokens), dtype=torch.int32, device=device)
        self.marks = torch.zeros((LAYERS, 2, mark_words(max(width, inner))), dtype=torch.int32, device=device)
        counted = tokens if can_be_counted(self.x[0]) else 0
        self.lines = torch.zeros((LAYERS, counted, LINE), dtype=torch.int64, device=device)
        self.near = torch.zeros(counted, dtype=torch.int32, device=device)
        self.p = [_knob(reference.rms_norm(self.x[0], self.norm, EPS), density)]
        self.p.append(_knob(self._hidden(0), density))
        self.hidden = [self._hidden(layer) for layer in range(LAYERS)]
        for _ in range(2):  # the counts lie around the thresholds of the layer before
            self.sparse()
        self.counts = self.lines.clone()

    @staticmethod
    def _weight(inputs: int, outputs: int, device: torch.device) -> Tensor:
        return torch.randn(inputs, outputs, device=device, dtype=torch.bfloat16).mul_(inputs**-0.5)

    def dense(self, *, by_input: bool) -> Callable[[], None]:
        """All layers by cuBLAS, with weights [K, N] or [N, K]."""
        pairs = list(zip(self.gate_up, self.down, strict=True))
        if not by_input:
            pairs = [(gate_up.t().contiguous().t(), down.t().contiguous().t()) for gate_up, down in pairs]

        def run() -> None:
            for x, (gate_up, down) in zip(self.x, pairs, strict=True):
                normed = add_norm(x, None, self.norm, EPS)[1]
                F.linear(glu(F.linear(normed, gate_up.t()), self.activation), down.t())

        return run

    def sparse(self) -> None:
        """All layers, reading the kept rows only."""
        self.marks.zero_()
        self.lines.zero_()
        for layer, marks in enumerate(self.marks):
            counted = self._counted(layer)
            hidden = self._hidden(layer, marks[0], counted)
            stream_matmul(self._chosen(1, hidden, marks[1], counted), self.down[layer], self.scratch)

    def selection(self) -> None:
        """Both sites' selection of all layers, the norm in front included; what a product counts on its way is not."""
        self.marks.zero_()
        self.lines.copy_(self.counts)
        for layer, marks in enumerate(self.marks):
            self._chosen(0, self.x[layer], marks[0])
            self._chosen(1, self.hidden[layer], marks[1], self._counted(layer))

    def norm_and_activation(self) -> None:
        """The small layers that a dense FFN has in the same places."""
        gate_up = torch.empty((len(self.x[0]), self.gate_up[0].shape[1]), dtype=torch.bfloat16, device=self.x[0].device)
        for x in self.x:
            add_norm(x, None, self.norm, EPS)
            glu(gate_up, self.activation)

    def measured_density(self) -> float:
        """Share of the weight rows that are read, over both matrices of all layers."""
        width, inner = self.x[0].shape[1], self.down[0].shape[0]
        read = 0
        for x, hidden in zip(self.x, self.hidden, strict=True):
            read += 2 * inner * int(self._chosen(0, x).length) + width * int(self._chosen(1, hidden).length)
        return read / (3 * LAYERS * width * inner)

    def _counted(self, layer: int) -> Histogram | None:
        """Where the rows between the products of a layer are counted, if they are."""
        return Histogram(self.lines[layer], self.near) if can_be_counted(self.x[layer]) else None

    def _hidden(self, layer: int, marks: Tensor | None = None, counted: Histogram | None = None) -> Tensor:
        chosen = self._chosen(0, self.x[layer], marks)
        return stream_matmul(chosen, self.gate_up[layer], self.scratch, activation=self.activation, histogram=counted)

    def _chosen(self, site: int, rows: Tensor, marks: Tensor | None = None, counted: Histogram | None = None) -> Listed:
        norm = (self.norm, EPS) if site == 0 else None
        state = self.p[site], self.guesses[site], self.kept[site]
        listed = select(rows, *state, norm=norm, marks=marks, histogram=counted).listed
        assert listed is not None
        return listed

    def errors(self) -> dict[str, float]:
        """Relative RMS against fp64 of the down product of the masked rows: ours and cuBLAS's on the same input."""
        hidden = self.hidden[0]
        masked = select(hidden, self.p[1], self.guesses[1], self.kept[1], listing=False).masked
        assert masked is not None
        truth = masked.double() @ self.down[0].double()
        found = {
            "ours": stream_matmul(self._chosen(1, hidden), self.down[0], self.scratch),
            "cublas": masked @ self.down[0],
        }
        return {name: float((y.double() - truth).norm() / truth.norm()) for name, y in found.items()}


def _knob(rows: Tensor, density: float) -> Tensor:
    """The p at which masks of these rows together keep the share `density` of their channels, as a tensor [1]."""
    low, high = 0.0, 1.0
    for _ in range(12):
        p = (low + high) / 2
        union = (reference.select(rows, p) != 0).any(0).double().mean()
        low, high = (p, high) if union < density else (low, p)
    # Rounded: at the very value where a channel comes in, no sum in fp32 could tell.
    return torch.full((1,), round(p, 3), dtype=torch.float64, device=rows.device)
