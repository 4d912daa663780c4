"""One task as the sweep sees it: its requests, and what every item's answers contribute to its score.

Scoring itself is lm-eval's (`apply_filters`, `process_results`): this file only reads the per-item values, so that
items can be resampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dllm_sparse.analysis.bootstrap import ItemValues, Link
from dllm_sparse.evaluation.scorer import Answer, Request
from dllm_sparse.types import DllmSparseError, UsageError, out_of_memory

# The paper's choice first (acc, not acc_norm), then what generation and language-modelling tasks have.
_PREFERRED = ("acc", "exact_match", "pass@1", "word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")
_LINKS: dict[str, Link] = {
    "mean": "identity",
    "weighted_perplexity": "exp",
    "perplexity": "exp",
    "bits_per_byte": "bits",
}
# Prompts and data are hashed as the requests they became; these decide how answers become scores.
_SCORING_KEYS = ("output_type", "metric_list", "filter_list", "process_results", "doc_to_target", "doc_to_choice")


@contextmanager
def naming(task: str, what: str) -> Iterator[None]:
    """A task is a program over files of its author's: whatever either raises is said with the task's name."""
    try:
        yield
    except Exception as error:  # of any type: see above; our own errors and a lack of memory go on as they came
        if isinstance(error, DllmSparseError) or out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[:1]
        raise DllmSparseError(f"task {task}: {what} ({type(error).__name__}: {' '.join(reason)})") from error


class EvaluationTask:
    """An lm-eval task, or the leaves of a group pooled (what lm-eval calls weight_by_size)."""

    def __init__(self, name: str, leaves: Sequence[Any], metric: str | None = None) -> None:
        self.name = name
        self.leaves = list(leaves)
        self._instances = [list(leaf.instances) for leaf in leaves]
        for instance in self._all_instances():
            if (instance.repeats or 1) > 1:
                raise UsageError(f"task {name} wants {instance.repeats} answers per request; one is supported")
        self.metric = metric or self._preferred()
        if self.metric not in self.leaves[0].aggregation():
            raise UsageError(f"task {name} has no metric {self.metric!r}; it has {', '.join(self._metrics())}")
        self.link = self._link()
        self.higher_is_better = bool(self.leaves[0].higher_is_better()[self.metric])

    @property
    def requests(self) -> list[Request]:
        """All requests, in a fixed order; is_greedy is asked for only where a score reads it."""
        return [
            Request(instance.request_type, tuple(instance.args), greedy=leaf.OUTPUT_TYPE == "loglikelihood")
            for leaf, instances in zip(self.leaves, self._instances, strict=True)
            for instance in instances
        ]

    @property
    def items(self) -> int:
        """Number of documents."""
        return sum(len(self._by_document(instances)) for instances in self._instances)

    @property
    def chance(self) -> float | None:
        """Expected score of guessing: mean of 1 / choices, 0 where nothing is chosen; None for perplexities."""
        if self.link != "identity":
            return None
        if self.leaves[0].OUTPUT_TYPE != "multiple_choice":
            return 0.0
        choices = [len(group) for instances in self._instances for group in self._by_document(instances).values()]
        return float(np.mean([1 / count for count in choices]))

    def fingerprint(self) -> str:
        """Hash of everything that decides the score besides the model: requests, documents, metric, filters."""
        digest = hashlib.sha256(f"{self.name}\n{self.metric}\n".encode())
        for leaf in self.leaves:
            rules = {key: leaf.get_config(key) for key in _SCORING_KEYS}
            digest.update(json.dumps(rules, sort_keys=True, default=_name_of).encode())
        for instance in self._all_instances():
            text = json.dumps([instance.request_type, instance.args, instance.doc], sort_keys=True, default=str)
            digest.update(text.encode())
        return digest.hexdigest()

    def values(self, answers: Sequence[Answer]) -> ItemValues:
        """Per-item contributions [1, N] from the answers to `requests`."""
        if len(answers) != sum(len(instances) for instances in self._instances):
            raise ValueError("one answer per request is needed")
        with naming(self.name, "its answers cannot be scored; do its documents hold what its YAML reads?"):
            return self._contributions(self._scores(iter(answers)))

    def _scores(self, answers: Iterator[Answer]) -> list[Any]:
        found: list[Any] = []
        for leaf, instances in zip(self.leaves, self._instances, strict=True):
            for instance in instances:
                instance.resps, instance.filtered_resps = [next(answers)], {}
            leaf.apply_filters()
            key = next(iter(instances[0].filtered_resps))
            for group in self._by_document(instances).values():
                results = [instance.filtered_resps[key] for instance in group]
                scores = leaf.process_results(group[0].doc, results)
                found.append(self._own(scores))
        return found

    def _own(self, scores: dict[str, Any]) -> Any:
        """This metric's value; a metric function may name its only result itself (pass_at_k gives pass@1)."""
        if self.metric in scores:
            return scores[self.metric]
        if len(scores) > 1:
            raise UsageError(f"task {self.name}: no metric {self.metric!r} among {', '.join(scores)}")
        return next(iter(scores.values()))

    def _contributions(self, found: Sequence[Any]) -> ItemValues:
        if self.link == "identity":
            return ItemValues(np.array([found], dtype=np.float64), np.ones(len(found)))
        pairs = [value if isinstance(value, tuple) else (value, 1) for value in found]
        nats = -np.array([[value for value, _ in pairs]], dtype=np.float64)
        return ItemValues(nats, np.array([size for _, size in pairs], dtype=np.float64), self.link)

    def _all_instances(self) -> list[Any]:
        return [instance for instances in self._instances for instance in instances]

    @staticmethod
    def _by_document(instances: Sequence[Any]) -> dict[int, list[Any]]:
        groups: dict[int, list[Any]] = {}
        for instance in instances:
            groups.setdefault(instance.doc_id, []).append(instance)
        return {key: sorted(group, key=lambda instance: instance.idx) for key, group in groups.items()}

    def _metrics(self) -> list[str]:
        return [str(name) for name in self.leaves[0].aggregation()]

    def _preferred(self) -> str:
        own = self._metrics()
        return next((name for name in _PREFERRED if name in own), own[0])

    def _link(self) -> Link:
        aggregation = self.leaves[0].aggregation()[self.metric]
        name = getattr(aggregation, "__name__", str(aggregation))
        if name not in _LINKS:
            usable = [metric for metric in self._metrics() if metric != self.metric]
            raise UsageError(
                f"task {self.name}: metric {self.metric!r} aggregates by {name!r}, which cannot be resampled by item; "
                f"other metrics: {', '.join(usable) or 'none'}"
            )
        return _LINKS[name]


def _name_of(value: Any) -> str:
    """Functions by name: their address differs in every process."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
