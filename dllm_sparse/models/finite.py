"""Where NaN or Inf begin. The normal path looks at logits alone; what went wrong is looked for when it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.models.feed_forward import FeedForward, Tap, Tapped, Tapper, known_context
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import NonFiniteActivations, Site, SiteName, StepContext


def not_finite(site: Site, step: int, what: str = "activations") -> NonFiniteActivations:
    """The error of values that are NaN or Inf at a site."""
    expert = f", expert {site.expert}" if site.expert >= 0 else ""
    return NonFiniteActivations(
        f"layer {site.layer}{expert}, site {site.name}, step {step}: NaN or Inf among the {what}"
    )


def not_finite_logits(step: int) -> NonFiniteActivations:
    """The error of logits that are NaN or Inf while no FFN was given or formed such a value."""
    return NonFiniteActivations(f"NaN or Inf in the logits at step {step}, behind the last layer's FFN")


@contextmanager
def locating(network: Transformer, forward: Callable[[], object]) -> Iterator[None]:
    """Lets NonFiniteActivations raised inside the block name layer and site, where the FFNs have met NaN or Inf.

    To that end `forward`, the forward that was checked in the block, runs once more, its FFNs being listened to. What
    masks them goes on masking.
    """
    try:
        yield
    except NonFiniteActivations as error:
        raise _found(network, forward) or error from None


def _found(network: Transformer, forward: Callable[[], object]) -> NonFiniteActivations | None:
    with ExitStack() as undo:
        modules: list[Any] = list(network.ffns)
        for module in modules:
            own = module.override
            if own is None or hasattr(own, "tap"):  # what replaces whole outputs shows no values
                undo.callback(setattr, module, "override", own)
                module.override = _Listener(own)
        try:
            forward()
        except NonFiniteActivations as found:
            return found
    return None


class _Listener:
    """Raises NonFiniteActivations at the first site whose values are not finite, before `own` sees them."""

    def __init__(self, own: Tapper | None) -> None:
        self._own = own
        self.dense_gate = own is not None and own.dense_gate

    def __call__(self, ffn: FeedForward, x: Tensor, context: StepContext | None) -> Tensor:
        """The FFN of one layer, [B, T, D] -> [B, T, D]."""
        return ffn.tapped(x, self.tap(ffn, known_context(x, context)), dense_gate=self.dense_gate)

    def tap(self, module: Tapped, context: StepContext, expert: int = -1) -> Tap:
        """Looks at the values of one layer (or of one of its experts) in one forward."""
        own = None if self._own is None else self._own.tap(module, context, expert)

        def tap(name: SiteName, values: Tensor) -> Tensor:
            if not bool(torch.isfinite(values).all()):
                raise not_finite(Site(module.layer, name, expert), context.step.index)
            return values if own is None else own(name, values)

        return tap
