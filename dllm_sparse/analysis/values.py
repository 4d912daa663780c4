"""Listening to the dense values of every site of every layer, in either engine, without a mask being formed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dllm_sparse.models.feed_forward import FeedForward, Tap, TappedFFN, known_context
from dllm_sparse.types import Site, SiteName, StepContext, TokenClass

Listener = Callable[[Site, Tensor, StepContext], None]
"""Told the values [B, T, n] of a site and the context of the forward."""


class SiteValues:
    """An FFN override that changes nothing and tells `listener` what passes."""

    dense_gate = False

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def __call__(self, ffn: FeedForward, x: Tensor, context: StepContext | None) -> Tensor:
        """The dense FFN, [B, T, D] -> [B, T, D]."""
        context = known_context(x, context)
        return ffn.tapped(x, self.tap(ffn, context))

    def tap(self, ffn: TappedFFN, context: StepContext, expert: int = -1) -> Tap:
        """Passes the values of one layer (or expert) on, untouched."""

        def tap(name: SiteName, values: Tensor) -> Tensor:
            self.listener(Site(ffn.layer, name, expert), values, context)
            return values

        return tap


def real_tokens(values: Tensor, context: StepContext) -> Tensor:
    """The vectors [n, width] of all tokens but padding, of values [B, T, width]."""
    return values[context.token_class != TokenClass.PADDING]
