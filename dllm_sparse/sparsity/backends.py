"""What computes with masked values: their dense products, or products that skip what was masked.

To add a backend: a subclass of `MaskedFFN`, a name in `sparsity/config.py`'s `Backend` and a line in
`sparse_ffn`. It is called once per layer and forward, and must give what `MaskedFFN` gives up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_sparse.kernels.cpu import sparse_matvec, wanted_outputs
from dllm_sparse.kernels.dispatch import CPU_MOST_TOKENS, cpu_pays, resolve_backend
from dllm_sparse.kernels.listing import list_kept
from dllm_sparse.kernels.storage import by_input, by_output
from dllm_sparse.kernels.streaming import Scratch, can_stream, stream_matmul
from dllm_sparse.models.feed_forward import FeedForward, Tap
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.sparsity.config import Backend, SparsityConfig
from dllm_sparse.types import BackendUnavailable


class MaskedFFN:
    """The plain twin of every backend: dense products of masked values."""

    @property
    def name(self) -> str:
        """What ran, for reports."""
        return "reference"

    def __call__(self, ffn: FeedForward, x: Tensor, tap: Tap, *, dense_gate: bool) -> Tensor:
        """One FFN, [B, T, D] -> [B, T, D], whose sites pass through `tap`; `dense_gate`: the gate sees x unmasked."""
        return ffn.tapped(x, tap, dense_gate=dense_gate, product=self.product)

    def product(self, linear: nn.Linear, values: Tensor) -> Tensor:
        """A linear layer on masked values [B, T, K] -> [B, T, N]."""
        out: Tensor = linear(values)
        return out


class CpuFFN(MaskedFFN):
    """Skips the zeros of up to 4 tokens; the dense product does the rest (prefill, blocks, values with few zeros).

    `always` skips wherever there is a zero; otherwise only where the measured rule says that it pays. `gate_first`,
    for masks of the gate alone: up is computed only where the gate was kept, so that two of three matrices are sparse.
    """

    def __init__(self, *, always: bool, gate_first: bool) -> None:
        self._always, self._gate_first = always, gate_first
        self._skipped = False

    @property
    def name(self) -> str:
        """ "cpu" once a product skipped something, or where that was asked for."""
        return "cpu" if self._always or self._skipped else "reference"

    def __call__(self, ffn: FeedForward, x: Tensor, tap: Tap, *, dense_gate: bool) -> Tensor:
        """One FFN, [B, T, D] -> [B, T, D]; see `MaskedFFN`."""
        rows = x.flatten(0, -2)
        if not self._gate_first or not self._pays(0, rows, ffn.down_proj.weight, picking=True):
            return super().__call__(ffn, x, tap, dense_gate=dense_gate)
        by_output(ffn.gate_up_proj)
        gate_layer, up_layer = ffn.halves()
        gate = tap("gate", ffn.activation(F.linear(x, *gate_layer)))
        up = self._up(rows, *up_layer, (gate != 0).flatten(0, -2))
        return self.product(ffn.down_proj, gate * up.view(gate.shape))

    def _up(self, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> Tensor:
        if not self._pays(int(wanted.count_nonzero()) / wanted.shape[1], rows, weight, picking=True):
            return F.linear(rows, weight, bias)
        self._skipped = True
        out = wanted_outputs(rows, weight, wanted)
        return out if bias is None else out + bias

    def product(self, linear: nn.Linear, values: Tensor) -> Tensor:
        """A linear layer on masked values [B, T, K] -> [B, T, N]."""
        rows = values.flatten(0, -2)
        few = len(rows) <= CPU_MOST_TOKENS
        if not few or not self._pays(int(rows.count_nonzero()) / rows.shape[1], rows, linear.weight):
            return super().product(linear, values)
        self._skipped = True
        out = sparse_matvec(rows, by_input(linear))
        if linear.bias is not None:
            out += linear.bias
        return out.view(*values.shape[:-1], -1)

    def _pays(self, share: float, rows: Tensor, weight: Tensor, *, picking: bool = False) -> bool:
        """Whether to skip where the tokens of `rows` together need `share` of a weight."""
        if self._always:
            return len(rows) <= CPU_MOST_TOKENS and share < len(rows)
        threads = torch.get_num_threads()
        return cpu_pays(share, len(rows), weight.numel(), rows.dtype, threads, picking=picking)


class TritonFFN(MaskedFFN):
    """Skips the channels that no token of a short forward kept, by the GPU's list kernel, whatever made the masks.

    For forwards outside captured steps; it waits for nothing either.
    """

    def __init__(self, device: torch.device) -> None:
        self._scratch = Scratch(device)

    @property
    def name(self) -> str:
        """What ran, for reports."""
        return "triton"

    def product(self, linear: nn.Linear, values: Tensor) -> Tensor:
        """A linear layer on masked values [B, T, K] -> [B, T, N]."""
        rows = values.flatten(0, -2)
        weight = by_input(linear)
        if not can_stream(rows, weight):
            return super().product(linear, values)
        return stream_matmul(list_kept(rows), weight, self._scratch, bias=linear.bias).view(*values.shape[:-1], -1)


def sparse_ffn(config: SparsityConfig, lm: LanguageModel) -> MaskedFFN:
    """The implementation behind the backend's name; raises BackendUnavailable where an explicit one cannot run."""
    backend = config.backend
    if lm.engine != "native":
        if backend not in ("auto", "reference"):
            raise BackendUnavailable(f"backend {backend!r} needs the native engine; {lm.name} runs in transformers")
        return MaskedFFN()
    resolved = resolve_backend(backend, lm.device, lm.dtype)
    if resolved == "triton":
        return TritonFFN(lm.device)
    if resolved == "cpu":
        return CpuFFN(always=backend == "cpu", gate_first=config.sites == "gate")
    return MaskedFFN()


def fallback(backend: Backend, lm: LanguageModel) -> str | None:
    """What `auto` falls back to and why, in a sentence; None for a backend that was named, which runs or raises.

    It speaks of forwards outside captured steps: those may skip on a GPU, which only their observer knows afterwards.
    """
    if backend != "auto":
        return None
    if lm.engine != "native":
        return f"reference, because {lm.name} runs in transformers: masked values are multiplied densely"
    if lm.device.type == "cuda":
        return "reference, because triton is chosen for captured steps alone: masked values are multiplied densely"
    if resolve_backend(backend, lm.device, lm.dtype) == "cpu":
        most = f"forwards of up to {CPU_MOST_TOKENS} tokens skip zeros where that pays"
        return f"cpu, because triton needs a CUDA GPU: {most}, others multiply them densely (reference)"
    return "reference, because triton needs a CUDA GPU: masked values are multiplied densely"
