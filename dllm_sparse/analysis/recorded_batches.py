"""Finished batches of a recording on disk, so that a recording that was killed resumes with every batch it had done.

A batch is two files, each written atomically; the second, small one says that the batch is whole. Their names begin
with a hash of all a recording depends on: a batch recorded in other circumstances is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dllm_sparse.analysis.counts_file import load_counts, save_counts
from dllm_sparse.analysis.tallies import MaskCounts
from dllm_sparse.files import file_sha256, read_sealed, write_sealed
from dllm_sparse.types import DamagedFile


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
        """The stored batch, or None. A damaged file raises DamagedFile: nothing is silently recorded twice."""
        tokens, counts = self._path(number, "json"), self._path(number, "safetensors")
        if not tokens.exists():
            return None
        stored = read_sealed(tokens, "a stored batch")
        if not counts.exists() or file_sha256(counts) != stored["counts_sha256"]:
            raise DamagedFile(counts, "the counts of its batch", "missing, or its checksum is another")
        return Recording(load_counts(counts), stored["ids"], stored["commit_steps"])

    def put(self, number: int, batch: Recording) -> None:
        """Stores a finished batch."""
        counts = save_counts(batch.counts, self._path(number, "safetensors"))
        write_sealed(
            self._path(number, "json"),
            {"ids": batch.ids, "commit_steps": batch.commit_steps, "counts_sha256": file_sha256(counts)},
        )

    def clear(self) -> None:
        """Removes this recording's batches, once what they led to is written."""
        for file in (*self.folder.glob(f"{self.key}-*"), *self.folder.glob(f".{self.key}-*")):
            file.unlink()  # the latter: what a killed writer left
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{self.key}-{number:05d}.{suffix}"
