"""The floors: published figures, and the parts against the parameters they count."""

from __future__ import annotations

import pytest
import torch

from dllm_sparse.bench.floors import (
    KNOWN_RATES,
    Cost,
    Fed,
    Rates,
    bound_by,
    expected_experts,
    floor_seconds,
    forward_costs,
    total,
)
from dllm_sparse.models.config import MoEConfig
from dllm_sparse.models.families import ALIASES
from dllm_sparse.models.shapes import SHAPES

H200 = KNOWN_RATES["H200", "bfloat16"]


@pytest.mark.parametrize("name", [name for name in SHAPES if name in ALIASES])
def test_shapes_have_the_parameters_of_their_checkpoints(name: str) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(ALIASES[name].billions, rel=4e-3)


def test_llada_reads_fifteen_gigabytes_a_small_step() -> None:
    """3.49 ms at 4.3 TB/s without keys and values, 3.57 with 640 positions cached; 12.15 for the linears of all 640."""
    config = SHAPES["llada-8b"]
    bare = total(forward_costs(config, Fed(1, 32, 32, 32), 2))
    assert bare.bytes == pytest.approx(15.0e9, rel=5e-3)
    assert floor_seconds(bare, H200) * 1e3 == pytest.approx(3.49, rel=3e-3)
    block = total(forward_costs(config, Fed(1, 32, 640, 32), 2))
    assert floor_seconds(block, H200) * 1e3 == pytest.approx(3.57, rel=3e-3)
    assert bound_by(block, H200) == "bandwidth"
    linears = forward_costs(config, Fed(1, 640, 640, 640), 2)
    del linears["attention"]
    assert floor_seconds(total(linears), H200) * 1e3 == pytest.approx(12.15, rel=3e-3)
    assert bound_by(total(linears), H200) == "flops"


@pytest.mark.parametrize("name", list(SHAPES))
def test_linear_weights_are_all_parameters_but_norms_biases_and_embedding(name: str) -> None:
    config = SHAPES[name]
    tokens = 1 if config.moe is None else 4096  # enough to reach every expert
    read = total(forward_costs(config, Fed(1, tokens, tokens, 1), 1)).bytes
    embedding = 0 if config.tied else config.vocab_size * config.width
    small = config.layers * (4 * config.width + sum(config.qkv_widths)) + config.width
    assert read <= config.parameters - embedding <= read + small


def test_a_mixture_reads_the_experts_its_tokens_chose() -> None:
    """LLaDA-MoE: 8 of 64 experts at one token, nearly all at 32; a token is multiplied with 8 of them always."""
    config = SHAPES["llada-moe-7b"]
    assert config.moe is not None
    expert = 3 * 2048 * 1024
    one, block = (forward_costs(config, Fed(1, tokens, tokens, 1), 2)["ffn"] for tokens in (1, 32))
    router = 64 * 2048
    assert one.bytes == 16 * 2 * (8 * expert + router)
    assert block.bytes == pytest.approx(16 * 2 * (64 * (1 - (7 / 8) ** 32) * expert + router))
    assert block.flops == 32 * one.flops == 32 * 16 * 2 * (8 * expert + router)
    counted = forward_costs(config, Fed(1, 32, 32, 1), 2, active_experts=20.5)["ffn"]
    assert counted.bytes == 16 * 2 * (20.5 * expert + router)
    assert counted.flops == block.flops


def test_distinct_experts_of_independent_tokens() -> None:
    moe = MoEConfig(experts=5, experts_per_token=2, expert_width=1)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(3, 5, generator=generator).topk(2).indices.unique().numel() for _ in range(4000)]
    assert expected_experts(moe, 3) == pytest.approx(sum(drawn) / 4000, rel=0.01)
    assert expected_experts(moe, 1) == pytest.approx(2)


def test_a_causal_prefill_multiplies_half_of_the_square() -> None:
    config = SHAPES["llama-3.1-8b"]
    causal = forward_costs(config, Fed(2, 100, 100, 1, block=1), 2)["attention"].flops
    seen = sum(range(1, 101))
    assert causal == config.layers * 2 * 4 * seen * config.heads * config.head_dim
    both = forward_costs(config, Fed(2, 100, 100, 1), 2)["attention"].flops
    assert both / causal == pytest.approx(200 / 101)


def test_a_block_sees_itself_and_what_is_before_it() -> None:
    """Three blocks of 4 behind 8 cached tokens, counted token by token; a forward without logits reads no head."""
    config = SHAPES["smollm2-135m"]
    costs = forward_costs(config, Fed(2, 12, 20, 0, block=4), 2)
    seen = sum(8 + 4 * (token // 4 + 1) for token in range(12))
    assert costs["attention"].flops == config.layers * 2 * 4 * seen * config.heads * config.head_dim
    assert costs["attention"].bytes == config.layers * 2 * 2 * 8 * config.kv_heads * config.head_dim * 2
    assert costs["head"] == Cost(0, 0)


def test_grouped_keys_are_read_once() -> None:
    config = SHAPES["llama-3.1-8b"]
    assert forward_costs(config, Fed(3, 1, 513, 1, block=1), 2)["attention"].bytes == 3 * 512 * 32 * 2 * 8 * 128 * 2


def test_the_floor_is_the_slower_of_the_two() -> None:
    rates = Rates(10.0, 100.0, "made up")
    assert floor_seconds(Cost(50.0, 100.0), rates) == 5.0
    assert bound_by(Cost(50.0, 100.0), rates) == "bandwidth"
    assert floor_seconds(Cost(10.0, 400.0), rates) == 4.0
    assert bound_by(Cost(10.0, 400.0), rates) == "flops"
