"""Loss on held-out text, dense and sparsified: the score of everything here that needs no task.

Autoregressive: nats a token of next-token prediction; exp is the perplexity. Diffusion: nats a token of LLaDA's bound,
with every window masked once and the numbers of masks spread evenly over the windows; the masks are the same for every
setting and model, so ratios carry little of their noise. A block-causal model has one block of every window masked,
each whole block in turn, so that what stands before it is known. Legend: N windows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.models.finite import locating, not_finite_logits
from dllm_sparse.models.language_model import LanguageModel, token_classes
from dllm_sparse.samplers.likelihood import stratified_masks
from dllm_sparse.samplers.uniform_likelihood import noised
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.sparsity.sparsifier import sparsify
from dllm_sparse.types import Observers, Step, StepContext, UsageError

_CUDA_TOKENS, _CPU_TOKENS = 1 << 15, 1 << 11
_MOST_LOGITS = 1 << 28


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a model sees [N, L], must say [N, L], and how much each position counts [N, L]; rows of weights sum to 1."""

    ids: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def windows(self) -> int:
        """Number of windows N."""
        return int(self.ids.shape[0])

    @property
    def tokens(self) -> int:
        """Token positions fed in one pass."""
        return self.ids.numel()

    def __getitem__(self, part: slice) -> HeldOut:
        """Some of the windows."""
        return HeldOut(self.ids[part], self.targets[part], self.weights[part])


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Nats a token of every window [N] float64, and what was masked meanwhile (None in a dense run)."""

    losses: Tensor
    counts: SparsityCounts | None

    @property
    def loss(self) -> float:
        """Mean over the windows, nats a token."""
        return float(self.losses.mean())


class LossProbe:
    """A model and its held-out text as a function of the sparsity setting, with JSON-ready results."""

    def __init__(self, lm: LanguageModel, data: HeldOut) -> None:
        self.lm, self.data = lm, data
        self._dense: float | None = None

    @property
    def dense(self) -> float:
        """The dense loss, nats a token."""
        if self._dense is None:
            self._dense = evaluate(self.lm, self.data).loss
        return self._dense

    def __call__(self, config: SparsityConfig) -> dict[str, Any]:
        """{"loss": nats a token, "sparsity": .., "by_layer": .., ...} as `SparsityCounts.to_dict` has it."""
        point = evaluate(self.lm, self.data, config)
        assert point.counts is not None
        return {"loss": point.loss, **point.counts.to_dict()}


def windows_of(lm: LanguageModel, texts: Sequence[str], windows: int, length: int) -> Tensor:
    """The first `windows` runs of `length` tokens of the texts end to end, [N, L]; raises UsageError for too little."""
    if lm.tokenizer is None:
        raise UsageError(f"{lm.name} has no tokenizer; held-out loss is measured on text")
    if not 2 <= length <= lm.config.max_positions:
        raise UsageError(f"windows of {length} tokens; allowed: 2 to the context of {lm.config.max_positions}")
    stream: list[int] = []
    for text in texts:
        # A token is a character at least; more text than that is never needed.
        room = (windows * length - len(stream)) * 16
        stream += lm.token_ids(text[:room], verbose=False)  # longer than the context is meant
        if len(stream) >= windows * length:
            break
    found = len(stream) // length
    if found < min(windows, 2):
        raise UsageError(f"the text has {len(stream)} tokens; two windows of {length} are needed at least")
    return torch.tensor(stream[: min(found, windows) * length]).view(-1, length)


def held_out(lm: LanguageModel, windows: Tensor, seed: int = 0) -> HeldOut:
    """Windows of ids [N, L] as the model's own kind of prediction problem."""
    if lm.kind == "autoregressive":
        targets = torch.cat((windows[:, 1:], windows[:, -1:]), dim=1)
        weights = torch.full(windows.shape, 1 / (windows.shape[1] - 1), dtype=torch.float32)
        weights[:, -1] = 0
        return HeldOut(windows, targets, weights)
    generator = torch.Generator().manual_seed(seed)
    masked = _noise(windows, lm.config.block_length, generator)
    if lm.mask_token_id is None:  # random tokens in their place; the window is one canvas behind BOS
        ids = noised(windows, masked, lm.config.vocab_size, generator)
    else:
        ids = windows.masked_fill(masked, lm.mask_token_id)
    # Nats of all L tokens are estimated by L / k times those of the k masked ones.
    return HeldOut(ids, windows, masked / masked.sum(-1, keepdim=True))


def _noise(windows: Tensor, block_length: int | None, generator: torch.Generator) -> Tensor:
    """Which positions [N, L] are masked: anywhere, or inside one block of each window."""
    rows, length = windows.shape
    if block_length is None or length <= block_length:
        return stratified_masks(length, rows, generator)
    inside = stratified_masks(block_length, rows, generator)
    places = torch.arange(rows) % (length // block_length) * block_length
    masked = torch.zeros(rows, length, dtype=torch.bool)
    return masked.scatter_(1, places[:, None] + torch.arange(block_length), inside)


@torch.inference_mode()
def evaluate(
    lm: LanguageModel,
    data: HeldOut,
    sparsity: SparsityConfig | None = None,
    observers: Observers = (),
    *,
    apply: bool = True,
) -> LossPoint:
    """The loss under a sparsity setting; raises NonFiniteActivations for NaN or Inf."""
    rows = max(min(_tokens(lm), _MOST_LOGITS // lm.config.vocab_size) // data.ids.shape[1], 1)
    context = nullcontext() if sparsity is None else sparsify(lm, sparsity, observers, apply=apply)
    with context as handle:
        parts = [_losses(lm, data[start : start + rows]) for start in range(0, data.windows, rows)]
        losses = torch.cat(parts)
        if not bool((finite := torch.isfinite(losses)).all()):
            window = int(finite.logical_not().nonzero()[0])
            with locating(lm.transformer, lambda: _losses(lm, data[window : window + 1])):
                raise not_finite_logits(0)
    return LossPoint(losses, None if handle is None else handle.counts)


def _losses(lm: LanguageModel, data: HeldOut) -> Tensor:
    """Nats a token [n] float64 on the CPU of a few windows in one forward."""
    index = data.weights.flatten().nonzero()[:, 0]
    ids = data.ids.to(lm.device)
    context = StepContext(Step(0, 1), token_classes(ids, None, lm.mask_token_id))
    logits = lm.predictions(ids, index.to(lm.device), context=context)
    nats = F.cross_entropy(logits.float(), data.targets.flatten()[index].to(logits.device), reduction="none")
    flat = torch.zeros(data.ids.numel(), dtype=torch.float64)
    flat[index] = nats.double().cpu() * data.weights.flatten()[index].double()
    return flat.view(data.ids.shape).sum(-1)


def _tokens(lm: LanguageModel) -> int:
    return _CUDA_TOKENS if lm.device.type == "cuda" else _CPU_TOKENS
