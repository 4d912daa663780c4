"""Finished points on disk: one file per (model, task, sparsity) point, named by a hash of all it depends on.

Files appear whole or not at all, so a sweep that was killed resumes with every point it had finished; a point whose
circumstances changed has another name and is never read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm_sparse.evaluation.fingerprints import key_of
from dllm_sparse.files import check_folder, read_sealed, write_sealed
from dllm_sparse.types import DamagedFile


class PointStore:
    """Points under `folder`; without a folder they live as long as this object. FileNotWritten if it takes none."""

    def __init__(self, folder: Path | None) -> None:
        check_folder(folder)
        self.folder = folder
        self.reused = 0
        self.computed = 0
        self._memory: dict[str, dict[str, Any]] = {}

    def get(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The stored point, or None. A damaged file raises: nothing is silently computed twice."""
        key = key_of(identity)
        if key not in self._memory and self.folder is not None:
            path = self._path(key)
            if path.exists():
                self._memory[key] = _read(path, identity)
        point = self._memory.get(key)
        self.reused += point is not None
        return point

    def put(self, identity: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
        """Stores a finished point and returns it as it would be read back."""
        key = key_of(identity)
        point = json.loads(json.dumps(point, allow_nan=False))
        if self.folder is not None:
            write_sealed(self._path(key), {"identity": identity, "point": point})
        self._memory[key] = point
        self.computed += 1
        return point

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key[:24]}.json"


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    stored = read_sealed(path, "a stored point")
    if key_of(stored["identity"]) != key_of(identity):
        raise DamagedFile(path, "the point its name says", "a file was renamed")
    point: dict[str, Any] = stored["point"]
    return point
