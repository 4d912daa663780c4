"""Dream's rules and shifted logits against plain restatements: whole canvas, and in blocks with Fast-dLLM's caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.types import NonFiniteActivations, UsageError
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm
from tests.samplers.plain_dream import MASK, plain_budget, plain_dream, plain_fast_dllm, shifted

GEN = 12
PROMPTS = [random_ids(1, length, seed=length)[0] for length in (7, 4, 1)]


def dream_lm(seed: int = 0, **facts: Any) -> ds.LanguageModel:
    return tiny_lm(seed=seed, qkv_bias=True, logit_shift=1, text_positions=True, **facts)


dream_options = st.fixed_dictionaries(
    {
        "remasking": st.sampled_from(["entropy", "maskgit_plus", "topk_margin", "origin"]),
        "steps": st.sampled_from([None, 1, 4, 12, 17]),
        "temperature": st.sampled_from([0.0, 0.6]),
        "top_p": st.sampled_from([None, 0.9]),
        "top_k": st.sampled_from([None, 5]),
        "alg_temp": st.sampled_from([0.0, 0.3]),
        "eps": st.sampled_from([1e-3, 0.2]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=40)
@given(dream_options, st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3), st.sampled_from([0, 1]))
def test_the_loop_is_dream_restated(values: dict[str, Any], prompts: list[Tensor], shift: int) -> None:
    """The rules serve a model without a shift too: LLaDA's logits already sit where the tokens are."""
    lm = dream_lm(seed=values["seed"] % 3) if shift else tiny_lm(seed=values["seed"] % 3, text_positions=True)
    ids, mask = left_padded(prompts)
    config = ds.SamplerConfig(gen_length=GEN, **values)
    out = ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=config)
    if shift:
        assert torch.equal(out.ids, plain_dream(lm, ids, mask, config))
    assert out.forward_passes == (values["steps"] or GEN)
    assert not bool((out.ids == MASK).any())
    assert torch.equal(out.ids[:, : ids.shape[1]], ids)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.2},
        {"threshold": 0.9},
        {"threshold": 0.2, "remasking": "maskgit_plus"},
        {"steps": 6},
        {"steps": 18, "remasking": "entropy"},
        {"remasking": "maskgit_plus"},
        {"threshold": 0.4, "remasking": "maskgit_plus", "steps": 3, "temperature": 0.6, "top_p": 0.9, "seed": 5},
        {"steps": 9, "remasking": "entropy", "temperature": 0.6, "top_k": 5},
    ],
)
def test_caches_decide_a_blocks_first_position_from_the_full_forward(cache: Any, options: dict[str, Any]) -> None:
    for seed in range(3):
        lm, seen = dream_lm(seed=seed), Recorder()
        config = ds.SamplerConfig(gen_length=GEN, block_length=4, cache=cache, **options)
        prompt = PROMPTS[seed][None]
        out = ds.generate(lm, prompt_ids=prompt, sampler=config, observers=(seen,))
        expected, forwards = plain_fast_dllm(lm, prompt, config)
        assert torch.equal(out.ids, expected)
        assert out.forward_passes == forwards
        for step, result in seen.steps:
            if step.index_in_block == 0:
                first = prompt.shape[1] + 4 * step.block
                assert result.committed[0].nonzero().flatten().tolist() == [first]


budgets = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.0, 0.2, 0.4, 0.9, 1.0]),
        "steps": st.sampled_from([1, 2, 3, 4, 5, 12, 17]),
        "remasking": st.sampled_from(["maskgit_plus", "topk_margin"]),
        "temperature": st.sampled_from([0.0, 0.6]),
        "top_k": st.sampled_from([None, 5]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=40)
