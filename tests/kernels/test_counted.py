"""Selection from counts on a GPU: the list of rows that a product counted is the one that searching them gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.histogram import SEARCHED, Histogram, new_histogram
from dllm_sparse.kernels.listing import Listed, run_space
from dllm_sparse.kernels.packing import RUNS, can_be_counted, select
from dllm_sparse.kernels.streaming import Scratch, stream_matmul
from tests.kernels.test_packing import adversarial, knob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def scratch() -> Scratch:
    return Scratch(torch.device("cuda"))


def passed_through(x: Tensor, histogram: Histogram, scratch: Scratch) -> Tensor:
    """x by way of a product that counts it."""
    histogram.lines.zero_()
    identity = torch.eye(x.shape[1], device="cuda", dtype=x.dtype)
    made = stream_matmul(x, identity, scratch, histogram=histogram)
    assert torch.equal(made, x)
    return made


def check(listed: Listed, truth: Tensor) -> None:
    """The list, run by run, holds the channels and values of masked rows."""
    space = run_space(truth.shape[1], RUNS)
    for run, length in enumerate(listed.length.tolist()):
        here = truth[:, run * space : (run + 1) * space]
        channels = (here != 0).any(0).nonzero().flatten()
        assert length == len(channels)
        place = slice(run * space, run * space + length)
        assert torch.equal(listed.rows[place].long(), run * space + channels)
        assert torch.equal(listed.values[:, place], here[:, channels])


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [272, 1536, 4096])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.8, 0.999, 1.0])
def test_lists_equal_the_fp64_rule(scratch: Scratch, rows: int, width: int, p: float) -> None:
    state, kept = new_histogram(rows, torch.device("cuda")), torch.zeros(rows, dtype=torch.int32, device="cuda")
    everything = adversarial(width, torch.bfloat16, 90)
    for first in range(0, 90 - rows, rows):
        x = everything[first : first + rows].contiguous()
        assert can_be_counted(x)
        for _ in range(2):  # from the thresholds of the rows before, then from their own
            made = passed_through(x, state, scratch)
            listed = select(made, knob(p), kept.float(), kept, histogram=state).listed
            assert listed is not None
            truth = reference.select(x, p)
            check(listed, truth)
            assert torch.equal(kept.long(), truth.count_nonzero(-1))


@pytest.mark.parametrize("shape", [(1024, 3072), (4096, 12288), (4096, 14336)])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_a_counted_ffn_equals_a_searched_one(scratch: Scratch, shape: tuple[int, int], rows: int) -> None:
    width, inner = shape
    gate_up = torch.randn(width, 2 * inner, device="cuda", dtype=torch.bfloat16) * width**-0.5
    down = torch.randn(inner, width, device="cuda", dtype=torch.bfloat16) * inner**-0.5
    state, kept = new_histogram(rows, torch.device("cuda")), torch.zeros(rows, dtype=torch.int32, device="cuda")
    for turn in range(4):
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        state.lines.zero_()
        hidden = stream_matmul(x, gate_up, scratch, activation="silu", histogram=state)
        assert torch.equal(hidden, stream_matmul(x, gate_up, scratch, activation="silu"))
        listed = select(hidden, knob(0.7), kept.float(), kept, histogram=state).listed
        truth = reference.select(hidden, 0.7)
        assert listed is not None
        check(listed, truth)
        searched = state.lines[:, SEARCHED]
        assert (searched == (1 if turn == 0 else 0)).all()
        poisoned = torch.where((truth != 0).any(0)[:, None], down, torch.nan)
        found, exact = stream_matmul(listed, poisoned, scratch, residual=x), x.double() + truth.double() @ down.double()
        assert float((found.double() - exact).norm() / exact.norm()) < 4e-3


def test_rows_that_are_not_finite_and_graphs(scratch: Scratch) -> None:
    x = torch.zeros(4, 1024, device="cuda", dtype=torch.bfloat16)
    identity = torch.eye(1024, device="cuda", dtype=torch.bfloat16)
    state, kept = new_histogram(4, torch.device("cuda")), torch.zeros(4, dtype=torch.int32, device="cuda")
    p = knob(0.7)

    def run() -> Listed:
        state.lines.zero_()
        made = stream_matmul(x, identity, scratch, histogram=state)
        listed = select(made, p, kept.float(), kept, histogram=state).listed
        assert listed is not None
        return listed

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        listed = run()
    for _ in range(5):
        x.copy_(torch.randn_like(x.float()) * torch.tensor([1.0, 30.0, 1e-3, 1.0], device="cuda")[:, None])
        graph.replay()
        check(listed, reference.select(x, 0.7))
    x[1, 5] = torch.inf  # spreads over its row as NaN: the identity has zeros
    graph.replay()
    assert kept[1] == 1024
    assert int(kept[0]) == int((reference.select(x[:1], 0.7) != 0).sum())
