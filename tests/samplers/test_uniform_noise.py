"""DiffusionGemma through transformers' own loop: same ids, and what observers and the sparsifier see of it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.samplers.loops import fitted
from dllm_sparse.types import NonFiniteActivations, TokenClass, UsageError
from tests.helpers import Recorder, left_padded, random_ids
from tests.models.random_hf import random_denoiser

PROMPTS = [random_ids(1, length, seed=length, vocabulary=90).clamp_min(3)[0] for length in (11, 6)]
IDS, MASK = left_padded(PROMPTS, pad=0)
SAMPLER = ds.SamplerConfig(gen_length=16, seed=3)


@pytest.fixture
def lm() -> ds.LanguageModel:
    return ds.wrap(random_denoiser())


def theirs(lm: ds.LanguageModel, ids: Tensor = IDS, mask: Tensor | None = MASK, **options: Any) -> Tensor:
    """transformers' own generation with the seed of SAMPLER."""
    torch.manual_seed(3)
    given = {} if mask is None else {"attention_mask": mask}
    return lm.transformer.model.generate(ids, max_new_tokens=16, **given, **options).sequences


def spied_on(lm: ds.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What transformers' sampler accepted at every step."""
    seen: list[Tensor] = []
    prepare = lm.transformer.model._prepare_sampler

    def prepared(config: Any) -> Any:
        sampler = prepare(config)
        accept = sampler.accept_canvas

        def accepting(*arguments: Any) -> Tensor:
            canvas = accept(*arguments)
            seen.append(sampler.accepted_token_mask.clone())
            return canvas

        sampler.accept_canvas = accepting
        return sampler

    monkeypatch.setattr(lm.transformer.model, "_prepare_sampler", prepared)
    return seen


def test_ids_are_transformers_own_dense_and_at_p_1(lm: ds.LanguageModel) -> None:
    assert (lm.kind, lm.noise, lm.mask_token_id, lm.engine) == ("diffusion", "uniform", None, "transformers")
    expected = theirs(lm)
    state = torch.get_rng_state()
    dense = ds.generate(lm, prompt_ids=IDS, attention_mask=MASK, sampler=SAMPLER)
    full = ds.generate(lm, prompt_ids=IDS, attention_mask=MASK, sampler=SAMPLER, sparsity=ds.SparsityConfig(p=1.0))
    assert torch.equal(dense.ids, expected)
    assert torch.equal(full.ids, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert dense.forward_passes == 2 * (1 + 6)  # two canvases: the encoder once, then six steps
    assert torch.equal(ds.generate(lm, prompt_ids=IDS[:1], sampler=SAMPLER).ids, theirs(lm, IDS[:1], None))
    masked = ds.generate(lm, prompt_ids=IDS, attention_mask=MASK, sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.6))
    assert not torch.equal(masked.ids, expected)
    sampler = ds.SamplerConfig(gen_length=16, seed=3, steps=4)
    assert torch.equal(ds.generate(lm, prompt_ids=IDS, attention_mask=MASK, sampler=sampler).ids[:, 11:19],
                       theirs(lm, max_denoising_steps=2)[:, 11:19])  # fmt: skip


def test_logits_are_transformers_own_and_p_1_is_bitwise_dense(lm: ds.LanguageModel) -> None:
    canvas = random_ids(2, 5, seed=9, vocabulary=90)
    bos = torch.full((2, 1), 1)
    expected = lm.transformer.model(input_ids=bos, decoder_input_ids=canvas).logits
    assert torch.equal(lm.logits(canvas), expected)
    assert torch.equal(lm.transformer(canvas, rows=torch.tensor([0, 7])), expected.flatten(0, 1)[[0, 7]])
    with ds.sparsify(lm, ds.SparsityConfig(p=1.0)) as handle:
        assert torch.equal(lm.logits(canvas), expected)
    routed = [row["tokens"] for row in handle.counts.by_expert() if (row["layer"], row["site"]) == (0, "input")]
    assert sum(routed) == 2 * 5 * 2  # two experts a token; the BOS before the canvas is not counted


def test_masks_are_recomputed_at_every_step_of_every_canvas(lm: ds.LanguageModel) -> None:
    seen = Recorder()
    ds.generate(lm, prompt_ids=IDS[:1], sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.6), observers=(seen,))
    for layer in (0, 1):
        for name in ("input", "intermediate"):
            here = [(keep, context) for site, _, keep, context in seen.masks if site == (layer, name, -1)]
            canvas = [(keep, context) for keep, context in here if context.start >= 11 and keep.shape[1] == 8]
            steps = [context.step for _, context in canvas]
            assert [step.index for step in steps] == [*range(6), 6, *range(6, 12)]  # step 6 begins with the encoder
            assert {step.total for step in steps} == {12}
            denoised = [keep for keep, context in canvas if not (context.step.index == 6 and context.start == 11)]
            assert all(not torch.equal(before, after) for before, after in pairwise(denoised))


