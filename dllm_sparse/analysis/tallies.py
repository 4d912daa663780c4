"""Integer counts of what masks did, per prompt, step and token class; every ratio is formed from them at the end.

Counts of two runs over different prompts join without loss: `merge` puts the prompts of one behind the other's.
Legend: R prompts (rows), S steps, C token classes, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from dllm_sparse.types import Kind, Site, SiteName, TokenClass, UsageError, in_order

WINDOW_SIZES = (1, 2, 4, 8, 16, 32)
"""Numbers of neighbouring tokens whose masks are united; behind them comes the whole block (or prompt)."""

TAUS = (0.05, 0.1, 0.2)
"""A token has moved when its relative change exceeds tau."""

PER_TOKEN_ONE = 1 << 30
"""Per-token Jaccards are summed in units of 2^-30, as integers, so that sums do not depend on their order."""

BINS_PER_DECADE = 24
CHANGE_RANGE = (1e-4, 10.0)
"""The relative changes the movement histogram resolves; its first and last bins hold what lies outside."""


class Column(IntEnum):
    """What is counted for each (prompt, step, token class) at a site. `pairs` compare with the step before."""

    TOKENS = 0
    KEPT = 1
    PAIRS = 2
    KEPT_NOW = 3  # of the pairs
    KEPT_BEFORE = 4
    INTERSECTION = 5
    UNION = 6
    JACCARD = 7  # per token, in units of 1 / PER_TOKEN_ONE
    REFERENCE_TOKENS = 8
    REFERENCE_NOW = 9
    REFERENCE_KEPT = 10
    REFERENCE_INTERSECTION = 11
    REFERENCE_UNION = 12
    REFERENCE_JACCARD = 13
    MOVED = 14  # and the taus after the first behind it


COLUMNS = Column.MOVED + len(TAUS)
_CLASSES = len(TokenClass)

OVERLAP_COLUMNS = Column.REFERENCE_TOKENS - Column.PAIRS
"""(tokens, kept, kept in the other, intersection, union, Jaccard): one comparison, as in Column from PAIRS on."""


def change_edges() -> Tensor:
    """Edges [E] fp32 of the movement histogram: 24 bins a decade from 1e-4 to 10."""
    low, high = (torch.tensor(value, dtype=torch.float64).log10() for value in CHANGE_RANGE)
    bins = round(float(high - low) * BINS_PER_DECADE)
    return torch.logspace(float(low), float(high), bins + 1, dtype=torch.float64).float()


@dataclass(slots=True)
class SiteTally:
    """Counts of one site. `steps` [R, S, C, K], `unions` [R, S, W + 1, 2] (kept, unions), `changes` [S, C, bins] over
    all prompts, `snapshots` [R, S, D, C, 6] indexed by the later step (D = 0 without snapshots)."""

    width: int
    steps: Tensor
    unions: Tensor
    changes: Tensor
    snapshots: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, width: int, deltas: int, device: torch.device) -> SiteTally:
        """Zero counts with room for `steps` steps."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            width,
            zeros(rows, steps, _CLASSES, COLUMNS),
            zeros(rows, steps, len(WINDOW_SIZES) + 1, 2),
            zeros(steps, _CLASSES, len(change_edges()) + 1, dtype=torch.int32),
            zeros(rows, steps, deltas, _CLASSES, OVERLAP_COLUMNS),
        )

    def resized(self, steps: int, device: torch.device) -> SiteTally:
        """The same counts on a device, with room for exactly `steps` steps."""
        return SiteTally(
            self.width,
            resize(self.steps, 1, steps).to(device),
            resize(self.unions, 1, steps).to(device),
            resize(self.changes, 0, steps).to(device),
            resize(self.snapshots, 1, steps).to(device),
        )


def resize(counts: Tensor, dim: int, size: int) -> Tensor:
    """Counts cut, or filled up with zeros, to `size` along a dimension."""
    missing = size - counts.shape[dim]
    if missing <= 0:
        return counts.narrow(dim, 0, size)
    shape = list(counts.shape)
    shape[dim] = missing
    return torch.cat((counts, counts.new_zeros(shape)), dim=dim)


@dataclass(slots=True)
class MaskCounts:
    """Everything a recorder counted. `canvas` [R, S, G, 2] holds, per site name, intersection and union with the step
    before of every generated position, summed over layers."""

    kind: Kind
    sites: dict[Site, SiteTally] = field(default_factory=dict)
    canvas: dict[SiteName, Tensor] = field(default_factory=dict)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    deltas: tuple[int, ...] = ()
    snapshot_every: int = 0

    @property
    def prompts(self) -> int:
        """Number of prompts counted."""
        return next((tally.steps.shape[0] for tally in self.sites.values()), 0)

    @property
    def site_names(self) -> list[SiteName]:
        """Names of the recorded sites, in the order of the computation."""
        return in_order(site.name for site in self.sites)

    @property
    def layers(self) -> list[int]:
        """Recorded layers in order."""
        return sorted({site.layer for site in self.sites})

    def at(self, name: SiteName, layer: int | None = None) -> list[SiteTally]:
        """The tallies of a site name, of one layer or of all."""
        return [tally for site, tally in self.sites.items() if site.name == name and layer in (None, site.layer)]

    def merge(self, other: MaskCounts) -> None:
        """Appends the prompts of another run, exactly. Raises UsageError when the runs recorded different things."""
        if not other.sites:
            return
        if self.sites and (self.sites.keys() != other.sites.keys() or self._settings() != other._settings()):
            raise UsageError("counts of different models, sites or snapshot settings cannot be merged")
        blocks = max(self.blocks, other.blocks, key=len)
        ours, theirs = self.resized(len(blocks)), other.resized(len(blocks))
        self.blocks = list(blocks)
        self.sites = {site: _joined(ours.sites.get(site), tally) for site, tally in theirs.sites.items()}
        self.canvas = {
            name: torch.cat((ours.canvas[name], counts)) if name in ours.canvas else counts
            for name, counts in theirs.canvas.items()
        }

    def resized(self, steps: int) -> MaskCounts:
        """The same counts on the CPU with room for exactly `steps` steps."""
        sites = {site: tally.resized(steps, torch.device("cpu")) for site, tally in self.sites.items()}
        canvas = {name: resize(counts, 1, steps).cpu() for name, counts in self.canvas.items()}
        return MaskCounts(self.kind, sites, canvas, self.blocks[:steps], self.deltas, self.snapshot_every)

    def _settings(self) -> tuple[object, ...]:
        return self.kind, self.deltas, self.snapshot_every


def _joined(ours: SiteTally | None, theirs: SiteTally) -> SiteTally:
    """Rows behind one another; the movement histogram, which knows no rows, is added."""
    if ours is None:
        return theirs
    return SiteTally(
        ours.width,
        torch.cat((ours.steps, theirs.steps)),
        torch.cat((ours.unions, theirs.unions)),
        ours.changes + theirs.changes,
        torch.cat((ours.snapshots, theirs.snapshots)),
    )
