"""Whole experts in two launches against the loop over experts: in Triton's interpreter, on a GPU, in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_sparse.kernels.experts import expert_ffn, fuses_on, linear_by_expert
from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.kernels.routing import Pairs, sort_pairs
from tests.helpers import interpreted

# (tokens, experts a token, experts, width, width of an expert)
SMALL = ((1, 1, 1, 16, 8), (3, 2, 5, 24, 70), (40, 1, 2, 70, 8), (0, 2, 4, 16, 8))


def layer(experts: int, width: int, inner: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(experts)
    gate_up = torch.randn(experts, 2 * inner, width, generator=generator) * width**-0.5
    down = torch.randn(experts, width, inner, generator=generator) * inner**-0.5
    return gate_up.to(device, dtype), down.to(device, dtype)


def routed(tokens: int, places: int, experts: int, seed: int = 0) -> Tensor:
    """Experts [M, k], different ones of a token, in favour of the first: some get many rows, some none."""
    odds = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) * torch.arange(experts, 0, -1)
    return odds.topk(places, dim=-1).indices


def looped(x: Tensor, pairs: Pairs, places: int, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    gate, up = linear_by_expert(x[pairs.order // places], gate_up, pairs.ends).chunk(2, -1)
    return linear_by_expert(ACTIVATIONS[activation](gate) * up, down, pairs.ends)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def check(device: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # of a few entries, chance decides
    for tokens, places, experts, width, inner in shapes:
        gate_up, down = layer(experts, width, inner, device, dtype)
        chosen = routed(tokens, places, experts)
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
        for expert in set(range(experts)) - set(chosen.flatten().tolist()):
            gate_up[expert], down[expert] = torch.nan, torch.nan  # never read
        pairs = sort_pairs(chosen.to(device), experts)
        for activation in ("silu", "gelu_tanh"):
            truth = looped(x.double(), pairs, places, gate_up.double(), down.double(), activation)
            found = expert_ffn(x, pairs, gate_up, down, activation, fused=True)
            assert found.shape == (tokens * places, width)
            own = relative(looped(x, pairs, places, gate_up, down, activation), truth)
            assert relative(found, truth) <= max(1.2 * own, bound), (tokens, experts, activation)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    poisoned = "import torch; torch.use_deterministic_algorithms(True)"  # fresh outputs are NaN
    interpreted(f"{poisoned}; from tests.kernels.test_experts import check; check('cpu', {SMALL}, torch.float32)")


def test_not_used_where_it_cannot_run() -> None:
    assert not fuses_on(torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_gpu(dtype: torch.dtype) -> None:
    check(
        "cuda",
        (*SMALL, (1, 8, 64, 512, 256), (32, 8, 64, 512, 256), (300, 4, 16, 256, 512), (7, 3, 256, 96, 40)),
        dtype,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_replays_with_other_routings() -> None:
    gate_up, down = layer(16, 256, 128, "cuda", torch.float16)
    x = torch.randn(9, 256, device="cuda", dtype=torch.float16)
    chosen = routed(9, 4, 16).cuda()

    def run() -> Tensor:
        return expert_ffn(x, sort_pairs(chosen, 16), gate_up, down, "silu", fused=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(4):
        chosen.copy_(routed(9, 4, 16, seed))
        if seed == 3:
            chosen.copy_(torch.arange(4).expand(9, 4))  # four experts get everything
        graph.replay()
        assert torch.equal(out, run())
