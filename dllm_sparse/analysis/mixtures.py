"""The masks of a layer's experts put together into one mask per token, so that active sets can be compared over steps.

An expert sees other tokens at every step, but a token always has an active set: the (expert, channel) pairs it keeps.
Shapes: B rows, T tokens, E experts, n channels of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_sparse.types import ROUTED, Site, StepContext


@dataclass(slots=True)
class _Whole:
    """A layer's values and masks [B * T, E, n] at one site, and how many (token, expert) pairs are in them."""

    values: Tensor
    keep: Tensor
    pairs: int = 0


class JoinedExperts:
    """Collects the masks that the experts of one layer offer one by one."""

    def __init__(self) -> None:
        self._open: dict[Site, _Whole] = {}

    def add(
        self, site: Site, values: Tensor, keep: Tensor, context: StepContext
    ) -> tuple[Site, Tensor, Tensor, StepContext] | None:
        """Takes the mask [1, N, n] of one expert; with the last one returns the arguments of `on_mask` for the layer.

        Values and mask are then [B, T, E * n], off where a token was not sent to an expert, the site's expert is
        ROUTED and the context that of the whole forward.
        """
        assert context.part is not None
        part, joined = context.part, site._replace(expert=ROUTED)
        rows, columns = part.whole.token_class.shape
        if joined not in self._open:
            shape = (rows * columns, part.experts, keep.shape[-1])
            self._open[joined] = _Whole(values.new_zeros(shape), keep.new_zeros(shape))
        whole = self._open[joined]
        whole.values[part.tokens, site.expert] = values[0]
        whole.keep[part.tokens, site.expert] = keep[0]
        whole.pairs += len(part.tokens)
        if whole.pairs < part.pairs:
            return None
        del self._open[joined]
        return joined, whole.values.view(rows, columns, -1), whole.keep.view(rows, columns, -1), part.whole
