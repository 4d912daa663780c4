"""Products of many tokens with many experts' weights, each token with those of its own expert.

Shapes: M tokens, P rows in the order of the experts, E experts, K inputs, N outputs, D width, F width of an expert;
ends [E] int32 is where the rows of each expert end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.kernels.routing import Pairs
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.kernels.streaming import ACTIVATION_CODES, SIXTEEN_BIT

_ALIGNED = 16
"""Bytes; the library's grouped product wants rows that begin at multiples of them."""


def groups_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the library has a grouped product: bf16 on a CUDA GPU of compute capability 9 or later."""
    here = device.type == "cuda" and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return here and torch.cuda.get_device_capability(device) >= (9, 0)


def fuses_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True where our kernel of whole experts runs: up to fp32 on a CUDA GPU with triton."""
    return device.type == "cuda" and dtype in (*SIXTEEN_BIT, torch.float32) and triton_installed()


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
        fused = fuses_on(x.device, x.dtype) and not (can_group(x, gate_up) and can_group(x, down))
    if fused:
        hidden = _grouped(x, gate_up, pairs, places, activation)
        return _grouped(hidden, down, pairs, 0, None)
    gate, up = grouped_linear(x[pairs.order // places], gate_up, pairs.ends).chunk(2, dim=-1)
    return grouped_linear(ACTIVATIONS[activation](gate) * up, down, pairs.ends)


def _grouped(x: Tensor, weight: Tensor, pairs: Pairs, places: int, activation: str | None) -> Tensor:
    """One launch: row pair / `places` of x (with 0 its place in the order) times [E, N, K] or, gated, [E, 2N, K]."""
    from dllm_sparse.kernels.gpu.experts import grouped_kernel

    experts, columns, k = weight.shape
    count, n = len(pairs.order), columns // (1 if activation is None else 2)
    out = torch.empty((count, n), dtype=x.dtype, device=x.device)
    rows = 16 if count <= 16 * experts else 64
    # How rows fall to experts is known to the device alone: as many programs as the worst case needs.
    grid = (-(-n // 64), count // rows + min(count, experts))
    if count:
        grouped_kernel[grid](
            x,
            weight,
            pairs.order,
            pairs.ends,
            out,
            n,
            k,
            experts,
            max(places, 1),
            BM=rows,
            BN=64,
            BK=64,
            EXPERTS=max(1 << (experts - 1).bit_length(), 16),
            GATHER=places > 0,
            GATED=activation is not None,
            ACT=0 if activation is None else ACTIVATION_CODES[activation],
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
