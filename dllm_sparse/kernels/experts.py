"""Products of many tokens with many experts' weights, each token with those of its own expert.

Shapes: M tokens, P rows in the order of the experts, E experts, K inputs, N outputs, D width, F width of an expert;
ends [E] int32 is where the rows of each expert end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.kernels.routing import Pairs
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.kernels.streaming import (
    ACTIVATION_CODES,
    LAYERS_OVERLAP,
    MAX_STREAMED,
    SIXTEEN_BIT,
    overlapping,
    processors,
)
from dllm_sparse.kernels.tuning import padded_tokens

_ALIGNED = 16
"""Bytes; the library's grouped product wants rows that begin at multiples of them."""


class GroupedTile(NamedTuple):
    """Outputs of a tile (two weight rows each when gated), bytes of a weight row at a time, warps, pipeline depth, and
    programs for each processor of the GPU."""

    columns: int
    row_bytes: int
    warps: int
    stages: int
    resident: int


GATED_TILE, DOWN_TILE = GroupedTile(32, 128, 4, 4, 4), GroupedTile(64, 128, 4, 4, 4)


def groups_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the library has a grouped product: bf16 on a CUDA GPU of compute capability 9 or later."""
    here = device.type == "cuda" and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return here and torch.cuda.get_device_capability(device) >= (9, 0)


def fuses_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True where our kernel of whole experts runs: up to fp32 on a CUDA GPU with triton."""
    return device.type == "cuda" and dtype in (*SIXTEEN_BIT, torch.float32) and triton_installed()


def wants_gradient(*tensors: Tensor) -> bool:
    """True where a gradient of some tensor is asked for, which our kernels do not give."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def never_waits(device: torch.device, dtype: torch.dtype) -> bool:
    """True where `expert_ffn` asks the device for nothing, so that a graph can hold it."""
    return groups_on(device, dtype) or fuses_on(device, dtype)


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """True where it runs on these rows [P, K] and weights [E, N, K]: rows of both begin at multiples of 16 bytes."""
    aligned = all(size * rows.element_size() % _ALIGNED == 0 for size in weight.shape[1:])
    return aligned and rows.dtype == weight.dtype and groups_on(rows.device, rows.dtype)


def expert_ffn(
    x: Tensor, pairs: Pairs, gate_up: Tensor, down: Tensor, activation: str, *, fused: bool | None = None
) -> Tensor:
    """down(act(gate x) * up x) of every pair (token, expert), tokens [M, D] -> [P, D] in the order of the experts.

    gate_up [E, 2F, D], gate rows first, and down [E, D, F]. `fused` asks for our two launches or against them; None
    takes them where the library has no grouped product and the loop would wait for the device.
    """
    places = len(pairs.order) // len(x) if len(x) else 1
    if fused is None:
        library = (can_group(x, gate_up) and can_group(x, down)) or wants_gradient(x, gate_up, down)
        fused = fuses_on(x.device, x.dtype) and not library
    if fused:
        hidden = grouped_product(x, gate_up, pairs, activation=activation, gather=True)
        return grouped_product(hidden, down, pairs, tokens=len(x))
    gate, up = grouped_linear(x[pairs.order // places], gate_up, pairs.ends).chunk(2, dim=-1)
    return grouped_linear(ACTIVATIONS[activation](gate) * up, down, pairs.ends)


def grouped_product(
    x: Tensor,
    weight: Tensor,
    pairs: Pairs,
    *,
    activation: str | None = None,
    gather: bool = False,
    scatter: bool = False,
    tokens: int | None = None,
    tile: GroupedTile | None = None,
) -> Tensor:
    """One launch: a row for every pair times its expert's [E, N, K], or act(gate) * up with [E, 2N, K] -> [P, N].

    Rows lie in the order of the experts. With `gather` x [M, K] are tokens instead, with `scatter` the result lies by
    pair. `tokens` is M, the most rows that an expert can have; None: P.
    """
    from dllm_sparse.kernels.gpu.experts import grouped_kernel

    experts, columns, k = weight.shape
    gated = activation is not None
    count, n = len(pairs.order), columns // (2 if gated else 1)
    tile = tile or (GATED_TILE if gated else DOWN_TILE)
    most = len(x) if gather else tokens or count
    rows = 16 if count <= 16 * experts else 64
    if most <= MAX_STREAMED:  # an expert's rows are one block: its weights are read once
        rows = padded_tokens(most)
    out = torch.empty((count, n), dtype=x.dtype, device=x.device)
    blocks = count // rows + min(count, experts) if most > rows else min(count, experts)
    programs = min(-(-n // tile.columns) * blocks, tile.resident * processors(x.device))
    if count:
        grouped_kernel[(programs,)](
            x,
            weight,
            pairs.order,
            pairs.ends,
            out,
            n,
            k,
            experts,
            count // len(x),
            BM=rows,
            BN=tile.columns,
            BK=tile.row_bytes // x.element_size(),
            EXPERTS=max(1 << (experts - 1).bit_length(), 16),
            GATHER=gather,
            SCATTER=scatter,
            GATED=gated,
            ACT=0 if activation is None else ACTIVATION_CODES[activation],
            STAGES=tile.stages,
            num_warps=tile.warps,
            **overlapping(LAYERS_OVERLAP, x.device),
        )
    return out


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [P, K], weight [E, N, K] -> [P, N]. The library's product waits for nothing; the loop reads `ends`."""
    if can_group(rows, weight):
        product: Tensor = F.grouped_mm(rows, weight.mT, offs=ends)
        return product
    return linear_by_expert(rows, weight, ends)


def linear_by_expert(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The plain twin: expert by expert, those that nobody chose left out."""
    out = rows.new_empty((len(rows), weight.shape[1]))
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            out[begin:end] = F.linear(rows[begin:end], weight[expert])
        begin = end
    return out


def combine(outputs: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Outputs [P, D] of pairs in the order `order` [P], weighted by weights [M, k] and summed in fp32 -> [M, D]."""
    tokens, places = weights.shape
    by_pair = torch.empty_like(outputs)
    by_pair[order] = outputs
    wide = by_pair.view(tokens, places, -1).float() * weights.unsqueeze(-1)
    return wide.sum(1).to(outputs.dtype)
