"""The cached autoregressive loop against uncached recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm
from tests.samplers.tiny import run

PAD, EOS = 35, 38
PROMPTS = [random_ids(1, length, seed=length, vocabulary=35)[0] for length in (7, 4, 1)]


def uncached(lm: ds.LanguageModel, prompt: Tensor, length: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    """One row, the whole sequence through the model for every token."""
    ids, generator = prompt[None], torch.Generator().manual_seed(seed)
    for _ in range(length):
        logits = lm.logits(ids)[:, -1:]
        if temperature > 0:
            uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
            logits = logits.double().exp() / (-uniform.log()) ** temperature
        ids = torch.cat((ids, logits.argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cached_decoding_is_uncached_decoding(temperature: float, seed: int) -> None:
    lm = tiny_lm("autoregressive", seed=seed)
    for prompt in PROMPTS:
        out = run(lm, prompt[None], gen_length=12, temperature=temperature, seed=seed)
        assert out.ids[0, len(prompt) :].tolist() == uncached(lm, prompt, 12, temperature, seed)
        assert out.forward_passes == 12
        assert out.commit_step.tolist() == [list(range(12))]


@pytest.mark.parametrize("sparsity", [None, "token", "group", "sequence"])
def test_a_left_padded_batch_equals_its_prompts_alone(sparsity: Any) -> None:
    lm = tiny_lm("autoregressive", seed=1)
    config = None if sparsity is None else ds.SparsityConfig(p=0.7, scope=sparsity, group_size=4)
    ids, mask = left_padded(PROMPTS)
    batch = run(lm, ids, mask, gen_length=12, sparsity=config)
    for row, prompt in enumerate(PROMPTS):
        single = run(lm, prompt[None], gen_length=12, sparsity=config)
        assert torch.equal(batch.ids[row, ids.shape[1] :], single.ids[0, len(prompt) :])


def test_finished_rows_are_filled_and_the_loop_ends_with_the_last() -> None:
    lm = tiny_lm("autoregressive", seed=1, pad_token_id=PAD)
    expected = [uncached(lm, prompt, 16) for prompt in PROMPTS]
    # Some token that ends the rows at different times.
    stop = next(
        token for token in range(36) if len({row.index(token) if token in row else -1 for row in expected} - {-1}) == 3
    )
    ids, mask = left_padded(PROMPTS, pad=PAD)
    seen = Recorder()
    out = run(
        lm,
        ids,
        mask,
        gen_length=16,
        eos_token_id=stop,
        stop_at_eos=True,
        observers=[seen],
        sparsity=ds.SparsityConfig(p=1.0),
    )
    ends = [row.index(stop) for row in expected]
    assert out.forward_passes == max(ends) + 1
    assert out.ids.shape[1] == ids.shape[1] + max(ends) + 1
    for row, (tokens, end) in enumerate(zip(expected, ends, strict=True)):
        generated = out.ids[row, ids.shape[1] :].tolist()
        assert generated == tokens[: end + 1] + [PAD] * (max(ends) - end)
        assert out.commit_step[row].tolist() == list(range(end + 1)) + [-1] * (max(ends) - end)
    assert out.generated_tokens == sum(ends)
    # A finished row is padding: neither its class nor the counts take it for text.
    for _, _, _, context in seen.masks:
        if context.step.index > 0:
            kinds = [int(kind) for kind in context.token_class[:, 0]]
            assert kinds == [
                ds.TokenClass.PADDING if context.step.index > end else ds.TokenClass.COMMITTED for end in ends
            ]


def test_without_stop_at_eos_nothing_stops() -> None:
    lm = tiny_lm("autoregressive", seed=1)
    first = uncached(lm, PROMPTS[0], 1)[0]
    out = run(lm, PROMPTS[0][None], gen_length=8, eos_token_id=first)
    assert out.forward_passes == 8
    assert out.ids[0, len(PROMPTS[0]) :].tolist() == uncached(lm, PROMPTS[0], 8)
    assert out.generated_tokens == 0


def test_every_stop_id_of_the_checkpoint_ends_a_row() -> None:
    """Llama 3.1 names three ends of text."""
    tokens = uncached(tiny_lm("autoregressive", seed=1), PROMPTS[0], 8)
    stop = tokens[4]
    lm = tiny_lm("autoregressive", seed=1, stop_token_ids=(stop,))
    out = run(lm, PROMPTS[0][None], gen_length=8, stop_at_eos=True)
    assert out.forward_passes == tokens.index(stop) + 1
    assert out.generated_tokens == tokens.index(stop)


def test_steps_and_classes_of_a_prefill_and_a_decoding_step() -> None:
    lm, seen = tiny_lm("autoregressive"), Recorder()
    ids, mask = left_padded(PROMPTS)
    run(lm, ids, mask, gen_length=4, observers=[seen], sparsity=ds.SparsityConfig())
    assert [step.index for step, _ in seen.steps] == [0, 1, 2, 3]
    assert [result.committed.nonzero()[:, 1].unique().tolist() for _, result in seen.steps] == [
        [ids.shape[1] + number] for number in range(4)
    ]
    prefill = next(context for _, _, _, context in seen.masks if context.step.index == 0)
    assert torch.equal(
        prefill.token_class, torch.where(mask == 1, ds.TokenClass.PROMPT, ds.TokenClass.PADDING).to(torch.int8)
    )
    later = [context for _, _, _, context in seen.masks if context.step.index > 0]
    assert {context.start for context in later} == {ids.shape[1], ids.shape[1] + 1, ids.shape[1] + 2}
    assert all((context.token_class == ds.TokenClass.COMMITTED).all() for context in later)
    _, classes = seen.starts[0]
    assert (classes[:, ids.shape[1] :] == ds.TokenClass.MASKED).all()
