"""The GPU kernels of the engine against their plain twins, on a GPU; relative RMS against fp64 where sums differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.cached_attention import Span, attend, rotate_and_store
from dllm_sparse.kernels.listing import Listed
from dllm_sparse.kernels.streaming import Scratch, add_norm, choose, glu, stream_matmul
from dllm_sparse.kernels.tuning import Tile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 64, 32), (3, 4096, 4096), (17, 576, 1536), (32, 1536, 576), (64, 12288, 4096))
TILES = (None, Tile(64, 64, 4, 4, 1), Tile(64, 64, 4, 3, 5), Tile(32, 128, 4, 2, 3))


def relative(found: Tensor, truth: Tensor) -> float:
    """Relative RMS error; NaN where something was never written."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


@pytest.fixture
def scratch() -> Scratch:
    made = Scratch(torch.device("cuda"))
    made.space(1 << 24).fill_(torch.nan)  # what a kernel reads it must have written
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", TILES)
def test_products_equal_fp64_up_to_rounding(scratch, dtype, shape, tile) -> None:
    tokens, k, n = shape
    x, w = randn(tokens, k, dtype=dtype), randn(k, n, dtype=dtype, scale=k**-0.5)
    bias, residual = randn(n, dtype=dtype), randn(tokens, n, dtype=dtype)
    truth = x.double() @ w.double() + bias.double() + residual.double()
    error = relative(stream_matmul(x, w, scratch, bias=bias, residual=residual, tile=tile), truth)
    library = relative(residual + F.linear(x, w.t(), bias), truth)
    assert error <= 1.2 * library
    assert int(scratch.counters.abs().sum()) == 0


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tile", TILES)
def test_gated_products_and_their_plain_twin(scratch, activation, tile) -> None:
    x, w = randn(5, 576, dtype=torch.bfloat16), randn(576, 3072, dtype=torch.bfloat16, scale=0.04)
    gate, up = (x.double() @ w.double()).chunk(2, -1)
    truth = reference.ACTIVATIONS[activation](gate) * up
    error = relative(stream_matmul(x, w, scratch, activation=activation, tile=tile), truth)
    assert error <= 1.2 * relative(reference.glu(x @ w, activation), truth)


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 700, 1024])
@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_listed_rows_are_the_only_ones_read(scratch, kept, tokens) -> None:
    k, n = 1024, 512
    w = randn(k, n, dtype=torch.bfloat16, scale=k**-0.5)
    rows = torch.randperm(k, device="cuda")[:kept].sort().values
    x = randn(tokens, k, dtype=torch.bfloat16)
    truth = x[:, rows].double() @ w[rows].double()
    poisoned = torch.full_like(w, torch.nan)
    poisoned[rows] = w[rows]
    packed = torch.full_like(x, torch.nan)
    packed[:, :kept] = x[:, rows]
    index = torch.zeros(k, dtype=torch.int32, device="cuda")
    index[:kept] = rows.int()
    listed = Listed(packed, index, torch.tensor([kept], dtype=torch.int32, device="cuda"))
    for tile in TILES:
        found = stream_matmul(listed, poisoned, scratch, tile=tile)
        assert torch.isfinite(found).all()
        assert kept == 0 or relative(found, truth) < 3e-3
        assert kept > 0 or not found.any()


def test_shares_are_added_in_one_order_unless_asked_otherwise(scratch) -> None:
    x, w = randn(4, 8192, dtype=torch.bfloat16), randn(8192, 512, dtype=torch.bfloat16, scale=0.01)
    tile = Tile(64, 64, 4, 3, 16)
    first = stream_matmul(x, w, scratch, tile=tile)
    assert all(torch.equal(first, stream_matmul(x, w, scratch, tile=tile)) for _ in range(20))
    assert relative(stream_matmul(x, w, scratch, tile=tile, atomic=True), x.double() @ w.double()) < 3e-3
    assert int(scratch.counters.abs().sum()) == 0


@pytest.mark.parametrize("width", [64, 576, 4096, 5000])
def test_small_layers_round_like_their_twins(width) -> None:
    x, delta = randn(7, width, dtype=torch.bfloat16), randn(7, width, dtype=torch.bfloat16)
    weight = randn(width, dtype=torch.bfloat16)
    total, out = add_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    assert relative(out, reference.rms_norm((x + delta).float(), weight.float(), 1e-5)) < 6e-3
    assert (out == reference.rms_norm(total, weight, 1e-5)).float().mean() > 0.99
    both = randn(7, 2 * width, dtype=torch.bfloat16)
    assert (glu(both, "silu") == reference.glu(both, "silu")).float().mean() > 0.99


