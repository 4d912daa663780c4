"""The forward of every step: its shape as it ran, its floor from bytes counted by hand, the experts it used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.bench.floors import Fed, Rates
from dllm_sparse.bench.steps import ExpertCount, forward_of, step_rows
from dllm_sparse.bench.workload import EngineWorkload, random_prompts
from dllm_sparse.models.config import MoEConfig
from tests.helpers import Recorder, tiny_lm

MOE = MoEConfig(experts=12, experts_per_token=2, expert_width=10, shared_experts=1, dense_layers=1)
BYTES_ALONE = Rates(1.0, 1e30, "made up: the floor in seconds is the bytes")


def workload(batch: int = 1, prompt_length: int = 5, **sampler: Any) -> EngineWorkload:
    options = {"gen_length": 8, "block_length": 4, **sampler}
    return EngineWorkload(sampler=ds.SamplerConfig(**options), batch=batch, prompt_length=prompt_length, repeats=2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("diffusion", {}),
        ("diffusion", {"cache": "prefix"}),
        ("diffusion", {"cache": "dual"}),
        ("diffusion", {"cache": "dual", "threshold": 0.9}),
        ("diffusion", {"cache": "dual", "cfg_scale": 0.5}),
        ("autoregressive", {}),
        ("block", {}),
        ("block", {"prompt_length": 3}),
        ("block", {"prompt_length": 8, "threshold": 0.2}),
        ("block", {"prompt_length": 6, "cfg_scale": 0.5, "threshold": 0.1, "editing_threshold": 0.1}),
    ],
)
def test_the_shape_of_every_forward_is_known(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm(block_length=4) if kind == "block" else tiny_lm(kind)
    work, seen = workload(batch=2, **options), []
    forward = lm.transformer.forward

    def spy(ids: Tensor, **arguments: Any) -> Tensor:
        cache, start = arguments["cache"], arguments.get("start", 0)
        whole = lm.config.attention == "bidirectional" and cache is not None
        rows = len(range(ids.shape[1])[arguments["rows"]]) > 0
        seen.append((*ids.shape, cache.length if whole else start + ids.shape[1], rows))
        return forward(ids, **arguments)

    monkeypatch.setattr(lm.transformer, "forward", spy)
    recorder = Recorder()
    ds.generate(lm, prompt_ids=random_prompts(lm, work), sampler=work.sampler, observers=[recorder])
    shapes = [forward_of(lm, work, step, result.confidence is not None)[1] for step, result in recorder.steps]
    assert [(shape.batch, shape.tokens, shape.keys, shape.head_rows > 0) for shape in shapes] == seen


def test_a_decode_step_reads_one_token_and_all_before_it() -> None:
    lm = tiny_lm("autoregressive")
    assert forward_of(lm, workload(batch=3), ds.Step(4, 8)) == ("decode", Fed(3, 1, 9, 1, block=1))


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_floors_of_block_diffusion_counted_by_hand(execution: str) -> None:
    """Prompt of 6 in blocks of 4, 8 tokens to decode: 4 prompt tokens first, then blocks behind 4, 8 and 12 of them."""
    lm, work = tiny_lm(block_length=4), workload(prompt_length=6, threshold=1.0, execution=execution)
    rows = {row["forward"]: row for row in step_rows(lm, work, BYTES_ALONE, _run(lm, work))}
    width, heads, kv_heads, head_dim, ffn_width, layers = 16, 4, 2, 4, 24, 2
    layer = width * (heads + 2 * kv_heads) * head_dim + heads * head_dim * width + 3 * width * ffn_width
    head = 40 * width
    cached = 2 * layers * kv_heads * head_dim  # a key and a value per layer and cached token
    linears = layers * layer
    assert {name: row["per_generation"] for name, row in rows.items()} == {"prefill": 1, "block": 10, "store": 2}
    assert rows["prefill"]["bytes"] == 4 * linears
    # The first block holds two prompt tokens; a threshold of 1 is reached by no token, so each step commits one.
    steps = [4] * 2 + [8] * 4 + [12] * 4
    assert rows["block"]["bytes"] == pytest.approx(4 * (linears + head + cached * sum(steps) / 10))
    assert rows["store"]["bytes"] == 4 * (linears + cached * (4 + 8) / 2)
    for row in rows.values():
        assert row["floor_ms"] == pytest.approx(row["bytes"] * 1e3)
        assert row["active_experts"] is None


@pytest.mark.parametrize("execution", ["eager", "graph"])
@pytest.mark.parametrize(
    ("kind", "options"), [("diffusion", {"cache": "dual"}), ("autoregressive", {}), ("block", {"threshold": 0.2})]
)
def test_experts_of_a_step_are_those_its_tokens_chose(kind: str, options: dict[str, Any], execution: str) -> None:
    facts = {"block_length": 4} if kind == "block" else {"kind": kind}
    lm, work = tiny_lm(**facts, moe=MOE, layers=3), workload(batch=2, execution=execution, **options)
    run = _run(lm, work)
    run()  # captures steps that do not count
    counter = ExpertCount(lm)
    with counter.listening():
        out = run(observers=(counter,))
    assert out.execution == execution
    expected = _chosen_by_hand(lm, work)
    assert [count for _, count in counter.counts()] == pytest.approx(expected)
    assert lm.graphs is None
    assert not any(module._forward_hooks for module in lm.transformer.modules())


def test_the_floor_of_a_mixture_reads_the_experts_that_were_chosen() -> None:
    lm, work = tiny_lm(moe=MOE, layers=3), workload(cache="dual")
    rows = {row["forward"]: row for row in step_rows(lm, work, BYTES_ALONE, _run(lm, work))}
    counts = _chosen_by_hand(lm, work)
    by_kind = {"full": counts[::4], "cached": [count for place, count in enumerate(counts) if place % 4]}
    attention = 3 * (16 * 8 * 4 + 16 * 16)
    fixed = attention + 3 * 16 * 24 + 2 * (12 * 16 + 3 * 16 * 10) + 40 * 16  # dense layer, routers, shared, head
    for name, tokens in (("full", 13), ("cached", 4)):
        mean = sum(by_kind[name]) / len(by_kind[name])
        active = rows[name]["active_experts"]
        assert active["measured"] == pytest.approx(mean)
        assert active["measured"] < active["random_routing"] - 0.1  # tokens alike go to the same experts
        assert active["random_routing"] == pytest.approx(12 * (1 - (10 / 12) ** tokens))
        assert active["of"] == 12
        stored = 3 * 2 * 2 * 4 * (13 - tokens)
        assert rows[name]["bytes"] == pytest.approx(4 * (fixed + stored + 2 * mean * 3 * 16 * 10))


def _run(lm: ds.LanguageModel, work: EngineWorkload) -> Any:
    prompts = random_prompts(lm, work)
    return lambda **options: ds.generate(lm, prompt_ids=prompts, sampler=work.sampler, **options)


def _chosen_by_hand(lm: ds.LanguageModel, work: EngineWorkload) -> list[float]:
    """Mean distinct experts per mixture layer of every forward of the plain path, from the sets of their numbers."""
    chosen: list[set[int]] = []
    routers = [block.ffn.router for block in lm.transformer.blocks[1:]]
    handles = [
        router.register_forward_hook(lambda _m, _i, routing: chosen.append(set(routing.experts.flatten().tolist())))
        for router in routers
    ]
    _run(lm, replace(work, sampler=replace(work.sampler, execution="eager")))()
    for handle in handles:
        handle.remove()
    layers = len(routers)
    return [sum(map(len, chosen[at : at + layers])) / layers for at in range(0, len(chosen), layers)]
