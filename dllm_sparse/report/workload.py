"""What `critical_sparsity` and `compare` share: tasks with their settings, sites, and the record of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dllm_sparse.evaluation.critical import SweepPlan
from dllm_sparse.evaluation.fingerprints import git_revision, versions
from dllm_sparse.evaluation.items import EvaluationTask
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.protocols import Protocol, ProtocolTask, protocol
from dllm_sparse.evaluation.sweep import Sweep, TaskSettings
from dllm_sparse.evaluation.tasks_loading import TaskSpec, load_tasks
from dllm_sparse.fields import listed
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.sparsity.config import Sites, SparsityConfig
from dllm_sparse.types import UsageError

PAPER_SITES: tuple[Sites, ...] = ("input", "up", "gate", "intermediate", "all_inputs")
KNOWN_SITES: tuple[Sites, ...] = get_args(Sites)


@dataclass(frozen=True, slots=True)
class Workload:
    """The tasks, how each is answered, and how they were chosen."""

    tasks: list[EvaluationTask]
    settings: Mapping[str, TaskSettings]
    limit: int | None
    protocol: Protocol | None = None

    @classmethod
    def load(
        cls,
        tasks: str | Sequence[str],
        *,
        limit: int | None = None,
        scoring: ScoringOptions | None = None,
        sampler: SamplerConfig | None = None,
        published: str | None = None,
        allow_code: bool = False,
    ) -> Workload:
        """Loads tasks by name, or all tasks of a published protocol; `tasks` then selects among them."""
        if limit is not None and limit < 1:
            raise UsageError(f"limit is {limit}; it must be at least 1")
        scoring, tasks = scoring or ScoringOptions(), listed(tasks)
        if published is None:
            loaded = load_tasks(tasks, limit, allow_code=allow_code)
            return cls(loaded, {task.name: TaskSettings(scoring, sampler) for task in loaded}, limit)
        chosen = protocol(published)
        entries = chosen.selected(tasks)
        specs = [TaskSpec(entry.name, shots=entry.shots, metric=entry.metric) for entry in entries]
        loaded = load_tasks(specs, limit, allow_code=allow_code)
        settings = {task.name: protocol_settings(entry, scoring) for task, entry in zip(loaded, entries, strict=True)}
        return cls(loaded, settings, limit, chosen)

    @classmethod
    def of(cls, tasks: str | Sequence[str] | Workload, **options: Any) -> Workload:
        """The workload itself, or one loaded by `load`."""
        return tasks if isinstance(tasks, Workload) else cls.load(tasks, **options)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "limit": self.limit,
            "protocol": None if self.protocol is None else self.protocol.to_dict(),
            "tasks": {
                task.name: {
                    "items": task.items,
                    "metric": task.metric,
                    "higher_is_better": task.higher_is_better,
                    "sha256": task.fingerprint(),
                    **self.settings[task.name].to_dict(),
                }
                for task in self.tasks
            },
        }


def protocol_settings(entry: ProtocolTask, scoring: ScoringOptions) -> TaskSettings:
    """How a protocol answers one of its tasks; `scoring` holds what it leaves open."""
    if entry.mc_num is not None:
        scoring = replace(scoring, mc_num=entry.mc_num, mc_batch=entry.mc_batch, cfg_scale=entry.cfg_scale)
    if entry.gen_length is None:
        return TaskSettings(scoring)
    length = entry.gen_length
    return TaskSettings(scoring, SamplerConfig(gen_length=length, steps=length, block_length=length))


def chosen_sites(sites: str | Sequence[str]) -> list[Sites]:
    """One site, several, or `all` for the paper's five; order kept, each once."""
    asked = list(listed(sites))
    if asked == ["all"]:
        return list(PAPER_SITES)
    for site in asked:
        if site not in KNOWN_SITES:
            raise UsageError(f"site {site!r} is unknown; allowed: {', '.join(KNOWN_SITES)}, or all")
    if not asked:
        raise UsageError("no site given; try all_inputs")
    return list(dict.fromkeys(asked))  # type: ignore[arg-type]


def record(workload: Workload, plan: SweepPlan, base: SparsityConfig, models: Mapping[str, Sweep]) -> dict[str, Any]:
    """What the result depends on: models, tasks, settings, versions. Nothing that differs between equal runs."""
    return {
        "models": {name: sweep.model for name, sweep in models.items()},
        **workload.to_dict(),
        "plan": asdict(plan),
        "sparsity": base.to_dict(),
        "versions": versions(),
        "git_revision": git_revision(),
    }


def points_folder(out: str | Path | None, points: str | Path | None = None) -> Path | None:
    """Where finished points live: the folder given, else under the result folder."""
    if points is not None:
        return Path(points)
    return None if out is None else Path(out) / "points"
