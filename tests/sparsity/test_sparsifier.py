"""The sparsifier on a model: identity, what it computes, what it measures, which layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.sparsity.config import IDENTITY
from dllm_sparse.types import UsageError
from tests.helpers import Recorder, random_ids, tiny_lm
from tests.sparsity.sampling import MASK, PROMPT, SITES, decode


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("scope", ["token", "group", "sequence"])
@pytest.mark.parametrize("rule", list(IDENTITY))
def test_the_identity_value_is_dense_bit_for_bit(rule: Any, scope: Any, kind: str) -> None:
    """ReLU: most intermediate values are exact zeros, which a mask counts and must not let harm the identity."""
    lm = tiny_lm(kind, activation="relu")
    dense_logits, dense_ids = lm.logits(PROMPT, MASK), decode(lm, None)
    for sites in SITES:
        for variant in ({}, {"score": "weighted"}, {"refresh_every": 3}, {"gate_input": "dense"}):
            config = ds.SparsityConfig(
                p=IDENTITY[rule],
                rule=rule,
                scope=scope,
                sites=sites,  # type: ignore[arg-type]
                group_size=3,
                **variant,  # type: ignore[arg-type]
            )
            with ds.sparsify(lm, config) as handle:
                assert torch.equal(lm.logits(PROMPT, MASK), dense_logits)
            assert set(handle.sparsity) == {*config.site_names, "mean", "hook_mean"}
            assert torch.equal(decode(lm, config), dense_ids)


def test_the_published_golden_model_is_dense_at_p_1(llada: ds.LanguageModel) -> None:
    ids = random_ids(2, 40, vocabulary=240)
    dense = llada.logits(ids)
    with ds.sparsify(llada, ds.SparsityConfig(p=1.0)):
        assert torch.equal(llada.logits(ids), dense)
    with ds.sparsify(llada, ds.SparsityConfig(p=0.8)):
        assert not torch.equal(llada.logits(ids), dense)


def masked(v: Tensor, p: float, on: bool) -> Tensor:
    return torch.where(ds.top_p_mask(v, p), v, 0) if on else v


@pytest.mark.parametrize("gate_input", ["masked", "dense"])
@pytest.mark.parametrize("sites", SITES)
def test_each_site_masks_what_the_definition_names(sites: Any, gate_input: Any) -> None:
    """input = x after the norm; gate = act(W_g x); up = W_u x; intermediate = gate * up of the masked x.

    With a dense gate input, as in the published LLaDA hook, only W_u sees the masked x.
    """
    lm, p = tiny_lm(), 0.6
    x = torch.randn(2, 5, lm.config.width, generator=torch.Generator().manual_seed(0))
    with ds.sparsify(lm, ds.SparsityConfig(p=p, sites=sites, gate_input=gate_input)):
        got = lm.transformer.ffns[1](x)
    names = ds.SparsityConfig(sites=sites).site_names
    ffn = lm.transformer.ffns[1]
    gate_weight, up_weight = ffn.gate_up_proj.weight.chunk(2)
    inner = masked(x, p, "input" in names)
    gate = masked(
        torch.nn.functional.silu((inner if gate_input == "masked" else x) @ gate_weight.T), p, "gate" in names
    )
    up = masked(inner @ up_weight.T, p, "up" in names)
    hidden = masked(gate * up, p, "intermediate" in names)
    torch.testing.assert_close(got, hidden @ ffn.down_proj.weight.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, ffn(x), rtol=1e-2, atol=1e-2)


def test_attention_projections_read_masked_values_under_all_linear() -> None:
    """One mask at x after the attention's norm, shared by q, k and v, and one at what the heads give."""
    lm, seen, read = tiny_lm(), Recorder(), {}
    attention = lm.transformer.attentions[0]
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, args[0].clone()))
        for name, linear in (("attention_input", attention.qkv_proj), ("attention_output", attention.o_proj))
    ]
    with ds.sparsify(lm, ds.SparsityConfig(p=0.6, sites="all_linear"), observers=[seen]) as handle:
        masked = lm.logits(PROMPT)
    for hook in handles:
        hook.remove()
    names = ["attention_input", "attention_output", "input", "intermediate"]
    assert [site[:2] for site, *_ in seen.masks] == [(layer, name) for layer in (0, 1) for name in names]
    assert [name for name in handle.sparsity if "mean" not in name] == names
    for site, values, keep, _ in seen.masks[:2]:
        assert torch.equal(keep, ds.top_p_mask(values, 0.6))
        assert torch.equal(read[site.name], values * keep)
    x = lm.transformer.blocks[0].attention_norm(lm.transformer.embedding(PROMPT))
    assert torch.equal(seen.masks[0][1], x)
    with ds.sparsify(lm, ds.SparsityConfig(p=0.6)):
        assert not torch.allclose(lm.logits(PROMPT), masked, rtol=1e-2, atol=1e-2)
    assert all(attention.override is None for attention in lm.transformer.attentions)


