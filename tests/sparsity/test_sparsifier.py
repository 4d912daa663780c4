"""The sparsifier on a model: identity, what it computes, what it leaves behind, and how it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.sparsity.config import IDENTITY
from dllm_sparse.types import BackendUnavailable, NonFiniteActivations, UsageError
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm

SITES = ("input", "up", "gate", "intermediate", "all_inputs", "all_linear")
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4, steps=4)
PROMPT, MASK = left_padded([random_ids(1, 5, seed=1)[0], random_ids(1, 3, seed=2)[0]])


def decode(lm: ds.LanguageModel, config: ds.SparsityConfig | None, observers: Any = ()) -> Tensor:
    return ds.generate(
        lm, prompt_ids=PROMPT, attention_mask=MASK, sampler=SAMPLER, sparsity=config, observers=observers
    ).ids


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


def test_masks_are_recomputed_at_every_step_from_that_step() -> None:
    lm, seen = tiny_lm(), Recorder()
    schedule = ((0.0, 0.3), (1.0, 0.9))
    decode(lm, ds.SparsityConfig(schedule=schedule), observers=[seen])
    config = ds.SparsityConfig(schedule=schedule)
    assert [context.step.index for _, _, _, context in seen.masks] == [step for step in range(4) for _ in range(4)]
    for _, values, keep, context in seen.masks:
        assert torch.equal(keep, ds.top_p_mask(values, config.p_at(context.step.index / 3)))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("scope", ["token", "group"])
def test_reused_masks_are_those_of_the_same_positions(cache: Any, scope: Any) -> None:
    """Brute force: a dictionary from absolute position to the mask that was last computed there."""
    lm, seen = tiny_lm(), Recorder()
    sampler = ds.SamplerConfig(gen_length=12, block_length=4, cache=cache)
    config = ds.SparsityConfig(p=0.6, refresh_every=3, scope=scope, group_size=2)
    ds.generate(lm, prompt_ids=PROMPT, sampler=sampler, sparsity=config, observers=[seen])
    known: dict[tuple[ds.Site, int], Tensor] = {}
    reused = 0
    for site, values, keep, context in seen.masks:
        if context.step.index % 3 == 0:
            if scope == "token":
                assert torch.equal(keep, ds.top_p_mask(values, 0.6))
            for token in range(keep.shape[1]):
                known[site, context.start + token] = keep[:, token]
        else:
            for token in range(keep.shape[1]):
                assert torch.equal(keep[:, token], known[site, context.start + token])
                reused += 1
    assert reused


def test_an_autoregressive_step_reuses_the_mask_of_the_last_refresh() -> None:
    lm, seen = tiny_lm("autoregressive"), Recorder()
    config = ds.SparsityConfig(p=0.6, refresh_every=3)
    ds.generate(lm, prompt_ids=PROMPT, sampler=ds.SamplerConfig(gen_length=8), sparsity=config, observers=[seen])
    last: dict[ds.Site, Tensor] = {}
    for site, values, keep, context in seen.masks:
        if context.step.index % 3 == 0:
            assert torch.equal(keep, ds.top_p_mask(values, 0.6))
            last[site] = keep[:, -1:]
        else:
            assert torch.equal(keep, last[site])


def test_a_new_canvas_does_not_reuse_old_masks() -> None:
    lm, config = tiny_lm(), ds.SparsityConfig(p=0.5, refresh_every=4)
    expected = decode(lm, config)
    with ds.sparsify(lm, config) as handle:
        for seed in (7, 8):  # another prompt of the same shape first
            other = random_ids(2, 5, seed=seed)
            ds.generate(lm, prompt_ids=other, sampler=SAMPLER, observers=[handle])
        got = ds.generate(lm, prompt_ids=PROMPT, attention_mask=MASK, sampler=SAMPLER, observers=[handle]).ids
    assert torch.equal(got, expected)


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


class Broken(Recorder):
    """An observer that fails at its third mask, in the middle of a forward."""

    def on_mask(self, *offered: Any) -> None:
        super().on_mask(*offered)
        if len(self.masks) == 3:
            raise KeyboardInterrupt


class Fragile(FeedForward):
    """A layer that cannot be sparsified."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "override" and value is not None:
            raise RuntimeError("no")
        super().__setattr__(name, value)


