"""The state of one generation, and what a loop returns."""

from __future__ import annotations

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
        self.ids = torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id)
        self.attention_mask = attention_mask
        if attention_mask is not None:
            self.attention_mask = torch.nn.functional.pad(attention_mask, (0, gen_length), value=1)
        # CFG: the unconditional copy masks whatever was given at the start, padding included (as LLaDA does).
        self.given = self.ids != self.mask_id
        self.committed = torch.zeros_like(self.given)
        self.commit_step = torch.full_like(self.ids[:, self.prompt_length :], -1)

    @property
    def padded(self) -> bool:
        """True where some row begins with padding."""
        return self.attention_mask is not None and not bool(self.attention_mask.all())

    def masked(self) -> Tensor:
        """Positions [B, L] that still hold a mask."""
        return self.ids == self.mask_id

    def token_class(self) -> Tensor:
        """Class [B, L] int8 of every position before the next step."""
        classes = torch.full_like(self.ids, TokenClass.DECODED, dtype=torch.int8)
        classes[:, : self.prompt_length] = TokenClass.PROMPT
        classes[self.committed] = TokenClass.COMMITTED
        classes[self.masked()] = TokenClass.MASKED
        if self.attention_mask is not None:
            classes[self.attention_mask == 0] = TokenClass.PADDING
        return classes

    def commit(self, picked: Tensor, tokens: Tensor, start: int, step: Step) -> None:
        """Writes tokens [B, T] where picked [B, T], from canvas position `start` on."""
        window = slice(start, start + picked.shape[1])
        self.ids[:, window] = torch.where(picked, tokens, self.ids[:, window])
        self.committed = torch.zeros_like(self.committed)
        self.committed[:, window] = picked
        self.commit_step[self.committed[:, self.prompt_length :]] = step.index