def test_counts_equal_those_of_independent_hooks(lm: ds.LanguageModel) -> None:
    """Entries and zeros of layer 1: what the dense projections receive, and every expert's values computed anew."""
    model = lm.transformer.model.model
    zeros, entries, routed = Counter(), Counter(), torch.zeros(6, dtype=torch.int64)

    def count(name: str, values: Tensor) -> None:
        zeros[name] += int((values == 0).sum())
        entries[name] += values.numel()

    def experts(module: Any, args: Any) -> None:
        for x, chosen in zip(args[0], args[1].tolist(), strict=True):
            for expert in chosen:
                routed[expert] += 1
                v = x * ds.top_p_mask(x, 0.6)
                gate, up = (module.gate_up_proj[expert] @ v).chunk(2)
                hidden = module.act_fn(gate) * up
                count("input", v)
                count("intermediate", hidden * ds.top_p_mask(hidden, 0.6))

    with ds.sparsify(lm, ds.SparsityConfig(p=0.6)) as handle:
        for layers in (model.encoder.language_model.layers, model.decoder.layers):
            layers[1].mlp.gate_proj.register_forward_pre_hook(lambda m, args: count("input", args[0]))
            layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: count("intermediate", args[0]))
            layers[1].experts.register_forward_pre_hook(experts)
        ds.generate(lm, prompt_ids=IDS[:1], sampler=SAMPLER, observers=(handle,))
    tokens = 11 + 8 + 12 * 8
    assert entries == {"input": tokens * 32 * 3, "intermediate": tokens * (48 + 2 * 24)}
    found = {row["site"]: row["sparsity"] for row in handle.counts.to_dict()["by_layer"] if row["layer"] == 1}
    assert found == pytest.approx({name: zeros[name] / entries[name] for name in entries}, abs=1e-3)  # near-ties
    rows = [row for row in handle.counts.by_expert() if (row["layer"], row["site"]) == (1, "input")]
    assert [row["tokens"] for row in rows] == [number for number in routed.tolist() if number]


