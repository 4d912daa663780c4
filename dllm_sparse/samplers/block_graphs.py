"""Steps of block diffusion as CUDA graph replays: see `graph_steps.py`, and `block_rule.py` for what they decide.

One capture of a step, and one of a finished block's forward, serve every block of every generation of a shape: where a
block lies and how far its tokens see come from device tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.engine.flags import Flags
from dllm_sparse.engine.forward import Window
from dllm_sparse.engine.graphs import Replayed
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.block_rule import BlockRule, Turn
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.samplers.confidence import pick_by_factor, pick_by_rank, pick_by_threshold_or_quota
from dllm_sparse.samplers.graph_buffers import FFNMaker, GraphBuffers
from dllm_sparse.samplers.graph_steps import greedy


class BlockGraphs(GraphBuffers):
    """Static buffers and steps of one batch size and canvas length; T = `block_length` tokens of every row are fed.

    The host moves the block with `begin_block`, launches `step` without waiting, and reads `state` when it must know.
    """

    def __init__(self, lm: LanguageModel, canvas: Canvas, rule: BlockRule, ffn: FFNMaker | None = None) -> None:
        super().__init__(lm, canvas, cached=True, ffn=ffn)
        self.config, self._most_posts = rule.config, rule.most_posts
        device, tokens = lm.device, rule.config.block_length
        self._live = torch.ones(self.rows, dtype=torch.bool, device=device)
        self._quotas = torch.tensor(rule.quotas, device=device)
        self._slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._unmasked = torch.zeros(1, dtype=torch.int64, device=device)  # unmasking steps that the block took
        self._posts = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self._state = torch.zeros(2, dtype=torch.bool, device=device)  # whether it goes on; whether the step wrote
        self.flags = Flags(self._state)
        self._nothing = torch.zeros(0, dtype=torch.int64, device=device)
        self._all = torch.arange(self.rows * tokens, device=device)
        self._step, self._feed = (
            Replayed(body, device, self.pool, self.settle(tokens)) for body in (self._denoise, self._feed_block)
        )

    def captured(self, rows: int) -> bool:
        """Whether steps of so many rows are there: those of all rows, which never leave."""
        return rows == self.rows

    def forget(self, rows: int) -> None:
        """Steps of B * T = `rows` tokens must be captured anew."""
        if rows == len(self._all):
            self._step.forget()
            self._feed.forget()

    def prefill(self, length: int) -> None:
        """Stores the keys and values of the first `length` positions, whole blocks. It is not captured."""
        self.end.fill_(length)
        slots = torch.arange(length, device=self.ids.device)
        self._feed_only(slots, self.config.block_length)
        settle = self.settle(length)
        if settle is not None:
            settle()

    def begin_block(self, begin: int, ended: list[bool], resting: list[bool]) -> None:
        """Moves to the block at canvas position `begin`, in which the rows `resting` [B] take no part: those that have
        `ended`, which count as padding, and those that need no more blocks."""
        torch.arange(begin, begin + len(self._slots), device=self._slots.device, out=self._slots)
        self.end.fill_(begin + len(self._slots))
        self._unmasked.zero_()
        self._posts.zero_()
        self.resting.copy_(torch.tensor(ended))
        self._live.copy_(~torch.tensor(resting))

    def step(self) -> None:
        """One step: what is sure is committed in every row; neither waits nor reads."""
        self._step.run()

    def feed(self) -> None:
        """Stores the keys and values of the block as it is now."""
        self._feed.run()

    def state(self) -> tuple[bool, bool]:
        """Whether the block has something left to decide, and whether its last step wrote: waits for that step."""
        self.flags.post()
        goes_on, written = self.flags.read()
        return goes_on, written

    def _feed_block(self) -> None:
        self._feed_only(self._slots, 0)

    def _feed_only(self, slots: Tensor, block: int) -> None:
        ids = self.ids.index_select(1, slots)
        window = Window(slots, self.positions(slots), self.span(block=block, whole=False))
        self.run_forward(ids, window, self._nothing, lambda: self.classes(ids, slots))
        self.index += 1

    def _denoise(self) -> None:
        slots, live = self._slots, self._live
        ids, given = self.ids.index_select(1, slots), self.given.index_select(1, slots)
        turn = Turn.of(ids.eq(self.mask_id), given, live, self._posts, self._most_posts)
        window = Window(slots, self.positions(slots), self.span(block=0, whole=False))
        logits = self.run_forward(ids, window, self._all, lambda: self.classes(ids, slots))
        found, sure = greedy(logits, self.forward.scratch, self.config)
        tokens, sure = found.view_as(ids), sure.view(ids.shape)
        self.broken |= ((turn.masked | turn.editable) & ~torch.isfinite(sure)).any()
        written = self._pick(torch.where(turn.masked, sure, -torch.inf))
        if self.config.editing_threshold is not None:
            surer = (sure > self.config.editing_threshold) & (tokens != ids)
            written = written | (turn.editable & surer)
        new = torch.where(written, tokens, ids)
        self.ids.index_copy_(1, slots, new)
        when = torch.where(written, self.index, self.commit_step.index_select(1, slots))
        self.commit_step.index_copy_(1, slots, when)
        self.index += 1
        self._unmasked += turn.unmasking.any()
        self._posts.copy_(turn.posts(self._posts, written, self._most_posts))
        after = Turn.of(new.eq(self.mask_id), given, live, self._posts, self._most_posts)
        steps_left = self._unmasked < len(self._quotas)  # none left: the model chose the mask token itself
        goes_on = torch.where(after.unmasking.any(), steps_left, after.editing.any())
        self._state.copy_(torch.cat((goes_on, written.any()[None])))

    def _pick(self, confidence: Tensor) -> Tensor:
        quota = self._quotas.index_select(0, self._unmasked.clamp_max(len(self._quotas) - 1)).expand(self.rows)
        if self.config.threshold is not None:
            return pick_by_threshold_or_quota(confidence, self.config.threshold, quota)
        if self.config.factor is not None:
            return pick_by_factor(confidence, self.config.factor)
        return pick_by_rank(confidence, quota)
