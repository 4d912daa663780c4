"""Held-out losses that survive an interruption: each setting's result is stored under all it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_sparse.analysis.heldout import HeldOut, LossProbe, held_out, windows_of
from dllm_sparse.evaluation.fingerprints import code_fingerprint, git_revision, model_fingerprint, versions
from dllm_sparse.evaluation.store import PointStore
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.sparsity.config import SparsityConfig


class StoredProbe(LossProbe):
    """A probe whose results live in `folder` (None: as long as this object); the same call resumes."""

    def __init__(self, lm: LanguageModel, data: HeldOut, folder: Path | None = None) -> None:
        super().__init__(lm, data)
        self.store = PointStore(folder)
        digest = hashlib.sha256(data.ids.numpy().tobytes() + data.targets.numpy().tobytes())
        self.identity = {
            "model": model_fingerprint(lm),
            "text_sha256": digest.hexdigest(),
            "code_sha256": code_fingerprint(),
        }

    def __call__(self, config: SparsityConfig) -> dict[str, Any]:
        """The stored result, or a fresh one that is stored at once."""
        identity = {**self.identity, "sparsity": config.to_dict()}
        found = self.store.get(identity)
        return found if found is not None else self.store.put(identity, super().__call__(config))

    def record(self) -> dict[str, Any]:
        """What results depend on, for reports."""
        return {
            "model": self.identity["model"],
            "text_sha256": self.identity["text_sha256"],
            "windows": self.data.windows,
            "tokens": self.data.tokens,
            "versions": versions(),
            "git_revision": git_revision(),
        }


def probe_of(
    lm: LanguageModel, texts: Sequence[str], windows: int, length: int, seed: int, out: str | Path | None
) -> StoredProbe:
    """The probe of a model on the first windows of some texts, stored under `out`/points."""
    data = held_out(lm, windows_of(lm, texts, windows, length), seed)
    return StoredProbe(lm, data, None if out is None else Path(out) / "points")
