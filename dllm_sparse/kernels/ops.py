"""The shared sparse backend as operators of PyTorch, `torch.ops.dllm_sparse.*`, registered by importing this file.

torch.compile takes them as they are (their fake kernels say what comes out) and a CUDA graph holds them. On every
device they call the functions of this package, which run the kernels on a GPU and their plain twins elsewhere. Decoding
as graphs calls those functions itself. `Library` and not `custom_op`, whose Python wrapper costs ten times as much a
call (33 us against 3 on a CPU).

Shapes: M rows of D inputs, F FFN width, n entries of a row, K inputs and N outputs of a product. Weights are [K, N],
contiguous by input. State that is updated: `guesses` [M] fp32, thresholds found last time as shares of their rows'
masses (0 where none), and `kept` [M] int32, entries kept of each row; `p` [1] fp64 is the L1 mass to keep.
`packing.select` and `streaming.stream_matmul` say more.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dllm_sparse.kernels import packing, reference
from dllm_sparse.kernels.experts import expert_ffn
from dllm_sparse.kernels.listing import Listed
from dllm_sparse.kernels.routing import Pairs
from dllm_sparse.kernels.streaming import Scratch, can_list, can_stream, stream_matmul
from dllm_sparse.types import BackendUnavailable

_STATE = "Tensor p, Tensor(a!) guesses, Tensor(b!) kept"
_SCHEMAS = {
    # Rows [M, n], RMS-normalised if there is a norm, with all but the kept entries zeroed.
    "select": f"(Tensor x, {_STATE}, Tensor? norm, float eps) -> Tensor",
    # What some row kept: values [M, n] of which the first length [1] columns mean something, rows [n], ascending.
    "select_list": f"(Tensor x, {_STATE}, Tensor? norm, float eps) -> (Tensor values, Tensor rows, Tensor length)",
    # The product that reads the listed rows of the weight alone: [M, N], with an activation [M, N / 2].
    "listed_product": "(Tensor values, Tensor rows, Tensor length, Tensor weight, Tensor? bias, Tensor? residual, "
    "str? activation) -> Tensor",
    # x + FFN(RMSNorm(x)) [M, D], masked at input and intermediate; guesses and kept are [2, M].
    "ffn": f"(Tensor x, Tensor norm, float eps, Tensor gate_up, Tensor down, {_STATE}, str activation) -> Tensor",
    # The FFN of every pair (token, expert), in the order of the experts: see `experts.expert_ffn`.
    "expert_ffn": "(Tensor x, Tensor order, Tensor ends, Tensor gate_up, Tensor down, str activation) -> Tensor",
}
_LIBRARY = torch.library.Library("dllm_sparse", "DEF")  # type: ignore[no-untyped-call]


@cache
def _scratch(device: torch.device) -> Scratch:
    """One workspace a device: calls follow each other on one stream, the first of them before any capture."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendUnavailable("the first call of a sparse product cannot be captured; run it once before")
    return Scratch(device)


def _select(x: Tensor, p: Tensor, guesses: Tensor, kept: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    pair = None if norm is None else (norm, eps)
    masked = packing.select(x, p, guesses, kept, norm=pair, listing=False).masked
    assert masked is not None
    return masked


def _select_list(
    x: Tensor, p: Tensor, guesses: Tensor, kept: Tensor, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    listed = packing.select(x, p, guesses, kept, norm=None if norm is None else (norm, eps)).listed
    assert listed is not None
    values, rows, length = listed
    return values, rows, length.clone() if length is kept else length  # what comes out must not be what went in


def _listed_product(
    values: Tensor,
    rows: Tensor,
    length: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    if weight.is_cuda and not can_stream(values, weight):
        raise BackendUnavailable(
            f"a listed product on a GPU takes at most 64 bf16 or fp16 rows and a contiguous weight [K, N] of the same "
            f"type, K a multiple of 16, N of 32; got {list(values.shape)} and {list(weight.shape)} in {weight.dtype}"
        )
    listed = Listed(values, rows, length)
    scratch = _scratch(weight.device)
    return stream_matmul(listed, weight, scratch, activation=activation, bias=bias, residual=residual)


def _ffn(
    x: Tensor,
    norm: Tensor,
    eps: float,
    gate_up: Tensor,
    down: Tensor,
    p: Tensor,
    guesses: Tensor,
    kept: Tensor,
    activation: str,
) -> Tensor:
    chosen = packing.select(x, p, guesses[0], kept[0], norm=(norm, eps), listing=can_list(x, gate_up))
    hidden = _product(chosen, gate_up, activation=activation)
    chosen = packing.select(hidden, p, guesses[1], kept[1], listing=can_list(hidden, down))
    return _product(chosen, down, residual=x)


def _expert_ffn(x: Tensor, order: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    return expert_ffn(x, Pairs(order, ends), gate_up, down, activation)


def _product(
    chosen: packing.Selected, weight: Tensor, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """Over the list where it was made, else dense."""
    if chosen.listed is None:
        assert chosen.masked is not None
        return reference.stream_matmul(chosen.masked, weight, activation=activation, residual=residual)
    return stream_matmul(chosen.listed, weight, _scratch(weight.device), activation=activation, residual=residual)


def _fake_select_list(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.int32), x.new_empty(1, dtype=torch.int32)


def _fake_listed_product(
    values: Tensor,
    rows: Tensor,
    length: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    return values.new_empty((values.shape[0], weight.shape[1] // (1 if activation is None else 2)))


for _name, _kernel, _fake in (
    ("select", _select, lambda x, *_: torch.empty_like(x)),
    ("select_list", _select_list, _fake_select_list),
    ("listed_product", _listed_product, _fake_listed_product),
    ("ffn", _ffn, lambda x, *_: torch.empty_like(x)),
    ("expert_ffn", _expert_ffn, lambda x, order, *_: x.new_empty((order.shape[0], x.shape[1]))),
):
    _LIBRARY.define(_name + _SCHEMAS[_name])  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dllm_sparse::{_name}", _fake, lib=_LIBRARY)
