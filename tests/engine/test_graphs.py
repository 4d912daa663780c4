"""Decoding as graphs commits what the plain path commits: bodies run without a graph on a CPU, as graphs on a GPU."""

from __future__ import annotations

import weakref

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.models.config import MoEConfig
from dllm_sparse.models.loading import random_model
from dllm_sparse.samplers.graph_steps import DiffusionGraphs
from dllm_sparse.types import NonFiniteActivations, UsageError
from tests.engine.decoding import DEVICES, PROMPTS, both, neither_growing_nor_waiting
from tests.helpers import random_ids, tiny_lm

RULES = ({}, {"threshold": 0.9}, {"factor": 1.0}, {"steps": 4}, {"confidence_dtype": "float64"})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", RULES)
def test_diffusion_commits_the_same_tokens_in_the_same_steps(device: str, cache: str, rule: dict) -> None:
    lm = ds.load("tiny-diffusion", device=device, dtype="float32")
    for prompts in PROMPTS:
        plain, graphed = both(lm, list(prompts), gen_length=8, block_length=4, cache=cache, **rule)
        assert torch.equal(plain.ids, graphed.ids)
        assert torch.equal(plain.commit_step, graphed.commit_step)
        assert plain.forward_passes == graphed.forward_passes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stop_at_eos", [False, True])
def test_autoregressive_commits_the_same_tokens(device: str, stop_at_eos: bool) -> None:
    lm = ds.load("tiny-ar", device=device, dtype="float32")
    for prompts in PROMPTS:
        plain, graphed = both(lm, list(prompts), gen_length=12, stop_at_eos=stop_at_eos)
        assert torch.equal(plain.ids, graphed.ids)
        assert torch.equal(plain.commit_step, graphed.commit_step)
        assert plain.forward_passes == graphed.forward_passes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_captured_steps_outlive_the_library_workspaces_of_others() -> None:
    """torch.compile's graphs free cuBLAS's workspaces: what a capture recorded must not lie in one of them."""
    lm = random_model("smollm2-135m", device="cuda", dtype="bfloat16")
    sampler = ds.SamplerConfig(gen_length=16, execution="graph")
    first = ds.generate(lm, prompt_ids=torch.arange(32)[None], sampler=sampler)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    taken = torch.full((1 << 28,), torch.nan, device="cuda")
    again = ds.generate(lm, prompt_ids=torch.arange(32)[None], sampler=sampler)
    assert torch.equal(first.ids, again.ids)
    assert taken.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_mixtures_of_experts_are_captured_in_any_precision(kind: str, device: str) -> None:
    lm = tiny_lm(kind, moe=MoEConfig(experts=6, experts_per_token=2, expert_width=10, shared_experts=1))
    lm.transformer.to(device)
    prompts = random_ids(2, 5)
    plain, graphed = (
        ds.generate(lm, prompt_ids=prompts, sampler=ds.SamplerConfig(gen_length=8, block_length=4, execution=execution))
        for execution in ("eager", "graph")
    )
    assert torch.equal(plain.ids, graphed.ids)


@pytest.mark.parametrize("stop_at_eos", [False, True])
@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
def test_rows_end_alike(name: str, stop_at_eos: bool) -> None:
    lm = ds.load(name, dtype="float32")
    some = int(ds.generate(lm, PROMPTS[0], sampler=ds.SamplerConfig(gen_length=8, block_length=4)).ids[0, -5])
    plain, graphed = both(
        lm, list(PROMPTS[1]), gen_length=16, block_length=4, stop_at_eos=stop_at_eos, eos_token_id=some
    )
    assert torch.equal(plain.ids, graphed.ids)
    assert plain.forward_passes == graphed.forward_passes


def test_captured_steps_are_kept_for_the_next_generation_of_the_same_shape() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=16, block_length=8, cache="dual", execution="graph")
    first = ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler)
    kept = lm.graphs
    ds.generate(lm, prompt_ids=[[9, 8, 7]], sampler=sampler)
    again = ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler)
    assert lm.graphs is kept
    assert torch.equal(first.ids, again.ids)
    ds.generate(lm, prompt_ids=[[5, 6, 7, 8]], sampler=sampler)
    assert lm.graphs is not kept


