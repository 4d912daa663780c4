"""What captured sparse forwards of M rows keep between steps: thresholds, how their products run, and counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm_sparse.kernels.dispatch import MEASURED_FOR, RECAPTURE_SHARE, listing_pays, still_pays, union_density
from dllm_sparse.kernels.histogram import LINE, MOST, Histogram
from dllm_sparse.kernels.packing import RUNS, mark_words
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.kernels.streaming import MAX_STREAMED
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.types import Site, SiteName, TokenClass

Choice = list[list[bool]]
"""One decision per layer and site."""


class Totals(NamedTuple):
    """What was counted over forwards, as `SparsityCounts.add_totals` takes it: kept [L, S, C] and tokens [C] by class,
    union, union_calls and call_sparsity [L, S], calls [1]."""

    kept: Tensor
    tokens: Tensor
    union: Tensor
    union_calls: Tensor
    call_sparsity: Tensor
    calls: Tensor


class GraphRows:
    """State of forwards of M rows at S sites of L layers: device tensors that graphs hold, and decisions on the host.

    `guesses` fp32 and `kept` int32 [L, S, M], `union` [L, S, RUNS] int32: thresholds as shares of their rows' masses,
    entries and (their sum) channels of the last forward; `marks` [L, S, words] int32, zero before a forward, is where
    it marks channels, `lines` [L, M, LINE] int64 and `near` [L, M] int32 are the histograms of the intermediate,
    with `counting`.
    `union` is measured at every forward where the list is made (padding is in it then, so forwards with padding do not
    count), and else while `measures`: finding it costs more than the products could save.
    """

    def __init__(
        self,
        layers: int,
        widths: dict[SiteName, int],
        rows: int,
        device: torch.device,
        *,
        listing: bool,
        dense: bool,
        counting: bool = False,
    ) -> None:
        self.rows, self.widths = rows, widths
        shape = (layers, len(widths))

        def zeros(*more: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((*shape, *more), dtype=dtype, device=device)

        self.guesses = zeros(rows, dtype=torch.float32)
        self.kept, self.union = zeros(rows, dtype=torch.int32), zeros(RUNS, dtype=torch.int32)
        words = mark_words(max(widths.values())) if 1 < rows <= MAX_STREAMED else 0
        self.marks = zeros(words, dtype=torch.int32)
        counted = rows if counting and rows <= MOST else 0
        self.lines = torch.zeros((layers, counted, LINE), dtype=torch.int64, device=device)
        self.near = torch.zeros((layers, counted), dtype=torch.int32, device=device)
        self._entries = torch.tensor(list(widths.values()), device=device)
        self._from_list, self._exact = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self._kept, self._tokens = (
            zeros(len(TokenClass)),
            torch.zeros(len(TokenClass), dtype=torch.int64, device=device),
        )
        self._union, self._union_calls, self._call_sparsity = zeros(), zeros(), zeros(dtype=torch.float64)
        self._calls = torch.zeros(1, dtype=torch.int64, device=device)
        self._start = listing, dense
        self.listable: Choice = [[rows <= MAX_STREAMED] * len(widths) for _ in range(layers)]
        self.stale = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        """As if no forward had been seen."""
        listing, dense = ([[start] * len(self.widths) for _ in self.listable] for start in self._start)
        self.listing: Choice = listing
        self.dense: Choice = dense
        self.measures = True
        self.settled: tuple[Tensor, Tensor] | None = None  # union and kept density of the forward that decided
        self._seen = torch.zeros(self._from_list.shape, dtype=torch.float64)  # density summed over forwards
        self._forwards = self._generations = 0
        self._publish()

    def begin(self) -> None:
        """A forward begins: what it adds to is zero."""
        self.marks.zero_()
        self.lines.zero_()

    def histogram(self, layer: int) -> Histogram:
        """Where the intermediate of a layer is counted."""
        return Histogram(self.lines[layer], self.near[layer])

    def reset(self) -> None:
        """A generation begins: forgets what was counted."""
        for total in self._totals():
            total.zero_()

    def add(self, classes: Tensor) -> None:
        """Adds a forward of tokens with these classes [M] to the counts."""
        if self.kept.is_cuda and triton_installed():
            self.add_at_once(classes)
        else:
            self.add_by_parts(classes)

    def add_by_parts(self, classes: Tensor) -> None:
        """The plain twin of the kernel behind `add`."""
        member = torch.nn.functional.one_hot(classes, len(TokenClass))
        member[:, TokenClass.PADDING] = 0
        kept = (self.kept.double() @ member.double()).long()
        live = member.sum()
        self._kept += kept
        self._tokens += member.sum(0)
        clean = (classes != TokenClass.PADDING).all()
        counted = (self._exact | (self._from_list & clean)) & (live > 0)
        self._union += torch.where(counted, self.kept[..., 0] if self.rows == 1 else self.union.sum(-1), 0)
        self._union_calls += counted
        entries = (live * self._entries).clamp_min(1)
        self._call_sparsity += torch.where(live > 0, 1 - kept.sum(-1).double() / entries, 0.0)
        self._calls += live > 0

    def add_at_once(self, classes: Tensor) -> None:
        """The kernel behind `add`."""
        from dllm_sparse.kernels.gpu.count import count_kernel

        count_kernel[(self._from_list.numel(),)](
            self.kept,
            self.union,
            classes.contiguous(),
            self._entries,
            self._from_list.view(torch.uint8),
            self._exact.view(torch.uint8),
            *self._totals(),
            self.rows,
            SITES=len(self.widths),
            RUNS=RUNS,
            CLASSES=len(TokenClass),
            SLOTS=1 << (len(TokenClass) - 1).bit_length(),
            BM=min(max(1 << (self.rows - 1).bit_length(), 16), 256),
            ALONE=self.rows == 1,
            num_warps=2,
        )

    def _totals(self) -> Totals:
        return Totals(self._kept, self._tokens, self._union, self._union_calls, self._call_sparsity, self._calls)

    def totals(self) -> Totals:
        """What was counted since `reset`, on the CPU; waits for the device."""
        return Totals(*(total.cpu() for total in self._totals()))

    def settle(self, *, always: bool, on_gpu: bool, or_dense: bool) -> None:
        """Lists the kept channels only where the first forward kept few enough of them together; once.

        `always` lists wherever that can be; `or_dense` runs the rest without masks.
        """
        if self.settled is not None:
            return
        entries, kept = self._entries.cpu(), self.kept.cpu()
        union = (kept[..., 0] if self.rows == 1 else self.union.sum(-1).cpu()) / entries
        self.settled = union, kept.double().mean(-1) / entries
        pays = [[always or (on_gpu and listing_pays(self.rows, d)) for d in layer] for layer in union.tolist()]
        self._choose(pays)
        if or_dense:
            self.dense = [[not one for one in layer] for layer in self.listing]
        self.measures = not on_gpu  # elsewhere measuring costs nothing that matters
        self._publish()

    def decide_again(self, totals: Totals, *, or_dense: bool) -> None:
        """Chooses again, from all forwards so far, when a generation that counted `totals` has ended; `stale` says that
        a capture is due.

        With `or_dense` the capture begins as the first one did, by a forward masked everywhere: what ran dense was not
        counted meanwhile. For its sake that is done after MEASURED_FOR generations in any case.
        """
        calls, tokens, entries = int(totals.calls), int(totals.tokens.sum()), self._entries.cpu()
        if self.settled is None or not calls:
            return
        self._generations += 1
        measured = totals.union_calls
        likely = union_density(totals.kept.sum(-1) / (tokens * entries), *self.settled)
        density = torch.where(measured > 0, totals.union / (measured * entries).clamp_min(1), likely)
        self._seen += density * calls
        self._forwards += calls
        before = self.listing
        pairs = zip(before, (self._seen / self._forwards).tolist(), strict=True)
        self._choose([[still_pays(self.rows, d, was) for was, d in zip(*pair, strict=True)] for pair in pairs])
        changed = [a != b for old, new in zip(before, self.listing, strict=True) for a, b in zip(old, new, strict=True)]
        uncounted = or_dense and bool((torch.tensor(self.dense) & torch.tensor(self.listable)).any())
        due = sum(changed) >= RECAPTURE_SHARE * len(changed) or (uncounted and self._generations >= MEASURED_FOR)
        self.stale |= due
        if not due:
            self.listing = before
        elif or_dense:
            self._begin_anew()
        else:
            self._publish()

    def add_to(self, counts: SparsityCounts, totals: Totals) -> None:
        """Adds `totals` to `counts`."""
        for layer in range(len(self.listing) if totals.calls else 0):
            for place, (name, width) in enumerate(self.widths.items()):
                counts.add_totals(
                    Site(layer, name),
                    totals.kept[layer, place],
                    totals.tokens,
                    totals.union[layer, place],
                    totals.call_sparsity[layer, place],
                    int(totals.calls),
                    int(totals.union_calls[layer, place]),
                    width,
                    self.rows,
                )

    def _choose(self, pays: Choice) -> None:
        pairs = zip(pays, self.listable, strict=True)
        self.listing = [[one and can for one, can in zip(*pair, strict=True)] for pair in pairs]

    def _publish(self) -> None:
        """Tells the counting on the device where unions will come from; sites that run dense keep everything."""
        listed = torch.tensor(self.listing) & torch.tensor(self.listable) & ~torch.tensor(self.dense)
        dense = torch.tensor(self.dense)
        self._from_list.copy_(listed)
        self._exact.copy_(dense | (self.rows == 1) | ~listed & self.measures)
        full = (dense * self._entries.cpu()).int().to(self.union.device)
        self.union[..., 0] = torch.maximum(self.union.sum(-1), full)
        self.union[..., 1:] = 0
        self.kept.copy_(torch.maximum(self.kept, full[..., None]))
