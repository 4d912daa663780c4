"""Integer counts of kept entries per site and token class; every ratio is formed from them, once, at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.kernels.tallying import can_tally, tally
from dllm_sparse.sparsity.gains import ffn_gain
from dllm_sparse.types import Site, SiteName, TokenClass, in_order

_CLASSES = len(TokenClass)
_TENSORS = ("kept", "entries", "call_sparsity")


@dataclass(slots=True)
class _SiteCount:
    width: int
    kept: Tensor  # [classes] int64
    entries: Tensor  # [classes] int64
    call_sparsity: Tensor  # [] float64: sparsity of each call, summed over calls
    calls: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> _SiteCount:
        with torch.inference_mode(False):  # the block around a generation may go on counting outside of it
            zeros = torch.zeros(_CLASSES, dtype=torch.int64, device=device)
            return cls(width, zeros, zeros.clone(), zeros[0].double())


@dataclass(slots=True)
class _UnionCount:
    kept: Tensor  # [] int64: channels some counted token of a forward kept, summed over forwards
    entries: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> _UnionCount:
        with torch.inference_mode(False):
            return cls(torch.zeros((), dtype=torch.int64, device=device))


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
        self._unions: dict[tuple[SiteName, int], _UnionCount] = {}  # by the tokens of a forward, padding included
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
        if site in self._sites and self._sites[site].kept.device != keep.device:
            moved = self.to(keep.device)  # captured steps, whose totals were read back, came before
            self._sites, self._unions = moved._sites, moved._unions
        width = keep.shape[-1]
        count = self._site(site, width, keep.device)
        if can_tally(keep):
            kept, _, _, union = tally(keep, token_class)
        else:
            kept, union = _tally(keep, classes)
        count.kept += kept
        count.entries += classes.tokens * width
        count.call_sparsity += 1 - kept.sum().double() / (classes.counted * width)
        count.calls += 1
        together = self._union(site.name, token_class.numel(), keep.device)
        together.kept += union.count_nonzero()
        together.entries += width

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
        rows: int,
    ) -> None:
        """Adds sums over `calls` forwards of `rows` tokens: kept and tokens [classes], call_sparsity [] (see `add`).

        `union_kept` [] is the sum over the `union_calls` of them in which the union was measured.
        """
        count = self._site(site, width, kept.device)
        device = count.kept.device  # where an earlier forward was counted
        count.kept += kept.to(device)
        count.entries += (tokens * width).to(device)
        count.call_sparsity += call_sparsity.to(device)
        count.calls += calls
        together = self._union(site.name, rows, kept.device)
        together.kept += union_kept.to(together.kept.device)
        together.entries += width * union_calls

    def merge(self, other: SparsityCounts) -> None:
        """Adds another run's counts to these."""
        for site, theirs in other._sites.items():
            ours = self._site(site, theirs.width, theirs.kept.device)
            for name in (*_TENSORS, "calls"):
                setattr(ours, name, getattr(ours, name) + getattr(theirs, name))
        for key, more in other._unions.items():
            together = self._union(*key, more.kept.device)
            together.kept = together.kept + more.kept
            together.entries += more.entries

    def to(self, device: torch.device | str) -> SparsityCounts:
        """A copy whose tensors are on `device`; as many transfers however many sites there are."""
        copy = SparsityCounts()
        if counts := list(self._sites.values()):
            moved = {name: torch.stack([getattr(count, name) for count in counts]).to(device) for name in _TENSORS}
            for row, (site, count) in enumerate(self._sites.items()):
                own: dict[str, Any] = {name: moved[name][row].clone() for name in _TENSORS}
                copy._sites[site] = replace(count, **own)
        if self._unions:
            kept = torch.stack([union.kept for union in self._unions.values()]).to(device)
            for place, (key, union) in enumerate(self._unions.items()):
                copy._unions[key] = replace(union, kept=kept[place].clone())
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
        """Share of a site's channels no token of a forward kept: what hardware could skip reading, per site.

        Sites whose unions were not measured are absent: captured steps measure where it costs nothing.
        """
        return self._skipped(self._unions)

    def exploitable_by_tokens(self) -> dict[str, dict[str, float]]:
        """`exploitable` of the forwards of so many tokens, those of all rows and padding included."""
        sizes = sorted({tokens for _, tokens in self._unions})
        found = {size: self._skipped(key for key in self._unions if key[1] == size) for size in sizes}
        return {str(size): sites for size, sites in found.items() if sites}

    def to_dict(self) -> dict[str, Any]:
        """Summary, per layer, per token class and exploitable sparsity, JSON-ready."""
        places, unions = sorted({site[:2] for site in self._sites}), self.exploitable_by_tokens()
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
            "exploitable_by_tokens": unions,
            "gain_by_tokens": {tokens: ffn_gain(sites) for tokens, sites in unions.items()},
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
                "tokens": int(count.entries.sum()) // count.width,
                "entries": int(count.entries.sum()),
                "sparsity": self._pooled([site]),
            }
            for site, count in sorted(self._sites.items())
            if site.expert >= 0
        ]

    def _site(self, site: Site, width: int, device: torch.device) -> _SiteCount:
        if site not in self._sites:
            self._sites[site] = _SiteCount.empty(width, device)
        return self._sites[site]

    def _union(self, name: SiteName, tokens: int, device: torch.device) -> _UnionCount:
        if (name, tokens) not in self._unions:
            self._unions[name, tokens] = _UnionCount.empty(device)
        return self._unions[name, tokens]

    def _skipped(self, keys: Iterable[tuple[SiteName, int]]) -> dict[str, float]:
        kept: dict[SiteName, int] = {}
        entries: dict[SiteName, int] = {}
        for name, tokens in keys:
            union = self._unions[name, tokens]
            if union.entries:
                kept[name] = kept.get(name, 0) + int(union.kept)
                entries[name] = entries.get(name, 0) + union.entries
        return {name: 1 - kept[name] / entries[name] for name in in_order(kept)}

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
