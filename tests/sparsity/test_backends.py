"""What computes the masked FFNs: the backends of a CPU against plain masking, and those that cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.types import BackendUnavailable
from tests.helpers import Recorder, random_ids, tiny_lm
from tests.sparsity.sampling import SITES, decode


def test_an_explicit_gpu_backend_is_refused_on_the_cpu() -> None:
    lm = tiny_lm()
    with pytest.raises(BackendUnavailable, match="needs a CUDA GPU"):
        decode(lm, ds.SparsityConfig(backend="triton"))
    assert all(ffn.override is None for ffn in lm.transformer.ffns)
    with ds.sparsify(lm, ds.SparsityConfig(backend="auto")) as handle:
        assert handle.backend == "reference"


def test_the_cpu_backend_decodes_what_masking_decodes() -> None:
    lm, prompt = tiny_lm("autoregressive"), random_ids(2, 5)
    sampler = ds.SamplerConfig(gen_length=8)
    plain = ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=ds.SparsityConfig(p=0.5, backend="reference"))
    skipping = ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=ds.SparsityConfig(p=0.5, backend="cpu"))
    assert torch.equal(plain.ids, skipping.ids)
    assert plain.sparsity == skipping.sparsity
    assert (plain.sparsity_report["backend"], skipping.sparsity_report["backend"]) == ("reference", "cpu")
    weight = lm.transformer.ffns[0].gate_up_proj.weight
    assert weight.t().is_contiguous()  # stored by input, values as they were
    assert torch.equal(weight, tiny_lm("autoregressive").transformer.ffns[0].gate_up_proj.weight)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("facts", [{}, {"mlp_bias": True, "qkv_bias": True, "output_bias": True}])
def test_the_cpu_backend_computes_what_masking_computes(sites: str, facts: dict[str, Any]) -> None:
    lm = tiny_lm("autoregressive", **facts)
    for gate_input in ("masked", "dense"):
        options = {"p": 0.6, "sites": sites, "gate_input": gate_input}
        found = []
        for backend in ("reference", "cpu"):
            with ds.sparsify(lm, ds.SparsityConfig(**options, backend=backend)) as handle:
                found.append(lm.logits(random_ids(1, 3)))
                assert handle.backend == backend
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("facts", [{}, {"mlp_bias": True}])
def test_a_masked_gate_decides_which_up_and_down_weights_are_read(facts: dict[str, Any]) -> None:
    lm, recorder = tiny_lm("autoregressive", **facts), Recorder()
    config = ds.SparsityConfig(p=0.5, sites="gate", backend="cpu")
    with ds.sparsify(lm, config, observers=[recorder]):
        expected = lm.logits(random_ids(1, 3))
    for site, _, keep, _ in recorder.masks:
        ffn, dropped = lm.transformer.ffns[site.layer], ~keep.flatten(0, -2).any(0)
        assert dropped.any()
        ffn.halves()[1][0][dropped] = torch.nan
        ffn.down_proj.weight[:, dropped] = torch.nan
    with ds.sparsify(lm, config):
        assert torch.equal(lm.logits(random_ids(1, 3)), expected)


def test_p_1_is_bitwise_dense_on_every_backend() -> None:
    lm = tiny_lm("autoregressive")
    for _ in range(2):  # with weights stored as loaded, then by input
        dense = lm.logits(random_ids(1, 3))
        for backend in ("auto", "cpu"):
            with ds.sparsify(lm, ds.SparsityConfig(p=1.0, backend=backend)):
                assert torch.equal(lm.logits(random_ids(1, 3)), dense)
        with ds.sparsify(lm, ds.SparsityConfig(p=0.5, backend="cpu")):
            lm.logits(random_ids(1, 3))


def test_auto_skips_where_it_pays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_sparse.kernels.dispatch.CPU_CALL_SECONDS", 0.0)
    lm = tiny_lm("autoregressive")
    for p, tokens, name in ((0.999, 1, "reference"), (0.1, 1, "cpu"), (0.1, 5, "reference")):
        with ds.sparsify(lm, ds.SparsityConfig(p=p, backend="auto")) as handle:
            lm.logits(random_ids(1, tokens))
        assert handle.backend == name


def test_an_explicit_backend_is_refused_where_transformers_runs_the_model() -> None:
    lm = ds.load("tiny-ar", device="cpu", engine="transformers")
    with (
        pytest.raises(BackendUnavailable, match="needs the native engine"),
        ds.sparsify(lm, ds.SparsityConfig(backend="cpu")),
    ):
        pass
    with ds.sparsify(lm, ds.SparsityConfig(p=0.5)) as handle:
        lm.logits(random_ids(1, 1))
    assert handle.backend == "reference"
