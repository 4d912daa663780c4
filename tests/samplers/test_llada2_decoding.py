"""LLaDA2's decoding on a checkpoint in its layout: cached blocks against the plain model recomputed at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from tests.families import write_checkpoint
from tests.helpers import Recorder, left_padded, random_ids
from tests.layouts import Checkpoint, llada2
from tests.models import plain_moe
from tests.samplers.plain_blocks import recompute

MASK, EOS, BLOCK = 250, 249, 4
PROMPTS = [random_ids(1, length, seed=length, vocabulary=240)[0] for length in (9, 4, 3)]


def quiet_head(**changes: Any) -> Checkpoint:
    """A checkpoint whose logits are 3 times a random one's, the mask token's never the largest."""
    config, tensors = llada2(block_size=BLOCK, num_hidden_layers=2, **changes)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 3
    tensors["lm_head.weight"][MASK] = 0.0
    return config, tensors


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return quiet_head()


@pytest.fixture(scope="module")
def lm(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ds.LanguageModel:
    return ds.load(str(write_checkpoint(tmp_path_factory.mktemp("llada2"), *checkpoint)), device="cpu")


def decode(lm: ds.LanguageModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> ds.Generation:
    observers = options.pop("observers", ())
    sampler = ds.SamplerConfig(**options)
    return ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, observers=observers)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPTS[0], {"gen_length": 7, "threshold": 0.3}),
        (PROMPTS[1], {"gen_length": 8, "threshold": 0.3, "editing_threshold": 0.2, "max_post_steps": 2}),
        (PROMPTS[2], {"gen_length": 5, "steps": 4, "minimal_topk": 2}),
    ],
)
def test_cached_blocks_equal_the_plain_model_recomputed(
    prompt: Tensor, options: dict[str, Any], lm: ds.LanguageModel, checkpoint: Checkpoint
) -> None:
    """The two sides share the schedule alone: here loops over experts and explicit masks, no cache, no batch."""
    config, tensors = checkpoint
    out = decode(lm, prompt[None], **options)
    sampler = ds.SamplerConfig(**options)
    ids, forwards = recompute(
        lambda ids: plain_moe.llada2_logits(ids, tensors, config), prompt, sampler, BLOCK, MASK, EOS
    )
    assert torch.equal(out.ids[0], ids)
    assert out.forward_passes == forwards


RULES: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.4},
    {"threshold": 0.4, "editing_threshold": 0.3},
    {"threshold": 0.4, "minimal_topk": 2, "stop_at_eos": True},
)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_its_prompts_recomputed_alone(rule: dict[str, Any], lm: ds.LanguageModel) -> None:
    ids, mask = left_padded(PROMPTS, pad=EOS)
    out = decode(lm, ids, mask, gen_length=10, **rule)
    sampler = ds.SamplerConfig(gen_length=10, **rule)
    for row, prompt in enumerate(PROMPTS):
        expected, _ = recompute(lambda ids: lm.logits(ids[None])[0], prompt, sampler, BLOCK, MASK, EOS)
        assert torch.equal(out.ids[row, ids.shape[1] :], expected[len(prompt) :])


def test_editing_rewrites_decoded_tokens_of_the_block_alone(lm: ds.LanguageModel) -> None:
    seen, prompt = Recorder(), PROMPTS[0]
    options = {"gen_length": 11, "threshold": 0.2}
    kept = decode(lm, prompt[None], **options)
    edited = decode(lm, prompt[None], editing_threshold=0.15, observers=[seen], **options)
    assert not torch.equal(kept.ids, edited.ids)
    assert torch.equal(edited.ids[0, :9], prompt)
    times = torch.stack([result.committed[0] for _, result in seen.steps]).sum(0)
    assert (times[:9] == 0).all()
    assert int(times.max()) > 1
    for step, result in seen.steps:  # the first block begins at position 8
        inside = torch.arange(len(times)) // BLOCK == 2 + step.block
        assert not bool((result.committed[0] & ~inside).any())


def test_an_end_of_text_ends_the_generation_after_its_block(tmp_path: Path) -> None:
    """The head is turned towards EOS: it comes in the first block, and nothing is decoded behind that."""
    config, tensors = quiet_head()
    tensors["lm_head.weight"][EOS] = tensors["lm_head.weight"][17] * 2
    lm = ds.load(str(write_checkpoint(tmp_path, config, tensors)), device="cpu")
    for seed in range(8):
        prompt = random_ids(1, 8, seed=seed, vocabulary=240)
        whole = decode(lm, prompt, gen_length=16)
        first = (whole.ids[0, 8:] == EOS).nonzero()
        if len(first) and int(first[0]) < 8:
            break
    stopped = decode(lm, prompt, gen_length=16, stop_at_eos=True)
    block = int(first[0]) // BLOCK + 1
    assert torch.equal(stopped.ids[0, : 8 + block * BLOCK], whole.ids[0, : 8 + block * BLOCK])
    assert (stopped.ids[0, 8 + block * BLOCK :] == EOS).all()
    assert stopped.forward_passes == 1 + block * BLOCK + block - 1 < whole.forward_passes


def test_what_the_config_says_is_what_the_loop_uses(lm: ds.LanguageModel) -> None:
    """Steps and blocks are the model's own: 4 steps a block where none are asked for, never LLaDA's 32."""
    out = decode(lm, PROMPTS[1][None], gen_length=6)
    assert out.forward_passes == 1 + 4 + 1 + 4
    assert out.ids.shape == (1, 10)
