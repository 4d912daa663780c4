"""Running scoring and decoding jobs, dense or sparsified, and what was measured meanwhile.

Every job has its own counts, merged in job order: the sums (of floats too) are then the same however the jobs were
spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dllm_sparse.analysis.exploitable import UnionCounter, shares
from dllm_sparse.evaluation.batches import Batch, score
from dllm_sparse.evaluation.processes import Processes
from dllm_sparse.models.finite import locating, not_finite_logits
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.loops import decode
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.sparsity.gains import ffn_gain
from dllm_sparse.sparsity.sparsifier import sparsify
from dllm_sparse.types import Observer

Advance = Callable[[float], None]
"""Told the share of the jobs that is done, in [0, 1]."""


class Job(Protocol):
    """A piece of work whose result does not depend on any other."""

    def run(self, lm: LanguageModel, observers: Sequence[Observer]) -> tuple[Tensor, ...]:
        """Does it; tensors may stay on the model's device."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One batch's likelihoods: (values [R] float64, all-greedy [R] bool)."""

    batch: Batch
    cfg_scale: float

    def run(self, lm: LanguageModel, observers: Sequence[Observer]) -> tuple[Tensor, ...]:
        """One forward, two where prompts are shared."""
        return score(lm, self.batch.to(lm.device), self.cfg_scale)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One batch of generations: ids [B, new tokens]. Prompts [B, P] are left-padded."""

    prompts: Tensor
    mask: Tensor | None
    sampler: SamplerConfig

    def run(self, lm: LanguageModel, observers: Sequence[Observer]) -> tuple[Tensor, ...]:
        """The model's own loop, layer by layer: hardly two batches have one shape, so captured steps would not pay."""
        decoded = decode(lm, self.prompts, self.mask, replace(self.sampler, execution="eager"), observers)
        return (decoded.ids[:, self.prompts.shape[1] :],)


@dataclass(slots=True)
class Measured:
    """Sparsity seen while jobs ran; merges exactly, in the order it is merged."""

    counts: SparsityCounts = field(default_factory=SparsityCounts)
    unions: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def merge(self, other: Measured) -> None:
        """Adds another measurement."""
        self.counts.merge(other.counts)
        for key, (kept, channels) in other.unions.items():
            before = self.unions.get(key, (0, 0))
            self.unions[key] = (before[0] + kept, before[1] + channels)

    def to_dict(self) -> dict[str, Any]:
        """Sparsity per site under both averages, per layer and token class, and what hardware could skip."""
        report = self.counts.to_dict()
        skippable = {"1": {k: v for k, v in report["sparsity"].items() if k not in ("mean", "hook_mean")}}
        skippable.update(shares(self.unions))
        return {
            "sparsity": report["sparsity"],
            "exploitable": {group: {"sites": sites, **ffn_gain(sites)} for group, sites in skippable.items()},
            "by_layer": report["by_layer"],
            "by_token_class": report["by_token_class"],
        }


def run_jobs(
    lm: LanguageModel,
    jobs: Sequence[Job],
    sparsity: SparsityConfig | None,
    processes: Processes,
    advance: Advance | None = None,
) -> tuple[list[tuple[Tensor, ...]], Measured]:
    """Results of all jobs in order, on the CPU, and the merged measurement, in every process."""
    own = processes.mine(len(jobs))
    finished: list[tuple[tuple[Tensor, ...], SparsityCounts, UnionCounter]] = []
    for done, number in enumerate(own, start=1):
        finished.append(_run_one(lm, jobs[number], sparsity))
        if advance is not None:
            advance(done / len(own))
    # One transfer at the end: nothing above waits for the GPU.
    home = (
        (number, (tuple(part.cpu() for part in result), Measured(counts.to("cpu"), unions.totals())))
        for number, (result, counts, unions) in zip(own, finished, strict=True)
    )
    answers = processes.collect(home)
    total = Measured()
    for _, measured in answers:
        total.merge(measured)
    return [result for result, _ in answers], total


def check_scores(
    lm: LanguageModel,
    jobs: Sequence[ScoreJob],
    results: Sequence[tuple[Tensor, ...]],
    sparsity: SparsityConfig | None,
) -> None:
    """Raises NonFiniteActivations where a likelihood is not finite: NaN or Inf in the model, or a probability of 0."""
    for job, (values, _) in zip(jobs, results, strict=True):
        if not bool(torch.isfinite(values).all()):
            masks = nullcontext() if sparsity is None else sparsify(lm, sparsity)
            with masks, locating(lm.transformer, partial(job.run, lm, ())):
                raise not_finite_logits(0)


@torch.inference_mode()
def _run_one(
    lm: LanguageModel, job: Job, sparsity: SparsityConfig | None
) -> tuple[tuple[Tensor, ...], SparsityCounts, UnionCounter]:
    unions = UnionCounter()
    if sparsity is None:
        return job.run(lm, ()), SparsityCounts(), unions
    with sparsify(lm, sparsity, (unions,)) as handle:
        result = job.run(lm, (handle,))
    return result, handle.counts, unions
