"""The loop of block-causal models against LLaDA2's and SDAR's procedure restated without a cache, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.samplers.confidence import pick_by_threshold_or_quota
from dllm_sparse.types import TokenClass, UsageError
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm
from tests.samplers.plain_blocks import recompute
from tests.samplers.tiny import run

MASK, EOS = 39, 38
PROMPTS = [random_ids(1, length, seed=length)[0] for length in (14, 9, 2)]
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.3},
    {"threshold": 0.3, "editing_threshold": 0.25},
    {"editing_threshold": 0.0, "max_post_steps": 2},
    {"factor": 1.5},
    {"cfg_scale": 1.5},
    {"threshold": 0.4, "minimal_topk": 2},
)


def plain(lm: ds.LanguageModel, prompt: Tensor, config: ds.SamplerConfig) -> tuple[Tensor, int]:
    """The procedure restated, on the model's own logits."""
    assert lm.config.block_length is not None
    return recompute(lambda ids: lm.logits(ids[None])[0], prompt, config, lm.config.block_length, MASK, EOS)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([{}, {"threshold": 0.2}, {"threshold": 0.35, "minimal_topk": 2}]),
    st.sampled_from([None, 0.0, 0.3]),
    st.booleans(),
    st.integers(0, 30),
)
def test_the_loop_is_the_procedure_restated(
    length: int, generated: int, block: int, rule: dict[str, Any], editing: float | None, stop: bool, seed: int
) -> None:
    lm = tiny_lm(seed=seed, block_length=block)
    lm.transformer.head.weight[EOS] *= 1.5
    edits = {} if editing is None else {"editing_threshold": editing, "max_post_steps": 3}
    values = {"gen_length": generated, "stop_at_eos": stop, **edits, **rule}
    prompt = random_ids(1, length, seed=seed)
    out = run(lm, prompt, **values)
    ids, forwards = plain(lm, prompt[0], ds.SamplerConfig(**values))
    assert torch.equal(out.ids[0], ids)
    assert out.forward_passes == forwards
    assert out.commit_step.shape == (1, generated)


@pytest.mark.parametrize("facts", [{}, {"block_length": 4}])
def test_every_end_of_text_of_a_model_ends_its_rows(facts: dict[str, Any]) -> None:
    """As a chat model's two do; an id among the options is the only one. In blocks of 4 with and without a cache."""
    prompt, values = PROMPTS[0][None, :12], {"gen_length": 16, "block_length": 4}
    whole = run(tiny_lm(**facts), prompt, **values)
    written = int(whole.ids[0, 12])
    lm = tiny_lm(**facts, stop_token_ids=(written,))
    stopped = run(lm, prompt, stop_at_eos=True, **values)
    assert torch.equal(stopped.ids[0, :16], whole.ids[0, :16])
    assert (stopped.ids[0, 16:] == EOS).all()
    assert stopped.forward_passes < whole.forward_passes
    assert 36 not in whole.ids[0, 12:]
    assert torch.equal(run(lm, prompt, stop_at_eos=True, eos_token_id=36, **values).ids, whole.ids)


