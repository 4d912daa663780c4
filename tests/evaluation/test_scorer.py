"""Likelihoods of batched, deduplicated, shared requests against the plain one-request functions."""

from __future__ import annotations

import random

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.requests import Pair
from dllm_sparse.evaluation.scorer import Request, Scorer
from dllm_sparse.generation import generate
from dllm_sparse.samplers.likelihood import log_likelihood
from dllm_sparse.types import UsageError

CONTEXTS = ["The fox", "A long way down the road", "", "Q:"]
ENDINGS = [" runs", " a", " sleeps all day", "x"]
REQUESTS = [Request("loglikelihood", (context, ending)) for context in CONTEXTS for ending in ENDINGS]


def values(lm: ds.LanguageModel, requests: list[Request] = REQUESTS, **options: object) -> list[float]:
    scorer = Scorer(lm, ScoringOptions(**{"mc_num": 8, **options}))
    answers, _ = scorer.run(scorer.prepare(requests))
    return [answer[0] for answer in answers]


def one_by_one(lm: ds.LanguageModel, mc_num: int = 8, group: int = 8, cfg_scale: float = 0.0) -> list[float]:
    encoder = Scorer(lm).encoder
    pairs = [encoder.pair(*request.arguments) for request in REQUESTS]
    return [log_likelihood(lm, list(p.prompt), list(p.target), mc_num, group, cfg_scale, seed=p.seed(0)) for p in pairs]


@pytest.mark.parametrize("budget", [None, 40])
def test_diffusion_equals_the_official_estimator(diffusion: ds.LanguageModel, budget: int | None) -> None:
    got = values(diffusion, batch_tokens=budget)
    assert got == pytest.approx(one_by_one(diffusion), rel=1e-5, abs=1e-4)


def test_groups_and_guidance_equal_the_official_estimator(diffusion: ds.LanguageModel) -> None:
    got = values(diffusion, mc_batch=4, cfg_scale=0.5)
    assert got == pytest.approx(one_by_one(diffusion, 8, 4, 0.5), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("budget", [None, 30])
def test_autoregressive_sharing_is_exact(ar: ds.LanguageModel, budget: int | None) -> None:
    assert values(ar, batch_tokens=budget) == pytest.approx(one_by_one(ar), rel=1e-6, abs=1e-4)


def test_shared_prompts_equal_unshared_ones_under_token_masks(ar: ds.LanguageModel) -> None:
    scorer = Scorer(ar)
    prepared = scorer.prepare(REQUESTS)
    config = ds.SparsityConfig(p=0.7, backend="reference")
    shared = [answer[0] for answer in scorer.run(prepared, config)[0]]
    with ds.sparsify(ar, config):
        plain = one_by_one(ar)
    assert shared == pytest.approx(plain, rel=1e-5, abs=1e-3)


def test_order_and_company_change_nothing(diffusion: ds.LanguageModel) -> None:
    order = list(range(len(REQUESTS)))
    random.Random(3).shuffle(order)
    whole = values(diffusion)
    mixed = values(diffusion, [REQUESTS[i] for i in order] + [REQUESTS[0]])
    assert mixed[:-1] == pytest.approx([whole[i] for i in order], abs=1e-4)
    assert values(diffusion, [REQUESTS[2]]) == pytest.approx([whole[2]], abs=1e-4)


def test_equal_requests_are_computed_once(diffusion: ds.LanguageModel) -> None:
    scorer = Scorer(diffusion, ScoringOptions(mc_num=4))
    prepared = scorer.prepare([REQUESTS[0]] * 5)
    assert len(prepared.pairs) == 1
    assert len({answer[0] for answer in scorer.run(prepared)[0]}) == 1


def test_pseudo_likelihood_sums_conditionals(diffusion: ds.LanguageModel) -> None:
    encoder = Scorer(diffusion).encoder
    pair = encoder.pair("The fox", " run")
    whole = [*pair.prompt, *pair.target]
    expected = 0.0
    for place in range(len(pair.prompt), len(whole)):
        ids = torch.tensor([whole])
        ids[0, place] = diffusion.mask_token_id
        expected += float(diffusion.logits(ids)[0, place].log_softmax(-1)[whole[place]])
    got = values(diffusion, [Request("loglikelihood", ("The fox", " run"))], estimator="pseudo")
    assert got == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_greedy_flag_is_what_greedy_decoding_gives(kind: str, request: pytest.FixtureRequest) -> None:
    lm: ds.LanguageModel = request.getfixturevalue(kind)
    encoder = Scorer(lm).encoder
    prompt = encoder.pair("The fox", " x").prompt
    for length in (1, 3):
        sampler = ds.SamplerConfig(gen_length=length, block_length=length)
        ids = generate(lm, prompt_ids=[list(prompt)], sampler=sampler).ids[0, len(prompt) :].tolist()
        scorer = Scorer(lm, ScoringOptions(mc_num=4))
        scorer.encoder.pair = lambda *_, greedy=False, ids=ids: Pair(prompt, tuple(ids), greedy)  # type: ignore[method-assign]
        answers, _ = scorer.run(scorer.prepare([Request("loglikelihood", ("", ""), greedy=True)]))
        assert answers[0][1] is True
        scorer.encoder.pair = lambda *_, greedy=False, ids=ids: Pair(prompt, (*ids[:-1], 5), greedy)  # type: ignore[method-assign]
        answers, _ = scorer.run(scorer.prepare([Request("loglikelihood", ("", ""), greedy=True)]))
        assert answers[0][1] is False


def test_generation_in_company_equals_generation_alone(ar: ds.LanguageModel, diffusion: ds.LanguageModel) -> None:
    options = {"until": ["\n"], "max_gen_toks": 6}
    requests = [Request("generate_until", (context, options)) for context in CONTEXTS if context]
    for lm in (ar, diffusion):
        scorer = Scorer(lm)
        together, _ = scorer.run(scorer.prepare(requests))
        alone = [scorer.run(scorer.prepare([request]))[0][0] for request in requests]
        assert together == alone


def test_rolling_windows_cover_the_text_once(ar: ds.LanguageModel, diffusion: ds.LanguageModel) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 3
    for lm, length in ((ar, 16), (diffusion, 16)):
        encoder = Scorer(lm, ScoringOptions(max_length=length)).encoder
        windows = encoder.windows(text)
        assert [token for window in windows for token in window.target] == encoder.encode(text)
        fed = 1 if lm.kind == "autoregressive" else 0
        assert all(len(window.prompt) + len(window.target) - fed <= length for window in windows)


def test_usage_errors(diffusion: ds.LanguageModel) -> None:
    with pytest.raises(UsageError, match="multiple of mc_batch"):
        ScoringOptions(mc_num=10, mc_batch=4)
    with pytest.raises(UsageError, match="estimator"):
        ScoringOptions(estimator="guess")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exceeds the context"):
        Scorer(diffusion, ScoringOptions(max_length=4)).encoder.pair("a", " much too long")
    scorer = Scorer(diffusion)
    with pytest.raises(UsageError, match="not supported"):
        scorer.prepare([Request("generate_until", ("a", {"num_beams": 4}))])
