"""What computes with masked values: their dense products, or products that skip what was masked.

To add a backend: a subclass of `MaskedFFN`, a name in `sparsity/config.py`'s `Backend` and a line in
`sparse_ffn`. It is called once per layer and forward, and must give what `MaskedFFN` gives up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_sparse.kernels.cpu import sparse_matvec
from dllm_sparse.kernels.dispatch import CPU_MOST_TOKENS, cpu_pays, resolve_backend
from dllm_sparse.kernels.storage import by_input
from dllm_sparse.kernels.streaming import Listed, Scratch, can_stream, stream_matmul
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.transformer import FeedForward, Tap
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

    `always` skips wherever there is a zero; otherwise only where the measured rule says that it pays.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._skipped = False

    @property
    def name(self) -> str:
        """ "cpu" once a product skipped something, or where that was asked for."""
        return "cpu" if self._always or self._skipped else "reference"

    def product(self, linear: nn.Linear, values: Tensor) -> Tensor:
        """A linear layer on masked values [B, T, K] -> [B, T, N]."""
        rows = values.flatten(0, -2)
        if len(rows) > CPU_MOST_TOKENS or not self._skips(linear, rows):
            return super().product(linear, values)
        self._skipped = True
        out = sparse_matvec(rows, by_input(linear))
        if linear.bias is not None:
            out += linear.bias
        return out.view(*values.shape[:-1], -1)

    def _skips(self, linear: nn.Linear, rows: Tensor) -> bool:
        kept = int(rows.count_nonzero())
        if self._always:
            return kept < rows.numel()
        size = linear.in_features, linear.out_features
        return cpu_pays(kept, len(rows), *size, rows.dtype, torch.get_num_threads())


class TritonFFN(MaskedFFN):
    """Skips the channels that no token of a short forward kept, by the GPU's list kernel, whatever made the masks.

    For forwards outside captured steps: finding the list waits for the device, which decoding as graphs does not.
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
        kept = (rows != 0).any(0).nonzero().flatten()
        if not can_stream(rows, weight) or len(kept) == rows.shape[1]:
            return super().product(linear, values)
        packed = torch.empty_like(rows)
        packed[:, : len(kept)] = rows[:, kept]
        index = torch.zeros(rows.shape[1], dtype=torch.int32, device=rows.device)
        index[: len(kept)] = kept.int()
        listed = Listed(packed, index, torch.tensor([len(kept)], dtype=torch.int32, device=rows.device))
        return stream_matmul(listed, weight, self._scratch, bias=linear.bias).view(*values.shape[:-1], -1)


def sparse_ffn(backend: str, lm: LanguageModel) -> MaskedFFN:
    """The implementation behind a backend's name; raises BackendUnavailable where an explicit one cannot run."""
    if lm.engine != "native":
        if backend not in ("auto", "reference"):
            raise BackendUnavailable(f"backend {backend!r} needs the native engine; {lm.name} runs in transformers")
        return MaskedFFN()
    resolved = resolve_backend(backend, lm.device, lm.dtype)
    if resolved == "triton":
        return TritonFFN(lm.device)
    if resolved == "cpu":
        return CpuFFN(always=backend == "cpu")
    return MaskedFFN()
