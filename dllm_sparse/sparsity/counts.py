"""Integer counts of kept entries per site and token class; every ratio is formed from them, once, at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.kernels.tallying import can_tally, tally
from dllm_sparse.types import Site, SiteName, TokenClass, in_order

_CLASSES = len(TokenClass)
_TENSORS = ("kept", "entries", "union_kept", "call_sparsity")


@dataclass(slots=True)
class _SiteCount:
    kept: Tensor  # [classes] int64
    entries: Tensor  # [classes] int64
    union_kept: Tensor  # [] int64: channels some counted token of a forward kept, summed over forwards
    call_sparsity: Tensor  # [] float64: sparsity of each call, summed over calls
    union_entries: int = 0
    calls: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> _SiteCount:
        with torch.inference_mode(False):  # the block around a generation may go on counting outside of it
            zeros = torch.zeros(_CLASSES, dtype=torch.int64, device=device)
            return cls(zeros, zeros.clone(), zeros[0].clone(), zeros[0].double())


@dataclass(frozen=True, slots=True)
class _Classes:
    """The token classes of one forward, counted."""

    given: Tensor
    index: Tensor  # [B * T] int64
    tokens: Tensor  # [classes] int64, padding 0
    counted: int  # tokens that are not padding
    real: Tensor | None  # [B * T] bool where there is padding

    @classmethod
    def of(cls, token_class: Tensor) -> _Classes:
        index = token_class.flatten().long()
        tokens = torch.bincount(index, minlength=_CLASSES)
        tokens[TokenClass.PADDING] = 0
        counted = int(tokens.sum())
        return cls(token_class, index, tokens, counted, index != TokenClass.PADDING if counted < len(index) else None)


class SparsityCounts:
    """Streams masks into counts. Padding is never counted; the counts of two runs add up exactly with `merge`."""

    def __init__(self) -> None:
        self._sites: dict[Site, _SiteCount] = {}
        self._classes: _Classes | None = None

    def add(self, site: Site, keep: Tensor, token_class: Tensor) -> None:
        """Counts one mask [B, T, n] bool whose tokens have the classes [B, T].

        What depends on the classes alone is computed once for all calls in a row with the same tensor.
        """
        if self._classes is None or self._classes.given is not token_class:
            self._classes = _Classes.of(token_class)
        classes = self._classes
        if not classes.counted:
            return
        if site not in self._sites:
            self._sites[site] = _SiteCount.empty(keep.device)
        count = self._sites[site]
        if can_tally(keep):
            kept, _, _, union = tally(keep, token_class)
        else:
            kept, union = _tally(keep, classes)
        count.kept += kept
        count.entries += classes.tokens * keep.shape[-1]
        count.call_sparsity += 1 - kept.sum().double() / (classes.counted * keep.shape[-1])
        count.calls += 1
        count.union_kept += union.count_nonzero()
        count.union_entries += keep.shape[-1]

    def add_totals(
        self,
        site: Site,
        kept: Tensor,
        tokens: Tensor,
        union_kept: Tensor,
        call_sparsity: Tensor,
        calls: int,
        union_calls: int,
        width: int,
    ) -> None:
        """Adds sums over `calls` forwards: kept and tokens [classes], call_sparsity [] (see `add`).

        `union_kept` [] is the sum over the `union_calls` of them in which the union was measured.
        """
        count = self._sites.setdefault(site, _SiteCount.empty(kept.device))
        count.kept += kept
        count.entries += tokens * width
        count.union_kept += union_kept
        count.call_sparsity += call_sparsity
        count.calls += calls
        count.union_entries += width * union_calls

    def merge(self, other: SparsityCounts) -> None:
        """Adds another run's counts to these."""
        for site, theirs in other._sites.items():
            ours = self._sites.setdefault(site, _SiteCount.empty(theirs.kept.device))
            for name in ("kept", "entries", "union_kept", "union_entries", "calls", "call_sparsity"):
                setattr(ours, name, getattr(ours, name) + getattr(theirs, name))

    def to(self, device: torch.device | str) -> SparsityCounts:
        """A copy whose tensors are on `device`; four transfers, however many sites there are."""
        copy = SparsityCounts()
        counts = list(self._sites.values())
        if counts:
            moved = {name: torch.stack([getattr(count, name) for count in counts]).to(device) for name in _TENSORS}
            for row, (site, count) in enumerate(self._sites.items()):
                own: dict[str, Any] = {name: moved[name][row].clone() for name in _TENSORS}
                copy._sites[site] = replace(count, **own)
        return copy

    def summary(self) -> dict[str, float]:
        """Element-weighted sparsity per site, `mean` over all entries; `hook_mean` weighs hooks and calls equally."""
        result: dict[str, float] = {
            name: self._pooled(site for site in self._sites if site.name == name) for name in self._names()
        }
        result["mean"] = self._pooled(self._sites)
        calls = sum(count.calls for count in self._sites.values())
        total = sum(float(count.call_sparsity) for count in self._sites.values())
        result["hook_mean"] = total / calls if calls else 0.0
        return result

    def exploitable(self) -> dict[str, float]:
        """Share of a site's channels no token of a forward kept: what hardware could skip reading, per site."""
        return {
            name: 1
            - sum(int(c.union_kept) for s, c in self._sites.items() if s.name == name)
            / max(sum(c.union_entries for s, c in self._sites.items() if s.name == name), 1)
            for name in self._names()
        }

    def to_dict(self) -> dict[str, Any]:
        """Summary, per layer, per token class and exploitable sparsity, JSON-ready."""
        places = sorted({(site.layer, site.name) for site in self._sites})
        by_layer = [
            {"layer": layer, "site": name, "sparsity": self._pooled(s for s in self._sites if s[:2] == (layer, name))}
            for layer, name in places
        ]
        by_class = {
            kind.name.lower(): {
                name: self._pooled((s for s in self._sites if s.name == name), [kind]) for name in self._names()
            }
            for kind in TokenClass
            if any(int(count.entries[kind]) for count in self._sites.values())
        }
        return {
            "average": "element",
            "sparsity": self.summary(),
            "exploitable": self.exploitable(),
            "by_layer": by_layer,
            "by_token_class": by_class,
            **({"by_expert": self.by_expert()} if any(site.expert >= 0 for site in self._sites) else {}),
        }

    def by_expert(self) -> list[dict[str, Any]]:
        """A row per layer, site and expert: tokens routed to it, entries, and their sparsity."""
        return [
            {
                "layer": site.layer,
                "site": site.name,
                "expert": site.expert,
                "tokens": int(count.entries.sum()) // (count.union_entries // count.calls),
                "entries": int(count.entries.sum()),
                "sparsity": self._pooled([site]),
            }
            for site, count in sorted(self._sites.items())
            if site.expert >= 0
        ]

    def _names(self) -> list[SiteName]:
        return in_order(site.name for site in self._sites)

    def _pooled(self, sites: Any, classes: Any = slice(None)) -> float:
        counts = [self._sites[site] for site in sites]
        entries = sum(int(count.entries[classes].sum()) for count in counts)
        return 1 - sum(int(count.kept[classes].sum()) for count in counts) / entries if entries else 0.0


def _tally(keep: Tensor, classes: _Classes) -> tuple[Tensor, Tensor]:
    """Entries kept per class [C], and the channels [n] some real token kept: the plain twin of `tally`."""
    per_token = keep.count_nonzero(-1).flatten()
    kept = torch.zeros(_CLASSES, dtype=torch.int64, device=keep.device).index_add_(0, classes.index, per_token)
    kept[TokenClass.PADDING] = 0
    rows = keep.flatten(0, 1)
    return kept, (rows if classes.real is None else rows[classes.real]).any(0)
