"""Sparse matrix-vector products on a CPU: only the weight rows of nonzero values, or of wanted outputs, are read.

`embedding_bag` with per-sample weights is exactly that: it gathers rows of a [K, N] matrix, scales and sums them, in
fp32 whatever the type. It runs one bag per thread, so the outputs are cut into as many parts as there are threads,
and each part is a bag of its own. Its derivative by the per-sample weights is the other product: a dot of x with each
wanted row of an [N, K] matrix, gathered without a copy. The plain twin of both is the dense product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""The types `embedding_bag` has fast paths for."""


def sparse_matvec(values: Tensor, weight: Tensor) -> Tensor:
    """values [T, K] times weight [K, N] -> [T, N], reading only the rows of weight that some nonzero value needs.

    `weight` must be contiguous and of the values' type. A row of `weight` whose values are all zero is never touched:
    a NaN there does not spread. T is meant to be small: the cost grows with the number of nonzero values.
    """
    tokens, outputs = values.shape[0], weight.shape[1]
    if tokens == 1:  # the common case in half the calls
        channel = values[0].nonzero().squeeze(-1)
        scale, starts = values[0].index_select(0, channel), channel.new_zeros(1)
    else:
        token, channel = values.nonzero(as_tuple=True)
        scale, starts = values[token, channel], torch.searchsorted(token, torch.arange(tokens))
    parts = _parts(outputs, torch.get_num_threads())
    if parts == 1:
        return F.embedding_bag(channel, weight, starts, mode="sum", per_sample_weights=scale)
    part = torch.arange(parts)[:, None]
    rows = (channel * parts + part).flatten()
    starts = (starts + part * len(channel)).flatten()
    narrow = weight.view(-1, outputs // parts)  # row k of the matrix is its rows k * parts .. (k + 1) * parts
    out = F.embedding_bag(rows, narrow, starts, mode="sum", per_sample_weights=scale.repeat(parts))
    return out.view(parts, tokens, -1).transpose(0, 1).reshape(tokens, outputs)


def wanted_outputs(x: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """x [T, K] times weight [N, K]: the outputs [T, N] where `wanted` [T, N] is True, zeros elsewhere.

    Only wanted rows of `weight` are read, once per token that wants them; it must be contiguous and of x's type.
    """
    token, output = wanted.nonzero(as_tuple=True)
    bags = token.new_zeros(1)  # where bags start: not needed beside the bag of every row
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, weight, output, bags, token, 0)
    out = x.new_zeros(wanted.shape)
    out[token, output] = dots
    return out


def _parts(outputs: int, threads: int) -> int:
    """The most parts of equal width that do not exceed the threads."""
    return next(parts for parts in range(max(threads, 1), 0, -1) if outputs % parts == 0)
