"""A likelihood bound for models of uniform noise: LLaDA's estimator with random tokens in the place of masks.

A text is taken to be written in random order, canvas by canvas, one token at a time; what is not yet written is drawn
anew, uniformly, before every token, as the model's own sampler does with what it has not accepted. By Jensen's
inequality over orders and noise, log p(text) of that process is at least the mean, over the number k = 1..L of tokens
not yet written, their choice and their noise, of L / k times the sum of their log p. It bounds another process than a
masked model's: to be compared between settings of one model, not between the two kinds.
Shapes: P prompt tokens, L tokens of a canvas, R copies, N flat positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dllm_sparse.models.hooked_denoiser import HookedDenoiser
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.types import Step, StepContext, TokenClass, UsageError


def canvases(lm: LanguageModel, prompt: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(what was written before, what is written on it) of every canvas a target needs."""
    length = lm.transformer.config.canvas_length  # type: ignore[attr-defined]
    for start in range(0, len(target), length):
        yield [*prompt, *target[:start]], [*target[start : start + length]]


def noised(target: Tensor, unwritten: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Copies [R, L] of a target [L] whose `unwritten` tokens [R, L] bool are drawn uniformly; on the CPU."""
    drawn = torch.randint(vocabulary, unwritten.shape, generator=generator)
    return torch.where(unwritten, drawn, target)


def denoised(
    lm: LanguageModel, prompt: Tensor, canvas: Tensor, unwritten: Tensor, rows: slice | Tensor = slice(None)
) -> Tensor:
    """Logits [R, rows, V] (or [N, V] for flat indices) of canvases [R, L] behind one prompt [P], read once."""
    network = lm.transformer
    assert isinstance(network, HookedDenoiser)
    classes = torch.where(unwritten, TokenClass.MASKED, TokenClass.DECODED).to(torch.int8)
    cache = None
    if len(prompt):
        read = torch.full((1, len(prompt)), TokenClass.PROMPT, dtype=torch.int8, device=canvas.device)
        cache = network.encode(prompt[None], None, StepContext(Step(0, 1), read))
        cache.past.batch_repeat_interleave(len(canvas))
    return network(canvas, cache=cache, rows=rows, context=StepContext(Step(0, 1), classes, start=len(prompt)))  # type: ignore[no-any-return]


def check_guidance(lm: LanguageModel, cfg_scale: float) -> None:
    """Raises UsageError for guidance, which needs a mask to hide the prompt behind."""
    if cfg_scale > 0:
        raise UsageError(f"cfg_scale is {cfg_scale}; {lm.name} has no mask token to hide the prompt behind: use 0")
