"""Any transformers model: sites found, dense equivalence, masks in the right places, offloading, no trace left."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.types import UnsupportedArchitecture, UsageError
from tests.helpers import GOLDEN, Recorder, left_padded, random_ids
from tests.models.random_hf import CLASSES, MIXTURES, random_model, saved_model

DENSE = [name for name in CLASSES if name not in MIXTURES]
GATED = ("llama", "gemma3", "olmo2", "phi3")
PROMPTS = [random_ids(1, length, seed=length, vocabulary=96).clamp_min(3)[0] for length in (21, 13, 5)]
IDS, MASK = left_padded(PROMPTS, pad=0)


@pytest.fixture(scope="module", params=list(CLASSES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ds.LanguageModel]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = saved_model(request.param, folder)
    return theirs, ds.load(str(folder), device="cpu", engine="transformers")


def test_dense_logits_are_transformers_own_bit_for_bit(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    assert (lm.engine, lm.kind) == ("transformers", "autoregressive")
    ids = IDS[:, -5:]
    assert torch.equal(lm.logits(ids), theirs(ids).logits)
    positions = {"position_ids": (MASK.cumsum(-1) - 1).clamp_min(0)}
    known = positions if "position_ids" in inspect.signature(theirs.forward).parameters else {}
    padded = theirs(IDS, attention_mask=MASK, **known).logits
    assert torch.equal(lm.logits(IDS, MASK)[MASK == 1], padded[MASK == 1])


def test_chosen_rows_alone(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    ids = IDS[:, -5:]
    whole = theirs(ids).logits
    torch.testing.assert_close(lm.transformer(ids, rows=slice(-1, None)), whole[:, -1:])
    flat = torch.tensor([0, 7, 11])
    torch.testing.assert_close(lm.transformer(ids, rows=flat), whole.flatten(0, 1)[flat])


def test_greedy_tokens_are_transformers_own(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    expected = theirs.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False, pad_token_id=2)
    sampler = ds.SamplerConfig(gen_length=12, stop_at_eos=True)
    out = ds.generate(lm, prompt_ids=IDS, attention_mask=MASK, sampler=sampler)
    ended = out.ids.clone()
    for row in ended[:, IDS.shape[1] :]:
        if (row == 2).any():
            row[int((row == 2).int().argmax()) :] = 2
    assert torch.equal(ended[:, : expected.shape[1]], expected[:, : ended.shape[1]])


def test_masks_cost_nothing_at_p_1_and_leave_nothing_behind(pair: tuple[Any, ds.LanguageModel]) -> None:
    _, lm = pair
    dense = lm.logits(IDS, MASK)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.transformer.modules()]
    with ds.sparsify(lm, ds.SparsityConfig(p=1.0)):
        torch.testing.assert_close(lm.logits(IDS, MASK), dense, rtol=1e-5, atol=1e-5)

    def fail() -> None:
        with ds.sparsify(lm, ds.SparsityConfig(p=0.4)):
            assert not torch.allclose(lm.logits(IDS, MASK), dense)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(lm.logits(IDS, MASK), dense)
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.transformer.modules()]
    assert after == hooks


def test_every_parameter_is_counted(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    assert lm.config.parameters == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", DENSE)
def test_masked_inputs_reach_the_projections(name: str) -> None:
    """What the first and the last projection receive is what top-p makes of their dense input, layer by layer."""
    model = random_model(name)
    lm = ds.wrap(model)
    first: dict[int, Tensor] = {}
    last: dict[int, Tensor] = {}
    recorder = Recorder()
    with ds.sparsify(lm, ds.SparsityConfig(p=0.7), observers=(recorder,)):
        # Registered behind ours, so they see what the projections get.
        handles = [
            ffn.root.get_submodule(path).register_forward_pre_hook(
                lambda m, args, into=into, layer=ffn.layer: into.__setitem__(layer, args[0])
            )
            for ffn in lm.transformer.ffns
            for path, into in ((ffn.layout.first, first), (ffn.layout.down, last))
        ]
        lm.logits(IDS)
    for handle in handles:
        handle.remove()
    assert [site[:2] for site, *_ in recorder.masks] == [
        (layer, site) for layer in range(2) for site in ("input", "intermediate")
    ]
    for site, values, keep, _ in recorder.masks:
        assert values.shape[:2] == IDS.shape
        got = (first if site.name == "input" else last)[site.layer].reshape(values.shape)
        assert torch.equal(keep, ds.top_p_mask(values, 0.7))
        assert torch.equal(got, values * keep)


@pytest.mark.parametrize("name", GATED)
def test_gate_and_up_multiply_to_the_intermediate(name: str) -> None:
    lm, seen = ds.wrap(random_model(name)), {}
    for sites in ("gate", "up", "intermediate"):
        recorder = Recorder()
        with ds.sparsify(lm, ds.SparsityConfig(p=0.5, sites=sites), observers=(recorder,), apply=False):
            lm.logits(IDS)
        seen[sites] = recorder.masks[1][1]
    torch.testing.assert_close(seen["gate"] * seen["up"], seen["intermediate"])


@pytest.mark.parametrize("name", ["phi", "gpt_neox", "opt"])
def test_a_plain_mlp_has_two_sites(name: str) -> None:
    lm = ds.wrap(random_model(name))
    with (
        pytest.raises(UsageError, match=r"no site 'gate'.*input, intermediate"),
        ds.sparsify(lm, ds.SparsityConfig(sites="gate")),
    ):
        pass
    assert not lm.transformer.ffns[0].override


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "phi", "gpt_neox", "gpt2", "opt", "olmoe"])
def test_attention_is_masked_where_its_projections_go_by_a_known_name(name: str) -> None:
    lm, recorder = ds.wrap(random_model(name)), Recorder()
    dense = lm.logits(IDS, MASK)
    with ds.sparsify(lm, ds.SparsityConfig(p=0.5, sites="all_linear"), observers=(recorder,)):
        assert not torch.allclose(lm.logits(IDS, MASK), dense)
    attention = [mask for mask in recorder.masks if mask[0].name.startswith("attention")]
    names = [(layer, f"attention_{end}") for layer in range(2) for end in ("input", "output")]
    assert [site[:2] for site, *_ in attention] == names
    assert all(torch.equal(keep, ds.top_p_mask(values, 0.5)) for _, values, keep, _ in attention)
    assert torch.equal(lm.logits(IDS, MASK), dense)


def test_attention_of_another_build_is_refused_and_nothing_left_behind() -> None:
    model = random_model("llama")
    for block in model.model.layers:
        block.self_attn.own_name = block.self_attn.q_proj
        del block.self_attn.q_proj
    lm = ds.wrap(model)
    with (
        pytest.raises(UnsupportedArchitecture, match=r"no attention with projections.*layer 0.*'all_inputs'"),
        ds.sparsify(lm, ds.SparsityConfig(sites="all_linear")),
    ):
        pass
    assert not any(ffn.override for ffn in lm.transformer.ffns)


@pytest.mark.parametrize("sites", ["input", "up", "gate", "intermediate", "all_inputs", "all_linear"])
@pytest.mark.parametrize("options", [{}, {"score": "weighted"}, {"gate_input": "dense"}, {"rule": "top_k", "p": 0.4}])
def test_hooks_and_native_engine_agree_on_llama(sites: Any, options: dict[str, Any]) -> None:
    folder = str(GOLDEN / "llama-tiny")
    native, hooked = (ds.load(folder, device="cpu", engine=engine) for engine in ("native", "transformers"))
    ids = random_ids(2, 40, vocabulary=250)
    config, results, seen = ds.SparsityConfig(**{"p": 0.7, "sites": sites, **options}), [], []
    for lm in (native, hooked):
        recorder = Recorder()
        with ds.sparsify(lm, config, observers=(recorder,)) as handle:
            results.append((lm.logits(ids), handle.sparsity))
        seen.append(recorder.masks)
    assert [mask[0] for mask in seen[0]] == [mask[0] for mask in seen[1]]
    for ours, theirs in zip(*seen, strict=True):
        assert float((ours[2] != theirs[2]).float().mean()) < 1e-3  # near-ties
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-3)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "olmoe"])
def test_offloaded_weights_give_the_same_masks(name: str) -> None:
    from accelerate import cpu_offload

    lm = ds.wrap(random_model(name))
    config = ds.SparsityConfig(p=0.6, score="weighted")
    with ds.sparsify(lm, config) as handle:
        expected, sparsity = lm.logits(IDS, MASK), handle.sparsity
    moved = random_model(name)
    cpu_offload(moved, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in moved.parameters())
    far = ds.wrap(moved)
    with ds.sparsify(far, config) as handle:
        moved_logits = far.logits(IDS, MASK)
    torch.testing.assert_close(moved_logits, expected, rtol=1e-5, atol=1e-5)
    assert handle.sparsity == pytest.approx(sparsity)
    from dllm_sparse.evaluation.fingerprints import model_fingerprint

    assert model_fingerprint(far)["weights_sha256"] == model_fingerprint(lm)["weights_sha256"]


def test_token_reuse_says_that_it_needs_the_native_engine() -> None:
    from dllm_sparse.analysis.token_reuse import TokenReuse
    from dllm_sparse.sparsity.sparsifier import overriding

    with pytest.raises(UsageError, match="native engine"), overriding(ds.wrap(random_model("llama")), TokenReuse(0.1)):
        pass
