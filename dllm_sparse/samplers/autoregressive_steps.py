"""The autoregressive loop's steps as CUDA graph replays; see `graph_steps.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.engine.forward import Window
from dllm_sparse.engine.graphs import Replayed
from dllm_sparse.kernels.streaming import choose
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.samplers.graph_buffers import FFNMaker, GraphBuffers
from dllm_sparse.types import TokenClass


class AutoregressiveGraphs(GraphBuffers):
    """One token a row and step behind a prefill. Rows that met one of `stop_ids` rest and are filled with `fill`."""

    def __init__(
        self, lm: LanguageModel, canvas: Canvas, stop_ids: Tensor | None, fill: int, ffn: FFNMaker | None = None
    ) -> None:
        super().__init__(lm, canvas, cached=True, ffn=ffn)
        batch, device = canvas.ids.shape[0], lm.device
        self.stop_ids, self.fill = stop_ids, fill
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)
        self._steps: dict[int, Replayed] = {}

    def load(self, canvas: Canvas) -> None:
        """Takes over a new prompt and runs it through the model: step 0."""
        super().load(canvas)
        prompt, batch, device = canvas.prompt_length, self.ids.shape[0], self.ids.device
        slots = torch.arange(prompt, device=device)
        positions = (slots[None] - self.begin[:, None]).clamp_min(0)
        self.end.fill_(prompt)
        window = Window(slots, positions.flatten(), self.span(block=1, whole=False))
        rows = torch.arange(1, batch + 1, device=device) * prompt - 1
        ids = self.ids[:, :prompt].contiguous()
        classes = torch.full_like(ids, TokenClass.PROMPT).masked_fill_(slots < self.begin[:, None], TokenClass.PADDING)
        logits = self.run_forward(ids, window, rows, lambda: classes)
        settle = self.settle(prompt)
        if settle is not None:  # a prefill is not captured, but comes again
            settle()
        self.slot.fill_(prompt - 1)
        self.position.copy_(positions[:, -1])
        self._commit(logits)

    def captured(self, rows: int) -> bool:
        """Whether steps of so many rows were run before."""
        return rows in self._steps

    def forget(self, rows: int) -> None:
        """Steps of `rows` tokens, one a row, must be captured anew."""
        if rows in self._steps:
            self._steps[rows].forget()

    def by_row(self) -> tuple[Tensor, ...]:
        """The buffers [B, ...] that go with a row when it changes its place."""
        return *super().by_row(), self.position

    def run(self) -> None:
        """The next token of every row that is fed; neither waits nor reads."""
        if self.rows not in self._steps:
            self._steps[self.rows] = Replayed(self._decode, self.ids.device, self.pool, self.settle(1))
        self._steps[self.rows].run()

    def _decode(self) -> None:
        ids = self.ids[: self.rows].index_select(1, self.slot)
        window = Window(self.slot, self.position[: self.rows], self.span(block=1, whole=False))
        self._commit(self.run_forward(ids, window, torch.arange(self.rows, device=ids.device), self._classes))

    def _classes(self) -> Tensor:
        """Class [B, 1]: the token fed was committed by the step before; rows that ended are padding."""
        ended = self.resting[: self.rows, None].to(torch.int64)
        return TokenClass.COMMITTED + (TokenClass.PADDING - TokenClass.COMMITTED) * ended

    def _commit(self, logits: Tensor) -> None:
        """Writes the next token and moves on by one."""
        tokens, probability = choose(logits, self.forward.scratch)
        ended = self.resting[: self.rows]
        self.broken |= (~ended & ~torch.isfinite(probability)).any()
        self.slot += 1
        self.end += 1
        self.position += 1
        self.ids[: self.rows].index_copy_(1, self.slot, torch.where(ended, self.fill, tokens)[:, None])
        when = torch.where(ended, -1, self.index)
        self.commit_step[: self.rows].index_copy_(1, self.slot, when[:, None])
        if self.stop_ids is not None:
            ended |= torch.isin(tokens, self.stop_ids)
        self.index += 1
