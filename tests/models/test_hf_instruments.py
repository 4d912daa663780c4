"""Every instrument through the transformers engine: where both engines can run a checkpoint, they report the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dllm_sparse as ds
from dllm_sparse.evaluation.batches import Batch, score
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.plans import plan
from dllm_sparse.evaluation.requests import Pair
from dllm_sparse.evaluation.scorer import Request, Scorer
from tests.evaluation.conftest import llama_folder, task_folder  # noqa: F401 (fixtures)
from tests.helpers import random_ids
from tests.models.random_hf import CLASSES, SHAPE, random_model, saved_model

PROMPTS = [random_ids(1, length, seed=length, vocabulary=90)[0].clamp_min(3).tolist() for length in (12, 7)]


@pytest.fixture(scope="module")
def engines(llama_folder: Path) -> dict[str, ds.LanguageModel]:  # noqa: F811
    """The golden Llama checkpoint with its tokenizer, in both engines."""
    return {
        engine: ds.load(str(llama_folder), device="cpu", engine=engine)  # type: ignore[arg-type]
        for engine in ("native", "transformers")
    }


def test_critical_sparsity_is_the_same(engines: dict[str, ds.LanguageModel], task_folder: Path) -> None:  # noqa: F811
    tasks = [str(task_folder / f"{name}.yaml") for name in ("choice", "rolling", "written")]
    found = {
        name: ds.critical_sparsity(lm, tasks, ["all_inputs", "gate"], grid=(0.9, 0.6), resamples=100)
        for name, lm in engines.items()
    }
    for ours, theirs in zip(found["native"].rows(), found["transformers"].rows(), strict=True):
        assert ours["dense_score"] == pytest.approx(theirs["dense_score"], rel=1e-4)
        assert ours["element_crossing"] == pytest.approx(theirs["element_crossing"], abs=2e-5)
        assert ours["hook_mean_crossing"] == pytest.approx(theirs["hook_mean_crossing"], abs=2e-5)


def test_both_compute_and_count_the_same_tokens(engines: dict[str, ds.LanguageModel]) -> None:
    requests = [Request("loglikelihood", (context, ending)) for context in ("A fox", "Q:") for ending in (" a", " xy")]
    counted = []
    for lm in engines.values():
        scorer = Scorer(lm)
        answers, measured = scorer.run(scorer.prepare(requests), ds.SparsityConfig(p=0.7, backend="reference"))
        counted.append((measured.counts.summary(), [value for value, _ in answers]))
    (our_sparsity, our_values), (their_sparsity, their_values) = counted
    assert our_sparsity == pytest.approx(their_sparsity, abs=1e-6)
    assert our_values == pytest.approx(their_values, rel=1e-4)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_shared_prompt_changes_no_likelihood(name: str) -> None:
    lm = ds.wrap(random_model(name, **({"sliding_window": 8} if name == "gemma3" else {})))
    pairs = [Pair(tuple(prompt), tuple(ids)) for prompt in PROMPTS for ids in (PROMPTS[1][:4], PROMPTS[0][3:9])]
    assert lm.transformer.shares_prefixes
    plans = [plan(lm, pairs, ScoringOptions(), share_prompts=share) for share in (False, True)]
    assert [batch.prefixes is not None for batches in plans for batch in batches] == [False, True]
    with ds.sparsify(lm, ds.SparsityConfig(p=0.8)):
        alone, shared = (score(lm, batch) for batches in plans for batch in batches)
    torch.testing.assert_close(
        _by_owner(plans[1][0], shared[0]), _by_owner(plans[0][0], alone[0]), rtol=1e-4, atol=1e-3
    )


def _by_owner(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    return values[batch.owners.argsort()]


def test_recurrent_states_are_not_shared() -> None:
    config = transformers.Qwen3NextConfig(
        **{**SHAPE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "linear_num_value_heads": 2},
        **{"shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        linear_value_head_dim=8,
    )
    assert not ds.wrap(transformers.Qwen3NextForCausalLM(config).eval()).transformer.shares_prefixes


def test_drift_and_reuse_are_the_same(engines: dict[str, ds.LanguageModel], tmp_path: Path) -> None:
    sampler, config, reports = ds.SamplerConfig(gen_length=6), ds.SparsityConfig(p=0.8), {}
    for name, lm in engines.items():
        reports[name] = ds.drift_report(lm, PROMPTS, sampler, config, tmp_path / name, apply=False, reuse=2)
    native, hooked = (reports[name]["variants"][0] for name in ("native", "transformers"))
    assert native["measured_sparsity"] == pytest.approx(hooked["measured_sparsity"], abs=2e-3)
    for ours, theirs in zip(native["curves"], hooked["curves"], strict=True):
        assert ours["jaccard_overall"]["micro"] == pytest.approx(theirs["jaccard_overall"]["micro"], abs=0.02)
    for ours, theirs in zip(reports["native"]["reuse"], reports["transformers"]["reuse"], strict=True):
        assert ours["variant"] == theirs["variant"]
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.05, abs=1e-3)


def test_comparison_of_two_engines_finds_no_difference(
    engines: dict[str, ds.LanguageModel],
    task_folder: Path,  # noqa: F811
) -> None:
    lm = engines["transformers"]
    twin = ds.wrap(lm.transformer.model, lm.tokenizer, name="again")
    result = ds.compare(models=[lm, twin], tasks=[str(task_folder / "rolling.yaml")], grid=(0.9, 0.6), resamples=100)
    first, second = result.rows()
    assert first["element_crossing"] == second["element_crossing"]


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "gemma3"])
def test_generation_under_a_schedule_and_a_group_scope(name: str) -> None:
    lm = ds.wrap(random_model(name))
    for options in ({"schedule": ((0.0, 1.0), (1.0, 0.4))}, {"scope": "group", "group_size": 4}, {"refresh_every": 3}):
        config = ds.SparsityConfig(p=0.6, **options)  # type: ignore[arg-type]
        out = ds.generate(lm, prompt_ids=[PROMPTS[0]], sampler=ds.SamplerConfig(gen_length=8), sparsity=config)
        assert out.forward_passes == 8
        assert out.sparsity is not None
        assert 0.05 < out.sparsity["mean"] < 0.95


def test_steps_are_never_captured_as_graphs() -> None:
    lm = ds.wrap(random_model("llama"))
    sampler = ds.SamplerConfig(gen_length=16, execution="graph")
    with pytest.raises(ds.types.UsageError, match="runs through transformers"):
        ds.generate(lm, prompt_ids=[PROMPTS[0]], sampler=sampler)


def test_log_likelihoods_are_those_of_transformers() -> None:
    model = random_model("olmo2")
    prompt, target = torch.tensor(PROMPTS[0]), torch.tensor(PROMPTS[1])
    logits = model(torch.cat((prompt, target))[None]).logits[0, len(prompt) - 1 : -1]
    expected = float(logits.log_softmax(-1).gather(-1, target[:, None]).sum())
    assert ds.log_likelihood(ds.wrap(model), prompt, target) == pytest.approx(expected, rel=1e-5)


def test_the_command_line_says_where_the_ffns_are(tmp_path: Path, capsys: Any) -> None:
    from tests.helpers import call_cli, write_toy_tokenizer

    saved_model("gpt_neox", tmp_path, vocab_size=256)
    write_toy_tokenizer(tmp_path)
    capsys.readouterr()
    code = call_cli("generate", "--model", str(tmp_path), "--prompt", "abc", "--gen-length", "4", "--json")
    assert code == 0
    assert json.loads(capsys.readouterr().out)
    code = call_cli("generate", "--model", str(tmp_path), "--prompt", "abc", "--gen-length", "4", "--engine", "native")
    assert code == 1
    assert "gpt_neox" in capsys.readouterr().err
    assert call_cli("generate", "--model", str(tmp_path), "--prompt", "abc", "--gen-length", "4") == 0
    assert "through transformers: gpt_neox.layers, 2 of 2 layers: plain MLP" in capsys.readouterr().err