def test_classes_follow_what_the_sampler_accepted(lm: ds.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted, seen = spied_on(lm, monkeypatch), Recorder()
    run = {"prompt_ids": IDS, "attention_mask": MASK, "sampler": SAMPLER}
    out = ds.generate(lm, **run, sparsity=ds.SparsityConfig(p=1.0), observers=(seen,))
    contexts = [context for site, _, _, context in seen.masks if site == (0, "input", -1)]
    prompt, *rest = contexts
    assert (prompt.start, prompt.step.index) == (0, 0)
    assert torch.equal(prompt.token_class == TokenClass.PADDING, MASK == 0)
    again = rest.pop(6)
    assert (again.start, again.step.index, again.step.block) == (11, 6, 1)
    assert bool((again.token_class == TokenClass.DECODED).all())
    none, commits = torch.zeros_like(accepted[0]), torch.full((2, 16), -1)
    for index, (context, now) in enumerate(zip(rest, accepted, strict=True)):
        before = none if index % 6 == 0 else accepted[index - 1]
        earlier = none if index % 6 < 2 else accepted[index - 2]
        expected = torch.where(before, torch.where(earlier, TokenClass.DECODED, TokenClass.COMMITTED), 2)
        assert torch.equal(context.token_class.long(), expected)
        step, result = seen.steps[index]
        assert step == context.step
        fresh = (now if index % 6 < 5 else torch.ones_like(now)) & ~before
        assert torch.equal(result.committed[:, context.start : context.start + 8], fresh)
        commits[:, context.start - 11 : context.start - 3][fresh] = index
    assert torch.equal(seen.steps[-1][1].ids, out.ids)
    assert torch.equal(out.commit_step, commits)
    assert bool((commits >= 0).all())
    ids, classes = seen.starts[0]
    assert ids.shape == classes.shape == (2, 27)


def test_rows_that_ended_are_counted_no_longer(lm: ds.LanguageModel) -> None:
    first = theirs(lm)[0, 11:19]
    eos = int(first[-2])  # row 0 ends in its first canvas
    run = {
        "prompt_ids": IDS,
        "attention_mask": MASK,
        "sampler": ds.SamplerConfig(gen_length=24, seed=3, eos_token_id=eos),
    }
    torch.manual_seed(3)
    expected = lm.transformer.model.generate(IDS, attention_mask=MASK, max_new_tokens=24, eos_token_id=eos).sequences
    seen = Recorder()
    out = ds.generate(lm, **run, sparsity=ds.SparsityConfig(p=1.0), observers=(seen,))
    assert torch.equal(out.ids, expected)
    for site, _, _, context in seen.masks:
        if site != (0, "input", -1) or context.step.block == 0:
            continue
        row = context.token_class[0]
        if context.start == 11:  # the encoder reads the canvas that holds the end
            place = int((first == eos).int().argmax())
            assert row.tolist() == [TokenClass.DECODED] * (place + 1) + [TokenClass.PADDING] * (7 - place)
        else:
            assert bool((row == TokenClass.PADDING).all())


def test_rows_that_converged_wait_uncounted(lm: ds.LanguageModel) -> None:
    lm.transformer.model.generation_config.update(stability_threshold=0, confidence_threshold=2.0)
    seen, run = Recorder(), {"prompt_ids": IDS, "attention_mask": MASK, "sampler": SAMPLER}
    out = ds.generate(lm, **run, sparsity=ds.SparsityConfig(p=1.0), observers=(seen,))
    assert torch.equal(out.ids, theirs(lm))
    canvases = [context for site, _, _, context in seen.masks if site == (0, "input", -1) and context.start > 0]
    waiting = [(context.token_class == TokenClass.PADDING).all(1).tolist() for context in canvases]
    assert [True, False] in waiting or [False, True] in waiting
    assert bool((out.commit_step >= 0).all())


@pytest.mark.parametrize(
    "options",
    [{"cfg_scale": 1.0}, {"temperature": 0.5}, {"cache": "dual"}, {"threshold": 0.9}, {"remasking": "random"},
     {"execution": "graph"}, {"block_length": 4}, {"steps": 5}],
)  # fmt: skip
def test_options_of_other_samplers_are_refused(lm: ds.LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        ds.generate(lm, prompt_ids=IDS, sampler=ds.SamplerConfig(gen_length=16, **options))


def test_lengths_are_whole_canvases_and_steps_the_checkpoints_own(lm: ds.LanguageModel) -> None:
    config = fitted(lm, ds.SamplerConfig(gen_length=9))
    assert (config.gen_length, config.block_length, config.steps) == (16, 8, 12)
    assert fitted(lm, config) == config
    with pytest.raises(UsageError, match="context of 128"):
        ds.generate(lm, prompt_ids=IDS, sampler=ds.SamplerConfig(gen_length=121))


def test_nothing_is_left_behind_and_bad_values_are_named(lm: ds.LanguageModel) -> None:
    model = lm.transformer.model
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    model.model.decoder.norm.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteActivations, match="logits at step 0"):
        ds.generate(lm, prompt_ids=IDS, sampler=SAMPLER)
    model.model.decoder.layers[1].mlp.up_proj.weight.data[0] = torch.nan  # the encoder's, too
    with pytest.raises(NonFiniteActivations, match="layer 1, site intermediate, step 0"):
        ds.generate(lm, prompt_ids=IDS, sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.8))
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert after == hooks
    assert "_denoising_step" not in vars(model)
    assert model.config.text_config._experts_implementation != "dllm_sparse"
    assert lm.transformer.context is None


def test_attention_inputs_are_masked_in_encoder_and_decoder(lm: ds.LanguageModel) -> None:
    seen, config = Recorder(), ds.SparsityConfig(p=0.7, sites="all_linear")
    out = ds.generate(lm, prompt_ids=IDS[:1], sampler=SAMPLER, sparsity=config, observers=(seen,))
    assert out.sparsity is not None
    assert min(out.sparsity["attention_input"], out.sparsity["attention_output"]) > 0.1
    starts = {context.start for site, _, _, context in seen.masks if site == (1, "attention_input", -1)}
    assert starts == {0, 11, 19}
