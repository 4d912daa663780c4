"""Run by `test_interpreted.py` under TRITON_INTERPRET=1: kernels on CPU tensors against their twins, small and odd."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import product

import torch

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.gpu.attention import attention_kernel
from dllm_sparse.kernels.gpu.choose import choose_kernel
from dllm_sparse.kernels.gpu.layers import add_norm_kernel, glu_kernel, rope_kernel
from dllm_sparse.kernels.gpu.select import list_one_kernel, mask_kernel
from dllm_sparse.kernels.gpu.stream_matmul import stream_matmul_kernel
from tests.sparsity.counted import check_counts

PLAIN = {"WAIT": False, "TRIGGER": False}


def close(found: torch.Tensor, truth: torch.Tensor, bound: float = 1e-5) -> None:
    error = float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
    assert error < bound, error


def products() -> None:
    for tokens, k, n, splits in ((1, 48, 32, 1), (3, 80, 96, 3), (17, 64, 64, 2)):
        x, w = torch.randn(tokens, k), torch.randn(k, 2 * n)
        bias, residual = torch.randn(2 * n), torch.randn(tokens, n)
        rows = torch.randperm(k)[: k // 2].sort().values
        for gated in (False, True):
            for listed in (False, True):
                columns, padded = 2 * n if gated else n, 32 if tokens > 16 else 16
                weight = w[:, :columns].contiguous()
                values, index, count = (
                    x,
                    torch.zeros(k, dtype=torch.int32),
                    torch.tensor([len(rows)], dtype=torch.int32),
                )
                truth = x @ weight
                if listed:
                    truth = x[:, rows] @ weight[rows]
                    poisoned = torch.full_like(weight, torch.nan)
                    poisoned[rows] = weight[rows]
                    weight, values = poisoned, torch.full_like(x, torch.nan)
                    values[:, : len(rows)] = x[:, rows]
                    index[: len(rows)] = rows.int()
                truth = truth + bias[:columns]
                truth = (reference.glu(truth, "silu") if gated else truth) + residual
                out = torch.full((tokens, n), torch.nan)
                arrivals = torch.zeros(64, dtype=torch.int32)
                stream_matmul_kernel[(-(-n // 32) * splits,)](
                    values, weight, bias, residual, out, torch.full((splits * tokens * columns,), torch.nan), arrivals,
                    index, count, index, index, index, tokens, n, k, columns, splits, 1,
                    BT=padded, BO=8 if tokens == 3 else padded, BN=32, BK=16, GATED=gated, ACT=0, LISTED=listed,
                    RUNS=0, COUNT=False, HAS_BIAS=True, HAS_RESIDUAL=True, ATOMIC=False, SWAP=tokens == 3,
                    STAGES=1, **PLAIN,
                )  # fmt: skip
                close(out, truth)
                assert not arrivals.any()


def layers() -> None:
    x, delta, weight = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    total, out = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    add_norm_kernel[(3,)](x, delta, weight, total, out, 40, 1e-5, BLOCK=64, ADD=True, **PLAIN)
    close(total, x + delta)
    close(out, reference.rms_norm(x + delta, weight, 1e-5))
    for code, name in enumerate(("silu", "relu", "gelu", "gelu_tanh")):
        both, out = torch.randn(3, 80), torch.full((3, 40), torch.nan)
        glu_kernel[(3, 2)](both, out, 40, ACT=code, BLOCK=32, **PLAIN)
        close(out, reference.glu(both, name))
    for normed, turned in product((False, True), (6, 4, 1)):
        qkv, angles = torch.randn(4, 6 * 12), torch.rand(9, turned) * 6
        positions, slots = torch.tensor([3, 4, 5, 6]), torch.tensor([4, 5])
        norms = (torch.randn(12), torch.randn(12), 1e-6) if normed else None
        tables = (angles.cos(), angles.sin())
        caches = [[torch.zeros(2, 1, 9, 12), torch.zeros(2, 1, 9, 12)] for _ in range(2)]
        q = torch.full((2, 4, 2, 12), torch.nan)
        given = norms or (qkv, qkv, 0.0)
        rope_kernel[(4, 2)](
            qkv, *tables, positions, slots, given[0], given[1], q, *caches[0], 2, 9, given[2],
            HEADS=4, KV_HEADS=1, HALF=6, TURNED=turned, PAD=8, BH=4, QK_NORM=normed, **PLAIN,
        )  # fmt: skip
        close(q, reference.rotate_and_store(qkv, tables, positions, slots, *caches[1], norms))
        for found, truth in zip(*caches, strict=True):
            close(found, truth)


def attention() -> None:
    for splits, shared, hidden in product((1, 3), (1, 2), (5, 33)):  # 33: a row of padding alone, which gives zeros
        q, keys, values = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 37, 16), torch.randn(2, 2, 37, 16)
        begin, end = torch.tensor([0, hidden]), torch.tensor([33])
        place = torch.arange(37)
        mask = ((place >= begin[:, None]) & (place < end))[:, None, None]
        truth = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        keys[:, :, 33:] = values[:, :, 33:] = torch.nan
        out, arrivals = torch.full((6, 64), torch.nan), torch.zeros(8, dtype=torch.int32)
        space = torch.full((splits * 8 * 16 * 16,), torch.nan)
        attention_kernel[(4 * shared, splits)](
            q, keys, values, begin, end, out, space, torch.full((splits * 8 * 16 * 2,), torch.nan), arrivals,
            3, 37, 1.4426950408889634 / 4, splits,
            HEADS=4, SETS=2 * shared, SHARED=shared, HEAD_DIM=16, BM=16, BS=16, **PLAIN,
        )  # fmt: skip
        close(out, truth.nan_to_num().transpose(1, 2).reshape(6, 64))
        assert not arrivals.any()


def choice() -> None:
    logits = torch.randn(3, 101)
    logits[0, 7] = logits[0, 90] = 9.0
    for wide in (False, True):
        kind = torch.float64 if wide else torch.float32
        token, probability = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=kind)
        choose_kernel[(3, 4)](
            logits, token, probability, torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int32),
            torch.zeros(3, 4, dtype=kind), torch.zeros(3, dtype=torch.int32), 101, 4,
            BLOCK=16, PADDED=4, WIDE=wide, **PLAIN,
        )  # fmt: skip
        truth = reference.choose(logits, wide=wide)
        assert token.tolist() == [7, *truth[0].tolist()[1:]]
        close(probability, truth[1])


def selection() -> None:
    x = torch.randn(6, 75).half()
    x[1] = 0
    x[2] = x[2].round()
    x[3, 1:] = 0
    x[4] = 0.5
    for p in (0.0, 0.4, 0.9):
        truth, knob = reference.select(x, p), torch.tensor([p], dtype=torch.float64)
        guesses, kept = torch.zeros(6), torch.zeros(6, dtype=torch.int32)
        for _ in range(2):  # cold, then from the thresholds found
            out, words = torch.full_like(x, torch.nan), torch.zeros(4, dtype=torch.int32)
            mask_kernel[(6,)](
                x, x, guesses, kept, out, words, knob, 75, 0.0, BLOCK=128, NORM=False, WORDS=True, **PLAIN
            )
            marked = (words[:, None] >> torch.arange(32) & 1).flatten()
            assert marked.tolist() == [*(truth != 0).any(0).int().tolist(), *[0] * 53]
            assert torch.equal(out, truth)
            assert kept.tolist() == truth.count_nonzero(-1).tolist()


def ties_and_broken_rows() -> None:
    """Where the mass reaches p exactly the rule's rounding decides; a row of NaN under a norm stays inside itself."""
    for row in ([2, 2, 1], [3, 3, 2, 1, 1], [1, 1, 1, 1, 0.5, 0.5], [1, 1, 0.5]):
        x, knob = torch.tensor([row]).half(), torch.tensor([0.8], dtype=torch.float64)
        out, kept, none = torch.full_like(x, torch.nan), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        mask_kernel[(1,)](x, x, none, kept, out, kept, knob, len(row), 0.0, BLOCK=32, NORM=False, WORDS=False, **PLAIN)
        assert torch.equal(out, reference.select(x, 0.8))
    x, weight, guess = torch.randn(1, 40).half(), torch.ones(40).half(), torch.zeros(1)
    x[0, 3] = torch.nan
    kept, words = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out = torch.full((1, 40), 7.0).half()
    mask_kernel[(1,)](
        x, weight, guess, kept, out, words, knob, 40, 1e-5, BLOCK=64, NORM=True, WORDS=True, **PLAIN
    )  # fmt: skip
    assert (int(kept), words.tolist()) == (40, [-1, 0xFF])
    values, index = torch.zeros(1, 64).half(), torch.full((64,), -1, dtype=torch.int32)
    list_one_kernel[(2,)](
        x, weight, guess, kept, values, index, knob, 40, 1e-5, BLOCK=64, CHUNK=32, NORM=True, **PLAIN
    )  # fmt: skip
    assert index[:40].tolist() == list(range(40))
    assert (index[40:] == -1).all()


