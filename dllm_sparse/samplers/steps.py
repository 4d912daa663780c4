"""What every denoising loop does in one step: the forward, the choice of a rule, the report to observers."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.engine.observing import rows_may_leave
from dllm_sparse.models.finite import locating
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.samplers.confidence import guide
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.remasking import Contest, Members, Rule
from dllm_sparse.types import Observers, Step, StepContext, StepResult


class Steps:
    """One canvas being decoded; loops add which positions are fed and which compete, and when a block is finished.

    `canvas` holds the rows that are fed, `rows` [R] of the `whole` canvas: those with nothing left to decide in a block
    leave until the next one. No row's tokens depend on that, and a forward counts once whatever it feeds.
    """

    def __init__(
        self, lm: LanguageModel, canvas: Canvas, config: SamplerConfig, observers: Observers, rule: Rule
    ) -> None:
        self.lm, self.canvas, self.config, self.observers = lm, canvas, config, observers
        self.whole = canvas
        self.rows = torch.arange(len(canvas.ids), device=canvas.ids.device)
        self._rows_leave = rows_may_leave(lm, observers)
        self.rule = rule
        self.forwards = 0
        self.index = 0
        self.cache: KVCache | None = None
        self._buffers: KVCache | None = None
        self.block: tuple[int, int] | None = None  # canvas positions of the active block, for observers

    def use_cache(self) -> None:
        """Makes the cache of all rows."""
        rows, length = self.whole.ids.shape
        self._buffers = KVCache(self.lm.config, rows * self._copies, length, self.lm.device, self.lm.dtype)
        self.cache = self._buffers

    @property
    def _copies(self) -> int:
        """Rows of a forward per row of the canvas: guidance feeds each twice."""
        return 2 if self.config.cfg_scale > 0 else 1

    def begin_block(self) -> None:
        """All rows that have not ended take part again. The cache is not kept: a block begins with a full forward."""
        self.gather()
        awake = (~self.whole.ended).nonzero().squeeze(1)
        if self._rows_leave and len(awake) < len(self.whole.ids):
            self.canvas, self.rows = self.whole.take(awake), awake
        if self._buffers is not None:
            self.cache = self._buffers.front(len(self.rows) * self._copies)

    def leave(self, end: int) -> None:
        """Rows without a mask before position `end` leave, if nobody needs them; keys and values move together."""
        awake = self.canvas.masked()[:, :end].any(-1).nonzero().squeeze(1)
        fed = len(self.rows)
        if not self._rows_leave or not 0 < len(awake) < fed:
            return
        if self.cache is not None:
            self.cache = self.cache.take(torch.cat([awake + copy * fed for copy in range(self._copies)]))
        canvas, rows = self.canvas.take(awake), self.rows[awake]
        self.gather()
        self.whole.committed.zero_()  # when they come back, other steps will have passed
        self.canvas, self.rows = canvas, rows

    def gather(self) -> None:
        """Brings what was decoded to the whole canvas, which is then the one fed."""
        if self.canvas is not self.whole:
            self.whole.put(self.rows, self.canvas)
            self.canvas = self.whole
            self.rows = torch.arange(len(self.whole.ids), device=self.rows.device)

    def take(self, step: Step, start: int, stop: int, eligible: Tensor, editable: Tensor | None = None) -> Tensor:
        """One step: a forward of canvas positions start..stop, of which `eligible` [B, E] of the first E compete and
        `editable` ones may be rewritten. Returns what was written [B, E] bool."""
        wanted = eligible if editable is None else eligible | editable
        first = int(wanted.any(0).int().argmax())  # only what may change needs logits
        rows = slice(first, wanted.shape[1])
        logits = self.forward(step, start, stop, rows)
        awake = int((~self.canvas.ended).sum())
        members = Members(self.rows, awake, len(self.whole.ids))
        contest = Contest(step, logits, eligible[:, rows], rows, stop - start, members)
        if editable is not None:
            ids = self.canvas.ids[:, start:stop][:, rows]
            contest = replace(contest, ids=ids, editable=editable[:, rows])
        with locating(self.lm.transformer, lambda: self.forward(step, start, stop, rows)):
            choice = self.rule.choose(contest)
        self.canvas.commit(choice.picked, choice.tokens, start + first, step)
        if self.observers:
            self.report(step, choice.confidence, start)
        return F.pad(choice.picked, (first, 0))

    def forward(self, step: Step, start: int, stop: int, rows: slice) -> Tensor:
        """Logits [B, rows, V] for the tokens at `rows` of canvas positions start..stop, after guidance."""
        canvas, positions = self.canvas, self.lm.positions(self.canvas.attention_mask)
        ids, mask, classes = canvas.ids[:, start:stop], canvas.attention_mask, canvas.token_class()[:, start:stop]
        guided = self.config.cfg_scale > 0
        if guided:
            ids = torch.cat((ids, ids.masked_fill(canvas.given[:, start:stop], canvas.mask_id)))
            classes = classes.repeat(2, 1)
            mask = mask.repeat(2, 1) if mask is not None else None
            positions = positions.repeat(2, 1) if positions is not None else None
        logits = self.lm.predictions(
            ids,
            rows,
            start=start,
            attention_mask=mask,
            positions=None if positions is None else positions[:, start:stop],
            cache=self.cache,
            context=StepContext(step, classes, start, guided, block=self.block),
        )
        self.forwards += 1
        if guided:
            logits = guide(logits, self.config.cfg_scale)
        if self.config.logits_eos_inf and self.rule.eos is not None:
            logits[..., self.rule.eos] = -torch.inf
        return logits

    def report(self, step: Step, confidence: Tensor, start: int) -> None:
        """Tells the observers what a step committed; confidence [B, T] is that of canvas positions `start` on."""
        everywhere = torch.full(self.whole.ids.shape, -torch.inf, device=confidence.device, dtype=confidence.dtype)
        everywhere[self.rows, start : start + confidence.shape[1]] = confidence
        if self.canvas is not self.whole:
            self.whole.put(self.rows, self.canvas)
        result = StepResult(self.whole.ids, self.whole.committed, everywhere)
        for observer in self.observers:
            observer.on_step(step, result)
