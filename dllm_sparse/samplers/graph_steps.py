"""Steps of both loops as CUDA graph replays: forward, choice and commit in one launch, nothing read back by the host.

They replace how a step is executed, not what is decided: the loops are the same, the choices are the functions of
`confidence.py`, and everything that changes from step to step lives in device tensors. On a CPU the same bodies run
without a graph, which is how the tests compare them with the plain path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sparse.engine.forward import Window
from dllm_sparse.engine.graphs import Replayed
from dllm_sparse.engine.observing import GraphableObserver, StepClock
from dllm_sparse.kernels.experts import never_waits
from dllm_sparse.kernels.streaming import Scratch, choose
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.samplers.confidence import pick_by_factor, pick_by_rank, pick_by_threshold
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.graph_buffers import FFNMaker, GraphBuffers
from dllm_sparse.types import Observers, UsageError

_LEAST_FORWARDS = 8
"""A capture costs about as much as two or three plain forwards."""


def graphable(
    lm: LanguageModel, config: SamplerConfig, observers: Observers, forwards: int
) -> tuple[bool, GraphableObserver | None]:
    """Whether to decode as graphs, and the observer that replaces the FFN if there is one.

    `config.execution` "auto" does where it can on a GPU and the capture is paid back. Raises UsageError where "graph"
    was asked for and cannot be.
    """
    brings = [observer for observer in observers if isinstance(observer, GraphableObserver)]
    reason = why_not_graphed(lm, config)
    if any(not isinstance(observer, GraphableObserver | StepClock) for observer in observers):
        reason = reason or "observers see every step on the host"
    elif len(brings) > 1 or any(observer.graph_key() is None for observer in brings):
        reason = reason or "these masks are computed by the plain path only"
    native = lm.transformer.ffns if lm.engine == "native" else []
    served = {id(observer) for observer in brings}
    if any(ffn.override is not None and id(ffn.override) not in served for ffn in native):
        reason = reason or "the FFNs are overridden by an enclosing block"
    if config.execution == "graph" and reason is not None:
        raise UsageError(f"execution 'graph' cannot run this: {reason}; use execution 'auto'")
    wanted = config.execution == "graph" or (
        config.execution == "auto" and lm.device.type == "cuda" and forwards >= _LEAST_FORWARDS
    )
    return wanted and reason is None, brings[0] if brings else None


def why_not_graphed(lm: LanguageModel, config: SamplerConfig) -> str | None:
    """What keeps a decoding from running as graphs; None where it can. The plain path does everything."""
    if lm.engine != "native":
        return "the model runs through transformers"
    if lm.config.experts and lm.device.type == "cuda" and not never_waits(lm.device, lm.dtype):
        return "experts without a grouped product are counted by the host"
    if lm.dtype == torch.float64 and lm.device.type == "cuda":
        return "the kernels do not compute in float64"
    if config.temperature > 0:
        return "temperature above 0 draws its noise on the host"
    if lm.kind == "autoregressive":
        return None
    reasons = (
        (config.draws, f"remasking {config.remasking!r} draws random numbers on the host"),
        (config.by_timesteps and config.by_quota, f"remasking {config.remasking!r} plans its steps on the host"),
        (config.remasking == "topk_margin", "remasking 'topk_margin' compares two tokens of a position"),
        (config.top_p is not None or config.top_k is not None, "top_p and top_k sort the vocabulary"),
        (config.cfg_scale > 0, "guidance doubles the rows"),
        (config.logits_eos_inf or config.confidence_eos_eot_inf, "logits are edited between the model and the choice"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def greedy(logits: Tensor, scratch: Scratch, config: SamplerConfig) -> tuple[Tensor, Tensor]:
    """The best token [M] of logits [M, V] and its probability [M] in the type that confidences have."""
    wide = config.confidence_dtype == "float64" or logits.dtype == torch.float64
    tokens, probability = choose(logits, scratch, wide=wide)
    return tokens, probability.to(logits.dtype) if config.confidence_dtype == "model" else probability


@dataclass(slots=True)
class _Shape:
    """One captured step: T tokens fed, of which R consecutive ones compete for a commit."""

    slots: Tensor  # [T] canvas positions
    row_slots: Tensor  # [R]
    row_offset: Tensor  # [1] where the rows begin inside the window
    step: Replayed
    placed: tuple[int, int] = (-1, -1)

    def place(self, start: int, begin: int) -> None:
        """Moves the window to `start` and the rows to `begin`; nothing happens where they already are."""
        if self.placed != (start, begin):
            torch.arange(start, start + len(self.slots), device=self.slots.device, out=self.slots)
            torch.arange(begin, begin + len(self.row_slots), device=self.slots.device, out=self.row_slots)
            self.row_offset.fill_(begin - start)
            self.placed = start, begin


class DiffusionGraphs(GraphBuffers):
    """The denoising loop's steps. `run` neither waits nor reads; `resting_rows` reads one flag a row."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, config: SamplerConfig, ffn: FFNMaker | None = None) -> None:
        super().__init__(lm, canvas, cached=config.cache != "none", ffn=ffn)
        self.config = config
        self.quota = torch.zeros(canvas.ids.shape[0], dtype=torch.int64, device=lm.device)
        self.left = torch.zeros_like(self.quota)  # of the budgets of earlier steps
        self.masks_won = torch.zeros(1, dtype=torch.bool, device=lm.device)
        self._quota: int | None = None
        self._shapes: dict[tuple[int, int, int], _Shape] = {}

    def load(self, canvas: Canvas) -> None:
        """Takes over a new canvas of the same shape."""
        super().load(canvas)
        self.masks_won.zero_()
        self.left.zero_()

    def by_row(self) -> tuple[Tensor, ...]:
        """The buffers [B, ...] that go with a row when it changes its place."""
        return *super().by_row(), self.left

    def captured(self, rows: int) -> bool:
        """Whether steps of so many rows were run before."""
        return any(shape[0] == rows for shape in self._shapes)

    def forget(self, rows: int) -> None:
        """Steps of B * T = `rows` tokens must be captured anew."""
        for (batch, tokens, _), shape in self._shapes.items():
            if batch * tokens == rows:
                shape.step.forget()

    def begin_block(self, ended: list[bool], forwards_left: int, *, leave: bool) -> None:
        """Wakes all rows of the canvas that have not `ended` [B]; no cache is kept: a full forward comes next."""
        resting = [ended[row] for row in self.order]
        self.resting.zero_()
        if any(resting):
            self.resting.copy_(torch.tensor(resting))
        if leave:
            self.leave(resting, forwards_left, keep_cache=False)

    def run(self, start: int, stop: int, begin: int, competing: int, quota: int | None) -> None:
        """One step over canvas positions start..stop; `competing` from `begin` on compete, `quota` of each row win, or
        may win where a threshold has a budget."""
        key = self.rows, stop - start, competing
        shape = self._shapes.get(key) or self._shapes.setdefault(key, self._capture(*key))
        shape.place(start, begin)
        if quota is not None and quota != self._quota:
            self.quota.fill_(quota)
            self._quota = quota
        shape.step.run()

    def resting_rows(self) -> list[bool]:
        """By place, whether nothing is left to decide in the block of the last step: waits for that step."""
        self.flags.post()
        return self.flags.read()

    def _capture(self, batch: int, tokens: int, competing: int) -> _Shape:
        device = self.ids.device
        slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        row_slots = torch.zeros(competing, dtype=torch.int64, device=device)
        offset = torch.zeros(1, dtype=torch.int64, device=device)
        first = torch.arange(batch, device=device)[:, None] * tokens
        # A shifted model's logits come from the position before; behind a cache the first one is not asked.
        inside = torch.arange(competing, device=device) - self.lm.config.logit_shift

        def body() -> None:
            window = Window(slots, self.positions(slots), self.span(block=0, whole=True))
            ids = self.ids[:batch].index_select(1, slots)
            rows = (first + (inside + offset).clamp_min(0)).flatten()
            self._commit(self.run_forward(ids, window, rows, lambda: self.classes(ids, slots)), row_slots)

        return _Shape(slots, row_slots, offset, Replayed(body, device, self.pool, self.settle(tokens)))

    def _commit(self, logits: Tensor, row_slots: Tensor) -> None:
        tokens, probability = greedy(logits, self.forward.scratch, self.config)
        fed_ids, fed_steps = self.ids[: self.rows], self.commit_step[: self.rows]
        current = fed_ids.index_select(1, row_slots)
        masked = current.eq(self.mask_id)
        tokens, probability = tokens.view_as(current), probability.view(current.shape)
        self.broken |= (masked & ~torch.isfinite(probability)).any()
        picked = self._pick(torch.where(masked, probability, -torch.inf))
        self.masks_won |= (picked & tokens.eq(self.mask_id)).any()
        new = torch.where(picked, tokens, current)
        fed_ids.index_copy_(1, row_slots, new)
        when = torch.where(picked, self.index, fed_steps.index_select(1, row_slots))
        fed_steps.index_copy_(1, row_slots, when)
        # A planned block ends for all rows at once, and none does where only its first position competed.
        if not self.config.by_quota and len(row_slots) == self.config.block_length:
            torch.logical_not(new.eq(self.mask_id).any(-1), out=self.resting[: self.rows])
        self.index += 1

    def _pick(self, confidence: Tensor) -> Tensor:
        if self.config.by_budget:
            left = self.left[: self.rows]
            left += self.quota[: self.rows]
            picked = pick_by_rank(confidence, left, self.config.threshold)
            left -= picked.sum(-1)
            return picked
        if self.config.threshold is not None:
            return pick_by_threshold(confidence, self.config.threshold)
        if self.config.factor is not None:
            return pick_by_factor(confidence, self.config.factor)
        return pick_by_rank(confidence, self.quota[: self.rows])