@given(budgets, st.integers(0, 35), st.lists(st.integers(0, 35) | st.just(MASK), max_size=6))
def test_a_threshold_keeps_to_the_steps_budget(values: dict[str, Any], first: int, more: list[int]) -> None:
    """A prompt holds a token at least: all masks predict the same, and the order of ties is not defined."""
    lm, ids = dream_lm(seed=values["seed"] % 3), torch.tensor([[first, *more]])
    config = ds.SamplerConfig(gen_length=GEN, **values)
    out = ds.generate(lm, prompt_ids=ids, sampler=config)
    expected, forwards = plain_budget(lm, ids, config)
    assert torch.equal(out.ids, expected)
    assert out.forward_passes == forwards


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_budget_is_what_steps_add_to_a_threshold(execution: Any) -> None:
    """Without `steps`, all that is sure is committed; one step plans everything at once, which is the same.

    Captured steps without a budget are not kept for one with it.
    """
    lm, prompt = dream_lm(), PROMPTS[0][None]
    passes = {}
    for steps in (None, 1, 2, GEN):
        config = ds.SamplerConfig(gen_length=GEN, steps=steps, threshold=0.2, remasking="maskgit_plus")
        config = replace(config, execution=execution)
        passes[steps] = ds.generate(lm, prompt_ids=prompt, sampler=config).forward_passes
    assert passes[None] == passes[1] < passes[2] < passes[GEN] == GEN


def test_a_mask_chosen_as_a_token_uses_up_the_budget() -> None:
    lm, prompt = dream_lm(), PROMPTS[0][None]
    lm.transformer.head.weight.zero_()
    lm.transformer.head.weight[MASK] = 1.0
    config = ds.SamplerConfig(gen_length=GEN, steps=3, threshold=0.0, remasking="maskgit_plus")
    for execution in ("eager", "graph"):
        out = ds.generate(lm, prompt_ids=prompt, sampler=replace(config, execution=execution))
        assert bool((out.ids[:, prompt.shape[1] :] == MASK).any())
        assert out.forward_passes == plain_budget(lm, prompt, config)[1] == 3


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_rows_of_a_batch_have_budgets_of_their_own(steps: int) -> None:
    ids, mask = left_padded(PROMPTS)
    for seed in range(3):
        lm = dream_lm(seed=seed)
        config = ds.SamplerConfig(gen_length=GEN, steps=steps, threshold=0.3, remasking="maskgit_plus")
        plain, graphed = (
            ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=replace(config, execution=execution))
            for execution in ("eager", "graph")
        )
        assert graphed.execution == "graph"
        assert torch.equal(plain.ids, graphed.ids)
        assert torch.equal(plain.commit_step, graphed.commit_step)
        forwards = []
        for row, prompt in enumerate(PROMPTS):
            expected, passes = plain_budget(lm, prompt[None], config)
            assert torch.equal(plain.ids[row, ids.shape[1] :], expected[0, len(prompt) :])
            forwards.append(passes)
        assert plain.forward_passes == graphed.forward_passes == max(forwards)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"steps": 6},
        {"steps": 3},
        {"threshold": 0.3},
        {"factor": 1.5},
        {"threshold": 0.3, "remasking": "maskgit_plus"},
        {"factor": 1.5, "remasking": "maskgit_plus"},
    ],
)
def test_captured_steps_decide_what_the_plain_path_does(cache: Any, rule: dict[str, Any]) -> None:
    ids, mask = left_padded(PROMPTS)
    blocks = {} if cache == "none" and "remasking" in rule else {"block_length": 4}
    for seed in range(2):
        lm = dream_lm(seed=seed)
        plain, graphed = (
            ds.generate(
                lm,
                prompt_ids=ids,
                attention_mask=mask,
                sampler=ds.SamplerConfig(gen_length=GEN, cache=cache, execution=execution, **blocks, **rule),
                sparsity=ds.SparsityConfig(p=0.8),
            )
            for execution in ("eager", "graph")
        )
        assert graphed.execution == "graph"
        assert torch.equal(plain.ids, graphed.ids)
        assert torch.equal(plain.commit_step, graphed.commit_step)
        assert plain.forward_passes == graphed.forward_passes
        for key in ("sparsity", "by_token_class", "exploitable"):
            for name, value in plain.sparsity_report[key].items():  # sums in another order: the last bit may differ
                assert graphed.sparsity_report[key][name] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remasking": "entropy"}, "'entropy' plans its steps on the host"),
        ({"remasking": "topk_margin", "threshold": 0.3}, "'topk_margin' compares two tokens"),
        ({"remasking": "maskgit_plus", "threshold": 0.3, "top_k": 3}, "top_p and top_k sort"),
    ],
)
def test_rules_of_the_plain_path_are_not_captured(options: dict[str, Any], words: str) -> None:
    config = ds.SamplerConfig(gen_length=4, execution="graph", **options)
    with pytest.raises(UsageError, match=words):
        ds.generate(dream_lm(), prompt_ids=PROMPTS[0][None], sampler=config)


