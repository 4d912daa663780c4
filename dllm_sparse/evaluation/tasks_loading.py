"""Tasks through lm-eval: bundled ones by name, YAML files by path, lm-eval's own by name where their data can be had.

A specification is NAME, PATH.yaml, or either followed by =FILE, which gives a task made for local data its file.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparse.evaluation.items import EvaluationTask, naming
from dllm_sparse.fields import listed
from dllm_sparse.types import DllmSparseError, UsageError

BUNDLED_TASKS = Path(__file__).parent / "tasks"
_ADVICE = (
    "Needed: the hub, or its cache under HF_HOME. Without it: the bundled tasks (tiny-cloze, tiny-infill, "
    "tiny-skills), a task over your own file (--tasks gsm8k-local=FILE), or a YAML of yours (--tasks PATH.yaml)."
)


class TaskDataMissing(DllmSparseError):
    """A task's data are neither here nor to be had."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """Which task, and what deviates from its YAML. `metric` None: accuracy, exact match or a perplexity, as it has."""

    name: str
    data_file: str | None = None
    shots: int | None = None
    metric: str | None = None

    @classmethod
    def parse(cls, text: str) -> TaskSpec:
        """Reads NAME, PATH.yaml, NAME=FILE."""
        name, _, data_file = text.partition("=")
        if not name:
            raise UsageError(f"task {text!r} has no name; give NAME, PATH.yaml or NAME=FILE")
        return cls(name, data_file or None)


def load_tasks(
    specs: str | Sequence[TaskSpec | str], limit: int | None = None, *, allow_code: bool = False
) -> list[EvaluationTask]:
    """Loads the tasks and builds the requests of their first `limit` items.

    `allow_code` permits tasks that run model-written programs. Raises UsageError for unknown tasks, TaskDataMissing
    where the data cannot be had.
    """
    if not specs:
        raise UsageError("no task given; try --tasks tiny-cloze")
    manager, tasks, missing = _Manager(), [], []
    for spec in (spec if isinstance(spec, TaskSpec) else TaskSpec.parse(spec) for spec in listed(specs)):
        try:
            leaves = manager.leaves(spec)
        except TaskDataMissing as error:
            missing.append(str(error))
            continue
        for leaf in leaves:
            if getattr(leaf, "UNSAFE_CODE", False) and not allow_code:
                raise UsageError(
                    f"task {spec.name} runs programs the model wrote; add --confirm-run-unsafe-code if you accept that"
                )
        with naming(spec.name, "no requests can be made of it; do its documents hold what its YAML reads?"), _quiet():
            for leaf in leaves:
                _set_shots(leaf, spec.shots)
                leaf.build_all_requests(limit=limit, rank=0, world_size=1)
            tasks.append(EvaluationTask(_title(spec, leaves), leaves, spec.metric))
    if missing:
        raise TaskDataMissing(f"data are missing. {' '.join(missing)} {_ADVICE}")
    names = [task.name for task in tasks]
    if len({*names}) < len(names):
        raise UsageError(f"a task is given twice: {', '.join(names)}")
    return tasks


def _bundled() -> dict[str, Path]:
    return {path.stem: path for path in BUNDLED_TASKS.rglob("*.yaml") if not path.stem.startswith("_")}


def _title(spec: TaskSpec, leaves: Sequence[Any]) -> str:
    return str(leaves[0].task_name) if len(leaves) == 1 else Path(spec.name).stem


def _set_shots(leaf: Any, shots: int | None) -> None:
    """lm-eval's rule: a task that fixes 0 shots in its YAML keeps them; None means 0."""
    own = leaf.get_config("num_fewshot")
    if shots is not None and own != 0:
        leaf.set_config(key="num_fewshot", value=shots)
    elif own is None:
        leaf.set_config(key="num_fewshot", value=0)
    leaf.set_fewshot_seed(seed=1234)  # lm-eval's default


class _Manager:
    """lm-eval's task manager; its index of thousands of YAMLs (17 s) is read only when a name is not ours."""

    def __init__(self) -> None:
        self._default: Any = None

    def leaves(self, spec: TaskSpec) -> list[Any]:
        """The lm-eval tasks behind a name: one, or all of a group."""
        manager = _import_manager()
        path = _bundled().get(spec.name) or (Path(spec.name) if spec.name.endswith((".yaml", ".yml")) else None)
        if path is not None and not path.is_file():
            raise UsageError(f"no task file {path}")
        metadata = {"data_file": str(Path(spec.data_file).resolve())} if spec.data_file else {}
        if spec.data_file and not Path(spec.data_file).is_file():
            raise TaskDataMissing(f"Task {spec.name!r}: no file {spec.data_file}.")
        if path is not None:
            source = manager(include_defaults=False, metadata=metadata)
            return self._load(source, str(path.resolve()), spec)
        if self._default is None:
            self._default = manager()
        if spec.name not in self._default.all_tasks:
            raise UsageError(_unknown(spec.name, self._default.all_tasks))
        return self._load(self._default, spec.name, spec)

    @staticmethod
    def _load(manager: Any, name: str, spec: TaskSpec) -> list[Any]:
        try:
            with _quiet():
                return list(manager.load([name])["tasks"].values())
        except (TaskDataMissing, UsageError):
            raise
        except Exception as error:  # datasets and the hub raise a dozen unrelated types
            raise TaskDataMissing(_missing(spec, error)) from error


def _import_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("tasks need lm-eval: pip install lm-eval") from error
    return TaskManager


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [*_bundled(), *known], n=3)
    nearest = f"nearest: {', '.join(close)}. " if close else ""
    return f"unknown task {name!r}; {nearest}Bundled: {', '.join(sorted(_bundled())) or 'none'}. A YAML path works too"


def _missing(spec: TaskSpec, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"Task {spec.name!r}: {reason.rstrip('.')}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets draw their own progress bars on stderr; ours is the only one shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
