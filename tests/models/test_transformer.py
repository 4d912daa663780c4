"""Properties of the one transformer: caches, slices, padding, precision, taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sparse.kernels.reference import rotate
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.rope import rope_tables
from tests.helpers import left_padded, random_ids, tiny_lm

PROMPTS = [random_ids(1, length, seed=length)[0] for length in (14, 9, 2)]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 4},
    {"kv_heads": 1, "qkv_bias": True},
    {"qk_norm": True, "head_dim": 8},
    {"tied": True, "activation": "gelu_tanh", "output_bias": True, "mlp_bias": True},
]


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of fp32 products of other shapes; a wrong mask or position moves logits by tenths."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def new_cache(lm: LanguageModel, rows: int, length: int) -> KVCache:
    return KVCache(lm.config, rows, length, lm.device, lm.dtype)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("facts", VARIANTS)
def test_parameters_are_counted(kind: str, facts: dict[str, Any]) -> None:
    lm = tiny_lm(kind, **facts)
    assert lm.config.parameters == sum(parameter.numel() for parameter in lm.transformer.parameters())


@pytest.mark.parametrize("facts", VARIANTS)
@pytest.mark.parametrize("chunks", [(14,), (1,) * 14, (5, 9), (9, 1, 4)])
def test_a_causal_model_in_cached_chunks_equals_the_whole(facts: dict[str, Any], chunks: tuple[int, ...]) -> None:
    lm, ids = tiny_lm("autoregressive", **facts), random_ids(3, 14)
    cache, parts, start = new_cache(lm, 3, 14), [], 0
    for size in chunks:
        parts.append(lm.transformer(ids[:, start : start + size], start=start, cache=cache))
        start += size
    close(torch.cat(parts, dim=1), lm.logits(ids))


def test_cached_chunks_of_a_left_padded_batch_equal_the_whole() -> None:
    lm = tiny_lm("autoregressive")
    ids, mask = left_padded(PROMPTS)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, parts = new_cache(lm, 3, 14), []
    for start, stop in ((0, 6), (6, 7), (7, 14)):
        parts.append(
            lm.transformer(
                ids[:, start:stop],
                start=start,
                attention_mask=mask[:, :stop],
                positions=positions[:, start:stop],
                cache=cache,
            )
        )
    close(torch.cat(parts, dim=1)[mask == 1], lm.logits(ids, mask)[mask == 1])


@pytest.mark.parametrize("facts", VARIANTS)
def test_a_bidirectional_slice_against_a_full_cache_equals_the_whole(facts: dict[str, Any]) -> None:
    """Nothing changed since the cache was filled, so the slice must see exactly what the whole saw."""
    lm = tiny_lm(**facts)
    ids, mask = left_padded(PROMPTS)
    for attention_mask in (None, mask):
        cache = new_cache(lm, 3, 14)
        whole = lm.transformer(ids, attention_mask=attention_mask, cache=cache)
        assert torch.equal(whole, lm.transformer(ids, attention_mask=attention_mask))
        for start, stop in ((0, 14), (5, 9), (13, 14), (6, 14)):
            part = lm.transformer(ids[:, start:stop], start=start, attention_mask=attention_mask, cache=cache)
            real = slice(None) if attention_mask is None else mask[:, start:stop] == 1
            close(part[real], whole[:, start:stop][real])


def test_a_cached_slice_sees_its_new_keys_and_the_old_ones_of_the_rest() -> None:
    """Dual cache: the slice replaces its own keys; what lies around keeps the state of the full forward."""
    lm, old, new = tiny_lm(layers=1), random_ids(1, 10, seed=1), random_ids(1, 10, seed=2)
    cache = new_cache(lm, 1, 10)
    lm.transformer(old, cache=cache)
    part = lm.transformer(new[:, 4:7], start=4, cache=cache)
    # With one layer, keys depend on the embedding alone: old and new tokens side by side are the same keys.
    mixed = torch.cat((old[:, :4], new[:, 4:7], old[:, 7:]), dim=1)
    close(part, lm.logits(mixed)[:, 4:7])


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_asking_for_some_rows_gives_those_rows(kind: str) -> None:
    lm, ids = tiny_lm(kind), random_ids(2, 11)
    whole = lm.logits(ids)
    for rows in (slice(-1, None), slice(3, 7), slice(None)):
        close(lm.transformer(ids, rows=rows), whole[:, rows])
    flat = torch.tensor([0, 10, 11, 21, 4])
    close(lm.transformer(ids, rows=flat), whole.flatten(0, 1)[flat])


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_padding_is_never_seen(kind: str) -> None:
    lm = tiny_lm(kind)
    ids, mask = left_padded(PROMPTS)
    batch = lm.logits(ids, mask)
    assert torch.isfinite(batch).all()
    for row, prompt in enumerate(PROMPTS):
        close(batch[row, mask[row] == 1], lm.logits(prompt[None])[0])
    other = torch.where(mask == 1, ids, 7)
    assert torch.equal(lm.logits(other, mask)[mask == 1], batch[mask == 1])
    assert torch.equal(lm.logits(ids, torch.ones_like(ids)), lm.logits(ids))


def test_causal_looks_back_only_and_bidirectional_both_ways() -> None:
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 36
    causal, both = tiny_lm("autoregressive"), tiny_lm()
    assert torch.equal(causal.logits(ids)[:, :6], causal.logits(changed)[:, :6])
    assert not torch.equal(both.logits(ids)[:, :6], both.logits(changed)[:, :6])


def test_rotary_embedding_keeps_its_precision_in_bf16() -> None:
    lm = tiny_lm(head_dim=16)
    frequencies = lm.transformer.frequencies.clone()
    lm.transformer.to(torch.bfloat16)
    assert lm.logits(random_ids(1, 4)).dtype == torch.bfloat16
    assert lm.transformer.frequencies.dtype == torch.float32
    assert torch.equal(lm.transformer.frequencies, frequencies)
    cos, sin = rope_tables(frequencies, torch.arange(4000, 4008))
    x = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).to(torch.bfloat16))
    # A rotation keeps lengths, and depends on differences of positions alone.
    wide = x.float()
    close(rotate(wide, cos, sin).norm(dim=-1), wide.norm(dim=-1))
    shifted = rope_tables(frequencies, torch.arange(8))
    products = [rotate(wide, *tables) @ rotate(wide, *tables).mT for tables in ((cos, sin), shifted)]
    torch.testing.assert_close(*products, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_the_tapped_ffn_is_the_dense_ffn_with_four_sites(activation: Any) -> None:
    lm = tiny_lm(activation=activation)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[str, Tensor]] = []

    def tap(site: str, values: Tensor) -> Tensor:
        seen.append((site, values))
        return values

    ffn = lm.transformer.ffns[0]
    assert torch.equal(ffn.tapped(x, tap), ffn(x))
    values = dict(seen)
    assert [site for site, _ in seen] == ["input", "gate", "up", "intermediate"]
    assert torch.equal(values["input"], x)
    assert torch.equal(values["intermediate"], values["gate"] * values["up"])
    assert values["up"].shape == (2, 3, lm.config.ffn_width)
    close(values["intermediate"] @ ffn.down_proj.weight.T, ffn(x))
