"""The operators: what PyTorch asks of one, the functions they stand for, torch.compile and graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse.kernels.ops  # noqa: F401, registers them
from dllm_sparse.kernels import reference
from dllm_sparse.kernels.experts import expert_ffn
from dllm_sparse.kernels.routing import sort_pairs
from dllm_sparse.types import BackendUnavailable

OPS = torch.ops.dllm_sparse
WIDTH, INNER = 64, 96
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


class Layer:
    """Weights and state of a small FFN of `tokens` rows, on a GPU in bf16."""

    def __init__(self, tokens: int, device: str) -> None:
        generator = torch.Generator().manual_seed(tokens)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        self.x, self.norm = draw(tokens, WIDTH), draw(WIDTH)
        self.gate_up, self.down = draw(WIDTH, 2 * INNER, scale=0.2), draw(INNER, WIDTH, scale=0.2)
        self.p = torch.full((1,), 0.6, dtype=torch.float64, device=device)
        self.state = [torch.zeros(2, tokens, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]

    def site(self, place: int) -> tuple[Tensor, ...]:
        """p, guesses and kept of the input (0) or the intermediate (1)."""
        return self.p, *(state[place] for state in self.state)

    def whole(self, x: Tensor) -> Tensor:
        """The FFN as one operator."""
        return OPS.ffn(x, self.norm, 1e-5, self.gate_up, self.down, self.p, *self.state, "silu")

    def parts(self, x: Tensor) -> Tensor:
        """The FFN as one operator a step."""
        listed = OPS.select_list(x, *self.site(0), self.norm, 1e-5)
        hidden = OPS.listed_product(*listed, self.gate_up, None, None, "silu")
        return OPS.listed_product(*OPS.select_list(hidden, *self.site(1), None, 0.0), self.down, None, x, None)

    def plain(self, x: Tensor) -> Tensor:
        """The FFN by dense products of masked values."""
        masked = reference.select(reference.rms_norm(x, self.norm, 1e-5), self.p)
        return x + reference.select(reference.glu(masked @ self.gate_up, "silu"), self.p) @ self.down


def near(found: Tensor, truth: Tensor) -> bool:
    """In bf16 the last kept value of a row may be another one, which is a good part of so short a row."""
    bound = 1e-5 if truth.dtype == torch.float32 else 0.15
    return bool((found.double() - truth.double()).norm() < bound * truth.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_they_are_what_pytorch_asks_of_an_operator(tokens: int, device: str) -> None:
    layer = Layer(tokens, device)
    check = torch.library.opcheck
    check(OPS.select, (layer.x, *layer.site(0), layer.norm, 1e-5))
    check(OPS.ffn, (layer.x, layer.norm, 1e-5, layer.gate_up, layer.down, layer.p, *layer.state, "silu"))
    listed = OPS.select_list(layer.x, *layer.site(0), None, 0.0)
    for bias, activation in ((None, "silu"), (layer.gate_up[0], None)):
        check(OPS.listed_product, (*listed, layer.gate_up, bias, None, activation))
    # What is behind the list has no meaning on a GPU, so that two calls cannot be compared there.
    undefined = {"test_utils": ("test_schema", "test_faketensor")} if device == "cuda" else {}
    check(OPS.select_list, (layer.x, *layer.site(0), layer.norm, 1e-5), **undefined)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_they_compute_the_masked_ffn(tokens: int, device: str) -> None:
    layer = Layer(tokens, device)
    found = layer.whole(layer.x)
    assert near(found, layer.plain(layer.x))
    kept = [state.clone() for state in layer.state]
    assert bool((kept[1] > 0).all())
    masked = OPS.select(layer.x, *layer.site(0), layer.norm, 1e-5)
    assert torch.equal(masked.count_nonzero(-1), kept[1][0])
    if device == "cuda" and tokens > 64:
        with pytest.raises(BackendUnavailable, match="at most 64"):
            layer.parts(layer.x)
    else:
        assert torch.equal(layer.parts(layer.x), found)
        assert all(torch.equal(now, before) for now, before in zip(layer.state, kept, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["whole", "parts"])
def test_they_compile_without_a_break_and_update_their_state(form: str, device: str) -> None:
    layer = Layer(3, device)
    call: Callable[[Tensor], Tensor] = getattr(layer, form)
    compiled: Any = torch.compile(lambda x: call(x * 2) + 1, backend="aot_eager", fullgraph=True)
    for x in (layer.x, layer.x.flip(0)):
        expected = call(x * 2) + 1
        kept = layer.state[1].clone()
        layer.state[1].zero_()
        assert torch.equal(compiled(x), expected)
        assert torch.equal(layer.state[1], kept)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_compile_without_a_break(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(s, generator=generator).to(device) for s in ((6, 16), (4, 48, 16), (4, 16, 24)))
    experts = torch.rand(6, 4, generator=generator).topk(2).indices.to(device)

    def run(x: Tensor) -> Tensor:
        pairs = sort_pairs(experts, 4)
        return OPS.expert_ffn(x * 2, pairs.order, pairs.ends, *weights, "silu") + 1

    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
    pairs = sort_pairs(experts, 4)
    assert torch.equal(compiled(x), expert_ffn(x * 2, pairs, weights[0], weights[1], "silu") + 1)
    torch.library.opcheck(OPS.expert_ffn, (x, pairs.order, pairs.ends, *weights, "silu"))


@pytest.mark.slow
def test_the_default_compiler_takes_them() -> None:
    layer = Layer(3, "cpu")
    compiled: Any = torch.compile(lambda x: layer.whole(x * 2) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(layer.x), layer.whole(layer.x * 2) + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", ["whole", "parts"])
def test_a_graph_replays_them_on_other_values(form: str) -> None:
    layer = Layer(4, "cuda")
    call: Callable[[Tensor], Tensor] = getattr(layer, form)
    x = layer.x.clone()
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x)
    for seed in range(4):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, call(x))
