"""Run by `test_interpreted.py` under TRITON_INTERPRET=1: rows that are counted, and what is listed of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.gpu.histogram import count_near, list_counted_kernel
from dllm_sparse.kernels.gpu.stream_matmul import stream_matmul_kernel
from dllm_sparse.kernels.histogram import new_histogram
from tests.kernels.interpreted import PLAIN, close


@triton.jit
def count_kernel(x_ptr, near_ptr, counts_ptr, lines_ptr, T, n, BT: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a product does with its result, for a result that is there."""
    t, i = tl.arange(0, BT), tl.program_id(0) * BN + tl.arange(0, BN)
    live = (t < T)[:, None] & (i < n)[None, :]
    x = tl.load(x_ptr + t[:, None] * n + i[None, :], mask=live, other=0.0)
    near = tl.load(near_ptr + t, mask=t < T, other=0)
    count_near(x, live, near, t, T, counts_ptr, lines_ptr, tl.program_id(0) == 0)


def rows_of(kind: str, count: int, n: int) -> Tensor:
    """Rows that counts settle, and rows that they do not."""
    x = torch.randn(count, n)
    if kind == "odd":
        x[0] = 0
        x[1] = x[1].round()
        x[2, 1:] = 0
        x[3] = 0.5
        x[4, 7] = torch.inf
        x[5, 3] = torch.nan
        x[6] *= 1e-30
        x[6, :5] *= 1e30
        x[7] *= 1e-36
    return x.bfloat16()


def check_list(x: Tensor, p: float, near: Tensor, packed: int) -> None:
    """What is listed of x [M, n], counted around the keys `near` [M], which become those of its thresholds."""
    (rows, n), runs, space = x.shape, 3, 64
    made = new_histogram(rows, torch.device("cpu"))
    count_kernel[(5,)](x, near, made.counts, made.lines, rows, n, BT=8, BN=32)
    kept, lengths = torch.full((rows,), -1, dtype=torch.int32), torch.full((runs,), -1, dtype=torch.int32)
    values, index = torch.full_like(x, torch.nan), torch.full((n,), -1, dtype=torch.int32)
    list_counted_kernel[(runs, -(-rows // packed))](
        x, near, made.counts, made.lines, kept, values, index, lengths,
        torch.tensor([p], dtype=torch.float64), rows, n, space,
        BT=1 << (rows - 1).bit_length(), BLOCK=64, PACKED=packed, **PLAIN,
    )  # fmt: skip
    truth = reference.select(x, p)
    assert kept.tolist() == truth.float().count_nonzero(-1).tolist()
    for run in range(runs):
        here = truth[:, run * space : (run + 1) * space]
        channels = (here != 0).any(0).nonzero().flatten()
        assert int(lengths[run]) == len(channels)
        listed = slice(run * space, run * space + len(channels))
        assert torch.equal(index[listed].long(), run * space + channels)
        assert torch.equal(values[:, listed].float().nan_to_num(-1), here[:, channels].float().nan_to_num(-1))


def counted_lists() -> None:
    """Cold, around thresholds of other rows, of these rows, and of none that is near."""
    for kind, rows, p, packed in (("even", 2, 0.3, 1), ("even", 5, 0.9, 2), ("even", 2, 1.0, 2), ("odd", 8, 0.9, 8)):
        near = torch.zeros(rows, dtype=torch.int32)
        check_list(rows_of(kind, rows, 150), p, near, packed)
        x = rows_of(kind, rows, 150)
        check_list(x, p, near, packed)
        if kind == "even":
            found = near.tolist()
            check_list(x, p, near, packed)
            assert near.tolist() == found
            check_list(x, p, near + 70, packed)
            check_list(x, p, near - 1400, packed)


def lists_in_runs() -> None:
    """Products over runs of any length, the last one short; what lies behind a run is not read."""
    tokens, k, n, space = 3, 144, 96, 32
    weight = torch.randn(k, n)
    for density in (0.0, 0.4, 1.0):
        keep, x = torch.rand(k) < density, torch.randn(tokens, k)
        values, index = torch.full_like(x, torch.nan), torch.full((k,), 10**6, dtype=torch.int32)
        lengths = torch.zeros(8, dtype=torch.int32)
        for run in range(5):
            channels = run * space + keep[run * space : (run + 1) * space].nonzero().flatten()
            lengths[run] = len(channels)
            index[run * space : run * space + len(channels)] = channels.int()
            values[:, run * space : run * space + len(channels)] = x[:, channels]
        poisoned = torch.where(keep[:, None], weight, torch.nan)
        out, arrivals = torch.full((tokens, n), torch.nan), torch.zeros(2, dtype=torch.int32)
        stream_matmul_kernel[(4,)](
            values, poisoned, values, values, out, torch.full((2 * tokens * n,), torch.nan), arrivals,
            index, lengths, index, index, index, tokens, n, k, n, 2, space // 16,
            BT=16, BN=64, BK=32, GATED=False, ACT=0, LISTED=True, RUNS=4, COUNT=False,
            HAS_BIAS=False, HAS_RESIDUAL=False, ATOMIC=False, SWAP=False, STAGES=1, **PLAIN,
        )  # fmt: skip
        close(out, (x * keep) @ weight)


COUNTS = (counted_lists, lists_in_runs)
