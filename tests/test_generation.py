"""`generate`: what it accepts, what it refuses, what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse import generation
from dllm_sparse.types import UsageError
from tests.helpers import left_padded, random_ids, tiny_lm

SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4)
IDS = random_ids(1, 5)


@pytest.fixture(scope="module", params=["toy", "toy_ar"])
def speaking(request: pytest.FixtureRequest) -> ds.LanguageModel:
    """A model with a tokenizer, of either kind."""
    folder: Path = request.getfixturevalue(request.param)
    return ds.load(str(folder), device="cpu")


def test_texts_of_different_length_in_one_batch(speaking: ds.LanguageModel) -> None:
    prompts = ["once upon a time", "cat", "a dog"]
    batch = ds.generate(speaking, prompts, sampler=SAMPLER)
    assert batch.prompt_length == len(prompts[0])
    assert batch.ids.shape == (3, len(prompts[0]) + 8)
    for row, prompt in enumerate(prompts):
        alone = ds.generate(speaking, prompt, sampler=SAMPLER)
        assert batch.texts[row] == alone.texts[0]
        assert torch.equal(batch.ids[row, -8 - len(prompt) :], alone.ids[0])
        assert (batch.ids[row, : batch.prompt_length - len(prompt)] == speaking.config.pad_token_id).all()


def test_text_and_ids_are_the_same_prompt(speaking: ds.LanguageModel) -> None:
    ids, mask = left_padded([torch.tensor([0, 1, 2]), torch.tensor([3])], pad=speaking.config.pad_token_id or 0)
    by_ids = ds.generate(speaking, prompt_ids=ids, attention_mask=mask, sampler=SAMPLER)
    by_lists = ds.generate(speaking, prompt_ids=ids.tolist(), attention_mask=mask.tolist(), sampler=SAMPLER)
    by_text = ds.generate(speaking, ["abc", "d"], sampler=SAMPLER)
    assert torch.equal(by_ids.ids, by_text.ids)
    assert torch.equal(by_lists.ids, by_text.ids)
    assert by_ids.texts == by_text.texts


def test_the_same_seed_gives_the_same_ids(speaking: ds.LanguageModel) -> None:
    runs = [
        ds.generate(speaking, "abc", sampler=ds.SamplerConfig(gen_length=8, block_length=4, temperature=1.0, seed=seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0].ids, runs[1].ids)
    assert not torch.equal(runs[0].ids, runs[2].ids)


def test_results_are_json_and_ordinary_tensors(speaking: ds.LanguageModel) -> None:
    out = ds.generate(speaking, "abc", sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.7))
    value = json.loads(json.dumps(out.to_dict(), allow_nan=False))
    assert value["ids"] == out.ids.tolist()
    assert value["sparsity"] == out.sparsity
    assert value["sparsity_report"]["average"] == "element"
    assert value["forward_passes"] == 8
    out.ids[0, 0] = 1
    out.commit_step[0, 0] = 1
    assert ds.generate(speaking, "abc", sampler=SAMPLER).sparsity is None


def test_dense_generation_inside_a_sparsify_block_is_sparse(speaking: ds.LanguageModel) -> None:
    config = ds.SparsityConfig(p=0.4)
    expected = ds.generate(speaking, "abc", sampler=SAMPLER, sparsity=config)
    with ds.sparsify(speaking, config) as handle:
        inside = ds.generate(speaking, "abc", sampler=SAMPLER)
        assert torch.equal(inside.ids, expected.ids)
        assert handle.sparsity == expected.sparsity


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either prompts or prompt_ids"),
        ({"prompts": "a", "prompt_ids": [[1]]}, "either prompts or prompt_ids"),
        ({"prompts": "a"}, "tiny has no tokenizer; give prompt_ids"),
        ({"prompt_ids": [1, 2]}, r"must be \[B, P\].*\[2\]"),
        ({"prompt_ids": [[]]}, r"must be \[B, P\]"),
        ({"prompt_ids": [[40]]}, "prompt_ids: there is no token 40; tiny has 0 to 39"),
        ({"prompt_ids": [[-1]]}, "prompt_ids: there is no token -1"),
        ({"prompt_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask is \[1, 1\], prompt_ids \[1, 2\]"),
        ({"prompt_ids": [[1, 2]], "attention_mask": [[1, 0]]}, "left padding"),
        ({"prompt_ids": [[1, 2]], "attention_mask": [[0, 2]]}, "left padding"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    for kind in ("diffusion", "autoregressive"):
        with pytest.raises(UsageError, match=message):
            ds.generate(tiny_lm(kind), sampler=SAMPLER, **values)


@pytest.mark.parametrize("options", [{"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}, {}])
@pytest.mark.parametrize("name", ["eos_token_id", "eot_token_id"])
@pytest.mark.parametrize("token", [9999, -1])
def test_ends_of_text_that_are_no_tokens_are_refused(options: dict[str, Any], name: str, token: int) -> None:
    sampler = ds.SamplerConfig(gen_length=4, block_length=4, **{name: token}, **options)
    for kind in ("diffusion", "autoregressive"):
        with pytest.raises(UsageError, match=rf"{name}: there is no token {token}; tiny has 0 to 39"):
            ds.generate(tiny_lm(kind), prompt_ids=[[1, 2]], sampler=sampler)


def test_prompts_that_are_empty(toy: Path) -> None:
    lm = ds.load(str(toy), device="cpu")
    with pytest.raises(UsageError, match="no prompt was given"):
        ds.generate(lm, [], sampler=SAMPLER)
    assert lm.config.bos_token_id is not None
    assert ds.generate(lm, "", sampler=SAMPLER).ids[0, 0] == lm.config.bos_token_id
    object.__setattr__(lm.config, "bos_token_id", None)
    for prompts in ([""], ["abc", ""]):
        with pytest.raises(UsageError, match="a prompt is empty"):
            ds.generate(lm, prompts, sampler=SAMPLER)


def test_rows_are_never_padded_with_the_mask_token(toy: Path) -> None:
    lm = ds.load(str(toy), device="cpu")
    usual = ds.generate(lm, ["abc", "de"], sampler=SAMPLER)
    object.__setattr__(lm.config, "pad_token_id", lm.mask_token_id)
    again = ds.generate(lm, ["abc", "de"], sampler=SAMPLER)
    assert again.texts == usual.texts
    object.__setattr__(lm.config, "eos_token_id", lm.mask_token_id)
    assert generation.left_padded(lm, [[5, 6], [7]])[0].tolist() == [[5, 6], [0, 7]]


def test_options_of_the_other_kind_of_prompt_are_refused(toy: Path) -> None:
    lm = ds.load(str(toy), device="cpu")
    with pytest.raises(UsageError, match="attention_mask goes with prompt_ids"):
        ds.generate(lm, ["abc"], attention_mask=[[1, 1, 1]], sampler=SAMPLER)
    with pytest.raises(UsageError, match="a chat template is for texts"):
        ds.generate(lm, prompt_ids=[[1, 2]], chat=True, sampler=SAMPLER)


def test_ids_among_texts_are_refused(toy: Path) -> None:
    with pytest.raises(UsageError, match="give rows of token ids as prompt_ids"):
        ds.generate(ds.load(str(toy), device="cpu"), [[1, 2]], sampler=SAMPLER)  # type: ignore[list-item]


def test_chat_needs_a_template(toy: Path, toy_chat: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        ds.generate(ds.load(str(toy), device="cpu"), "abc", sampler=SAMPLER, chat=True)
    lm = ds.load(str(toy_chat), device="cpu")
    assert ds.generate(lm, "abc", sampler=SAMPLER, chat=True).ids[0, :6].tolist() == [248, 0, 1, 2, 251, 248]


def test_a_given_end_of_text_stands_for_the_models_own(toy: Path) -> None:
    lm, given = ds.load(str(toy), device="cpu"), ds.SamplerConfig(eos_token_id=6)
    own = lm.config.eos_token_id
    assert own not in (None, 6)
    assert generation.before_end(lm, [5, own, 6, 7], ds.SamplerConfig()) == [5]
    assert generation.before_end(lm, [5, own, 6, 7], given) == [5, own]
    assert generation.before_end(lm, [5, 7], given) == [5, 7]
