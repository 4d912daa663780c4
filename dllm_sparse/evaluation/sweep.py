"""Evaluating points: one model, one task, one sparsity setting at a time, each stored when it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dllm_sparse.analysis.bootstrap import ItemValues
from dllm_sparse.evaluation.fingerprints import code_fingerprint, model_fingerprint, versions
from dllm_sparse.evaluation.items import EvaluationTask
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.processes import Processes
from dllm_sparse.evaluation.scorer import Prepared, Scorer
from dllm_sparse.evaluation.store import PointStore
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.sparsity.config import IDENTITY, SparsityConfig


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How one task is answered. `sampler` None: the length each generation request asks for."""

    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    sampler: SamplerConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, without what decides no result."""
        return {
            "scoring": self.scoring.identity(),
            "sampler": None if self.sampler is None else self.sampler.to_dict(),
        }


class Watcher(Protocol):
    """Told how a run proceeds."""

    def planned(self, points: int) -> None:
        """So many points are to be done in all; may be corrected later."""
        ...

    def started(self, title: str) -> None:
        """A point begins."""
        ...

    def advanced(self, share: float) -> None:
        """This share of the current point is done."""
        ...

    def finished(self, *, reused: bool) -> None:
        """The point is done, or was found in the store."""
        ...


class Silent:
    """A watcher that does nothing."""

    def planned(self, points: int) -> None:
        """Ignored."""

    def started(self, title: str) -> None:
        """Ignored."""

    def advanced(self, share: float) -> None:
        """Ignored."""

    def finished(self, *, reused: bool) -> None:
        """Ignored."""


class Sweep:
    """One model and its tasks, ready to be evaluated at any setting. Requests are prepared on first need."""

    def __init__(
        self,
        lm: LanguageModel,
        tasks: Sequence[EvaluationTask],
        *,
        settings: Mapping[str, TaskSettings] | None = None,
        store: PointStore | None = None,
        processes: Processes | None = None,
        watcher: Watcher | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        self.lm, self.tasks = lm, list(tasks)
        self.store = store or PointStore(None)
        self.processes = processes or Processes()
        self.watcher: Watcher = watcher or Silent()
        self.settings = {task.name: (settings or {}).get(task.name, TaskSettings()) for task in tasks}
        self._scorers = {
            name: Scorer(lm, setting.scoring, setting.sampler, self.processes)
            for name, setting in self.settings.items()
        }
        self._prepared: dict[str, Prepared] = {}
        self._model = model or model_fingerprint(lm)
        self._tasks = {task.name: task.fingerprint() for task in tasks}

    def with_seed(self, seed: int) -> Sweep:
        """The same sweep under another seed of the likelihood estimate."""
        settings = {
            name: replace(setting, scoring=replace(setting.scoring, seed=seed))
            for name, setting in self.settings.items()
        }
        return Sweep(
            self.lm,
            self.tasks,
            settings=settings,
            store=self.store,
            processes=self.processes,
            watcher=self.watcher,
            model=self._model,
        )

    @property
    def model(self) -> dict[str, Any]:
        """The model's fingerprint."""
        return self._model

    def identity(self, task: EvaluationTask, config: SparsityConfig) -> dict[str, Any]:
        """Everything a point depends on."""
        return {
            "model": self._model,
            "task": {"name": task.name, "sha256": self._tasks[task.name], "items": task.items, "metric": task.metric},
            **self.settings[task.name].to_dict(),
            "sparsity": config.to_dict(),
            "code_sha256": code_fingerprint(),
            "versions": {name: value for name, value in versions().items() if name != "python"},
        }

    def point(self, task: EvaluationTask, config: SparsityConfig) -> dict[str, Any]:
        """The evaluated point, from the store where it is there: p, score, item values, sparsity, exploitable."""
        identity = self.identity(task, config)
        self.watcher.started(f"{Path(self.lm.name).name}: {task.name} {config.sites} p={config.p:g}")
        stored = self.processes.agree(self.store.get(identity) if self.processes.first else None)
        if stored is None:
            stored = self._evaluate(task, config)
            # Only the first process writes; the others keep the point in memory.
            store = self.store if self.processes.first else PointStore(None)
            stored = store.put(identity, stored)
            self.watcher.finished(reused=False)
        else:
            self.watcher.finished(reused=True)
        return stored

    def _evaluate(self, task: EvaluationTask, config: SparsityConfig) -> dict[str, Any]:
        scorer = self._scorers[task.name]
        if task.name not in self._prepared:
            self._prepared[task.name] = scorer.prepare(task.requests)
        answers, measured = scorer.run(self._prepared[task.name], config, self.watcher.advanced)
        values = task.values(answers)
        return {
            "p": config.p,
            "score": float(values.scores()[0]),
            "numerator": values.numerator[0].tolist(),
            "denominator": None if values.link == "identity" else values.denominator.tolist(),
            "link": values.link,
            **measured.to_dict(),
        }


def dense(config: SparsityConfig) -> SparsityConfig:
    """The same setting with the rule's identity knob: nothing is changed, exact zeros are counted."""
    return replace(config, p=IDENTITY[config.rule], schedule=None, layer_p=None)


def stacked(points: Sequence[Mapping[str, Any]]) -> ItemValues:
    """Item values [K, N] of several points of one task."""
    numerator = np.array([point["numerator"] for point in points])
    first = points[0]
    denominator = np.ones(numerator.shape[1]) if first["denominator"] is None else np.array(first["denominator"])
    return ItemValues(numerator, denominator, first["link"])
