"""What captured steps of both loops work on: static buffers, which rows are fed, and the set a model keeps."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor

from dllm_sparse.engine.flags import Flags
from dllm_sparse.engine.forward import FFNRunner, FixedForward, Window
from dllm_sparse.kernels.cached_attention import Span
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.types import NonFiniteActivations, TokenClass

_FORWARDS_FOR_A_CAPTURE = 32
"""Forwards still planned that make up for capturing steps of fewer rows, which costs two or three plain forwards."""

FFNMaker = Callable[[FixedForward], FFNRunner]
"""Makes the FFN that replaces the dense one, once the static buffers are there."""


class GraphBuffers(ABC):
    """Static buffers of one batch size B and canvas length L.

    Steps feed the first `rows` places, all or a power of two, and `order` says which row of the canvas sits in each.
    Rows with nothing left to decide (`resting` [B] bool, by place) leave: those behind take their places.
    """

    def __init__(self, lm: LanguageModel, canvas: Canvas, *, cached: bool, ffn: FFNMaker | None) -> None:
        batch, length = canvas.ids.shape
        device = lm.device
        self.lm = lm
        self.forward = FixedForward(lm.transformer, length)
        self.cached = cached
        self.cache = KVCache(lm.config, batch, length, device, lm.dtype, layers=None if cached else 1)
        self.ffn = ffn(self.forward) if ffn is not None else None
        self.mask_id = canvas.mask_id
        self.ids = torch.zeros_like(canvas.ids)
        self.given = torch.zeros_like(canvas.given)
        self.commit_step = torch.zeros_like(canvas.ids)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.broken = torch.zeros(1, dtype=torch.bool, device=device)
        self.begin = torch.zeros(batch, dtype=torch.int64, device=device)
        self.end = torch.full((1,), length, dtype=torch.int64, device=device)
        self.resting = torch.zeros(batch, dtype=torch.bool, device=device)
        self.flags = Flags(self.resting)
        self.rows, self.order = batch, list(range(batch))
        self.padded = canvas.padded
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @abstractmethod
    def captured(self, rows: int) -> bool:
        """Whether steps of so many rows were run before."""

    @abstractmethod
    def forget(self, rows: int) -> None:
        """Steps of B * T = `rows` tokens must be captured anew."""

    def load(self, canvas: Canvas) -> None:
        """Takes over a new canvas of the same shape."""
        self.rows, self.order = len(self.order), list(range(len(self.order)))
        self.ids.copy_(canvas.ids)
        self.given.copy_(canvas.given)
        self.commit_step.fill_(-1)
        self.broken.zero_()
        self.index.zero_()
        self.resting.zero_()
        self.flags.forget()
        for rows in self.ffn.reset() if self.ffn is not None else ():
            self.forget(rows)
        if canvas.attention_mask is not None:
            self.begin.copy_((canvas.attention_mask == 0).sum(-1))

    def take(self, canvas: Canvas) -> None:
        """Takes over what was changed on the canvas between blocks."""
        self.ids.copy_(canvas.ids[self._index(self.order)])

    def leave(self, resting: list[bool], forwards_left: int, *, keep_cache: bool) -> None:
        """Feeds only as many rows as hold those not `resting` [B]; their keys and values come along if asked for."""
        awake = [not rests for rests in resting]
        self.rows = self._enough_rows(sum(awake), forwards_left)
        empty = [place for place in range(self.rows) if not awake[place]]
        behind = [place for place in range(self.rows, len(awake)) if awake[place]]
        if not behind:
            return
        empty = empty[: len(behind)]
        places = list(range(len(awake)))
        for one, other in zip(empty, behind, strict=True):
            places[one], places[other] = other, one
        index = self._index(places)
        for values in self.by_row():
            values.copy_(values[index])
        self.order = [self.order[place] for place in places]
        if keep_cache:
            self.cache.move(self._index(behind), self._index(empty))
        if self.flags.forget():  # they name places as they were
            self.flags.post()

    def by_row(self) -> tuple[Tensor, ...]:
        """The buffers [B, ...] that go with a row when it changes its place."""
        return self.ids, self.given, self.commit_step, self.begin, self.resting

    def _enough_rows(self, needed: int, forwards_left: int) -> int:
        """The smallest power of two that holds the rows needed and is worth its capture, else all rows."""
        pays = forwards_left >= _FORWARDS_FOR_A_CAPTURE or not self.ids.is_cuda
        rows, batch = 1, len(self.order)
        while rows < batch and (rows < needed or not (pays or self.captured(rows))):
            rows *= 2
        return min(rows, batch)

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, device=self.ids.device)

    def span(self, *, block: int, whole: bool) -> Span:
        """What the rows that are fed may see."""
        return Span(self.begin[: self.rows], self.end, padded=self.padded, block=block, whole=whole)

    def positions(self, slots: Tensor) -> Tensor:
        """Rotary positions [rows * T] of canvas positions [T], as `LanguageModel.positions` has them."""
        if not self.lm.config.text_positions:
            return slots.repeat(self.rows)
        return (slots - self.begin[: self.rows, None]).clamp_min(0).flatten()

    def classes(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Class [B, T] int64 of every token fed, as `Canvas.token_class` has it."""
        classes = torch.full_like(ids, TokenClass.DECODED)
        committed = self.commit_step[: len(ids)].index_select(1, slots) == self.index - 1
        classes.masked_fill_(committed, TokenClass.COMMITTED)
        classes.masked_fill_(self.given[: len(ids)].index_select(1, slots), TokenClass.PROMPT)
        classes.masked_fill_(ids.eq(self.mask_id), TokenClass.MASKED)
        hidden = (slots < self.begin[: len(ids), None]) | self.resting[: len(ids), None]
        return classes.masked_fill_(hidden, TokenClass.PADDING)

    def run_forward(self, ids: Tensor, window: Window, rows: Tensor, classes: Callable[[], Tensor]) -> Tensor:
        """Logits [R, V] of flat rows [R] of ids [B, T], whose token classes an FFN that counts wants to know."""
        cache = self.cache.front(len(ids))
        if self.ffn is None:
            return self.forward(ids, window, cache, rows)
        with self.forward.aside:
            self.ffn.begin(classes())
        logits = self.forward(ids, window, cache, rows, self.ffn)
        self.ffn.end()
        return logits

    def settle(self, tokens: int) -> Callable[[], None] | None:
        """What to do between the first, plain run of a step of T tokens a row and its capture."""
        ffn, rows = self.ffn, tokens * self.rows
        return None if ffn is None else lambda: ffn.settle(rows)

    def store(self, canvas: Canvas) -> None:
        """Gives the canvas what was decoded so far; raises NonFiniteActivations if a step met NaN or Inf."""
        if bool(self.broken):
            step = int(self.index) - 1
            raise NonFiniteActivations(
                f"NaN or Inf in the logits at or before step {step}; execution 'eager' names layer and site"
            )
        order = self._index(self.order)
        canvas.ids[order] = self.ids
        canvas.commit_step[order] = self.commit_step[:, canvas.prompt_length :]


GraphsT = TypeVar("GraphsT", bound=GraphBuffers)


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
