"""Block diffusion: the blocks of a block-causal model, denoised one after the other behind cached finished blocks.

A block is the model's `block_length` tokens counted from the row's first token, so the end of a prompt shares a block
with the first generated tokens, and the last block is filled up with masks that are decoded and cut off. Forwards: one
for the whole blocks of the prompt; one a denoising step, which feeds the block alone; one for a finished block whose
tokens have changed since they were fed, unless no block follows. Each is a step of its own. A finished block cannot
change any more, so the cache is exact. Observers see the canvas with the rows' blocks beside each other (`Layout`).
Shapes: B rows, L tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.engine.observing import GraphableObserver, StepClock
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.block_graphs import BlockGraphs
from dllm_sparse.samplers.block_layout import Layout
from dllm_sparse.samplers.block_rule import BlockRule, Turn
from dllm_sparse.samplers.canvas import Canvas, Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.graph_buffers import kept_graphs, on_device
from dllm_sparse.samplers.graph_steps import graphable
from dllm_sparse.samplers.steps import Steps
from dllm_sparse.types import Observers, Step, StepResult

_SHARED_LENGTHS = 256
"""Canvases of captured steps are filled up to multiples of so many positions, so that one capture serves many prompts.
Nothing is fed or read there."""


def denoise_blocks(
    lm: LanguageModel, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig, observers: Observers
) -> Decoded:
    """Decodes `gen_length` masks behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding.

    Source: LLaDA2.0 (arXiv 2512.15745) and SDAR (arXiv 2510.06303).
    """
    assert lm.mask_token_id is not None
    layout, rule = Layout(prompt, attention_mask, config), BlockRule(lm, config)
    as_graphs, masking = graphable(lm, config, observers, layout.blocks * rule.steps)
    canvas = layout.canvas(lm.mask_token_id, _SHARED_LENGTHS if as_graphs else 1)
    for observer in observers:
        observer.on_start(canvas.ids, canvas.token_class())
    if not as_graphs:
        return _decode(_Loop(lm, canvas, observers, rule, layout))
    with lm.graphs_lock, on_device(lm):
        return _decode(_GraphLoop(lm, canvas, observers, rule, layout, masking))


def _decode(loop: _Loop | _GraphLoop) -> Decoded:
    layout = loop.layout
    loop.prefill()
    for block in range(layout.blocks):
        loop.run_block(block)
        if loop.config.stop_at_eos and loop.end_rows(block):
            break
        if block + 1 < layout.blocks:
            loop.store(block)
    return layout.decoded(loop.canvas, loop.finish(), loop.execution)


class _Loop(Steps):
    """Runs forwards layer by layer."""

    execution = "eager"

    def __init__(
        self, lm: LanguageModel, canvas: Canvas, observers: Observers, rule: BlockRule, layout: Layout
    ) -> None:
        super().__init__(lm, canvas, rule.config, observers, rule)
        self.block_rule, self.layout = rule, layout
        self.use_cache()
        self.began = 0  # step index of the block's first forward, the prefill being block 0's
        self.stale = False  # whether the block's tokens changed since they were last fed

    def prefill(self) -> None:
        """Stores the keys and values of the prompt's whole blocks."""
        if self.layout.prefix:
            self._feed_only(0, slice(0, self.layout.prefix))

    def store(self, block: int) -> None:
        """Stores a finished block; nothing to do where its last forward already saw its last tokens."""
        if self.stale:
            self._feed_only(block, self.layout.window(block))

    def run_block(self, block: int) -> None:
        """Denoises one block of every row; rows that are finished edit theirs until nothing changes."""
        canvas, window, most_posts = self.canvas, self.layout.window(block), self.block_rule.most_posts
        resting = torch.tensor(self.layout.resting(block, canvas.ended.tolist()), device=canvas.ids.device)
        posts = torch.zeros(len(resting), dtype=torch.int64, device=resting.device)
        self.block = window.start, window.stop
        self.began, self.stale = self.index if block else 0, True
        self.rule.start_block(canvas.masked()[:, window].sum(-1).tolist())
        while True:
            masks, given = canvas.ids[:, window] == canvas.mask_id, canvas.given[:, window]
            turn = Turn.of(masks, given, ~resting, posts, most_posts)
            if bool(turn.unmasking.any()):
                if not self.block_rule.left:
                    return  # the model chose the mask token itself
            elif not bool(turn.editing.any()):
                return
            written = self.take(self._step(block), *self.block, turn.masked, turn.editable)
            self.index += 1
            self.stale = bool(written.any())
            posts = turn.posts(posts, written, most_posts)

    def end_rows(self, block: int) -> bool:
        """Ends rows that hold an end of text; True once all have ended."""
        return _end_rows(self.canvas, self.rule.ends, self.layout.window(block).stop)

    def finish(self) -> int:
        """Returns the forwards that were run."""
        return self.forwards

    def _step(self, block: int) -> Step:
        return self.layout.step(self.index, self.began, block, self.block_rule.steps)

    def _feed_only(self, block: int, window: slice) -> None:
        """A step whose forward is for its keys and values alone; it decides nothing."""
        step, canvas = self._step(block), self.canvas
        self.forward(step, window.start, window.stop, slice(0))
        nothing = torch.zeros_like(canvas.ids[:, window])
        canvas.commit(nothing.bool(), nothing, window.start, step)
        self.index += 1
        for observer in self.observers:
            observer.on_step(step, StepResult(canvas.ids, canvas.committed))


