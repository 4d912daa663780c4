"""Where the blocks of a batch lie: prompts of any length moved so that all rows decode the same positions at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.samplers.canvas import Canvas, Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.types import Step


class Layout:
    """Blocks of `length` tokens counted from each row's first token, at the same canvas positions in every row.

    The whole blocks of the prompts end at position `prefix`, where the first block to decode begins: a row with fewer
    has padding in front, whole blocks of it. `counts` [B] says how many blocks each row decodes, `blocks` the most.
    """

    def __init__(self, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig) -> None:
        rows, width = prompt.shape
        self.prompt, self.mask, self.length = prompt, attention_mask, config.block_length
        lengths = torch.full((rows,), width) if attention_mask is None else attention_mask.sum(-1).cpu()
        tails = lengths % self.length  # prompt tokens in the first block to decode
        counts = -(-(tails + config.gen_length) // self.length)
        self.prefix = int((lengths - tails).max())
        self.tails: list[int] = tails.tolist()
        self.counts: list[int] = counts.tolist()
        self.blocks = max(self.counts)
        self._end = width + config.gen_length
        self._padding = (width - lengths).to(prompt.device)[:, None]
        self._shift = (self.prefix - (width - tails)).to(prompt.device)[:, None]  # [B, 1] how far rows were moved

    def canvas(self, mask_id: int, multiple: int = 1) -> Canvas:
        """The prompts, and masks behind them to the end of the last block and on to a `multiple` of positions."""
        width, length = self.prompt.shape[1], -(-self.window(self.blocks).start // multiple) * multiple
        source = torch.arange(length, device=self.prompt.device) - self._shift
        ids = self.prompt.gather(1, source.clamp(0, width - 1)).masked_fill(source >= width, mask_id)
        real = None if self.mask is None else (source >= self._padding).long()[:, : self.prefix]
        canvas = Canvas(ids[:, : self.prefix], real, length - self.prefix, mask_id)
        canvas.give(ids[:, self.prefix :], self.prefix)
        return canvas

    def window(self, block: int) -> slice:
        """The canvas positions of a block."""
        begin = self.prefix + block * self.length
        return slice(begin, begin + self.length)

    def resting(self, block: int, ended: list[bool]) -> list[bool]:
        """Which rows [B] take no part in a block: those that have ended, or need no more."""
        return [one or block >= count for one, count in zip(ended, self.counts, strict=True)]

    def masks(self, block: int, resting: list[bool]) -> int:
        """How many masks the block of some row that takes part begins with, if the prompts hold none."""
        given = self.tails if block == 0 else [0] * len(resting)
        return self.length - min(tail for tail, rests in zip(given, resting, strict=True) if not rests)

    def step(self, index: int, began: int, block: int, steps: int) -> Step:
        """The step of a forward; `began` is the first one of its block, which takes up to so many unmasking `steps`."""
        total = bool(self.prefix) + self.blocks * (steps + 1) - 1
        return Step(index, total, block, index - began)

    def decoded(self, canvas: Canvas, forwards: int, execution: str) -> Decoded:
        """What was decoded, every row back at its place behind the prompt."""
        width = self.prompt.shape[1]
        source = torch.arange(self._end, device=self.prompt.device) + self._shift
        ids = canvas.ids.gather(1, source.clamp_min(0))
        if self.mask is not None:
            ids[:, :width] = torch.where(self.mask.bool(), ids[:, :width], self.prompt)
        return Decoded(ids, forwards, canvas.commit_step.gather(1, source[:, width:] - self.prefix), execution)
