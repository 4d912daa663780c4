"""Steps of both loops as CUDA graph replays: forward, choice and commit in one launch, nothing read back by the host.

They replace how a step is executed, not what is decided: the loops are the same, the choices are the functions of
`confidence.py`, and everything that changes from step to step lives in device tensors. On a CPU the same bodies run
without a graph, which is how the tests compare them with the plain path.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from dllm_sparse.engine.forward import FFNRunner, FixedForward, Window
from dllm_sparse.engine.graphs import Replayed
from dllm_sparse.engine.observing import GraphableObserver, StepClock
from dllm_sparse.kernels.cached_attention import Span
from dllm_sparse.kernels.streaming import choose
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.transformer import KVCache
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.samplers.confidence import pick_by_factor, pick_by_rank, pick_by_threshold
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.types import NonFiniteActivations, Observers, TokenClass, UsageError

_LEAST_FORWARDS = 8
"""A capture costs about as much as two or three plain forwards."""

FFNMaker = Callable[[FixedForward], FFNRunner]
"""Makes the FFN that replaces the dense one, once the static buffers are there."""


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
    if lm.dtype == torch.float64 and lm.device.type == "cuda":
        return "the kernels do not compute in float64"
    if config.temperature > 0:
        return "temperature above 0 draws its noise on the host"
    if lm.kind == "autoregressive":
        return None
    reasons = (
        (config.remasking != "low_confidence", f"remasking {config.remasking!r} draws random numbers on the host"),
        (config.cfg_scale > 0, "guidance doubles the rows"),
        (config.logits_eos_inf or config.confidence_eos_eot_inf, "logits are edited between the model and the choice"),
        (lm.config.logit_shift != 0, "the model predicts the next position"),
    )
    return next((reason for holds, reason in reasons if holds), None)


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


class _Graphs:
    """Static buffers of one batch size B and canvas length L, shared by both loops."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, *, cached: bool, ffn: FFNMaker | None) -> None:
        batch, length = canvas.ids.shape
        device = lm.device
        self.lm = lm
        self.forward = FixedForward(lm.transformer, length)
        self.cache = KVCache(lm.config, batch, length, device, lm.dtype, layers=None if cached else 1)
        self.ffn = ffn(self.forward) if ffn is not None else None
        self.ids = torch.zeros_like(canvas.ids)
        self.commit_step = torch.zeros_like(canvas.ids)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.broken = torch.zeros(1, dtype=torch.bool, device=device)
        self.begin = torch.zeros(batch, dtype=torch.int64, device=device)
        self.end = torch.full((1,), length, dtype=torch.int64, device=device)
        self.prompt_length = torch.zeros(1, dtype=torch.int64, device=device)
        self.padded = canvas.padded
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def load(self, canvas: Canvas) -> None:
        """Takes over a new canvas of the same shape."""
        self.ids.copy_(canvas.ids)
        self.commit_step.fill_(-1)
        self.broken.zero_()
        self.index.zero_()
        for rows in self.ffn.reset() if self.ffn is not None else ():
            self.forget(rows)
        self.prompt_length.fill_(canvas.prompt_length)
        if canvas.attention_mask is not None:
            self.begin.copy_((canvas.attention_mask == 0).sum(-1))

    def forget(self, rows: int) -> None:
        """Steps of B * T = `rows` tokens must be captured anew."""
        raise NotImplementedError  # each loop has its own

    def run_forward(self, ids: Tensor, window: Window, rows: Tensor, classes: Callable[[], Tensor]) -> Tensor:
        """Logits [R, V] of flat rows [R] of ids [B, T], whose token classes an FFN that counts wants to know."""
        if self.ffn is None:
            return self.forward(ids, window, self.cache, rows)
        self.ffn.begin(classes())
        logits = self.forward(ids, window, self.cache, rows, self.ffn)
        self.ffn.end()
        return logits

    def settle(self, tokens: int) -> Callable[[], None] | None:
        """What to do between the first, plain run of a step of T tokens a row and its capture."""
        ffn, rows = self.ffn, tokens * self.ids.shape[0]
        return None if ffn is None else lambda: ffn.settle(rows)

    def store(self, canvas: Canvas) -> None:
        """Gives the canvas what was decoded so far; raises NonFiniteActivations if a step met NaN or Inf."""
        if bool(self.broken):
            step = int(self.index) - 1
            raise NonFiniteActivations(
                f"NaN or Inf in the logits at or before step {step}; execution 'eager' names layer and site"
            )
        canvas.ids.copy_(self.ids)
        canvas.commit_step.copy_(self.commit_step[:, canvas.prompt_length :])


