"""The denoising loop against a plain restatement, its invariants, and batches against single prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.samplers.schedule import transfer_counts
from dllm_sparse.types import UsageError
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm
from tests.samplers.plain_llada import plain_llada
from tests.samplers.tiny import EOS, EOT, MASK, PROMPTS, run

options = st.fixed_dictionaries(
    {
        "steps": st.sampled_from([4, 8, 12, 24]),
        "block_length": st.sampled_from([3, 6, 12]),
        "temperature": st.sampled_from([0.0, 0.7]),
        "cfg_scale": st.sampled_from([0.0, 0.0, 1.5]),
        "remasking": st.sampled_from(["low_confidence", "random"]),
        "logits_eos_inf": st.booleans(),
        "confidence_eos_eot_inf": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=30)
@given(options, st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3), st.integers(0, 3))
def test_the_loop_is_llada_restated(values: dict[str, Any], prompts: list[Tensor], seed: int) -> None:
    lm = tiny_lm(seed=seed)
    lm.transformer.head.weight[[EOS, EOT]] *= 1.5  # predicted often enough for the flags to matter
    ids, mask = left_padded(prompts, pad=EOS)
    config = ds.SamplerConfig(gen_length=12, **values)
    out = run(lm, ids, mask, gen_length=12, **values)
    expected, when = plain_llada(lm, ids, mask, config)
    assert torch.equal(out.ids, expected)
    assert torch.equal(out.commit_step, when)
    assert out.forward_passes == config.steps


@settings(max_examples=30)
@given(
    st.sampled_from(["none", "prefix", "dual"]),
    st.sampled_from([{}, {"threshold": 0.3}, {"factor": 1.5}]),
    st.sampled_from([4, 8, 12, 24]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from(["low_confidence", "random"]),
    st.integers(0, 50),
)
def test_every_mask_is_committed_once_and_the_prompt_never_changes(
    cache: Any, rule: dict[str, float], steps: int, temperature: float, remasking: Any, seed: int
) -> None:
    lm, seen = tiny_lm(seed=seed % 5), Recorder()
    ids, mask = left_padded(PROMPTS)
    values = {"cache": cache, "steps": steps, "temperature": temperature, "remasking": remasking, "seed": seed, **rule}
    out = run(lm, ids, mask, gen_length=12, block_length=6, observers=[seen], **values)
    width = ids.shape[1]
    assert torch.equal(out.ids[:, :width], ids)
    assert not (out.ids == MASK).any()
    times = torch.stack([result.committed for _, result in seen.steps]).sum(0)
    assert (times[:, :width] == 0).all()
    assert (times[:, width:] == 1).all()
    for number, (step, result) in enumerate(seen.steps):
        assert step.index == number
        places = result.committed.nonzero()[:, 1] - width
        assert (places // 6 == step.block).all()
        assert torch.equal(out.commit_step[result.committed[:, width:]], torch.full((len(places),), number))
        # What was committed stays as it was decided.
        assert torch.equal(result.ids[result.committed], out.ids[result.committed])
        if not rule:
            quotas = transfer_counts(6, steps // 2)
            assert (result.committed.sum(-1) == quotas[step.index_in_block]).all()
    assert len(seen.steps) == out.forward_passes
    assert seen.steps[-1][0].fraction <= 1.0


RULES: tuple[dict[str, float], ...] = ({}, {"threshold": 0.3}, {"factor": 1.5}, {"cfg_scale": 1.5})


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    ("rule", "sparsity"),
    [*((rule, None) for rule in RULES), *(({}, scope) for scope in ("token", "group", "sequence"))],
)
def test_a_left_padded_batch_equals_its_prompts_alone(cache: Any, rule: dict[str, float], sparsity: Any) -> None:
    lm = tiny_lm(seed=1)
    config = None if sparsity is None else ds.SparsityConfig(p=0.7, scope=sparsity, group_size=4)
    ids, mask = left_padded(PROMPTS)
    values = {"gen_length": 12, "block_length": 6, "steps": 6, "cache": cache, "sparsity": config, **rule}
    batch = run(lm, ids, mask, **values)
    alone = [run(lm, prompt[None], **values) for prompt in PROMPTS]
    for row, single in enumerate(alone):
        assert torch.equal(batch.ids[row, ids.shape[1] :], single.ids[0, len(PROMPTS[row]) :])
    assert batch.forward_passes >= max(single.forward_passes for single in alone)


def test_guidance_of_scale_zero_is_no_guidance() -> None:
    lm = tiny_lm()
    plain = run(lm, PROMPTS[0][None], gen_length=12, block_length=6)
    assert torch.equal(run(lm, PROMPTS[0][None], gen_length=12, block_length=6, cfg_scale=0.0).ids, plain.ids)
    guided = run(lm, PROMPTS[0][None], gen_length=12, block_length=6, cfg_scale=3.0)
    assert not torch.equal(guided.ids, plain.ids)
    assert guided.forward_passes == plain.forward_passes


def test_leaving_a_finished_block_changes_forwards_and_no_token() -> None:
    lm = tiny_lm()
    values = {"gen_length": 12, "block_length": 3, "steps": 32}  # 8 steps for 3 masks
    planned = run(lm, PROMPTS[0][None], **values)
    early = run(lm, PROMPTS[0][None], early_block_exit=True, **values)
    assert torch.equal(early.ids, planned.ids)
    assert (planned.forward_passes, early.forward_passes) == (32, 12)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.9}, {"factor": 1.0}])
def test_a_model_that_predicts_the_mask_token_comes_to_an_end(cache: Any, rule: dict[str, float]) -> None:
    lm = tiny_lm()
    lm.transformer.head.weight[MASK] = lm.transformer.head.weight.abs().max() * 10 * lm.transformer.norm.weight.sign()
    lm.transformer.norm.weight.copy_(lm.transformer.norm.weight * 0 + 1)
    out = run(lm, PROMPTS[0][None], gen_length=12, block_length=6, cache=cache, **rule)
    assert out.forward_passes <= 12


@pytest.mark.parametrize("length", [1, 7, 30])
def test_equal_confidences_are_decided_as_the_plain_loop_decides_them(length: int) -> None:
    """All logits are 0, so all confidences are equal: which ones topk takes depends on the width of its row."""
    lm, prompt = tiny_lm(), random_ids(1, length)
    lm.transformer.head.weight.zero_()
    values = {"gen_length": 48, "block_length": 12, "steps": 16}
    out = run(lm, prompt, **values)
    ids, when = plain_llada(lm, prompt, torch.ones_like(prompt), ds.SamplerConfig(**values))
    assert torch.equal(out.ids, ids)
    assert torch.equal(out.commit_step, when)


def test_token_classes_follow_the_canvas() -> None:
    lm, seen = tiny_lm(), Recorder()
    ids, mask = left_padded(PROMPTS)
    run(
        lm,
        ids,
        mask,
        gen_length=12,
        block_length=6,
        steps=6,
        cache="dual",
        sparsity=ds.SparsityConfig(),
        observers=[seen],
    )
    width, kinds = ids.shape[1], ds.TokenClass
    start_ids, start_classes = seen.starts[0]
    assert torch.equal(start_ids[:, :width], ids)
    history = [torch.zeros_like(start_ids, dtype=torch.bool)] + [result.committed for _, result in seen.steps]
    decoded = torch.zeros_like(start_ids, dtype=torch.bool)
    expected = []
    for just in history:
        decoded |= just
        classes = torch.full_like(start_classes, kinds.MASKED)
        classes[decoded] = kinds.DECODED
        classes[just] = kinds.COMMITTED
        classes[:, :width] = torch.where(mask == 1, kinds.PROMPT, kinds.PADDING).to(torch.int8)
        expected.append(classes)
    assert torch.equal(start_classes, expected[0])
    for _, _, _, context in seen.masks:
        window = slice(context.start, context.start + context.token_class.shape[1])
        assert torch.equal(context.token_class, expected[context.step.index][:, window])


def test_confidences_reach_observers() -> None:
    lm, seen = tiny_lm(), Recorder()
    run(lm, PROMPTS[0][None], gen_length=12, block_length=6, observers=[seen])
    for _, result in seen.steps:
        assert result.confidence is not None
        assert result.confidence.shape == result.ids.shape
        assert result.confidence[result.committed].max() == result.confidence.max()


def test_seeds_decide_everything_random_and_nothing_global() -> None:
    lm = tiny_lm()
    values = {"gen_length": 12, "block_length": 6, "temperature": 1.0, "remasking": "random"}
    state = torch.get_rng_state()
    first, again = run(lm, PROMPTS[0][None], seed=1, **values), run(lm, PROMPTS[0][None], seed=1, **values)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, run(lm, PROMPTS[0][None], seed=2, **values).ids)
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_that_do_not_fit_are_refused_with_a_way_out() -> None:
    lm = tiny_lm()  # a context of 96 tokens
    with pytest.raises(
        UsageError, match=r"prompt of 90 tokens \+ gen_length 12 exceeds the context of 96; try gen_length 6"
    ):
        run(lm, random_ids(1, 90), gen_length=12, block_length=6)
    with pytest.raises(UsageError, match="shorten the prompt to 84 tokens"):
        run(lm, random_ids(1, 96), gen_length=12, block_length=6)
    with pytest.raises(UsageError, match="block_length 5 does not divide gen_length 12"):
        run(lm, random_ids(1, 4), gen_length=12, block_length=5)
    with pytest.raises(UsageError, match="steps 5 cannot be split over 2 blocks"):
        run(lm, random_ids(1, 4), gen_length=12, block_length=6, steps=5)