@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
def test_nan_weights_are_reported(name: str) -> None:
    lm = ds.load(name, dtype="float32")
    with torch.no_grad():
        lm.transformer.blocks[0].ffn.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteActivations, match="step"):
        both(lm, ["x"], gen_length=8, block_length=8)
    with pytest.raises(NonFiniteActivations, match="step"):
        ds.generate(lm, ["x"], sampler=ds.SamplerConfig(gen_length=8, block_length=8, execution="graph"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"temperature": 0.5}, "temperature"), ({"remasking": "random"}, "random"), ({"cfg_scale": 1.0}, "guidance")],
)
def test_what_cannot_be_graphed_is_refused_by_name_and_falls_back_under_auto(options: dict, reason: str) -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    with pytest.raises(UsageError, match=reason):
        ds.generate(lm, ["x"], sampler=ds.SamplerConfig(gen_length=8, execution="graph", block_length=8, **options))
    ds.generate(lm, ["x"], sampler=ds.SamplerConfig(gen_length=8, block_length=8, **options))


def test_observers_need_the_plain_path() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=8, block_length=8, execution="graph")
    with pytest.raises(UsageError, match="observers"):
        ds.generate(lm, ["x"], sampler=sampler, observers=[ds.Observer()])


def test_masks_in_the_prompt_take_the_plain_path() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    ids = [[5, lm.mask_token_id, 7]]
    plain, graphed = (
        ds.generate(lm, prompt_ids=ids, sampler=ds.SamplerConfig(gen_length=8, block_length=8, execution=name))
        for name in ("eager", "graph")
    )
    assert torch.equal(plain.ids, graphed.ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("p", [None, 0.7])
def test_thousands_of_steps_neither_grow_recapture_nor_wait(p: float | None) -> None:
    lm = ds.load("tiny-diffusion", device="cuda", dtype="bfloat16")
    sampler = ds.SamplerConfig(gen_length=64, block_length=32, cache="dual", execution="graph")
    sparsity = None if p is None else ds.SparsityConfig(p=p)
    prompt = [[5, 6, 7, 8]]
    ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=sparsity)
    assert lm.graphs is not None
    kept, graphs = lm.graphs, lm.graphs[1]
    assert isinstance(graphs, DiffusionGraphs)
    with neither_growing_nor_waiting():
        for step in range(2000):
            begin = 4 + 32 * (step // 32 % 2)
            graphs.run(begin, begin + 32, begin, 32, 1)
    ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=sparsity)
    assert lm.graphs is kept


def test_weights_that_moved_are_captured_anew() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=8, block_length=8, execution="graph")
    ds.generate(lm, ["x"], sampler=sampler)
    lm.transformer.to(torch.bfloat16)
    graphed = ds.generate(lm, ["x"], sampler=sampler)
    assert torch.equal(graphed.ids, both(lm, ["x"], gen_length=8, block_length=8)[0].ids)


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.9}, {"steps": 4}])
def test_a_model_that_chooses_the_mask_token_decodes_as_in_the_plain_path(cache: str, rule: dict) -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    with torch.no_grad():
        lm.transformer.head.weight[lm.mask_token_id] = lm.transformer.head.weight.mean(0) * 4
    plain, graphed = both(lm, ["Once upon"], gen_length=16, block_length=8, cache=cache, **rule)
    assert torch.equal(plain.ids, graphed.ids)
    assert plain.forward_passes == graphed.forward_passes


def test_old_buffers_go_before_new_ones_come() -> None:
    lm = ds.load("tiny-diffusion", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=8, block_length=8, execution="graph")
    ds.generate(lm, prompt_ids=[[5, 6]], sampler=sampler)
    assert lm.graphs is not None
    old = weakref.ref(lm.graphs[1])
    ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler)
    assert old() is None
