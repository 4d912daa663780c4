"""Captured steps under masks keep, count and report what the plain path does."""

from __future__ import annotations

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.engine.forward import FixedForward
from dllm_sparse.engine.observing import StepClock
from dllm_sparse.sparsity.graph_ffn import GraphSparseFFN
from dllm_sparse.sparsity.graph_rows import GraphRows
from dllm_sparse.sparsity.sparsifier import Sparsifier
from dllm_sparse.types import NonFiniteActivations, TokenClass, UsageError
from tests.engine.decoding import DEVICES, PROMPTS
from tests.helpers import tiny_lm
from tests.sparsity.counted import check_counts

MASKS = (
    *(({"sites": sites}, False) for sites in ("all_inputs", "input", "intermediate", "gate")),
    *(({"scope": scope, "group_size": 3}, False) for scope in ("group", "sequence")),
    ({}, True),
    ({"scope": "group", "sites": "gate"}, True),
)


@pytest.mark.parametrize(("options", "lists"), MASKS)
@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
def test_masks_and_counts_of_captured_steps_are_those_of_the_plain_path(
    name: str, options: dict, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `lists` the products read only what was kept, by the twins of the kernels."""
    if lists:
        monkeypatch.setattr(Sparsifier, "graph_ffn", lambda self, f: GraphSparseFFN(f, self.config, always=True))
    lm = ds.load(name, dtype="float32")
    for prompts in (PROMPTS[0], PROMPTS[1][:2]):
        plain, graphed, again = (
            ds.generate(
                lm,
                list(prompts),
                sampler=ds.SamplerConfig(gen_length=8, block_length=4, cache="dual", execution=execution),
                sparsity=ds.SparsityConfig(**{"p": 0.7, **options}),
            ).to_dict()
            for execution in ("eager", "graph", "graph")
        )
        assert plain["ids"] == graphed["ids"]
        names = ["sparsity", "by_token_class"]
        if len(prompts) == 1 or not lists:  # a list holds what padding kept: its union is not counted
            names.append("exploitable")
            sizes = [list(out["sparsity_report"]["exploitable_by_tokens"]) for out in (plain, graphed)]
            assert sizes[0] == sizes[1]
        for found in names:
            for key, value in plain["sparsity_report"][found].items():
                close = 1e-3 if lists else 1e-12  # sums in another order
                assert graphed["sparsity_report"][found][key] == pytest.approx(value, abs=close)
        assert graphed["sparsity"] == again["sparsity"]


def test_what_a_forward_marked_is_forgotten_before_the_next() -> None:
    """Stale marks have more read and change no output; stale counts would, and no CPU has them."""
    forward = FixedForward(tiny_lm().transformer.bfloat16(), 8)
    ffn = GraphSparseFFN(forward, ds.SparsityConfig(p=0.7), always=True)
    classes = torch.full((1, 4), TokenClass.MASKED)
    ffn.begin(classes)
    marks = ffn.by_rows[4].marks
    assert marks.numel() > 0
    marks.fill_(-1)
    lines = ffn.by_rows[4].lines
    assert lines.numel() > 0
    lines.fill_(7)
    ffn.begin(classes)
    assert not marks.any()
    assert not lines.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_counts_of_the_kernel_are_those_of_its_twin() -> None:
    check_counts("cuda")


def test_a_clock_leaves_masked_steps_captured() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=16, block_length=8, execution="graph")
    out = ds.generate(lm, ["x"], sampler=sampler, sparsity=ds.SparsityConfig(p=0.5), observers=(StepClock(),))
    assert out.execution == "graph"
    with pytest.raises(UsageError, match="observers"):
        ds.generate(lm, ["x"], sampler=sampler, sparsity=ds.SparsityConfig(p=0.5), observers=(ds.Observer(),))


@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
def test_nan_under_masks_that_wait_for_nothing_is_reported(scope: str) -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    with torch.no_grad():
        lm.transformer.blocks[0].ffn.gate_up_proj.weight[0, 0] = torch.nan
    sampler = ds.SamplerConfig(gen_length=8, block_length=8, execution="graph")
    with pytest.raises(NonFiniteActivations, match="step"):
        ds.generate(lm, ["x"], sampler=sampler, sparsity=ds.SparsityConfig(p=0.5, scope=scope))


def overflowing(kind: str, device: str) -> ds.LanguageModel:
    """One layer without attention whose FFN overflows at token 5 and nowhere else."""
    lm = tiny_lm(kind, layers=1, width=32, head_dim=8, ffn_width=32)
    block = lm.transformer.blocks[0]
    block.attention.o_proj.weight.zero_()
    lm.transformer.embedding.weight[:, 0] = 0
    lm.transformer.embedding.weight[5, 0] = 1
    block.ffn.gate_up_proj.weight[[0, 32]] = 0
    block.ffn.gate_up_proj.weight[[0, 32], 0] = 1e30
    lm.transformer.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    return lm


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_inf_that_reaches_no_choice_is_reported_when_the_generation_ends(kind: str, device: str) -> None:
    lm = overflowing(kind, device)
    for cache, execution in (("none", "eager"), ("none", "graph"), ("dual", "graph")):
        sampler = ds.SamplerConfig(gen_length=8, block_length=4, cache=cache, execution=execution)
        for _ in range(2):
            with pytest.raises(NonFiniteActivations, match="step 0"):
                ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler, sparsity=ds.SparsityConfig(p=0.7))
            out = ds.generate(lm, prompt_ids=[[4, 6, 7]], sampler=sampler, sparsity=ds.SparsityConfig(p=0.7))
            assert out.execution == execution  # and the flag is down again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_on_a_gpu_the_kernels_keep_the_measured_sparsity(name: str, backend: str) -> None:
    lm = ds.load(name, device="cuda", dtype="bfloat16")
    plain, graphed = (
        ds.generate(
            lm,
            ["Once upon a time"],
            sampler=ds.SamplerConfig(gen_length=32, block_length=8, cache="dual", execution=execution),
            sparsity=ds.SparsityConfig(p=0.7, backend=backend),
        )
        for execution in ("eager", "graph")
    )
    assert graphed.sparsity_report["backend"] == "triton"
    for site in ("input", "intermediate"):
        assert graphed.sparsity[site] == pytest.approx(plain.sparsity[site], abs=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
def test_steps_captured_anew_go_on_as_before(name: str) -> None:
    lm = ds.load(name, device="cuda", dtype="bfloat16")
    sampler = ds.SamplerConfig(gen_length=16, block_length=8, cache="dual", execution="graph")
    for options in ({}, {"scope": "group", "group_size": 4}, {"sites": "gate"}):
        sparsity = ds.SparsityConfig(p=0.5, **options)
        for _ in range(2):
            before = ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler, sparsity=sparsity)
        assert lm.graphs is not None
        graphs = lm.graphs[1]
        assert isinstance(graphs.ffn, GraphSparseFFN)
        for state in graphs.ffn.by_rows.values():
            state.stale = True
        for _ in range(2):
            again = ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler, sparsity=sparsity)
            assert lm.graphs[1] is graphs
            assert torch.equal(before.ids, again.ids)
            assert before.sparsity == again.sparsity


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_masks_only_where_they_pay_are_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_sparse.sparsity.graph_rows.MEASURED_FOR", 2)
    lm = ds.load("tiny-diffusion", device="cuda", dtype="bfloat16")
    sampler = ds.SamplerConfig(gen_length=16, block_length=8, cache="dual", execution="graph")
    for p in (0.2, 0.99):
        kept = []
        for _ in range(7):
            sparsity = ds.SparsityConfig(p=p, where="faster")
            out = ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler, sparsity=sparsity)
            kept.append(out.sparsity["mean"])
        assert all(share > 0.3 for share in kept) if p == 0.2 else min(kept) == 0


@pytest.mark.parametrize(
    "options",
    [{"rule": "top_k"}, {"sites": "all_linear"}, {"schedule": [(0, 0.5), (1, 0.9)]}, {"refresh_every": 2}, {"p": 1.0}],
)
def test_other_masks_take_the_plain_path(options: dict) -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sparsity = ds.SparsityConfig(**{"p": 0.7, **options})
    sampler = ds.SamplerConfig(gen_length=8, block_length=8, execution="graph")
    with pytest.raises(UsageError, match="plain path"):
        ds.generate(lm, ["x"], sampler=sampler, sparsity=sparsity)
    ds.generate(lm, ["x"], sampler=ds.SamplerConfig(gen_length=8, block_length=8), sparsity=sparsity)


def test_an_enclosing_sparsify_block_is_not_forgotten() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    config, sampler = ds.SparsityConfig(p=0.3), ds.SamplerConfig(gen_length=8, block_length=8)
    inside = ds.generate(lm, ["x"], sampler=sampler, sparsity=config)
    with ds.sparsify(lm, config) as handle:
        around = ds.generate(lm, ["x"], sampler=sampler)
        with pytest.raises(UsageError, match="enclosing block"):
            ds.generate(lm, ["x"], sampler=ds.SamplerConfig(gen_length=8, block_length=8, execution="graph"))
        lm.logits(inside.ids)  # counting goes on outside a loop's inference mode
    assert torch.equal(inside.ids, around.ids)
    assert handle.sparsity["mean"] > 0.5


def test_masks_only_where_they_pay_leave_a_cpu_dense_and_say_so() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=96, block_length=96, steps=8, execution="graph")
    dense = ds.generate(lm, ["Once upon a time"], sampler=sampler)
    found = ds.generate(lm, ["Once upon a time"], sampler=sampler, sparsity=ds.SparsityConfig(p=0.5, where="faster"))
    assert torch.equal(dense.ids, found.ids)
    assert found.sparsity["mean"] == 0


def test_what_a_first_prefill_kept_is_settled_once_as_for_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, settled = ds.load("tiny-ar", dtype="float32"), []
    settle = GraphRows.settle

    def spy(state: GraphRows, **options: bool) -> None:
        if state.settled is None:
            settled.append(state.rows)
        settle(state, **options)

    monkeypatch.setattr(GraphRows, "settle", spy)
    sampler = ds.SamplerConfig(gen_length=8, execution="graph")
    for _ in range(2):
        ds.generate(lm, prompt_ids=[[5, 6, 7], [8, 9, 10]], sampler=sampler, sparsity=ds.SparsityConfig(p=0.7))
    assert settled == [6, 2]
