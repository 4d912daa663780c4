"""Run by `test_interpreted.py` under TRITON_INTERPRET=1: lists of any length, ties, zeros, NaN, odd sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.gpu import select as gpu_select
from dllm_sparse.kernels.gpu.attention import attention_kernel
from dllm_sparse.kernels.gpu.choose import choose_kernel
from dllm_sparse.kernels.gpu.layers import add_norm_kernel, glu_kernel
from dllm_sparse.kernels.gpu.stream_matmul import stream_matmul_kernel
from tests.kernels.interpreted import PLAIN, close


@triton.jit
def bits_set(word):  # type: ignore[no-untyped-def]
    """The interpreter has no inline assembly."""
    count = tl.zeros_like(word)
    for bit in range(32):
        count += (word >> bit) & 1
    return count


def lists() -> None:
    """No row, one, a tile and one more, all; K no multiple of the tile, N neither; more shares than tiles."""
    tokens, k, n = 3, 80, 96
    weight, residual = torch.randn(k, n), torch.randn(tokens, n)
    for length in (0, 1, 33, 80):
        rows = torch.randperm(k)[:length].sort().values
        x = torch.randn(tokens, k)
        values, index = torch.full_like(x, torch.nan), torch.full((k,), 10**6, dtype=torch.int32)
        values[:, :length], index[:length] = x[:, rows], rows.int()
        poisoned = torch.full_like(weight, torch.nan)
        poisoned[rows] = weight[rows]
        for splits, atomic in ((1, False), (4, False), (2, True)):
            out, arrivals = torch.full((tokens, n), torch.nan), torch.zeros(2, dtype=torch.int32)
            space = torch.full((splits * tokens * n,), 0.0 if atomic else torch.nan)
            stream_matmul_kernel[(2 * splits,)](
                values, poisoned, values, residual, out, space, arrivals, index,
                torch.tensor([length], dtype=torch.int32), index, index, index, tokens, n, k, n, splits, 1,
                BT=16, BO=8 if splits == 4 else 16, BN=64, BK=32, GATED=False, ACT=0, LISTED=True, RUNS=0, COUNT=False,
                HAS_BIAS=False, HAS_RESIDUAL=True, ATOMIC=atomic, SWAP=splits == 4, STAGES=1, **PLAIN,
            )  # fmt: skip
            close(out, residual + x[:, rows] @ weight[rows])
            assert not arrivals.any()


def norms() -> None:
    """Rows of one entry, of a whole block, of one more; rows of zeros; nothing added."""
    for n in (1, 32, 33):
        x, weight = torch.randn(3, n), torch.randn(n)
        x[1] = 0
        out = torch.full_like(x, torch.nan)
        block = 1 << (n - 1).bit_length()
        add_norm_kernel[(3,)](x, x, weight, x, out, n, 1e-5, BLOCK=block, ADD=False, **PLAIN)
        close(out, reference.rms_norm(x, weight, 1e-5))
        both, out = torch.randn(3, 2 * n), torch.full((3, n), torch.nan)
        both[2] = 0
        glu_kernel[(3, 2)](both, out, n, ACT=0, BLOCK=32, **PLAIN)
        close(out, reference.glu(both, "silu"))


def one_key() -> None:
    """A single key to see, in more shares than there are blocks of keys."""
    q, keys, values = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 37, 16), torch.randn(1, 1, 37, 16)
    expected = values[0, 0, 36].clone()
    keys[:, :, :36] = values[:, :, :36] = torch.nan
    out, arrivals = torch.full((1, 32), torch.nan), torch.zeros(1, dtype=torch.int32)
    attention_kernel[(1, 4)](
        q, keys, values, torch.tensor([36]), torch.tensor([37]), out, torch.full((4 * 16 * 16,), torch.nan),
        torch.full((4 * 16 * 2,), torch.nan), arrivals, 1, 37, 0.25, 4,
        HEADS=2, SETS=1, SHARED=1, HEAD_DIM=16, BM=16, BS=16, **PLAIN,
    )  # fmt: skip
    close(out, expected.repeat(2)[None])
    assert not arrivals.any()


def choices() -> None:
    """Equal logits all over, one finite logit, NaN and Inf, of fewer words than a block holds."""
    logits = torch.zeros(5, 21)
    logits[1] = -torch.inf
    logits[1, 20] = -3.0
    logits[2, 4], logits[3, 17] = torch.nan, torch.inf
    logits[4, ::2] = 2.5
    for splits in (1, 3):
        token, probability = torch.full((5,), -1), torch.zeros(5)
        arrivals = torch.zeros(5, dtype=torch.int32)
        choose_kernel[(5, splits)](
            logits, token, probability, torch.full((5, splits), torch.nan),
            torch.full((5, splits), -1, dtype=torch.int32), torch.full((5, splits), torch.nan), arrivals, 21, splits,
            BLOCK=8, PADDED=4, WIDE=False, **PLAIN,
        )  # fmt: skip
        assert token[[0, 1, 4]].tolist() == [0, 20, 0]
        close(probability[[0, 1, 4]], reference.choose(logits[[0, 1, 4]])[1])
        assert not torch.isfinite(probability[2:4]).any()
        assert not arrivals.any()


def odd_rows() -> None:
    """One entry, zeros, ties all over, NaN and Inf: what is not finite is kept, other rows do not mind."""
    for n in (1, 33):
        x = torch.randn(5, n).half()
        x[0] = 0
        x[1] = 0.25
        x[2, 0], x[3, n - 1] = torch.nan, torch.inf
        for p in (0.3, 0.9):
            guesses, kept = torch.zeros(5), torch.full((5,), -1, dtype=torch.int32)
            out, knob = torch.full_like(x, torch.nan), torch.tensor([p], dtype=torch.float64)
            block = max(32, 1 << (n - 1).bit_length())
            gpu_select.mask_kernel[(5,)](
                x, x, guesses, kept, out, kept, knob, n, 0.0, BLOCK=block, NORM=False, WORDS=False, **PLAIN
            )  # fmt: skip
            truth = reference.select(x, p)
            assert torch.equal(out.nan_to_num(-1, -2), truth.nan_to_num(-1, -2))
            assert kept.tolist() == truth.count_nonzero(-1).tolist()


def unions() -> None:
    """The list of what some of T rows kept, T and n no multiples of the tiles: nothing, everything, a part."""
    gpu_select._popcount = bits_set
    n, chunk, words = 70, 32, 4
    for rows, density in ((2, 0.0), (2, 1.0), (9, 0.1)):
        keep = torch.rand(rows, n) < density
        masked = torch.randn(rows, n) * keep
        bits = torch.nn.functional.pad(keep.any(0), (0, 128 - n)).view(words, 32).long() << torch.arange(32)
        packed, index = torch.full((rows, n), torch.nan), torch.full((n,), -1, dtype=torch.int32)
        count = torch.full((1,), -1, dtype=torch.int32)
        gpu_select.pack_kernel[(-(-n // chunk), -(-rows // 8))](
            masked, bits.sum(-1).to(torch.int32), packed, index, count, rows, n, BT=8, WORDS=words, CHUNK=chunk,
            **PLAIN,
        )  # fmt: skip
        channels = keep.any(0).nonzero().flatten()
        assert count.tolist() == [len(channels)]
        assert torch.equal(index[: len(channels)].long(), channels)
        assert torch.equal(packed[:, : len(channels)], masked[:, channels])
        assert packed[:, len(channels) :].isnan().all()


EDGES = (lists, norms, one_key, choices, odd_rows, unions)