GraphsT = TypeVar("GraphsT", bound="_Graphs")


def kept_graphs(lm: LanguageModel, key: tuple[object, ...], make: Callable[[], GraphsT]) -> GraphsT:
    """The captured steps of an earlier generation with the same key and weights, else new ones; a model keeps one set.

    Captured steps hold addresses: weights that were moved, cast or replaced need new ones.
    """
    if lm.graphs is None or lm.graphs[0] != (*key, *_addresses(lm)):
        lm.graphs = None
        gc.collect()  # its parts refer to each other: the old buffers must go before the new ones come
        made = make()
        lm.graphs = (*key, *_addresses(lm)), made  # only now: making them may have stored weights by input
    return cast("GraphsT", lm.graphs[1])


def _addresses(lm: LanguageModel) -> tuple[object, ...]:
    return lm.device, lm.dtype, *(parameter.data_ptr() for parameter in lm.transformer.parameters())


def on_device(lm: LanguageModel) -> AbstractContextManager[object]:
    """Makes the model's GPU the current one: kernels and captures go where the weights are."""
    return torch.cuda.device(lm.device) if lm.device.type == "cuda" else nullcontext()


class DiffusionGraphs(_Graphs):
    """The denoising loop's steps. `run` neither waits nor reads; `unfinished` reads one number."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, config: SamplerConfig, ffn: FFNMaker | None = None) -> None:
        super().__init__(lm, canvas, cached=config.cache != "none", ffn=ffn)
        self.config, self.mask_id = config, canvas.mask_id
        self.quota = torch.zeros(canvas.ids.shape[0], dtype=torch.int64, device=lm.device)
        self.remaining = torch.zeros(1, dtype=torch.int64, device=lm.device)
        self.masks_won = torch.zeros(1, dtype=torch.bool, device=lm.device)
        self._quota: int | None = None
        self._shapes: dict[tuple[int, int], _Shape] = {}

    def load(self, canvas: Canvas) -> None:
        """Takes over a new canvas of the same shape."""
        super().load(canvas)
        self.masks_won.zero_()

    def run(self, start: int, stop: int, begin: int, quota: int | None) -> None:
        """One step over canvas positions start..stop; the block from `begin` on competes, `quota` of each row win."""
        tokens, rows = stop - start, self.config.block_length
        shape = self._shapes.get((tokens, rows))
        if shape is None:
            shape = self._shapes[tokens, rows] = self._capture(tokens, rows)
        shape.place(start, begin)
        if quota is not None and quota != self._quota:
            self.quota.fill_(quota)
            self._quota = quota
        shape.step.run()

    def forget(self, rows: int) -> None:
        """Steps of B * T = `rows` tokens must be captured anew."""
        for (tokens, _), shape in self._shapes.items():
            if tokens * self.ids.shape[0] == rows:
                shape.step.forget()

    def unfinished(self) -> bool:
        """Whether the block of the last step still holds masks: waits for that step."""
        return int(self.remaining) > 0

    def _capture(self, tokens: int, competing: int) -> _Shape:
        device, batch = self.ids.device, self.ids.shape[0]
        slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        row_slots = torch.zeros(competing, dtype=torch.int64, device=device)
        offset = torch.zeros(1, dtype=torch.int64, device=device)
        first = torch.arange(batch, device=device)[:, None] * tokens + torch.arange(competing, device=device)

        def body() -> None:
            span = Span(self.begin, self.end, padded=self.padded, causal=False, whole=True)
            window = Window(slots, slots.repeat(batch), span)
            ids = self.ids.index_select(1, slots)
            rows = (first + offset).flatten()
            self._commit(self.run_forward(ids, window, rows, lambda: self._classes(ids, slots)), row_slots)

        return _Shape(slots, row_slots, offset, Replayed(body, device, self.pool, self.settle(tokens)))

    def _classes(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Class [B, T] int64 of every token fed, as `Canvas.token_class` has it."""
        classes = torch.full_like(ids, TokenClass.DECODED)
        classes.masked_fill_(self.commit_step.index_select(1, slots) == self.index - 1, TokenClass.COMMITTED)
        classes.masked_fill_(slots < self.prompt_length, TokenClass.PROMPT)
        classes.masked_fill_(ids.eq(self.mask_id), TokenClass.MASKED)
        return classes.masked_fill_(slots < self.begin[:, None], TokenClass.PADDING)

    def _commit(self, logits: Tensor, row_slots: Tensor) -> None:
        tokens, probability = choose(logits, self.forward.scratch, wide=self._wide(logits))
        if self.config.confidence_dtype == "model":
            probability = probability.to(logits.dtype)
        current = self.ids.index_select(1, row_slots)
        masked = current.eq(self.mask_id)
        tokens, probability = tokens.view_as(current), probability.view(current.shape)
        self.broken |= (masked & ~torch.isfinite(probability)).any()
        picked = self._pick(torch.where(masked, probability, -torch.inf))
        self.masks_won |= (picked & tokens.eq(self.mask_id)).any()
        new = torch.where(picked, tokens, current)
        self.ids.index_copy_(1, row_slots, new)
        when = torch.where(picked, self.index, self.commit_step.index_select(1, row_slots))
        self.commit_step.index_copy_(1, row_slots, when)
        self.remaining.copy_(new.eq(self.mask_id).sum())
        self.index += 1

    def _wide(self, logits: Tensor) -> bool:
        return self.config.confidence_dtype == "float64" or logits.dtype == torch.float64

    def _pick(self, confidence: Tensor) -> Tensor:
        if self.config.threshold is not None:
            return pick_by_threshold(confidence, self.config.threshold)
        if self.config.factor is not None:
            return pick_by_factor(confidence, self.config.factor)
        return pick_by_rank(confidence, self.quota)


