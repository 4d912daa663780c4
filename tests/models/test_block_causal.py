"""Block-causal attention against explicit masks: in the transformer, in transformers' Qwen3, and with a cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.types import CheckpointError
from tests.helpers import left_padded, random_ids, tiny_lm
from tests.models.checkpoints import configure
from tests.models.random_hf import SHAPE

PROMPTS = [random_ids(1, length, seed=length)[0] for length in (14, 9, 2)]


def block_mask(length: int, block: int) -> Tensor:
    """Who sees whom [L, L] bool, position by position."""
    rows = [[key // block <= query // block for key in range(length)] for query in range(length)]
    return torch.tensor(rows)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of fp32 products of other shapes; a wrong mask or position moves logits by tenths."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_one_token_are_causal_and_one_block_is_bidirectional() -> None:
    ids, mask = left_padded(PROMPTS)
    real = mask == 1
    causal, both = tiny_lm("autoregressive"), tiny_lm()
    assert tiny_lm(block_length=3).config.attention == "block_causal"
    for lm, block in ((causal, 1), (both, 14)):
        blocks = tiny_lm(block_length=block)
        blocks.transformer.load_state_dict(lm.transformer.state_dict())
        for attention_mask in (None, mask):
            expected = lm.logits(ids, attention_mask)[real]
            close(blocks.logits(ids, attention_mask)[real], expected)


@pytest.mark.parametrize("block", [2, 3, 4])
def test_a_token_sees_its_block_and_those_before(block: int) -> None:
    lm, ids = tiny_lm(block_length=block, layers=1), random_ids(1, 10)
    plain, seen = lm.logits(ids)[0], block_mask(10, block)
    for key in range(10):
        changed = ids.clone()
        changed[0, key] = (changed[0, key] + 1) % 36
        moved = (lm.logits(changed)[0] != plain).any(-1)
        assert torch.equal(moved, seen[:, key])


@pytest.mark.parametrize("block", [3, 4])
def test_finished_blocks_from_a_cache_equal_recomputing_them(block: int) -> None:
    """Block by block, in chunks of several blocks, and chunks that begin or end inside a block already complete."""
    lm, ids = tiny_lm(block_length=block), random_ids(2, 12)
    whole = lm.logits(ids)
    for cuts in (range(0, 13, block), (0, 2 * block, 12), (0, 12)):
        cache, parts = lm.transformer.new_cache(2, 12), []
        for start, stop in zip(cuts, list(cuts)[1:], strict=False):
            parts.append(lm.transformer(ids[:, start:stop], start=start, cache=cache))
        close(torch.cat(parts, dim=1), whole)
    close(lm.transformer(ids[:, block + 1 : 2 * block], start=block + 1, cache=cache), whole[:, block + 1 : 2 * block])


def test_blocks_of_a_left_padded_row_begin_at_its_first_token() -> None:
    lm = tiny_lm(block_length=4)
    ids, mask = left_padded(PROMPTS)
    batch = lm.logits(ids, mask)
    assert torch.isfinite(batch).all()
    cache = lm.transformer.new_cache(3, 14)
    lm.transformer(ids[:, :10], attention_mask=mask, cache=cache)
    # From canvas position 6 on every row's unfinished blocks are fed once more.
    part = lm.transformer(ids[:, 6:], start=6, attention_mask=mask, cache=cache)
    for row, prompt in enumerate(PROMPTS):
        real = mask[row] == 1
        close(batch[row, real], lm.logits(prompt[None])[0])
        close(part[row, real[6:]], batch[row, 6:][real[6:]])


TIED = {"tie_word_embeddings": True, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


@pytest.fixture(scope="module", params=[("Qwen3", {}), ("Qwen3", TIED), ("Qwen3Moe", EXPERTS)])
def sdar(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ds.LanguageModel]:
    """A random Qwen3 or Qwen3-MoE of transformers, and the same tensors as an SDAR checkpoint loaded here."""
    name, facts = request.param
    options = {**SHAPE, "head_dim": 16, "attn_implementation": "eager", **facts}
    config = getattr(transformers, f"{name}Config")(**options)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in theirs.named_parameters():
        if "experts." in key or "mlp.gate.weight" in key:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if "norm" in key:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("sdar")
    theirs.save_pretrained(folder)
    configure(folder, model_type="sdar_moe" if facts is EXPERTS else "sdar", mask_token_id=95, **facts)
    return theirs, ds.load(str(folder), device="cpu", dtype="float32")


def test_an_sdar_checkpoint_is_a_qwen3_under_a_block_mask(sdar: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = sdar
    name = "SDAR-MoE" if lm.config.experts else "SDAR"
    assert (lm.kind, lm.family, lm.mask_token_id) == ("diffusion", name, 95)
    assert (lm.config.attention, lm.config.block_length) == ("block_causal", 4)
    assert lm.config.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    ids = random_ids(2, 23, vocabulary=95)
    hidden = torch.zeros(23, 23).masked_fill(~block_mask(23, 4), -torch.inf)
    expected = theirs(ids, attention_mask=hidden.expand(2, 1, 23, 23), use_cache=False).logits
    close(lm.logits(ids), expected)


def test_the_config_may_name_its_block_and_must_name_it_well(
    sdar: tuple[Any, ds.LanguageModel], tmp_path: Path
) -> None:
    _, lm = sdar
    shutil.copytree(lm.name, tmp_path, dirs_exist_ok=True)
    configure(tmp_path, block_size=8)
    assert ds.load(str(tmp_path), device="cpu").config.block_length == 8
    configure(tmp_path, block_size=0)
    with pytest.raises(CheckpointError, match="block_size is 0; expected a positive integer"):
        ds.load(str(tmp_path), device="cpu")
