"""A dense run that meets NaN or Inf says where they began, whichever loop it is, and leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.heldout import evaluate, held_out
from dllm_sparse.models.config import MoEConfig
from dllm_sparse.types import NonFiniteActivations
from tests.helpers import left_padded, random_ids, tiny_lm
from tests.models.random_hf import random_denoiser, random_model

PROMPT, MASK = left_padded([random_ids(1, 7, seed=3)[0], random_ids(1, 4, seed=4)[0]])
BEHIND = "^NaN or Inf in the logits at step 0, behind the last layer's FFN$"
MOE = MoEConfig(experts=4, experts_per_token=4, expert_width=10)


def decode(lm: ds.LanguageModel, **options: Any) -> object:
    sampler = ds.SamplerConfig(**{"gen_length": 8, "block_length": 8, "execution": "eager", **options})
    return ds.generate(lm, prompt_ids=PROMPT, attention_mask=MASK, sampler=sampler)


def likelihood(lm: ds.LanguageModel, **options: Any) -> object:
    return ds.log_likelihood(lm, [5], [7, 8], mc_num=4, batch_size=4, **options)


def loss(lm: ds.LanguageModel) -> object:
    return evaluate(lm, held_out(lm, random_ids(4, 8)))


DIFFUSION: list[tuple[str, dict[str, Any], Callable[[ds.LanguageModel], object]]] = [
    ("diffusion", {}, decode),
    ("diffusion", {}, lambda lm: decode(lm, cfg_scale=1.0)),
    ("diffusion", {}, lambda lm: decode(lm, cache="dual", threshold=0.9)),
    ("diffusion", {}, lambda lm: decode(lm, remasking="entropy")),
    ("diffusion", {}, likelihood),
    ("diffusion", {}, lambda lm: likelihood(lm, cfg_scale=1.0)),
    ("diffusion", {}, loss),
    ("diffusion", {"block_length": 8}, decode),
    ("diffusion", {"block_length": 8}, likelihood),
    ("autoregressive", {}, decode),
    ("autoregressive", {}, likelihood),
    ("autoregressive", {}, loss),
]


@pytest.mark.parametrize(("kind", "facts", "run"), DIFFUSION)
def test_layer_and_site_are_named(kind: str, facts: dict[str, Any], run: Callable[[ds.LanguageModel], object]) -> None:
    for weight, value, words in (
        ("blocks.1.ffn_norm.weight", math.inf, "^layer 1, site input, step 0: NaN or Inf"),
        ("blocks.0.ffn.gate_up_proj.weight", math.nan, "^layer 0, site gate, step 0: NaN or Inf"),
        ("blocks.0.ffn.down_proj.weight", 3e38, "^layer 1, site input, step 0: NaN or Inf"),
        ("blocks.1.ffn.down_proj.weight", 3e38, BEHIND),
        ("head.weight", math.nan, BEHIND),
    ):
        lm = tiny_lm(kind, **facts)
        lm.transformer.get_parameter(weight).view(-1)[0 if math.isnan(value) else slice(None)] = value
        with pytest.raises(NonFiniteActivations, match=words):
            run(lm)
        assert all(ffn.override is None for ffn in lm.transformer.ffns)


def test_experts_are_named() -> None:
    for run in (decode, likelihood):
        lm = tiny_lm(moe=MOE)
        lm.transformer.get_parameter("blocks.1.ffn.experts.down_proj")[2] = math.nan
        with pytest.raises(NonFiniteActivations, match=BEHIND):
            run(lm)
        lm.transformer.get_parameter("blocks.1.ffn.experts.gate_up_proj")[2] = math.nan
        with pytest.raises(NonFiniteActivations, match=r"^layer 1, expert 2, site gate, step 0"):
            run(lm)


def test_models_of_transformers_are_named() -> None:
    lm = ds.wrap(random_model("llama"))
    inner = lm.transformer.model.model
    first = int(ds.generate(lm, prompt_ids=PROMPT, sampler=ds.SamplerConfig(gen_length=2)).ids[0, PROMPT.shape[1]])
    inner.embed_tokens.weight.data[first] = math.nan
    assert first not in PROMPT.flatten().tolist()
    with pytest.raises(NonFiniteActivations, match=r"^layer 0, site input, step 1"):
        decode(lm)
    inner.layers[1].mlp.up_proj.weight.data[0] = math.nan
    for run in (decode, likelihood):
        with pytest.raises(NonFiniteActivations, match=r"^layer 1, site up, step 0"):
            run(lm)
    assert all(ffn.override is None for ffn in lm.transformer.ffns)


def test_denoisers_of_transformers_are_named() -> None:
    lm = ds.wrap(random_denoiser())
    lm.transformer.model.model.decoder.layers[1].mlp.up_proj.weight.data[0] = math.nan
    sampler = ds.SamplerConfig(gen_length=8, steps=2)
    with pytest.raises(NonFiniteActivations, match=r"^layer 1, site up, step 0"):
        ds.generate(lm, prompt_ids=PROMPT, sampler=sampler)
    with pytest.raises(NonFiniteActivations, match=r"^layer 1, site up, step 0"):
        likelihood(lm)


def test_what_masks_other_layers_goes_on_masking() -> None:
    lm = tiny_lm()
    lm.transformer.get_parameter("blocks.1.ffn.gate_up_proj.weight")[0] = math.nan
    config = ds.SparsityConfig(p=0.5, layers=(0,))
    with ds.sparsify(lm, config) as handle:
        with pytest.raises(NonFiniteActivations, match=r"^layer 1, site gate, step 0"):
            decode(lm)
        assert all(ffn.override is handle for ffn in lm.transformer.ffns)


def test_finite_runs_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, calls = tiny_lm(), 0
    forward = lm.transformer.forward

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(lm.transformer, "forward", counted)
    assert math.isfinite(likelihood(lm))  # type: ignore[arg-type]
    decode(lm, steps=4)
    assert calls == 1 + 4
