"""`MaskRecorder`: watches the masks of generations and streams them into integer counts.

Held in memory are, per site, the last and the first mask and the last values of every token, whatever the number of
steps (plus the snapshots asked for). Everything is keyed by absolute canvas position and by the step of the context,
so cached forwards, which feed only part of the canvas, count what they fed and nothing twice. The unconditional rows
of classifier-free guidance (their prompt is masked out) are left out; padding is never counted.

A diffusion model is compared position by position: with the step before (where that step fed the position) and with
the first step that fed it (step 0, unless blocks or canvases enter one by one). One step may feed disjoint windows in
several forwards. An autoregressive model sees every position once, so a token is compared with the token before it and
with the consensus mask of the prompt: the channels the prompt's tokens keep most often, as many as one token keeps.

In a mixture of experts the channels of a layer are the (expert, channel) pairs of all its routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_sparse.analysis.comparisons import by_class, change_histogram, overlap, relative_change
from dllm_sparse.analysis.masks import consensus_mask, count_kept, window_unions
from dllm_sparse.analysis.mixtures import JoinedExperts
from dllm_sparse.analysis.tallies import (
    COLUMNS,
    TAUS,
    WINDOW_SIZES,
    Column,
    MaskCounts,
    SiteTally,
    change_edges,
    resize,
)
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.types import Kind, Observer, Site, SiteName, Step, StepContext, TokenClass, UsageError

_NEVER = -2  # below the step before step 0


@dataclass(slots=True)
class _Memory:
    """What is remembered of a site. Diffusion: [B, L, n]; autoregressive: [B, 1, n], the token before."""

    keep: Tensor
    values: Tensor
    reference: Tensor
    seen: Tensor  # [L or 1] int64: the step that last fed each position, or _NEVER
    snapshots: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # step -> (first position, masks)


class MaskRecorder(Observer):
    """Pass it as an observer of `generate`; it may watch several generations by one model, one after the other.

    `snapshot_every=k` keeps the masks of every k-th step until the largest of `deltas` has passed, and compares each
    with the masks of `delta` steps later. Raises UsageError for one without the other, or values below 1.
    """

    def __init__(
        self, kind: Kind, sampler: SamplerConfig, snapshot_every: int = 0, deltas: tuple[int, ...] = ()
    ) -> None:
        if snapshot_every < 0 or any(delta < 1 for delta in deltas) or bool(deltas) != (snapshot_every > 0):
            raise UsageError("snapshots need snapshot_every of at least 1 and deltas of at least 1, or neither")
        self._causal = kind == "autoregressive"
        self._gen_length = sampler.gen_length
        self._every, self._deltas = snapshot_every, deltas
        self._total = MaskCounts(kind, deltas=deltas, snapshot_every=snapshot_every)
        self._edges = change_edges()
        self._length = self._prompt = 0
        self._clear()

    def counts(self) -> MaskCounts:
        """The counts of all generations watched so far; to be called between generations."""
        self._total.merge(self._run)
        self._clear()
        return self._total

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        """A new canvas [B, L]: its rows are new prompts."""
        self.counts()
        self._length = ids.shape[1]
        given = (token_class == TokenClass.PROMPT) | (token_class == TokenClass.PADDING)
        self._prompt = int(given.any(0).nonzero().max()) + 1 if bool(given.any()) else 0

    @torch.inference_mode()
    def on_mask(self, site: Site, values: Tensor, keep: Tensor, context: StepContext) -> None:
        """Counts one mask against the one before and against the reference, then remembers it."""
        if context.part is not None:
            joined = self._mixtures.add(site, values, keep, context)
            if joined is None:
                return
            site, values, keep, context = joined
        rows = keep.shape[0] // 2 if context.guided else keep.shape[0]
        values, keep, classes = values[:rows], keep[:rows], context.token_class[:rows].long()
        index = context.step.index
        window = slice(None) if self._causal else slice(context.start, context.start + keep.shape[1])
        memory = self._remembered(site, values, keep, classes, window, index)
        columns, paired = self._compare(memory, keep, window, index)
        change = relative_change(values, memory.values[:, window])
        for place, tau in enumerate(TAUS):
            columns[..., Column.MOVED + place] = (change > tau) & paired
        tally = self._tally(site, keep, context.step)
        tally.steps[:, index] += by_class(columns, classes)
        tally.changes[index] += change_histogram(
            change, self._edges.to(change.device), classes, paired.expand_as(change)
        )
        self._count_unions(tally.unions[:, index], keep, classes, context)
        self._count_canvas(site.name, columns, context)
        if self._every:
            self._count_snapshots(tally.snapshots[:, index], memory, keep, classes, context)
        memory.keep[:, window] = keep[:, -1:] if self._causal else keep
        memory.values[:, window] = values[:, -1:] if self._causal else values
        memory.seen[window] = index

    def _remembered(
        self, site: Site, values: Tensor, keep: Tensor, classes: Tensor, window: slice, index: int
    ) -> _Memory:
        if site not in self._memory:
            length = 1 if self._causal else self._length
            shape = (keep.shape[0], length, keep.shape[-1])
            masks, old_values = keep.new_zeros(shape), values.new_zeros(shape)
            seen = torch.full((length,), _NEVER, device=keep.device)
            self._memory[site] = _Memory(masks, old_values, masks.clone(), seen)
        memory = self._memory[site]
        if self._causal and index == 0:
            memory.reference = consensus_mask(keep, classes == TokenClass.PROMPT)
        elif not self._causal:
            new = (memory.seen[window] == _NEVER)[:, None]
            memory.reference[:, window] = torch.where(new, keep, memory.reference[:, window])
        return memory

    def _compare(self, memory: _Memory, keep: Tensor, window: slice, index: int) -> tuple[Tensor, Tensor]:
        """Columns [B, T, K] of every token, and which tokens [T or 1] the step before has fed, too."""
        columns = torch.zeros((*keep.shape[:2], COLUMNS), dtype=torch.int64, device=keep.device)
        kept = count_kept(keep)
        paired = memory.seen[window] == index - 1
        columns[..., Column.TOKENS], columns[..., Column.KEPT] = 1, kept
        before = overlap(keep, kept, memory.keep[:, window])
        columns[..., Column.PAIRS : Column.REFERENCE_TOKENS] = before * paired[:, None]
        reference = memory.reference if self._causal else memory.reference[:, window]
        columns[..., Column.REFERENCE_TOKENS : Column.MOVED] = overlap(keep, kept, reference)
        return columns, paired

    def _count_unions(self, unions: Tensor, keep: Tensor, classes: Tensor, context: StepContext) -> None:
        """Unions of neighbours in the active block, or among the prompt's tokens of an autoregressive prefill."""
        if self._causal and context.step.index > 0:
            return
        begin, end = 0, keep.shape[1]
        if not self._causal:
            if context.block is None:
                return  # a forward of what lies before the block
            begin, end = (place - context.start for place in context.block)
        region, valid = keep[:, begin:end], classes[:, begin:end] != TokenClass.PADDING
        sizes = [size for size in WINDOW_SIZES if size <= end - begin]
        for place, (kept, windows) in enumerate(window_unions(region, valid, sizes)):
            unions[:, place, 0], unions[:, place, 1] = kept, windows
        unions[:, -1, 0] = count_kept((region & valid.unsqueeze(-1)).any(1))
        unions[:, -1, 1] = valid.any(-1)

    def _count_canvas(self, name: SiteName, columns: Tensor, context: StepContext) -> None:
        """Adds a layer's intersections and unions with the step before to the generated positions [B, G]."""
        canvas = self._run.canvas[name][:, context.step.index]
        first = context.start - self._prompt
        skipped = max(-first, 0)
        canvas = canvas[:, first + skipped :]
        pairs = columns[:, skipped : skipped + canvas.shape[1], Column.INTERSECTION : Column.UNION + 1]
        canvas[:, : pairs.shape[1]] += pairs

    def _count_snapshots(
        self, table: Tensor, memory: _Memory, keep: Tensor, classes: Tensor, context: StepContext
    ) -> None:
        """Compares with the snapshots whose age is one of the deltas, drops those too old, takes a new one."""
        index, start = context.step.index, 0 if self._causal else context.start
        for place, delta in enumerate(self._deltas):
            if index - delta not in memory.snapshots:
                continue
            first, masks = memory.snapshots[index - delta]
            begin, end = max(start, first), min(start + keep.shape[1], first + masks.shape[1])
            now = keep[:, begin - start : end - start]
            columns = overlap(now, count_kept(now), masks[:, begin - first : end - first])
            table[:, place] += by_class(columns, classes[:, begin - start : end - start])
        memory.snapshots = {at: kept for at, kept in memory.snapshots.items() if index - at < max(self._deltas)}
        if index % self._every == 0:
            memory.snapshots[index] = (start, (keep[:, -1:] if self._causal else keep).clone())

    def _tally(self, site: Site, keep: Tensor, step: Step) -> SiteTally:
        """The site's tables, with room for this step: the planned steps, or twice as many where they run out."""
        run, rows = self._run, keep.shape[0]
        if len(run.blocks) <= step.index:
            run.blocks.append((step.block, step.index_in_block))
        if site not in run.sites:
            run.sites[site] = SiteTally.empty(rows, step.total, keep.shape[-1], len(self._deltas), keep.device)
        if site.name not in run.canvas:
            shape = (rows, step.total, self._gen_length, 2)
            run.canvas[site.name] = torch.zeros(shape, dtype=torch.int32, device=keep.device)
        if step.index >= run.sites[site].steps.shape[1]:
            run.sites[site] = run.sites[site].resized(2 * step.index, keep.device)
        if step.index >= run.canvas[site.name].shape[1]:
            run.canvas[site.name] = resize(run.canvas[site.name], 1, 2 * step.index)
        return run.sites[site]

    def _clear(self) -> None:
        self._run = MaskCounts(self._total.kind, deltas=self._deltas, snapshot_every=self._every)
        self._memory: dict[Site, _Memory] = {}
        self._mixtures = JoinedExperts()
