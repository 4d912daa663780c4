"""How something that watches or changes the FFNs takes part in decoding as graphs, without hooks on the model."""

from __future__ import annotations

from dllm_sparse.engine.forward import FFNRunner, FixedForward
from dllm_sparse.types import Observer, Step


class StepClock(Observer):
    """An observer that decoding as graphs can serve because it only wants to know that a step was launched."""

    def graph_step(self, step: Step) -> None:
        """A step was launched on the current stream; nothing was waited for."""


class GraphableObserver(Observer):
    """An observer that decoding as graphs can serve: it brings its own FFN in place of hooks on the model."""

    def graph_key(self) -> str | None:
        """Identifies what the FFN does, so that captured steps are reused; None where it needs the plain path."""
        raise NotImplementedError

    def graph_ffn(self, forward: FixedForward) -> FFNRunner:
        """The FFN of captured forwards."""
        raise NotImplementedError

    def graph_start(self, ffn: FFNRunner) -> None:
        """A generation begins; `ffn` is what `graph_ffn` made, now or for an earlier one."""

    def graph_stop(self, ffn: FFNRunner) -> None:
        """A generation ended: what the FFN counted can be read."""
