"""How something that watches or changes the FFNs takes part in decoding as graphs, without hooks on the model."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dllm_sparse.engine.forward import FFNRunner, FixedForward
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.types import Observer, Observers, Step


def rows_may_leave(lm: LanguageModel, observers: Observers) -> bool:
    """Whether forwards may feed only the rows that still have something to decide: nothing that watches them, or
    computes their FFNs, needs every row."""
    overrides = (ffn.override for ffn in lm.transformer.ffns if ffn.override is not None)
    return not any(getattr(one, "needs_every_row", True) for one in (*observers, *overrides))


class StepClock(Observer):
    """An observer that decoding as graphs can serve because it only wants to know that a step was launched."""

    def graph_step(self, step: Step, *, decides: bool = True) -> None:
        """A step was launched on the current stream; nothing was waited for. One that does not decide feeds tokens for
        their keys and values alone."""


class GraphableObserver(Observer, ABC):
    """An observer that decoding as graphs can serve: it brings its own FFN in place of hooks on the model."""

    @abstractmethod
    def graph_key(self) -> str | None:
        """Identifies what the FFN does, so that captured steps are reused; None where it needs the plain path."""

    @abstractmethod
    def graph_ffn(self, forward: FixedForward) -> FFNRunner:
        """The FFN of captured forwards."""

    @abstractmethod
    def graph_stop(self, ffn: FFNRunner) -> None:
        """A generation ended; what `ffn`, made by `graph_ffn` now or for an earlier one, counted can be read."""
