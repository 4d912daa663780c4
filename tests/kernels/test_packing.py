"""Exact selection on a GPU: the fp64 rule on random and adversarial rows, cold and warm, alone and together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.packing import select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def adversarial(width: int, dtype: torch.dtype, count: int) -> Tensor:
    """Random rows, and rows that break careless searches: zero, constant, one-hot, tiny, huge, two-valued, ties."""
    generator = torch.Generator("cuda").manual_seed(width)
    x = torch.randn(count, width, device="cuda", generator=generator)
    x[1::9] *= torch.exp(2 * torch.randn(x[1::9].shape, device="cuda", generator=generator))
    x[2::9] = x[2::9].round()
    x[3::9] *= 1e-6
    x[4::9] *= 200.0
    x[5::9] = torch.where(x[5::9] > 1.5, 100.0, 0.001)
    x[6::9, 1:] = 0
    x[7::9] = 0.75
    x[8::9] = 0
    x[0, : width // 2] = 0
    return x.to(dtype)


def knob(p: float) -> Tensor:
    return torch.full((1,), p, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("width", [33, 576, 4096, 5000, 12288, 18944])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_masks_equal_the_fp64_rule(width: int, dtype: torch.dtype, p: float) -> None:
    x = adversarial(width, dtype, 90)
    guesses = torch.zeros(len(x), device="cuda")
    kept = torch.full_like(guesses, -1, dtype=torch.int32)
    truth = reference.select(x, p)
    broken = torch.full_like(guesses, torch.nan)
    for guess in (guesses, guesses, guesses + 1, guesses + 1e-9, torch.rand_like(guesses) / width, broken):
        chosen = select(x, knob(p), guess.clone(), kept, listing=False)
        assert chosen.masked is not None
        assert torch.equal(chosen.masked, truth)
        assert torch.equal(kept.long(), truth.count_nonzero(-1))


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
@pytest.mark.parametrize("width", [576, 4096, 12288])
@pytest.mark.parametrize("p", [0.1, 0.6, 0.9])
def test_the_list_is_the_union_and_the_values_are_packed_to_it(rows: int, width: int, p: float) -> None:
    x = adversarial(width, torch.bfloat16, rows + 9)[:rows]
    guesses = torch.zeros(rows, device="cuda")
    kept = torch.zeros_like(guesses, dtype=torch.int32)
    for _ in range(2):
        listed = select(x, knob(p), guesses, kept).listed
        assert listed is not None
        truth = reference.select(x, p)
        channels = (truth != 0).any(0).nonzero().flatten()
        assert int(listed.length) == len(channels)
        assert torch.equal(listed.rows[: len(channels)].long(), channels)
        assert torch.equal(listed.values[:, : len(channels)], truth[:, channels])


@pytest.mark.parametrize("rows", [1, 5])
def test_a_norm_in_front_rounds_like_its_twin(rows: int) -> None:
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    guesses = torch.zeros(rows, device="cuda")
    kept = torch.zeros_like(guesses, dtype=torch.int32)
    chosen = select(x, knob(0.8), guesses, kept, norm=(weight, 1e-5), listing=False)
    truth = reference.select(reference.rms_norm(x, weight, 1e-5), 0.8)
    assert chosen.masked is not None
    assert ((chosen.masked != 0) == (truth != 0)).float().mean() > 0.995
    assert (chosen.masked.double() - truth.double()).norm() / truth.double().norm() < 2e-2


def test_selection_replays_in_a_graph() -> None:
    x = torch.zeros(4, 4096, device="cuda", dtype=torch.bfloat16)
    guesses = torch.zeros(4, device="cuda")
    kept = torch.zeros_like(guesses, dtype=torch.int32)
    p = knob(0.7)
    select(x, p, guesses, kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        listed = select(x, p, guesses, kept).listed
    assert listed is not None
    for _ in range(5):
        x.copy_(torch.randn_like(x.float()))
        graph.replay()
        channels = (reference.select(x, 0.7) != 0).any(0).nonzero().flatten()
        assert torch.equal(listed.rows[: int(listed.length)].long(), channels)
