"""Block diffusion: the blocks of a block-causal model, denoised one after the other behind cached finished blocks.

A block is the model's `block_length` tokens counted from the row's first token, so the end of a prompt shares a block
with the first generated tokens, and the last block is filled up with masks that are decoded and cut off. Forwards: one
for the whole blocks of the prompt; one a denoising step, which feeds the block alone; one for a finished block whose
tokens have changed since they were fed, unless no block follows. Each is a step of its own. A finished block cannot
change any more, so the cache is exact.
Shapes: B rows, W positions of the window fed (one block; of a left-padded batch less than two).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.block_rule import BlockRule
from dllm_sparse.samplers.canvas import Canvas, Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.graph_steps import graphable
from dllm_sparse.samplers.steps import Steps
from dllm_sparse.types import Observers, Step, StepResult


def denoise_blocks(
    lm: LanguageModel, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig, observers: Observers
) -> Decoded:
    """Decodes `gen_length` masks behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding.

    Source: LLaDA2.0 (arXiv 2512.15745) and SDAR (arXiv 2510.06303).
    """
    graphable(lm, config, observers, 0)  # refuses where graphs were asked for
    assert lm.mask_token_id is not None
    layout = Layout(prompt, attention_mask, config)
    canvas = Canvas(prompt, attention_mask, config.gen_length, lm.mask_token_id, overhang=layout.stop - layout.end)
    for observer in observers:
        observer.on_start(canvas.ids, canvas.token_class())
    loop = _Loop(lm, canvas, config, observers, layout)
    loop.prefill()
    for block in range(layout.blocks):
        loop.run_block(block)
        if config.stop_at_eos and loop.end_rows(block):
            break
        if block + 1 < layout.blocks:
            loop.store(block)
    return Decoded(canvas.ids[:, : layout.end], loop.forwards, canvas.commit_step[:, : config.gen_length])


class Layout:
    """Where blocks lie on the canvas. Rows of a left-padded batch have theirs apart by less than a block."""

    def __init__(self, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig) -> None:
        rows, width = prompt.shape
        lengths = torch.full((rows,), width) if attention_mask is None else attention_mask.sum(-1).cpu()
        self.length = config.block_length
        tails = lengths % self.length  # prompt tokens in the first block to decode
        self.first = (width - tails).to(prompt.device)  # [B] where that block begins
        self.low, self.high = int(width - tails.max()), int(width - tails.min())
        self.end = width + config.gen_length
        blocks = -(-(tails + config.gen_length) // self.length)
        self.blocks = int(blocks.max())
        self.stop = int((width - tails + blocks * self.length).max())

    def window(self, block: int) -> slice:
        """The canvas positions of a block in any row."""
        shift = block * self.length
        return slice(self.low + shift, min(self.high + shift + self.length, self.stop))

    def inside(self, block: int) -> Tensor:
        """Which positions of the window [B, W] are the row's own block; none where the row needs no more blocks."""
        window = self.window(block)
        places = torch.arange(window.start, window.stop, device=self.first.device)
        begin = (self.first + block * self.length)[:, None]
        return (places >= begin) & (places < begin + self.length) & (begin < self.end)


class _Loop(Steps):
    def __init__(
        self, lm: LanguageModel, canvas: Canvas, config: SamplerConfig, observers: Observers, layout: Layout
    ) -> None:
        super().__init__(lm, canvas, config, observers, rule := BlockRule(lm, config))
        self.block_rule, self.layout = rule, layout
        self.use_cache()
        self.total = bool(layout.high) + layout.blocks * (rule.steps + 1) - 1
        self.began = 0  # step index of the block's first forward, the prefill being block 0's
        self.stale = False  # whether the block's tokens changed since they were last fed

    def prefill(self) -> None:
        """Stores the keys and values of the prompt's whole blocks."""
        if self.layout.high:
            self._feed_only(0, slice(0, self.layout.high))

    def store(self, block: int) -> None:
        """Stores a finished block; nothing to do where its last forward already saw its last tokens."""
        if self.stale:
            self._feed_only(block, self.layout.window(block))

    def run_block(self, block: int) -> None:
        """Denoises one block of every row; rows that are finished edit theirs until nothing changes."""
        window, inside = self.layout.window(block), self.layout.inside(block)
        posts = torch.zeros(len(inside), dtype=torch.int64, device=inside.device)
        self.block = window.start, window.stop
        self.began, self.stale = self.index if block else 0, True
        self.rule.start_block(self.canvas.masked()[:, window].sum(-1).tolist())
        while True:
            masked = self.canvas.masked()[:, window] & inside
            unmasking = masked.any(-1)
            editing = ~unmasking & ~self.canvas.ended & inside.any(-1) & (posts < self.block_rule.most_posts)
            if bool(unmasking.any()):
                if not self.block_rule.left:
                    return  # the model chose the mask token itself
            elif not bool(editing.any()):
                return
            editable = inside & (unmasking | editing)[:, None] & ~masked & ~self.canvas.given[:, window]
            written = self.take(self._step(block), *self.block, masked, editable)
            self.index += 1
            self.stale = bool(written.any())
            edited = (written & ~masked).any(-1)
            posts += editing
            posts[editing & ~edited] = self.block_rule.most_posts  # nothing left to edit

    def end_rows(self, block: int) -> bool:
        """Ends rows that hold an end of text, what is still masked being filled with it; True once all have ended."""
        canvas, ends = self.canvas, self.rule.ends
        ended = canvas.end_rows(ends, self.layout.window(block).stop)
        if ends:  # the window of a padded batch ends behind the block of some rows
            canvas.ids[canvas.ended[:, None] & (canvas.ids == canvas.mask_id)] = ends[0]
        return ended

    def _step(self, block: int) -> Step:
        return Step(self.index, self.total, block, self.index - self.began)

    def _feed_only(self, block: int, window: slice) -> None:
        """A step whose forward is for its keys and values alone; it decides nothing."""
        step, canvas = self._step(block), self.canvas
        self.forward(step, window.start, window.stop, slice(0))
        nothing = torch.zeros_like(canvas.ids[:, window])
        canvas.commit(nothing.bool(), nothing, window.start, step)
        self.index += 1
        for observer in self.observers:
            observer.on_step(step, StepResult(canvas.ids, canvas.committed))
