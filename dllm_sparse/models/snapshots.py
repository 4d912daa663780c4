"""The models a training run kept along the way: loadable folders, each with what was true when it was taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparse.files import read_sealed

FACTS = "training.json"
"""Written last: a snapshot with it is complete."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot: its folder, and what was true when it was taken."""

    path: Path
    step: int
    tokens: int
    facts: dict[str, Any]


def snapshots_of(run: Path) -> list[Snapshot]:
    """The complete snapshots of a run's folder in order of steps; empty where it holds none."""
    found = []
    for file in sorted((run / "snapshots").glob(f"step-*/{FACTS}")):
        facts = read_sealed(file, "the facts of a snapshot")
        found.append(Snapshot(file.parent, int(facts["step"]), int(facts["tokens"]), facts))
    return sorted(found, key=lambda snapshot: snapshot.step)
