"""The same seed gives the same results, whatever the batch size and whoever watches: fp32, CPU, prompts of a length.

Over the number of processes: `evaluation/test_sweep.py`. What may change a result is in docs/determinism.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.report.workload import Workload
from dllm_sparse.types import Observer
from tests.evaluation.conftest import ar, diffusion, llada_folder, llama_folder, task_folder  # noqa: F401 (fixtures)
from tests.helpers import Recorder, random_ids

SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4)
PROMPTS = random_ids(6, 5, seed=3, vocabulary=200)
SPARSE = (None, ds.SparsityConfig(p=0.8), ds.SparsityConfig(p=0.5, sites="all_linear"))


@pytest.fixture(params=["llada", "llama", "dream"])
def lm(request: pytest.FixtureRequest) -> ds.LanguageModel:
    """A golden model of each kind of decoding."""
    return request.getfixturevalue(request.param)


def decoded(lm: ds.LanguageModel, rows: int, sparsity: ds.SparsityConfig | None, **options: Any) -> torch.Tensor:
    """All prompts, so many at a time."""
    sampler = ds.SamplerConfig(**{"gen_length": 8, "block_length": 4, **options})
    parts = PROMPTS.split(rows)
    return torch.cat([ds.generate(lm, prompt_ids=part, sampler=sampler, sparsity=sparsity).ids for part in parts])


@pytest.mark.parametrize("sparsity", SPARSE, ids=["dense", "p=0.8", "p=0.5"])
def test_tokens_do_not_depend_on_the_batch_size(lm: ds.LanguageModel, sparsity: ds.SparsityConfig | None) -> None:
    whole = decoded(lm, 6, sparsity)
    for rows in (1, 4):
        assert torch.equal(decoded(lm, rows, sparsity), whole)


def test_random_tokens_depend_on_seed_and_batch_alone(llada: ds.LanguageModel) -> None:
    """As in the reference programs, noise is drawn for a whole batch: the rows of another batch get other numbers."""
    options = {"temperature": 1.0, "seed": 3}
    assert torch.equal(decoded(llada, 6, None, **options), decoded(llada, 6, None, **options))
    assert not torch.equal(decoded(llada, 1, None, **options), decoded(llada, 6, None, **options))


@pytest.mark.parametrize("sparsity", SPARSE, ids=["dense", "p=0.8", "p=0.5"])
def test_observers_change_nothing(lm: ds.LanguageModel, sparsity: ds.SparsityConfig | None) -> None:
    options: dict[str, Any] = {"prompt_ids": PROMPTS, "sampler": SAMPLER, "sparsity": sparsity}
    alone = ds.generate(lm, **options)
    for observers in ((Observer(),), (Recorder(), Recorder())):
        watched = ds.generate(lm, **options, observers=observers)
        assert torch.equal(watched.ids, alone.ids)
        assert (watched.forward_passes, watched.sparsity) == (alone.forward_passes, alone.sparsity)


def test_a_drift_report_does_not_depend_on_batch_size_or_observers(lm: ds.LanguageModel) -> None:
    def report(batch_size: int, *observers: Observer) -> dict[str, Any]:
        rule = ds.SparsityConfig(p=0.7)
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "observers": observers,
            "snapshot_every": 2,
            "deltas": (2,),
        }
        found = dict(ds.drift_report(lm, PROMPTS.tolist(), SAMPLER, rule, **options))
        found["config"] = {name: value for name, value in found["config"].items() if name != "batch_size"}
        return {name: value for name, value in found.items() if name not in ("date", "seconds")}

    whole = report(6)
    assert report(6, Recorder()) == whole
    assert report(4) == whole


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_scores_and_sparsities_do_not_depend_on_how_requests_are_batched(
    request: pytest.FixtureRequest,
    task_folder: Any,  # noqa: F811
    kind: str,
) -> None:
    """All but what is by definition about forwards: the mean over hooks, and what tokens of one forward share."""
    tasks = [str(task_folder / f"{name}.yaml") for name in ("choice", "rolling", "written")]

    def swept(batch_tokens: int) -> list[Any]:
        workload = Workload.load(tasks, limit=3, scoring=ScoringOptions(mc_num=4, batch_tokens=batch_tokens))
        lm = request.getfixturevalue(kind)
        result = ds.critical_sparsity(lm, workload, sites=["all_inputs"], grid=[0.6], resamples=100)
        found = result.to_dict()["results"]["all_inputs"]["tasks"]
        points = [
            (name, point["p"], point["score"], point["element"], point["kept"], point["kept_interval"])
            for name, task in found.items()
            for point in task["points"]
        ]
        return [*points, *(task["critical"]["element"] for task in found.values())]

    assert swept(200) == swept(5000)
