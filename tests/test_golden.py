"""The identity contract: what the reference programs produced, through the public API alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_sparse as ds
from tests.helpers import by_name, golden

# Golden logits hold 7 significant digits; fp32 against fp64 differs by up to 2e-4 on them (golden README).
LOGIT_TOLERANCE = 1e-3


def _bits(text: str) -> list[bool]:
    return [character == "1" for character in text]


@pytest.mark.parametrize("case", **by_name(golden("logits") + golden("dream", "logits")))
def test_logits(request: pytest.FixtureRequest, case: dict[str, Any]) -> None:
    lm: ds.LanguageModel = request.getfixturevalue(case["checkpoint"].removesuffix("-tiny"))
    ids = torch.tensor(case["prompt_ids"])
    mask = None if case["attention_mask"] is None else torch.tensor(case["attention_mask"])
    logits = lm.logits(ids, attention_mask=mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert logits.shape == (*ids.shape, lm.config.vocab_size)
    for expected in case["expected_rows"]:
        row, position = expected["row"], expected["position"]
        if real[row, position]:
            assert (logits[row, position] - torch.tensor(expected["logits"])).abs().max() < LOGIT_TOLERANCE
    assert torch.equal(logits.argmax(-1)[real], torch.tensor(case["expected_argmax"])[real])
    if "expected_logsumexp" in case:
        assert (logits.logsumexp(-1) - torch.tensor(case["expected_logsumexp"]))[real].abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("case", **by_name(golden("llada_generate")))
def test_llada_generate(llada: ds.LanguageModel, case: dict[str, Any]) -> None:
    params = dict(case["params"])
    assert params.pop("mask_id") == llada.mask_token_id
    sampler = ds.SamplerConfig(
        eos_token_id=params.pop("eos_id"), eot_token_id=params.pop("eot_id"), seed=params.pop("seed") or 0, **params
    )
    out = ds.generate(llada, prompt_ids=case["prompt_ids"], attention_mask=case["attention_mask"], sampler=sampler)
    assert out.ids.tolist() == case["expected_ids"]
    assert out.forward_passes == case["nfe"]
    assert out.commit_step.tolist() == case["commit_step"]


@pytest.mark.parametrize("case", **by_name(golden("fast_dllm")))
def test_fast_dllm(llada: ds.LanguageModel, case: dict[str, Any]) -> None:
    params = dict(case["params"])
    assert params.pop("mask_id") == llada.mask_token_id
    # Fast-dLLM's plain loop leaves a block as soon as it holds no mask; LLaDA's does not.
    sampler = ds.SamplerConfig(
        confidence_dtype="float64", early_block_exit=True, seed=params.pop("seed") or 0, **params
    )
    out = ds.generate(llada, prompt_ids=case["prompt_ids"], sampler=sampler)
    assert out.ids.tolist() == case["expected_ids"]
    assert out.forward_passes == case["nfe"]


@pytest.mark.parametrize("case", **by_name(golden("dream")))
def test_dream(dream: ds.LanguageModel, case: dict[str, Any]) -> None:
    params = dict(case["params"])
    assert params.pop("mask_id") == dream.mask_token_id
    sampler = ds.SamplerConfig(
        gen_length=params.pop("max_new_tokens"),
        remasking=params.pop("alg"),
        alg_temp=params.pop("alg_temp") or 0.0,
        seed=params.pop("seed") or 0,
        **params,
    )
    out = ds.generate(dream, prompt_ids=case["prompt_ids"], attention_mask=case["attention_mask"], sampler=sampler)
    assert out.ids.tolist() == case["expected_ids"]
    assert out.forward_passes == case["nfe"]
    assert out.commit_step.tolist() == case["commit_step"]
    assert int((out.ids == dream.mask_token_id).sum()) == case["masks_left"]


@pytest.mark.parametrize("case", **by_name(golden("fast_dllm_dream")))
def test_fast_dllm_for_dream(dream: ds.LanguageModel, case: dict[str, Any]) -> None:
    params = dict(case["params"])
    assert params.pop("mask_id") == dream.mask_token_id
    algorithm, threshold, block = params.pop("alg"), params.pop("threshold"), params.pop("block_length")
    rule = {"remasking": "maskgit_plus", "threshold": threshold}
    sampler = ds.SamplerConfig(
        gen_length=params.pop("max_new_tokens"),
        alg_temp=params.pop("alg_temp") or 0.0,
        **(rule if algorithm == "confidence_threshold" else {"remasking": algorithm}),
        **({} if block is None else {"block_length": block}),
        **params,
    )
    out = ds.generate(dream, prompt_ids=case["prompt_ids"], sampler=sampler)
    assert out.ids.tolist() == case["expected_ids"]
    assert out.forward_passes == case["nfe"]


@pytest.mark.parametrize("case", **by_name(golden("ar")))
def test_autoregressive(llama: ds.LanguageModel, case: dict[str, Any]) -> None:
    params = case["params"]
    ids, mask = torch.tensor(case["prompt_ids"]), torch.tensor(case["attention_mask"])
    sampler = ds.SamplerConfig(
        gen_length=params["max_new_tokens"], eos_token_id=params["eos_id"], stop_at_eos=params["eos_id"] is not None
    )
    out = ds.generate(llama, prompt_ids=ids, attention_mask=mask, sampler=sampler)
    assert out.ids.tolist() == case["expected_ids"]
    assert out.forward_passes == len(case["expected_ids"][0]) - ids.shape[1]
    following = llama.logits(ids, attention_mask=mask)[:, -1]
    assert (following - torch.tensor(case["expected_next_token_logits"])).abs().max() < LOGIT_TOLERANCE
    alone = ids[:1, mask[0].bool()]
    assert llama.logits(alone).argmax(-1).tolist() == case["expected_full_argmax_single"]


@pytest.mark.parametrize("case", **by_name(golden("likelihood")))
def test_likelihood(llada: ds.LanguageModel, case: dict[str, Any]) -> None:
    params = dict(case["params"])
    del params["mask_id"]
    value = ds.log_likelihood(llada, case["prompt_ids"], case["target_ids"], **params)
    assert value == pytest.approx(case["expected"], rel=1e-4)
    if case["exact_single_token"] is not None:
        assert value == pytest.approx(case["exact_single_token"], rel=1e-4)


@pytest.mark.parametrize("case", **by_name(golden("topp")))
def test_top_p(case: dict[str, Any]) -> None:
    v = torch.tensor(case["values"], dtype=torch.float64).to(getattr(torch, case["dtype"]))
    for result in case["results"]:
        for ties, expected in (("keep", result["mask_ties"]), ("trim", result["mask_minimal"])):
            keep = ds.top_p_mask(v, result["p"], ties=ties)
            if case["all_zero"]:
                assert not keep.any()
            elif result["boundary"]:
                assert _is_neighbour(v, keep, torch.tensor(_bits(expected)))
            else:
                assert keep.tolist() == _bits(expected), (result["p"], ties)


def _is_neighbour(v: torch.Tensor, keep: torch.Tensor, expected: torch.Tensor) -> bool:
    """True where the two masks differ by at most one magnitude, at the cut."""
    differing = v.abs()[keep ^ expected].unique()
    kept = v.abs()[keep & expected]
    return len(differing) == 0 or (len(differing) == 1 and bool((kept >= differing).all()))


@pytest.mark.parametrize("case", **by_name(golden("topp", "flattened")))
def test_sequence_scope_is_the_published_flattened_rule(case: dict[str, Any]) -> None:
    from dllm_sparse.sparsity.rules import flattened_top_p_mask

    v = torch.tensor(case["values"], dtype=torch.float64).to(getattr(torch, case["dtype"]))
    for result in case["results"]:
        keep = flattened_top_p_mask(v, result["p"])
        expected = torch.tensor([_bits(row) for row in result["mask_flattened"]])
        if result["boundary"]:
            assert _is_neighbour(v.flatten(), keep.flatten(), expected.flatten())
        else:
            assert torch.equal(keep, expected), result["p"]
        empty = (v == 0).all(-1)  # the fixture keeps all of an all-zero row, the definition keeps nothing
        assert not ds.top_p_mask(v, result["p"])[empty].any()
        if not result.get("per_token_boundary", True):
            per_token = torch.tensor([_bits(row) for row in result["mask_per_token_ties"]])
            assert torch.equal(ds.top_p_mask(v, result["p"])[~empty], per_token[~empty])