class AutoregressiveGraphs(_Graphs):
    """One token a row and step behind a prefill. Rows that met one of `stop_ids` are filled with `fill`."""

    def __init__(
        self, lm: LanguageModel, canvas: Canvas, stop_ids: Tensor | None, fill: int, ffn: FFNMaker | None = None
    ) -> None:
        super().__init__(lm, canvas, cached=True, ffn=ffn)
        batch, device = canvas.ids.shape[0], lm.device
        self.stop_ids, self.fill = stop_ids, fill
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._step = Replayed(self._decode, device, self.pool, self.settle(1))

    def load(self, canvas: Canvas) -> None:
        """Takes over a new prompt and runs it through the model: step 0."""
        super().load(canvas)
        self.finished.zero_()
        prompt, batch, device = canvas.prompt_length, self.ids.shape[0], self.ids.device
        slots = torch.arange(prompt, device=device)
        positions = (slots[None] - self.begin[:, None]).clamp_min(0)
        self.end.fill_(prompt)
        span = Span(self.begin, self.end, padded=self.padded, causal=True, whole=False)
        rows = torch.arange(1, batch + 1, device=device) * prompt - 1
        ids = self.ids[:, :prompt].contiguous()
        classes = torch.full_like(ids, TokenClass.PROMPT).masked_fill_(slots < self.begin[:, None], TokenClass.PADDING)
        logits = self.run_forward(ids, Window(slots, positions.flatten(), span), rows, lambda: classes)
        self.slot.fill_(prompt - 1)
        self.position.copy_(positions[:, -1])
        self._commit(logits)

    def run(self) -> None:
        """The next token of every row; neither waits nor reads."""
        self._step.run()

    def forget(self, rows: int) -> None:
        """Steps of `rows` tokens, one a row, must be captured anew."""
        if rows == self.ids.shape[0]:
            self._step.forget()

    def all_finished(self) -> bool:
        """Whether every row has ended: waits for the last step."""
        return bool(self.finished.all())

    def _decode(self) -> None:
        span = Span(self.begin, self.end, padded=self.padded, causal=True, whole=False)
        batch = self.ids.shape[0]
        rows = torch.arange(batch, device=self.ids.device)
        ids = self.ids.index_select(1, self.slot)
        window = Window(self.slot, self.position, span)
        self._commit(self.run_forward(ids, window, rows, self._classes))

    def _classes(self) -> Tensor:
        """Class [B, 1]: the token fed was committed by the step before; rows that ended are padding."""
        ended = self.finished[:, None].to(torch.int64)
        return TokenClass.COMMITTED + (TokenClass.PADDING - TokenClass.COMMITTED) * ended

    def _commit(self, logits: Tensor) -> None:
        """Writes the next token and moves on by one."""
        tokens, probability = choose(logits, self.forward.scratch)
        self.broken |= (~self.finished & ~torch.isfinite(probability)).any()
        self.slot += 1
        self.end += 1
        self.position += 1
        self.ids.index_copy_(1, self.slot, torch.where(self.finished, self.fill, tokens)[:, None])
        when = torch.where(self.finished, -1, self.index)
        self.commit_step.index_copy_(1, self.slot, when[:, None])
        if self.stop_ids is not None:
            self.finished |= torch.isin(tokens, self.stop_ids)
        self.index += 1
