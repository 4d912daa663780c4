"""Finished batches of a recording on disk, so that a recording that was killed resumes with every batch it had done.

A batch is two files, each written atomically; the second, small one says that the batch is whole. Their names begin
with a hash of all a recording depends on: a batch recorded in other circumstances is never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparse.analysis.counts_file import load_counts, save_counts
from dllm_sparse.analysis.tallies import MaskCounts
from dllm_sparse.files import write_json
from dllm_sparse.types import DllmSparseError


@dataclass(slots=True)
class Recording:
    """What was counted, and per prompt the generated ids and the step that committed each of them (-1: none).

    `complete` is False when the run was interrupted; then only the prompts finished by that time are in it.
    `resumed` counts the batches that an earlier, interrupted run had recorded.
    """

    counts: MaskCounts
    ids: list[list[int]]
    commit_steps: list[list[int]]
    complete: bool = True
    resumed: int = 0

    def add(self, other: Recording) -> None:
        """Puts the prompts of another recording behind these."""
        self.counts.merge(other.counts)
        self.ids += other.ids
        self.commit_steps += other.commit_steps


class RecordedBatches:
    """The batches of one recording under `folder`; `key` stands for everything they depend on."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key[:24]

    def get(self, number: int) -> Recording | None:
        """The stored batch, or None. A damaged file raises DllmSparseError: nothing is silently recorded twice."""
        tokens = self._path(number, "json")
        if not tokens.exists():
            return None
        try:
            stored = json.loads(tokens.read_text(encoding="utf-8"))
            ids, steps = _rows(stored["ids"]), _rows(stored["commit_steps"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DllmSparseError(f"{tokens} is not a stored batch ({error!r}); remove it and run again") from error
        counts = load_counts(self._path(number, "safetensors"))
        if not counts.prompts == len(ids) == len(steps):
            raise DllmSparseError(f"{tokens} does not fit the counts beside it; remove it and run again")
        return Recording(counts, ids, steps)

    def put(self, number: int, batch: Recording) -> None:
        """Stores a finished batch."""
        save_counts(batch.counts, self._path(number, "safetensors"))
        write_json(self._path(number, "json"), {"ids": batch.ids, "commit_steps": batch.commit_steps})

    def clear(self) -> None:
        """Removes this recording's batches, once what they led to is written."""
        for file in self.folder.glob(f"{self.key}-*"):
            file.unlink()
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{self.key}-{number:05d}.{suffix}"


def _rows(value: Any) -> list[list[int]]:
    if not isinstance(value, list) or not all(isinstance(row, list) and all(map(_whole, row)) for row in value):
        raise TypeError("expected rows of integers")
    return value


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
