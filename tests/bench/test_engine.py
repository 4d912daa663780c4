"""`bench_engine` on small models: the forwards it names are those that ran, and its figures hang together."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.bench.components import COMPONENTS
from dllm_sparse.bench.engine import bench_engine
from dllm_sparse.bench.floors import Rates
from dllm_sparse.bench.machine import measured_rates, peak_memory, reset_peak_memory
from dllm_sparse.bench.workload import EngineWorkload, random_prompts
from dllm_sparse.models.loading import random_model
from dllm_sparse.types import UsageError
from tests.helpers import tiny_lm

RATES = Rates(1e10, 1e11, "made up")
CPU = torch.device("cpu")


def workload(batch: int = 1, **sampler: Any) -> EngineWorkload:
    options = {"gen_length": 8, "block_length": 4, **sampler}
    return EngineWorkload(sampler=ds.SamplerConfig(**options), batch=batch, prompt_length=5, repeats=2)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_a_row_hangs_together(kind: str) -> None:
    lm, work = tiny_lm(kind), workload(cache="dual")
    row = bench_engine(lm, work, RATES)
    kinds = {step["forward"]: step for step in row["steps"]}
    assert set(kinds) == ({"full", "cached"} if kind == "diffusion" else {"prefill", "decode"})
    assert sum(step["per_generation"] for step in kinds.values()) == row["forwards"] == 8
    for step in kinds.values():
        assert step["share_of_floor"] == pytest.approx(step["floor_ms"] / step["ms"]["median"])
        assert step["ms"]["low"] <= step["ms"]["median"] <= step["ms"]["high"]
    assert row["canvas_tokens_per_second"]["median"] == pytest.approx(8 / row["seconds"]["median"], rel=0.5)
    assert row["tokens_per_second"]["median"] <= row["canvas_tokens_per_second"]["median"]
    components = row["components_ms_per_forward"]
    assert tuple(components) == COMPONENTS
    assert all(value > 0 for value in components.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.transformer.modules())


def test_prompts_hold_ordinary_tokens_only() -> None:
    lm = tiny_lm()
    prompts = random_prompts(lm, workload(batch=50))
    assert prompts.shape == (50, 5)
    assert set(prompts.unique().tolist()) <= set(range(36))


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(UsageError, match=r"batch is 0"):
        EngineWorkload(batch=0)
    with pytest.raises(UsageError, match="execution is 'steam'; allowed: auto, eager, graph"):
        EngineWorkload(sampler=ds.SamplerConfig(execution="steam"))
    with pytest.raises(UsageError, match=r"exceeds the context of 96"):
        bench_engine(tiny_lm(), EngineWorkload(prompt_length=90), RATES)


def test_random_models_are_seeded_and_have_the_right_kind() -> None:
    lm = random_model("smollm2-135m", device="cpu", dtype="bfloat16", seed=3)
    again = random_model("smollm2-135m", device="cpu", dtype="bfloat16", seed=3)
    assert (lm.kind, lm.dtype, lm.tokenizer) == ("autoregressive", torch.bfloat16, None)
    assert torch.equal(lm.transformer.blocks[0].ffn.down_proj.weight, again.transformer.blocks[0].ffn.down_proj.weight)
    assert lm.transformer.head.weight is lm.transformer.embedding.weight
    assert float(lm.transformer.embedding.weight.float().std()) == pytest.approx(0.02, rel=0.01)
    with pytest.raises(UsageError, match=r"unknown shape 'llada-9b'; known: llada-8b, "):
        random_model("llada-9b")


def test_rates_are_measured_where_they_are_not_known() -> None:
    rates = measured_rates(CPU, torch.float32)
    assert 1e8 < rates.bandwidth < 1e13
    assert 1e8 < rates.flops < 1e15


def test_the_peak_is_the_runs_own() -> None:
    size = 64 << 20

    def touch() -> None:
        with mmap.mmap(-1, size) as fresh:  # straight from the system: the allocator may hold freed memory
            fresh.write(b"x" * size)

    touch()
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    touch()
    assert peak_memory(CPU) - before >= size * 0.9