class _GraphLoop:
    """The same steps, each one replay of a captured graph; the host reads two flags a step, and none of a step behind
    which another one surely comes."""

    execution = "graph"

    def __init__(
        self,
        lm: LanguageModel,
        canvas: Canvas,
        observers: Observers,
        rule: BlockRule,
        layout: Layout,
        masking: GraphableObserver | None,
    ) -> None:
        self.canvas, self.config, self.rule, self.layout, self.masking = canvas, rule.config, rule, layout, masking
        self._clocks = [observer for observer in observers if isinstance(observer, StepClock)]
        config, masks = rule.config, masking.graph_key() if masking else None
        rules = (config.threshold, config.factor, config.editing_threshold, rule.most_posts, config.confidence_dtype)
        key = ("blocks", tuple(canvas.ids.shape), canvas.padded, rules, tuple(rule.quotas), masks)
        ffn = masking.graph_ffn if masking else None
        self.graphs = kept_graphs(lm, key, lambda: BlockGraphs(lm, canvas, rule, ffn))
        self.graphs.load(canvas)
        self.forwards = self.began = 0
        self.stale = False

    def prefill(self) -> None:
        """Stores the keys and values of the prompt's whole blocks."""
        if self.layout.prefix:
            self.graphs.prefill(self.layout.prefix)
            self._launched(0, decides=False)

    def run_block(self, block: int) -> None:
        """Denoises one block of every row."""
        ended = self.canvas.ended.tolist()
        resting = self.layout.resting(block, ended)
        self.began, self.stale = self.forwards if block else 0, True
        if all(resting):
            return
        self.graphs.begin_block(self.layout.window(block).start, ended, resting)
        sure, goes_on = self.rule.sure_steps(self.layout.masks(block, resting)), True
        while goes_on:
            self.graphs.step()
            self._launched(block, decides=True)
            sure -= 1
            if sure <= 0:
                goes_on, self.stale = self.graphs.state()

    def store(self, block: int) -> None:
        """Stores a finished block; nothing to do where its last forward already saw its last tokens."""
        if self.stale:
            self.graphs.feed()
            self._launched(block, decides=False)

    def end_rows(self, block: int) -> bool:
        """Ends rows that hold an end of text; True once all have ended."""
        self.graphs.store(self.canvas)
        ended = _end_rows(self.canvas, self.rule.ends, self.layout.window(block).stop)
        self.graphs.take(self.canvas)
        self.graphs.resting.copy_(self.canvas.ended)  # their tokens count no more in the block's last forward
        return ended

    def finish(self) -> int:
        """Brings what was decoded to the canvas; returns the forwards that were run."""
        self.graphs.store(self.canvas)
        if self.masking is not None and self.graphs.ffn is not None:
            self.masking.graph_stop(self.graphs.ffn)
        return self.forwards

    def _launched(self, block: int, *, decides: bool) -> None:
        step = self.layout.step(self.forwards, self.began, block, self.rule.steps)
        for clock in self._clocks:
            clock.graph_step(step, decides=decides)
        self.forwards += 1


def _end_rows(canvas: Canvas, ends: tuple[int, ...], stop: int) -> bool:
    """Ends rows with an end of text before `stop`, what is still masked being filled with it; True once all have."""
    ended = canvas.end_rows(ends, stop)
    if ends:  # a model may have chosen the mask token itself
        generated = canvas.ids[:, canvas.prompt_length :]
        generated[canvas.ended[:, None] & (generated == canvas.mask_id)] = ends[0]
    return ended
