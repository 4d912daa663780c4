"""The state of one generation, and what a loop returns."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sparse.types import Step, TokenClass


@dataclass(slots=True)
class Decoded:
    """What a loop returns: ids [B, L] with the prompt in front, forwards run, and the step that committed each
    generated position, [B, gen_length] (-1 where none did)."""

    ids: Tensor
    forward_passes: int
    commit_step: Tensor
    execution: str = "eager"


class Canvas:
    """The state of one generation: ids, which positions are masks, and what the last step committed.

    What is to be generated holds `mask_id` (an autoregressive loop puts its fill there).
    """

    def __init__(self, prompt: Tensor, attention_mask: Tensor | None, gen_length: int, mask_id: int) -> None:
        self.mask_id = mask_id
        self.prompt_length = prompt.shape[1]
        more = (0, gen_length)
        self.ids = torch.nn.functional.pad(prompt, more, value=mask_id)
        self.attention_mask = attention_mask
        if attention_mask is not None:
            self.attention_mask = torch.nn.functional.pad(attention_mask, more, value=1)
        # CFG: the unconditional copy masks whatever was given at the start, padding included (as LLaDA does).
        self.given = self.ids != self.mask_id
        self.committed = torch.zeros_like(self.given)
        self.commit_step = torch.full_like(self.ids[:, self.prompt_length :], -1)
        self.ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)

    @property
    def padded(self) -> bool:
        """True where some row begins with padding."""
        return self.attention_mask is not None and not bool(self.attention_mask.all())

    def masked(self) -> Tensor:
        """Positions [B, L] that are still to be decided."""
        return (self.ids == self.mask_id) & ~self.ended[:, None]

    def give(self, ids: Tensor, start: int) -> None:
        """Puts ids [B, T] at `start`, behind the prompt; those that are not masks belong to it."""
        self.ids[:, start : start + ids.shape[1]] = ids
        self.given = self.ids != self.mask_id

    def take(self, rows: Tensor) -> Canvas:
        """The canvas of these rows [R] alone; `put` brings back what becomes of it."""
        part = copy(self)
        for name, values in self._per_row():
            setattr(part, name, values[rows])
        return part

    def put(self, rows: Tensor, part: Canvas) -> None:
        """Takes over rows [R] from a canvas made by `take`."""
        for name, values in self._per_row():
            values[rows] = getattr(part, name)

    def _per_row(self) -> list[tuple[str, Tensor]]:
        return [(name, values) for name, values in vars(self).items() if isinstance(values, Tensor)]

    def end_rows(self, ends: tuple[int, ...], end: int) -> bool:
        """Ends rows with one of `ends` among what was generated before position `end`; True once all have ended.

        Behind `end` they are filled with the first of `ends`, as if each were decoded alone.
        """
        if not ends:
            return False
        generated = self.ids[:, self.prompt_length : end]
        found = torch.isin(generated, torch.tensor(ends, device=generated.device))
        self.ended |= (found & ~self.given[:, self.prompt_length : end]).any(-1)
        self.ids[:, end:].masked_fill_(self.ended[:, None], ends[0])
        return bool(self.ended.all())

    def token_class(self) -> Tensor:
        """Class [B, L] int8 of every position before the next step."""
        classes = torch.full_like(self.ids, TokenClass.DECODED, dtype=torch.int8)
        classes[:, : self.prompt_length] = TokenClass.PROMPT
        classes[self.given] = TokenClass.PROMPT
        classes[self.committed] = TokenClass.COMMITTED
        classes[self.masked()] = TokenClass.MASKED
        if self.attention_mask is not None:
            classes[self.attention_mask == 0] = TokenClass.PADDING
        classes[self.ended] = TokenClass.PADDING
        return classes

    def commit(self, picked: Tensor, tokens: Tensor, start: int, step: Step) -> None:
        """Writes tokens [B, T] where picked [B, T], from canvas position `start` on."""
        window = slice(start, start + picked.shape[1])
        self.ids[:, window] = torch.where(picked, tokens, self.ids[:, window])
        self.committed = torch.zeros_like(self.committed)
        self.committed[:, window] = picked
        self.commit_step[self.committed[:, self.prompt_length :]] = step.index
