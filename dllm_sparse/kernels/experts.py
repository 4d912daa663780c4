"""Products of many tokens with many experts' weights, each token with those of its own expert.

Shapes: P rows in the order of the experts, E experts, K inputs, N outputs; ends [E] int32 is where the rows of each
expert end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 16
"""Bytes; the library's grouped product wants rows that begin at multiples of them."""


def groups_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the library has a grouped product: bf16 on a CUDA GPU of compute capability 9 or later."""
    here = device.type == "cuda" and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return here and torch.cuda.get_device_capability(device) >= (9, 0)


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """True where it runs on these rows [P, K] and weights [E, N, K]: rows of both begin at multiples of 16 bytes."""
    aligned = all(size * rows.element_size() % _ALIGNED == 0 for size in weight.shape[1:])
    return aligned and rows.dtype == weight.dtype and groups_on(rows.device, rows.dtype)


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