def attributes(lm: ds.LanguageModel) -> list[dict[str, Any]]:
    """Everything every module holds, besides its parameters and children."""
    return [
        {key: value for key, value in vars(module).items() if not isinstance(value, Tensor)}
        for module in lm.transformer.modules()
    ]


def test_nothing_is_left_behind() -> None:
    lm = tiny_lm()
    before, dense = attributes(lm), lm.logits(PROMPT)
    config = ds.SparsityConfig(p=0.5)

    def is_clean() -> bool:
        return attributes(lm) == before and torch.equal(lm.logits(PROMPT), dense)

    with ds.sparsify(lm, config):
        assert not is_clean()
    assert is_clean()
    with pytest.raises(ZeroDivisionError), ds.sparsify(lm, config):
        raise ZeroDivisionError
    assert is_clean()
    with pytest.raises(KeyboardInterrupt):
        decode(lm, config, observers=[Broken()])
    assert is_clean()
    with pytest.raises(UsageError, match="gen_length"):
        ds.generate(lm, prompt_ids=PROMPT, sampler=ds.SamplerConfig(gen_length=512), sparsity=config)
    assert is_clean()


def test_nothing_is_left_behind_when_entering_fails_half_way() -> None:
    lm = tiny_lm()
    lm.transformer.blocks[1].ffn = Fragile(lm.config, 1)
    with pytest.raises(RuntimeError, match="no"), ds.sparsify(lm, ds.SparsityConfig()):
        pytest.fail("the block must not run")
    assert all(ffn.override is None for ffn in lm.transformer.ffns)


def test_nested_blocks_are_refused_and_sequential_ones_fine() -> None:
    lm, config = tiny_lm(), ds.SparsityConfig(p=0.5)
    with ds.sparsify(lm, config):
        first = lm.logits(PROMPT)
        with pytest.raises(UsageError, match="already sparsified"), ds.sparsify(lm, config):
            pytest.fail("the inner block must not run")
        with pytest.raises(UsageError, match="already sparsified"):
            decode(lm, config)
        assert torch.equal(lm.logits(PROMPT), first)
    with ds.sparsify(lm, config):
        assert torch.equal(lm.logits(PROMPT), first)


def test_nan_weights_are_reported_with_layer_site_and_step() -> None:
    for weight, sites, message in (
        ("blocks.1.ffn.gate_up_proj.weight", "all_inputs", "layer 1, site intermediate, step 0"),
        ("blocks.0.ffn.down_proj.weight", "all_inputs", "layer 1, site input, step 0"),
        ("blocks.1.ffn.gate_up_proj.weight", "gate", "layer 1, site gate, step 0"),
        ("blocks.0.attention_norm.weight", "all_linear", "layer 0, site attention_input, step 0"),
        ("blocks.1.attention.qkv_proj.weight", "all_linear", "layer 1, site attention_output, step 0"),
    ):
        for scope in ("token", "group", "sequence"):
            for p in (0.5, 1.0):
                lm = tiny_lm()
                lm.transformer.get_parameter(weight).view(-1)[0] = torch.nan
                config = ds.SparsityConfig(p=p, sites=sites, scope=scope)  # type: ignore[arg-type]
                with pytest.raises(NonFiniteActivations, match=message):
                    decode(lm, config)


@pytest.mark.parametrize("p", [None, 0.5])
def test_nan_that_appears_later_is_reported_with_its_step(p: float | None) -> None:
    """The tokens committed first get a NaN embedding, so that step 1 is the first to see it."""
    message = "logits at step 1" if p is None else "layer 0, site input, step 1"
    config = None if p is None else ds.SparsityConfig(p=p)
    lm, seen = tiny_lm(seed=2), Recorder()
    decode(lm, config, observers=[seen])
    committed = seen.steps[0][1].ids[seen.steps[0][1].committed]
    assert not torch.isin(committed, PROMPT).any()
    lm.transformer.embedding.weight[committed] = torch.nan
    with pytest.raises(NonFiniteActivations, match=message):
        decode(lm, config)