def test_one_step_a_block_commits_everything_from_the_full_forward() -> None:
    lm = dream_lm()
    out = ds.generate(
        lm, prompt_ids=PROMPTS[0][None], sampler=ds.SamplerConfig(gen_length=8, block_length=4, steps=2, cache="dual")
    )
    assert out.forward_passes == 2
    assert not bool((out.ids == MASK).any())


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("remasking", ["low_confidence", "entropy"])
def test_padded_rows_decode_like_single_prompts(cache: Any, remasking: Any) -> None:
    lm = dream_lm(seed=3)
    blocks = {} if (cache, remasking) == ("none", "entropy") else {"block_length": 4}
    config = ds.SamplerConfig(gen_length=GEN, cache=cache, remasking=remasking, **blocks)
    ids, mask = left_padded(PROMPTS)
    together = ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=config).ids[:, ids.shape[1] :]
    for row, prompt in enumerate(PROMPTS):
        alone = ds.generate(lm, prompt_ids=prompt[None], sampler=config).ids[0, len(prompt) :]
        assert torch.equal(together[row], alone)


def test_guidance_and_eos_options_reach_the_shifted_logits() -> None:
    lm = dream_lm(seed=1)
    prompt = PROMPTS[0][None]
    x = torch.cat((prompt, torch.full((1, 3), MASK)), dim=1)
    free = x.clone()
    free[:, : prompt.shape[1]] = MASK
    guided, unguided = shifted(lm.logits(x)), shifted(lm.logits(free))
    expected = (unguided + 2.5 * (guided - unguided))[0, -3:]
    expected[:, 38] = -torch.inf
    options = {"gen_length": 3, "steps": 1, "cfg_scale": 1.5, "logits_eos_inf": True, "remasking": "maskgit_plus"}
    out = ds.generate(lm, prompt_ids=prompt, sampler=ds.SamplerConfig(**options))
    assert torch.equal(out.ids[0, -3:], expected.argmax(-1))


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy"])
def test_nan_logits_are_named(remasking: Any) -> None:
    lm = dream_lm()
    lm.transformer.norm.weight.fill_(torch.nan)
    options: dict[str, Any] = {"gen_length": 4, "block_length": 4, "remasking": remasking}
    with pytest.raises(NonFiniteActivations, match="step 0"):
        ds.generate(lm, prompt_ids=PROMPTS[0][None], sampler=ds.SamplerConfig(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remasking": "entropy", "threshold": 0.9}, "maskgit_plus"),
        ({"remasking": "origin", "factor": 1.0}, "maskgit_plus"),
        ({"remasking": "maskgit_plus", "threshold": 0.9, "alg_temp": 0.1}, "alg_temp"),
        ({"remasking": "entropy", "top_p": 0.0}, "top_p is 0.0"),
        ({"remasking": "entropy", "top_k": 0}, "top_k is 0"),
        ({"remasking": "entropy", "eps": 1.0}, "eps is 1.0"),
        ({"remasking": "entropy", "alg_temp": -1.0}, "alg_temp is -1.0"),
        ({"remasking": "entropy", "confidence_eos_eot_inf": True}, "confidence_eos_eot_inf"),
        ({"top_p": 0.9}, "remasking 'low_confidence' does not use it"),
        ({"remasking": "random", "alg_temp": 0.1}, "remasking 'random' does not use it"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ds.SamplerConfig(gen_length=32, **options).fitted(tiny_lm().config)


def test_without_a_cache_the_canvas_is_one_block() -> None:
    assert ds.SamplerConfig(gen_length=96, remasking="entropy").block_length == 96
    assert ds.SamplerConfig(gen_length=96, remasking="entropy", cache="dual").block_length == 32
    assert ds.SamplerConfig.from_dict(ds.SamplerConfig(remasking="origin").to_dict()).blocks == 1
    with pytest.raises(UsageError, match=r"block_length is 8, but without a cache .* leave block_length out, or give"):
        ds.SamplerConfig(gen_length=96, remasking="entropy", block_length=8)
