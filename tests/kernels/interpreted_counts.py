"""Run by `test_interpreted.py` under TRITON_INTERPRET=1: rows that are counted, and what is listed of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.gpu.histogram import count_near, list_counted_kernel
from dllm_sparse.kernels.gpu.stream_matmul import stream_matmul_kernel
from dllm_sparse.kernels.histogram import SEARCHED, new_histogram
from tests.kernels.interpreted import PLAIN, close


@triton.jit
def count_kernel(x_ptr, near_ptr, counts_ptr, lines_ptr, T, n, BT: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a product does with its result, for a result that is there."""
    t, i = tl.arange(0, BT), tl.program_id(0) * BN + tl.arange(0, BN)
    live = (t < T)[:, None] & (i < n)[None, :]
    x = tl.load(x_ptr + t[:, None] * n + i[None, :], mask=live, other=0.0)
    near = tl.load(near_ptr + t, mask=t < T, other=0)
    count_near(x, live, near, t, T, counts_ptr, lines_ptr, tl.program_id(0) == 0)


def check_list(x: Tensor, p: float, near: Tensor) -> list[int]:
    """What is listed of x [M, n], counted around the keys `near` [M], which become those of its thresholds.

    Returns which rows had to be searched.
    """
    (rows, n), runs, space = x.shape, 3, 64
    made = new_histogram(rows, torch.device("cpu"))
    count_kernel[(5,)](x, near, made.counts, made.lines, rows, n, BT=8, BN=32)
    kept, lengths = torch.full((rows,), -1, dtype=torch.int32), torch.full((runs,), -1, dtype=torch.int32)
    values, index = torch.full_like(x, torch.nan), torch.full((n,), -1, dtype=torch.int32)
    list_counted_kernel[(runs, rows)](
        x, near, made.counts, made.lines, kept, values, index, lengths,
        torch.tensor([p], dtype=torch.float64), rows, n, space,
        BT=1 << (rows - 1).bit_length(), BLOCK=64, ROW=1 << (n - 1).bit_length(), **PLAIN,
    )  # fmt: skip
    truth = reference.select(x, p)
    assert kept.tolist() == (truth.float() != 0).sum(-1).tolist()
    for run in range(runs):
        here = truth[:, run * space : (run + 1) * space]
        channels = (here != 0).any(0).nonzero().flatten()
        assert int(lengths[run]) == len(channels)
        listed = slice(run * space, run * space + len(channels))
        assert torch.equal(index[listed].long(), run * space + channels)
        assert torch.equal(values[:, listed].float().nan_to_num(-1), here[:, channels].float().nan_to_num(-1))
    searched: list[int] = made.lines[:, SEARCHED].tolist()
    return searched


def near_threshold(x: Tensor, p: float) -> Tensor:
    """The keys [M] of the thresholds of rows [M, n]."""
    truth = reference.select(x, p).abs()
    least = torch.where(truth > 0, truth, torch.inf).amin(-1)
    return least.view(torch.int16).int()


def counted_lists() -> None:
    """Cold, around thresholds of these rows, of others up to an octave away, and of none that is near."""
    for rows, p in ((1, 0.6), (2, 0.3), (5, 0.9)):
        near, x = torch.zeros(rows, dtype=torch.int32), torch.randn(rows, 150).bfloat16()
        assert check_list(x, p, near) == [1] * rows
        assert near.tolist() == near_threshold(x, p).tolist()
        for away in (0, 70, -60, 110):
            x = torch.randn(rows, 150).bfloat16()
            assert check_list(x, p, near_threshold(x, p) + away) == [0] * rows
    for away in (135, -1400):  # just below the keys that are counted; far above
        assert check_list(x[:2], 0.9, near_threshold(x[:2], 0.9) + away) == [1, 1]


def rows_that_counts_do_not_settle() -> None:
    """Zero, tiny, not finite, or of entries that no sum holds or that are too small to be counted; p = 1."""
    x = torch.randn(6, 150)
    near = near_threshold(x.bfloat16(), 0.9)
    x[0] = 0
    x[1] *= 1e-36
    x[2, 7], x[3, 3], x[4, 9] = torch.inf, torch.nan, 3e38
    x = x.bfloat16()
    for row in range(5):
        assert check_list(x[row : row + 1], 0.9, near[row : row + 1].clone()) == [1]
    assert check_list(x[4:], 0.9, near[4:].clone()) == [1, 0]
    for scale in (1e38, 1e33):  # Inf is among the keys that are counted, or above them
        large = (torch.rand(1, 150) + 1.6) * scale
        near = near_threshold(large.bfloat16(), 0.2)
        large[0, 5] = torch.inf
        assert check_list(large.bfloat16(), 0.2, near) == [1]
    many = torch.ones(1, 150)
    many[:, :100] = 2.0**20  # together more than a mass may be
    assert check_list(
        many.bfloat16(), 1 - 25 / (100 * 2.0**20 + 50), near_threshold(torch.ones(1, 1).bfloat16(), 1)
    ) == [1]
    small = torch.full((1, 150), 0.6 * 2.0**-24)  # counted as nothing: with them the target takes one entry more
    small[:, :10], small[:, 10] = 1.0, 0.5
    p = 10 * 2.0**24 / (10.5 * 2.0**24 + 40)
    assert check_list(small.bfloat16(), p, near_threshold(torch.ones(1, 1).bfloat16(), 1)) == [1]
    wide = torch.randn(1, 150)
    near = near_threshold(wide.bfloat16(), 0.9)
    wide[:, :5] = torch.tensor([1e-18, 1e-22, 1e-26, 1e-30, 1e-35])
    assert check_list(wide.bfloat16(), 1.0, near) == [1]


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
            BT=16, BO=16, BN=64, BK=32, GATED=False, ACT=0, LISTED=True, RUNS=4, COUNT=False,
            HAS_BIAS=False, HAS_RESIDUAL=False, ATOMIC=False, SWAP=False, STAGES=1, **PLAIN,
        )  # fmt: skip
        close(out, (x * keep) @ weight)


COUNTS = (counted_lists, rows_that_counts_do_not_settle, lists_in_runs)
