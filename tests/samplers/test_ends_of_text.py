"""Ends of text in the denoising loop: rows that stop at one, and the flags that hold it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_sparse as ds
from tests.helpers import left_padded, tiny_lm
from tests.samplers.plain_llada import plain_llada
from tests.samplers.tiny import EOS, PROMPTS, run


def eos_lover() -> ds.LanguageModel:
    """A model that says EOS at some positions: its head row is another token's, a little longer."""
    lm = tiny_lm(seed=3)
    ids = run(lm, PROMPTS[0][None], gen_length=12, block_length=3).ids[0, len(PROMPTS[0]) :]
    favourite = int(ids[:3].mode().values)
    lm.transformer.head.weight[EOS] = lm.transformer.head.weight[favourite] * 1.01
    return lm


def test_stop_at_eos_leaves_out_the_blocks_behind_it() -> None:
    lm = eos_lover()
    prompt = PROMPTS[0][None]
    values = {"gen_length": 12, "block_length": 3}
    full, stopped = run(lm, prompt, **values), run(lm, prompt, stop_at_eos=True, **values)
    width = prompt.shape[1]
    generated = full.ids[0, width:].tolist()
    assert EOS in generated[:9]
    kept = (generated.index(EOS) // 3 + 1) * 3
    assert stopped.ids[0, width : width + kept].tolist() == generated[:kept]
    assert (stopped.ids[0, width + kept :] == EOS).all()
    assert stopped.forward_passes == kept
    assert (stopped.commit_step[0, kept:] == -1).all()
    assert stopped.generated_tokens == generated.index(EOS)


def test_stop_at_eos_waits_for_every_row() -> None:
    lm = eos_lover()
    ids, mask = left_padded(PROMPTS)
    values = {"gen_length": 12, "block_length": 3}
    ends = []
    for prompt in PROMPTS:
        generated = run(lm, prompt[None], **values).ids[0, len(prompt) :].tolist()
        ends.append(generated.index(EOS) // 3 + 1 if EOS in generated else 4)
    assert run(lm, ids, mask, stop_at_eos=True, **values).forward_passes == 3 * max(ends)


def test_eos_flags() -> None:
    lm = eos_lover()
    prompt, width = PROMPTS[0][None], len(PROMPTS[0])
    values = {"gen_length": 12, "block_length": 3}
    dense = run(lm, prompt, **values).ids[0, width:]
    assert (dense == EOS).any()
    assert not (run(lm, prompt, logits_eos_inf=True, **values).ids[0, width:] == EOS).any()
    assert not torch.equal(run(lm, prompt, confidence_eos_eot_inf=True, **values).ids[0, width:], dense)
    other = int(dense[dense != EOS][0])
    own = run(lm, prompt, logits_eos_inf=True, eos_token_id=other, **values).ids[0, width:]
    assert not (own == other).any()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_confidence_flag_spares_eos_at_a_temperature_as_published(temperature: float, seed: int) -> None:
    lm, prompt = eos_lover(), PROMPTS[0][None]
    values = {"gen_length": 12, "block_length": 12, "temperature": temperature, "seed": seed}
    config = ds.SamplerConfig(confidence_eos_eot_inf=True, logits_eos_inf=False, **values)  # type: ignore[arg-type]
    lm.transformer.head.weight[EOS] *= 1.3
    out = run(lm, prompt, confidence_eos_eot_inf=True, **values)
    ids, when = plain_llada(lm, prompt, torch.ones_like(prompt), config)
    assert torch.equal(out.ids, ids)
    assert torch.equal(out.commit_step, when)
    assert temperature == 0 or (out.ids == EOS).any()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", [{"steps": 8}, {"threshold": 0.3}, {"factor": 1.5}])
def test_stopping_early_changes_no_text_in_a_batch(cache: Any, rule: dict[str, Any]) -> None:
    """A row that ends waits for the others and goes on decoding, but only behind its end-of-text."""
    ended = 0
    for seed in range(4):
        lm = tiny_lm(seed=seed)
        ids, mask = left_padded(PROMPTS)
        values = {"gen_length": 16, "block_length": 4, "cache": cache, "stop_at_eos": True, **rule}
        batch = run(lm, ids, mask, **values)
        for row, prompt in enumerate(PROMPTS):
            alone = run(lm, prompt[None], **values).ids[0, len(prompt) :].tolist()
            stop = alone.index(EOS) + 1 if EOS in alone else len(alone)
            assert batch.ids[row, ids.shape[1] :].tolist()[:stop] == alone[:stop]
            ended += stop < len(alone)
    assert ended  # or the test shows nothing