@pytest.mark.parametrize("sites", SITES)
def test_weighted_scores_use_the_norms_of_the_consuming_matrix(sites: Any) -> None:
    lm, seen = tiny_lm(), Recorder()
    with ds.sparsify(lm, ds.SparsityConfig(p=0.7, sites=sites, score="weighted"), observers=[seen]):
        lm.logits(PROMPT)
    assert seen.masks
    for site, values, keep, _ in seen.masks:
        block = lm.transformer.blocks[site.layer]
        consumers = {
            "attention_input": block.attention.qkv_proj,
            "attention_output": block.attention.o_proj,
            "input": block.ffn.gate_up_proj,
        }
        consumer = consumers.get(site.name, block.ffn.down_proj).weight
        norms = torch.stack([column.norm() for column in consumer.T])
        assert torch.equal(keep, ds.top_p_mask(values.abs() * norms, 0.7))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_measured_sparsity_is_a_recount_of_the_masks(cfg_scale: float) -> None:
    """Padding is never counted; under guidance the unconditional rows are counted as rows of their own."""
    lm, seen = tiny_lm(), Recorder()
    sampler = ds.SamplerConfig(gen_length=8, block_length=4, cfg_scale=cfg_scale)
    out = ds.generate(
        lm,
        prompt_ids=PROMPT,
        attention_mask=MASK,
        sampler=sampler,
        sparsity=ds.SparsityConfig(p=0.6),
        observers=[seen],
    )
    assert out.sparsity is not None
    for name in ("input", "intermediate", None):
        zeros = entries = 0
        for site, _, keep, context in seen.masks:
            if name in (None, site.name):
                assert context.guided == (cfg_scale > 0)
                assert len(keep) == (4 if context.guided else 2)
                counted = keep[context.token_class != ds.TokenClass.PADDING]
                zeros, entries = zeros + int((~counted).sum()), entries + counted.numel()
        assert out.sparsity[name or "mean"] == pytest.approx(zeros / entries, abs=1e-12)
    assert out.sparsity_report["sparsity"] == out.sparsity


def test_masks_can_be_watched_without_being_applied() -> None:
    lm, seen = tiny_lm(), Recorder()
    dense = lm.logits(PROMPT)
    with ds.sparsify(lm, ds.SparsityConfig(p=0.5), observers=[seen], apply=False) as handle:
        assert torch.equal(lm.logits(PROMPT), dense)
    assert all(torch.equal(keep, ds.top_p_mask(values, 0.5)) for _, values, keep, _ in seen.masks)
    assert 0.3 < handle.sparsity["mean"] < 0.9


def test_observers_change_nothing() -> None:
    lm = tiny_lm()
    for config in (None, ds.SparsityConfig(p=0.5)):
        assert torch.equal(decode(lm, config, observers=[Recorder(), Recorder()]), decode(lm, config))


def test_each_layer_may_have_its_own_p() -> None:
    lm, recorder = tiny_lm(), Recorder()
    with ds.sparsify(lm, ds.SparsityConfig(layer_p=(1.0, 0.3)), observers=(recorder,)):
        lm.logits(PROMPT, MASK)
    for site, values, keep, _ in recorder.masks:
        assert torch.equal(keep, ds.top_p_mask(values, (1.0, 0.3)[site.layer]))


def test_chosen_layers_alone_are_masked_and_counted() -> None:
    lm = tiny_lm()
    with ds.sparsify(lm, ds.SparsityConfig(p=0.3, layers=(1,))) as handle:
        chosen = lm.logits(PROMPT, MASK)
    assert {row["layer"] for row in handle.counts.to_dict()["by_layer"]} == {1}
    with ds.sparsify(lm, ds.SparsityConfig(layer_p=(1.0, 0.3))):
        assert torch.equal(lm.logits(PROMPT, MASK), chosen)


@pytest.mark.parametrize(("values", "words"), [({"layers": (2,)}, "0 to 1"), ({"layer_p": (0.5,)}, "has 2 layers")])
def test_layers_the_model_does_not_have(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words), ds.sparsify(tiny_lm(), ds.SparsityConfig(**values)):
        pass