@pytest.mark.parametrize("heads", [(4, 4, 64), (9, 3, 64), (8, 2, 128), (6, 2, 32)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("share", [1, 2])
def test_rotation_writes_the_cache_like_its_twin(heads, normed, share) -> None:
    heads, kv_heads, dim = heads
    batch, tokens, length = 2, 5, 40
    qkv = randn(batch * tokens, (heads + 2 * kv_heads) * dim, dtype=torch.bfloat16)
    angles = torch.rand(length, dim // 2 // share, device="cuda") * 6
    tables = (angles.cos(), angles.sin())
    slots = torch.arange(11, 11 + tokens, device="cuda")
    positions = torch.randint(0, length, (batch * tokens,), device="cuda")
    norms = (randn(dim, dtype=torch.bfloat16), randn(dim, dtype=torch.bfloat16), 1e-6) if normed else None
    caches = [
        [torch.zeros(batch, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in "ab"
    ]
    q = rotate_and_store(qkv, tables, positions, slots, *caches[0], norms)
    expected = reference.rotate_and_store(qkv, tables, positions, slots, *caches[1], norms)
    for found, truth in ((q, expected), *zip(*caches, strict=True)):
        assert relative(found, truth) < 4e-3
    assert not caches[0][0][:, :, :11].any()


@pytest.mark.parametrize("tokens", [1, 4, 32, 100])
@pytest.mark.parametrize("heads", [(4, 4, 64), (9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("seen", [1, 65, 200])
def test_split_attention_equals_the_library(scratch, tokens, heads, seen) -> None:
    heads, kv_heads, dim = heads
    batch, length = 3, 200
    q = randn(batch, heads, tokens, dim, dtype=torch.bfloat16)
    keys, values = (randn(batch, kv_heads, length, dim, dtype=torch.bfloat16) for _ in "kv")
    begin = torch.tensor([0, min(3, seen - 1), seen - 1], device="cuda")
    end = torch.tensor([seen], device="cuda")
    place = torch.arange(length, device="cuda")
    mask = ((place >= begin[:, None]) & (place < end))[:, None, None]
    wide = (part.double() for part in (q, keys, values))
    truth = (
        F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2).flatten(0, 1)
    )
    keys[:, :, seen:], values[:, :, seen:] = torch.nan, torch.nan
    if tokens > 64:
        keys[:, :, seen:], values[:, :, seen:] = 0, 0  # the library reads what it masks
    span = Span(begin, end, padded=True, block=0, whole=False)
    assert relative(attend(q, keys, values, span, scratch), truth) < 5e-3


@pytest.mark.parametrize("rows", [1, 32, 300])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_choice_and_probability(scratch, rows, wide, dtype) -> None:
    logits = randn(rows, 50_003, dtype=dtype, scale=4.0)
    logits[0, 5:] = -torch.inf
    logits[0, 2] = logits[0, 4] = 30.0  # a tie goes to the lower id
    token, probability = choose(logits, scratch, wide=wide)
    truth = logits.double().softmax(-1).amax(-1)
    assert torch.equal(logits.gather(1, token[:, None]).squeeze(1), logits.amax(-1))
    assert int(token[0]) == 2
    assert relative(probability, truth) < (1e-12 if wide else 1e-5)
    logits[-1, 7] = torch.nan
    assert choose(logits, scratch)[1][-1].isnan()


def test_a_graph_replays_with_new_inputs_and_lists(scratch) -> None:
    layer = nn.Linear(512, 256, bias=False, device="cuda", dtype=torch.bfloat16)
    w = layer.weight.detach().t().contiguous()
    x = torch.zeros(2, 512, device="cuda", dtype=torch.bfloat16)
    rows = torch.zeros(512, dtype=torch.int32, device="cuda")
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    stream_matmul(Listed(x, rows, length), w, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stream_matmul(Listed(x, rows, length), w, scratch)
    for kept in (0, 3, 512, 100):
        chosen = torch.randperm(512, device="cuda")[:kept].sort().values
        x[:, :kept] = torch.randn(2, kept, device="cuda").to(x.dtype)
        rows[:kept] = chosen.int()
        length.fill_(kept)
        graph.replay()
        truth = x[:, :kept].double() @ w[chosen].double()
        assert kept == 0 or relative(out, truth) < 3e-3
        assert kept > 0 or not out.any()