@pytest.mark.parametrize("steps", [4, 8, 12, 32])
def test_steps_are_split_over_the_blocks(steps: int) -> None:
    """More steps than tokens end early; fewer commit several tokens each. A block of 4, of which there are 4."""
    lm, prompt = tiny_lm(block_length=4), PROMPTS[0][None, :12]
    out = run(lm, prompt, gen_length=16, steps=steps)
    ids, forwards = plain(lm, prompt[0], ds.SamplerConfig(gen_length=16, steps=steps))
    assert torch.equal(out.ids[0], ids)
    assert out.forward_passes == forwards == 1 + 4 * min(steps // 4, 4) + 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [3, 4])
def test_a_left_padded_batch_equals_its_prompts_alone(rule: dict[str, Any], block: int) -> None:
    """Rows whose prompts end at different places of a block share their forwards."""
    for seed in range(2):
        lm = tiny_lm(seed=seed, block_length=block)
        ids, mask = left_padded(PROMPTS)
        batch = run(lm, ids, mask, gen_length=7, **rule)
        for row, prompt in enumerate(PROMPTS):
            single = run(lm, prompt[None], gen_length=7, **rule)
            assert torch.equal(batch.ids[row, ids.shape[1] :], single.ids[0, len(prompt) :])
            assert batch.forward_passes >= single.forward_passes


def test_guidance_from_the_cache_equals_guidance_by_recomputing() -> None:
    lm, prompt = tiny_lm(block_length=4), PROMPTS[1]
    out = run(lm, prompt[None], gen_length=7, cfg_scale=2.0)
    x = torch.cat((prompt, torch.full((7,), MASK)))
    for begin in (8, 12):
        while bool((x[begin : begin + 4] == MASK).any()):
            both = torch.stack((x, x))[:, : begin + 4]
            both[1, : len(prompt)] = MASK
            conditional, free = lm.logits(both)[:, begin:]
            sure, tokens = (free + 3.0 * (conditional - free)).softmax(-1).max(-1)
            place = sure.masked_fill(x[begin : begin + 4] != MASK, -1.0).argmax()
            x[begin + place] = tokens[place]
    assert torch.equal(out.ids[0], x)


def test_editing_changes_what_was_decoded() -> None:
    """Without it a token stays as committed; with it some do not, and every step says what it wrote."""
    changed = 0
    for seed in range(6):
        lm, seen = tiny_lm(seed=seed, block_length=4), Recorder()
        values = {"gen_length": 8, "threshold": 0.2}
        prompt = random_ids(1, 5, seed=seed)
        kept = run(lm, prompt, **values)
        edited = run(lm, prompt, editing_threshold=0.1, observers=[seen], **values)
        times = torch.stack([result.committed for _, result in seen.steps]).sum(0)[0, 5:13]
        assert (times >= 1).all()
        changed += int((times > 1).sum())
        assert edited.forward_passes >= kept.forward_passes
        for number, (step, result) in enumerate(seen.steps):
            assert step.index == number
            assert (edited.commit_step[0][result.committed[0, 5:13]] >= number).all()
    assert changed


def test_observers_see_windows_classes_and_blocks() -> None:
    lm, seen = tiny_lm(block_length=4), Recorder()
    prompt = PROMPTS[1][None]  # two blocks and one token
    out = run(lm, prompt, gen_length=5, sparsity=ds.SparsityConfig(p=0.5), observers=[seen])
    ids, classes = seen.starts[0]
    assert ids.shape == classes.shape == (1, 16)  # filled up to whole blocks
    assert classes[0].tolist() == [TokenClass.PROMPT] * 9 + [TokenClass.MASKED] * 7
    contexts = {context.step.index: context for _, _, _, context in seen.masks}
    assert len(contexts) == len(seen.steps) == out.forward_passes == 1 + 3 + 1 + 4
    windows = [(context.start, context.start + context.token_class.shape[1]) for context in contexts.values()]
    assert windows == [(0, 8)] + [(8, 12)] * 4 + [(12, 16)] * 4
    assert [context.block for context in contexts.values()] == [None, *windows[1:]]
    assert [(step.block, step.index_in_block) for step, _ in seen.steps] == [
        *((0, place) for place in range(5)),
        *((1, place) for place in range(4)),
    ]
    assert {step.total for step, _ in seen.steps} == {1 + 2 * 5 - 1}
    committed = torch.stack([result.committed.any(-1) for _, result in seen.steps])[:, 0]
    assert committed.tolist() == [False, *[True] * 3, False, *[True] * 4]
    stored = contexts[4].token_class[0].tolist()
    assert stored.count(TokenClass.COMMITTED) == 1
    assert TokenClass.MASKED not in stored


def test_full_mass_is_bitwise_dense() -> None:
    lm, prompt = tiny_lm(block_length=4), PROMPTS[1][None]
    dense, seen = Recorder(), Recorder()
    run(lm, prompt, gen_length=8, observers=[dense])
    run(lm, prompt, gen_length=8, observers=[seen], sparsity=ds.SparsityConfig(p=1.0))
    for (_, one), (_, other) in zip(dense.steps, seen.steps, strict=True):
        assert torch.equal(one.ids, other.ids)
        if one.confidence is None or other.confidence is None:  # a forward for keys and values decides nothing
            assert one.confidence is other.confidence
            assert not one.committed.any()
        else:
            assert torch.equal(one.confidence, other.confidence)


def test_sampling_is_seeded_and_restricted() -> None:
    lm, prompt = tiny_lm(block_length=4), PROMPTS[0][None]
    values = {"gen_length": 16, "temperature": 1.0}
    first = run(lm, prompt, seed=1, **values)
    assert torch.equal(run(lm, prompt, seed=1, **values).ids, first.ids)
    assert not torch.equal(run(lm, prompt, seed=2, **values).ids, first.ids)
    greedy = run(lm, prompt, gen_length=16)
    assert torch.equal(run(lm, prompt, seed=1, top_k=1, **values).ids[0, :16], greedy.ids[0, :16])
    assert run(lm, prompt, remasking="random", gen_length=16).forward_passes == greedy.forward_passes


def test_confidence_is_the_probability_under_the_distribution_sampled_from() -> None:
    """With only one token left to sample, every confidence is 1: any threshold below commits the block at once."""
    lm, prompt = tiny_lm(block_length=4), PROMPTS[0][None, :12]
    out = run(lm, prompt, gen_length=8, temperature=0.5, top_k=1, threshold=0.99)
    assert out.forward_passes == 1 + 1 + 1 + 1
    assert run(lm, prompt, gen_length=8, threshold=0.99).forward_passes == 1 + 4 + 1 + 4


@pytest.mark.parametrize("rule", RULES)
def test_a_model_that_predicts_the_mask_token_comes_to_an_end(rule: dict[str, Any]) -> None:
    lm = tiny_lm(block_length=4)
    lm.transformer.head.weight[MASK] = lm.transformer.head.weight.abs().max() * 10 * lm.transformer.norm.weight.sign()
    lm.transformer.norm.weight.copy_(lm.transformer.norm.weight * 0 + 1)
    out = run(lm, PROMPTS[0][None], gen_length=10, **rule)
    assert out.forward_passes <= 1 + 3 * (4 + 16 + 1)


def test_the_rule_for_sure_tokens() -> None:
    confidence = torch.tensor([[0.9, 0.5, -torch.inf, 0.95], [0.5, 0.4, 0.3, -torch.inf], [-torch.inf] * 4])
    picked = pick_by_threshold_or_quota(confidence, 0.5, [1, 2, 1])
    assert picked.tolist() == [[True, False, False, True], [True, True, False, False], [False] * 4]
    assert pick_by_threshold_or_quota(confidence[:1], 0.5, [3]).tolist() == [[True, True, False, True]]


def test_random_remasking_commits_in_a_drawn_order() -> None:
    lm, prompt = tiny_lm(block_length=8), PROMPTS[0][None, :8]
    sure = run(lm, prompt, gen_length=16).commit_step
    drawn = [run(lm, prompt, gen_length=16, remasking="random", seed=seed).commit_step for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], sure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "dual"}, "cache is dual; a block-causal model allows: none"),
        ({"remasking": "entropy"}, "remasking is entropy; a block-causal model allows: low_confidence, random"),
        ({"confidence_eos_eot_inf": True}, "confidence_eos_eot_inf is True"),
        ({"steps": 6}, "steps 6 cannot be split over 4 blocks"),
        ({"block_length": 8}, "block_length is 8, but this block-causal model decodes in its own blocks of 4 tokens"),
        ({"max_post_steps": 3}, "max_post_steps is 3, but decoding without editing_threshold does not use it"),
        ({"top_k": 3}, "top_k is 3, but greedy decoding does not use it"),
        ({"top_p": 0.9}, "top_p is 0.9, but greedy decoding does not use it"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny_lm(block_length=4), PROMPTS[0][None], gen_length=16, **options)


@pytest.mark.parametrize("options", [{"minimal_topk": 2}, {"editing_threshold": 0.5}, {"max_post_steps": 3}])
def test_options_of_block_causal_models_are_refused_elsewhere(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="block-causal"):
        run(tiny_lm(), PROMPTS[0][None], gen_length=32, **options)