def list_of_one_row() -> None:
    for row in (torch.randn(1, 75), torch.randn(1, 75).round(), torch.zeros(1, 75), torch.full((1, 75), 0.5)):
        x = row.half()
        for p in (0.0, 0.4, 0.9):
            truth, knob = reference.select(x, p), torch.tensor([p], dtype=torch.float64)
            values, index = torch.full_like(x, torch.nan), torch.full((75,), -1, dtype=torch.int32)
            kept = torch.full((1,), -1, dtype=torch.int32)
            list_one_kernel[(3,)](
                x, x, torch.zeros(1), kept, values, index, knob, 75, 0.0, BLOCK=128, CHUNK=32, NORM=False, **PLAIN
            )  # fmt: skip
            channels = truth[0].nonzero().flatten()
            assert kept.tolist() == [len(channels)]
            assert torch.equal(index[: len(channels)].long(), channels)
            assert torch.equal(values[0, : len(channels)], truth[0, channels])


def counting() -> None:
    check_counts("cpu")


CHECKS = (products, layers, attention, choice, selection, ties_and_broken_rows, list_of_one_row, counting)


def run(checks: Iterable[Callable[[], None]]) -> None:
    """Runs every check and prints its name."""
    torch.manual_seed(0)
    for check in checks:
        check()
        sys.stdout.write(f"{check.__name__}\n")
