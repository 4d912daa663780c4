"""Captured steps of block-causal models commit what the plain path commits: same tokens, same steps, same forwards."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.engine.observing import StepClock
from dllm_sparse.samplers.block_graphs import BlockGraphs
from dllm_sparse.types import NonFiniteActivations, Step, UsageError
from tests.engine.decoding import DEVICES, neither_growing_nor_waiting
from tests.families import FAMILIES
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm

NAMES = ("llada2", "sdar", "sdar-moe")
PROMPTS = [random_ids(1, length, seed=length, vocabulary=240)[0] for length in (9, 4, 3, 11)]
ALONE, EQUAL, PADDED = (left_padded([PROMPTS[row] for row in rows]) for rows in ((0,), (1, 1), (0, 1, 2, 3)))
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"steps": 9},
    {"threshold": 0.3},
    {"threshold": 0.3, "minimal_topk": 2},
    {"factor": 1.5},
    {"threshold": 0.2, "editing_threshold": 0.15, "max_post_steps": 4},
    {"editing_threshold": 0.0, "max_post_steps": 2},
    {"confidence_dtype": "float64"},
)


@cache
def loaded(name: str, device: str) -> ds.LanguageModel:
    """A tiny random checkpoint of a family, made surer: a step decides from nothing to a whole block."""
    with TemporaryDirectory() as folder:
        FAMILIES[name](Path(folder) / name)
        lm = ds.load(str(Path(folder) / name), device=device, dtype="float32")
    with torch.no_grad():
        lm.transformer.head.weight.mul_(4)
    return lm


def run(lm: ds.LanguageModel, prompts: tuple[Tensor, Tensor], execution: str, **options: Any) -> ds.Generation:
    observers, sparsity = options.pop("observers", ()), options.pop("sparsity", None)
    sampler = ds.SamplerConfig(**{"gen_length": 10, "execution": execution, **options})
    out = ds.generate(
        lm,
        prompt_ids=prompts[0],
        attention_mask=prompts[1],
        sampler=sampler,
        sparsity=sparsity,
        observers=observers,
    )
    assert execution == "auto" or out.execution == execution
    return out


def check_alike(lm: ds.LanguageModel, prompts: tuple[Tensor, Tensor], **options: Any) -> ds.Generation:
    plain, graphed = (run(lm, prompts, execution, **options) for execution in ("eager", "graph"))
    assert torch.equal(plain.ids, graphed.ids)
    assert torch.equal(plain.commit_step, graphed.commit_step)
    assert plain.forward_passes == graphed.forward_passes
    return graphed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "rule"),
    [*(("llada2", rule) for rule in RULES), *((name, rule) for name in NAMES[1:] for rule in RULES[2:7:3])],
)
def test_the_same_tokens_in_the_same_steps(name: str, rule: dict[str, Any], device: str) -> None:
    lm = loaded(name, device)
    out = check_alike(lm, PADDED, **rule)
    some = int(out.ids[0, -7])  # comes in a block that is not the last one
    check_alike(lm, PADDED, stop_at_eos=True, eos_token_id=some, **rule)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompts", [ALONE, EQUAL])
@pytest.mark.parametrize("name", NAMES)
def test_without_padding(name: str, prompts: tuple[Tensor, Tensor], device: str) -> None:
    check_alike(loaded(name, device), prompts, threshold=0.3)


def test_an_end_of_text_saves_forwards() -> None:
    lm = loaded("sdar", "cpu")
    whole = run(lm, ALONE, "graph")
    stopped = run(lm, ALONE, "graph", stop_at_eos=True, eos_token_id=int(whole.ids[0, -10]))
    assert stopped.forward_passes < whole.forward_passes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompts", [ALONE, PADDED])
@pytest.mark.parametrize("options", [{"p": 0.7}, {"p": 0.7, "sites": "gate"}, {"p": 0.6, "scope": "sequence"}])
def test_masks_and_counts_are_those_of_the_plain_path(
    options: dict[str, Any], prompts: tuple[Tensor, Tensor], device: str
) -> None:
    lm, sparsity = loaded("sdar", device), ds.SparsityConfig(**options)
    rule = {"threshold": 0.2, "editing_threshold": 0.15, "max_post_steps": 2}
    plain, graphed, again = (
        run(lm, prompts, execution, sparsity=sparsity, **rule) for execution in ("eager", "graph", "graph")
    )
    assert torch.equal(plain.ids, graphed.ids)
    assert plain.forward_passes == graphed.forward_passes
    assert graphed.sparsity == again.sparsity
    close = 1e-12 if device == "cpu" else 1e-3  # where sums are added in another order, an entry may tip
    for kind, expected in plain.sparsity_report["by_token_class"].items():
        assert graphed.sparsity_report["by_token_class"][kind] == pytest.approx(expected, abs=close)
    assert graphed.sparsity == pytest.approx(plain.sparsity, abs=close)


@pytest.mark.parametrize("place", [-18, -11])
def test_rows_that_ended_are_counted_no_more(place: int) -> None:
    lm, options = loaded("sdar", "cpu"), {"sparsity": ds.SparsityConfig(p=0.7), "gen_length": 20}
    end = {"stop_at_eos": True, "eos_token_id": int(run(lm, PADDED, "eager", **options).ids[0, place])}
    plain, graphed = (run(lm, PADDED, execution, **options, **end) for execution in ("eager", "graph"))
    assert torch.equal(plain.ids, graphed.ids)
    assert graphed.sparsity == pytest.approx(plain.sparsity, abs=1e-12)
    expected = plain.sparsity_report["by_token_class"]
    assert {kind: pytest.approx(value, abs=1e-12) for kind, value in expected.items()} == (
        graphed.sparsity_report["by_token_class"]
    )


@pytest.mark.parametrize(("name", "p"), [("llada2", 0.7), ("sdar-moe", 0.7), ("sdar", 1.0)])
def test_masks_inside_experts_and_full_mass_take_the_plain_path(name: str, p: float) -> None:
    lm, sparsity = loaded(name, "cpu"), ds.SparsityConfig(p=p)
    with pytest.raises(UsageError, match="plain path"):
        run(lm, ALONE, "graph", sparsity=sparsity)
    assert run(lm, ALONE, "auto", sparsity=sparsity).execution == "eager"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"temperature": 0.5}, "temperature"), ({"remasking": "random"}, "random"), ({"cfg_scale": 1.0}, "guidance")],
)
def test_what_cannot_be_graphed_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run(loaded("sdar", "cpu"), ALONE, "graph", **options)


def test_one_capture_serves_prompts_of_other_lengths() -> None:
    lm = loaded("llada2", "cpu")
    first = run(lm, ALONE, "graph")
    kept = lm.graphs
    run(lm, (PROMPTS[3][None], torch.ones(1, 11)), "graph")
    assert lm.graphs is kept
    assert torch.equal(run(lm, ALONE, "graph").ids, first.ids)
    run(lm, ALONE, "graph", threshold=0.5)
    assert lm.graphs is not kept


@pytest.mark.parametrize("rule", [{}, {"threshold": 0.3}, {"editing_threshold": 0.1, "max_post_steps": 2}])
def test_masks_in_the_prompt_and_chosen_by_the_model(rule: dict[str, Any]) -> None:
    lm = tiny_lm(block_length=4)
    ids = random_ids(2, 7)
    ids[0, 1] = ids[0, 5] = ids[1, 6] = lm.mask_token_id
    first = check_alike(lm, (ids, torch.ones_like(ids)), **rule)
    lm.transformer.head.weight[lm.mask_token_id] = lm.transformer.head.weight[int(first.ids[0, -2])] * 1.2
    out = check_alike(lm, (ids, torch.ones_like(ids)), **rule)
    assert bool((out.ids[:, 7:] == lm.mask_token_id).any())
    check_alike(lm, (ids, torch.ones_like(ids)), stop_at_eos=True, eos_token_id=int(out.ids[1, 7]), **rule)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_reported(device: str) -> None:
    lm = tiny_lm(block_length=4)
    lm.transformer.blocks[0].ffn.down_proj.weight[0, 0] = torch.nan
    lm.transformer.to(device)
    for execution in ("eager", "graph"):
        with pytest.raises(NonFiniteActivations, match="step"):
            run(lm, (PROMPTS[0][None] % 36, torch.ones(1, 9)), execution)


def test_a_clock_hears_the_steps_that_the_plain_path_takes() -> None:
    class Clock(StepClock):
        def __init__(self) -> None:
            self.heard: list[tuple[Step, bool]] = []

        def graph_step(self, step: Step, *, decides: bool = True) -> None:
            self.heard.append((step, decides))

    lm, clock, seen = loaded("sdar", "cpu"), Clock(), Recorder()
    run(lm, PADDED, "graph", threshold=0.3, observers=[clock])
    run(lm, PADDED, "eager", threshold=0.3, observers=[seen])
    assert clock.heard == [(step, result.confidence is not None) for step, result in seen.steps]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_steps_neither_grow_recapture_nor_wait(name: str) -> None:
    lm = loaded.__wrapped__(name, "cuda")
    lm.transformer.to(torch.bfloat16)
    first = run(lm, ALONE, "auto", gen_length=64)
    assert first.execution == "graph"
    assert lm.graphs is not None
    kept, graphs = lm.graphs, lm.graphs[1]
    assert isinstance(graphs, BlockGraphs)
    with neither_growing_nor_waiting():
        for number in range(2000):
            graphs.step() if number % 5 else graphs.feed()
    assert torch.equal(run(lm, ALONE, "auto", gen_length=64).ids, first.ids)
    assert lm.graphs is kept