def test_an_explicit_gpu_backend_is_refused_on_the_cpu() -> None:
    lm = tiny_lm()
    with pytest.raises(BackendUnavailable, match="needs a CUDA GPU"):
        decode(lm, ds.SparsityConfig(backend="triton"))
    assert all(ffn.override is None for ffn in lm.transformer.ffns)
    with ds.sparsify(lm, ds.SparsityConfig(backend="auto")) as handle:
        assert handle.backend == "reference"


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


def test_the_cpu_backend_decodes_what_masking_decodes() -> None:
    lm, prompt = tiny_lm("autoregressive"), random_ids(2, 5)
    sampler = ds.SamplerConfig(gen_length=8)
    plain = ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=ds.SparsityConfig(p=0.5, backend="reference"))
    skipping = ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=ds.SparsityConfig(p=0.5, backend="cpu"))
    assert torch.equal(plain.ids, skipping.ids)
    assert plain.sparsity == skipping.sparsity
    assert (plain.sparsity_report["backend"], skipping.sparsity_report["backend"]) == ("reference", "cpu")
    weight = lm.transformer.ffns[0].gate_up_proj.weight
    assert weight.t().is_contiguous()  # stored by input, values as they were
    assert torch.equal(weight, tiny_lm("autoregressive").transformer.ffns[0].gate_up_proj.weight)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("facts", [{}, {"mlp_bias": True, "qkv_bias": True, "output_bias": True}])
def test_the_cpu_backend_computes_what_masking_computes(sites: str, facts: dict[str, Any]) -> None:
    lm = tiny_lm("autoregressive", **facts)
    for gate_input in ("masked", "dense"):
        options = {"p": 0.6, "sites": sites, "gate_input": gate_input}
        found = []
        for backend in ("reference", "cpu"):
            with ds.sparsify(lm, ds.SparsityConfig(**options, backend=backend)) as handle:
                found.append(lm.logits(random_ids(1, 3)))
                assert handle.backend == backend
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("facts", [{}, {"mlp_bias": True}])
def test_a_masked_gate_decides_which_up_and_down_weights_are_read(facts: dict[str, Any]) -> None:
    lm, recorder = tiny_lm("autoregressive", **facts), Recorder()
    config = ds.SparsityConfig(p=0.5, sites="gate", backend="cpu")
    with ds.sparsify(lm, config, observers=[recorder]):
        expected = lm.logits(random_ids(1, 3))
    for site, _, keep, _ in recorder.masks:
        ffn, dropped = lm.transformer.ffns[site.layer], ~keep.flatten(0, -2).any(0)
        assert dropped.any()
        ffn.halves()[1][0][dropped] = torch.nan
        ffn.down_proj.weight[:, dropped] = torch.nan
    with ds.sparsify(lm, config):
        assert torch.equal(lm.logits(random_ids(1, 3)), expected)


def test_p_1_is_bitwise_dense_on_every_backend() -> None:
    lm = tiny_lm("autoregressive")
    for _ in range(2):  # with weights stored as loaded, then by input
        dense = lm.logits(random_ids(1, 3))
        for backend in ("auto", "cpu"):
            with ds.sparsify(lm, ds.SparsityConfig(p=1.0, backend=backend)):
                assert torch.equal(lm.logits(random_ids(1, 3)), dense)
        with ds.sparsify(lm, ds.SparsityConfig(p=0.5, backend="cpu")):
            lm.logits(random_ids(1, 3))


def test_auto_skips_where_it_pays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_sparse.kernels.dispatch.CPU_CALL_SECONDS", 0.0)
    lm = tiny_lm("autoregressive")
    for p, tokens, name in ((0.999, 1, "reference"), (0.1, 1, "cpu"), (0.1, 5, "reference")):
        with ds.sparsify(lm, ds.SparsityConfig(p=p, backend="auto")) as handle:
            lm.logits(random_ids(1, tokens))
        assert handle.backend == name


def test_an_explicit_backend_is_refused_where_transformers_runs_the_model() -> None:
    lm = ds.load("tiny-ar", device="cpu", engine="transformers")
    with (
        pytest.raises(BackendUnavailable, match="needs the native engine"),
        ds.sparsify(lm, ds.SparsityConfig(backend="cpu")),
    ):
        pass
    with ds.sparsify(lm, ds.SparsityConfig(p=0.5)) as handle:
        lm.logits(random_ids(1, 1))
    assert handle.backend == "reference"
