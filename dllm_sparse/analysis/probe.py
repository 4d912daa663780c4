"""Repeats every step of a dense generation with other FFNs, and measures how far what they decide is off.

Every variant sees the canvas the dense model saw, with its own state from step to step, so differences do not add up
through different tokens. Legend: B rows, W positions compared in a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_sparse.analysis.token_reuse import TokenReuse
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.confidence import pick_by_quota, token_probabilities
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.sparsifier import Sparsifier, overriding
from dllm_sparse.types import Observer, Step, StepContext, StepResult, TokenClass


@dataclass(slots=True)
class Fidelity:
    """Sums over steps of one variant's agreement with the dense model on the dense trajectory."""

    divergence: float = 0.0
    positions: int = 0
    same_token: int = 0
    same_position: int = 0
    committed: int = 0
    by_age: dict[int, tuple[float, int]] = field(default_factory=dict)  # age of the mask in steps -> (KL, positions)

    def add(self, kl: Tensor, age: int | None) -> None:
        """Adds the divergences [N] of the positions of one step."""
        total, count = float(kl.double().sum()), kl.numel()
        self.divergence += total
        self.positions += count
        if age is not None:
            old, seen = self.by_age.get(age, (0.0, 0))
            self.by_age[age] = old + total, seen + count


@dataclass(slots=True)
class Variant:
    """One way to save work: masks refreshed every `refresh_every` steps, or FFN outputs kept below `tau`."""

    name: str
    override: Sparsifier | TokenReuse
    sparsity: SparsityConfig | None = None
    fidelity: Fidelity = field(default_factory=Fidelity)
    cache: KVCache | None = None

    @property
    def tau(self) -> float | None:
        """The threshold of token reuse, None for mask reuse."""
        return self.override.tau if isinstance(self.override, TokenReuse) else None


class FidelityProbe(Observer):
    """Repeats every step of a dense generation with every variant, on the canvas as it was before the step."""

    def __init__(self, lm: LanguageModel, variants: Sequence[Variant]) -> None:
        self.lm, self.variants = lm, variants
        self._causal = lm.kind == "autoregressive"

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        """Remembers the canvas [B, L]; every variant starts afresh."""
        self._ids, self._classes = ids.clone(), token_class.clone()
        padding = token_class == TokenClass.PADDING
        self._mask = (~padding).long() if bool(padding.any()) else None
        self._dense_cache = self._new_cache()
        for variant in self.variants:
            variant.override.on_start(ids, token_class)
            variant.cache = self._new_cache()

    def on_step(self, step: Step, result: StepResult) -> None:
        """Runs the dense model and all variants, and compares what they would have decided."""
        competing = result.committed  # all there is to compare with where no confidence was computed
        if result.confidence is not None and not self._causal:
            competing = self._masked() & (result.confidence > -torch.inf)
        if bool(competing.any()):
            where = _span(competing)
            counted = competing[:, where]
            dense = self._logits(step, where, self._dense_cache).float().log_softmax(-1)
            for variant in self.variants:
                with overriding(self.lm, variant.override):
                    logits = self._logits(step, where, variant.cache).float()
                self._compare(variant, step, dense, logits, counted, result.committed[:, where] & counted)
        self._classes[self._classes == TokenClass.COMMITTED] = TokenClass.DECODED
        self._classes[result.committed] = TokenClass.COMMITTED
        self._ids = result.ids.clone()

    def _masked(self) -> Tensor:
        assert self.lm.mask_token_id is not None
        return self._ids.eq(self.lm.mask_token_id)

    def _logits(self, step: Step, where: slice, cache: KVCache | None) -> Tensor:
        """Logits [B, W, V] for the positions decided upon, before the step."""
        begin, end = 0, self._ids.shape[1]
        classes, positions = self._classes, self.lm.positions(self._mask)
        if self._causal:
            end, where = where.start, slice(-1, None)
            begin = end - 1 if step.index else 0
            # A row that ended is fed no token that counts.
            classes = classes.masked_fill(classes == TokenClass.MASKED, TokenClass.PADDING)
        return self.lm.predictions(
            self._ids[:, begin:end],
            where,
            start=begin,
            attention_mask=None if self._mask is None else self._mask[:, :end],
            positions=None if positions is None else positions[:, begin:end],
            cache=cache,
            context=StepContext(step, classes[:, begin:end], begin),
        )

    def _compare(
        self, variant: Variant, step: Step, dense: Tensor, logits: Tensor, counted: Tensor, committed: Tensor
    ) -> None:
        """Adds a step of a variant: dense [B, W, V] log-probabilities, counted and committed [B, W] bool."""
        found = variant.fidelity
        divergence = (dense.exp() * (dense - logits.log_softmax(-1))).sum(-1)
        every = variant.sparsity.refresh_every if variant.sparsity else None
        found.add(divergence[counted], step.index % every if every else None)
        tokens = logits.argmax(-1)
        found.committed += int(committed.sum())
        found.same_token += int((tokens == dense.argmax(-1))[committed].sum())
        if not self._causal:
            confidence = token_probabilities(logits, tokens, torch.float32).masked_fill(~counted, -torch.inf)
            picked = pick_by_quota(confidence, committed.sum(-1).tolist())
            found.same_position += int((picked & committed).sum())

    def _new_cache(self) -> KVCache | None:
        """An autoregressive variant keeps its own keys and values: they come from its own FFNs."""
        if not self._causal:
            return None
        return self.lm.transformer.new_cache(*self._ids.shape)


def _span(marked: Tensor) -> slice:
    """The columns from the first to the last marked in any row [B, L]."""
    columns = marked.any(0).nonzero()[:, 0]
    return slice(int(columns[0]), int(columns[-1]) + 1)
