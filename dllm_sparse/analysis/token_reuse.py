"""Reuse of whole FFN outputs from step to step: the FFN is computed only for tokens whose input moved."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.analysis.comparisons import relative_change
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.sparsity.sparsifier import widened
from dllm_sparse.types import Observer, StepContext, TokenClass


class TokenReuse(Observer):
    """An FFN override that recomputes only tokens whose input moved, the rest keep their last output.

    A token has moved when |x - x'| > tau |x'| in the L2 norm, x' being the input its kept output was computed from
    (so small steps cannot add up unnoticed). What is fed for the first time is computed. Made for diffusion models,
    whose forwards feed the same positions again and again.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self.tokens = torch.zeros((len(TokenClass), 2), dtype=torch.int64)  # per class: fed, computed

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        """A new canvas [B, L]: outputs of the old one are worthless."""
        self._inputs.clear()
        self._outputs.clear()

    def __call__(self, ffn: FeedForward, x: Tensor, context: StepContext | None) -> Tensor:
        """The FFN of one layer, [B, T, D] -> [B, T, D], computed where it must be."""
        assert context is not None
        if ffn.layer not in self._inputs:
            moved = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            self._inputs[ffn.layer], self._outputs[ffn.layer] = x.clone(), _dense(ffn, x)
        else:
            window = slice(context.start, context.start + x.shape[1])
            fed = self._inputs[ffn.layer].shape[1]
            for kept in (self._inputs, self._outputs):
                kept[ffn.layer] = widened(kept[ffn.layer], window.stop)
            inputs, outputs = self._inputs[ffn.layer][:, window], self._outputs[ffn.layer][:, window]
            moved = relative_change(x, inputs) > self.tau
            moved[:, max(fed - window.start, 0) :] = True  # fed for the first time
            inputs[moved] = x[moved]
            outputs[moved] = _dense(ffn, x[moved])
        self._count(context.token_class, moved)
        return self._outputs[ffn.layer][:, context.start : context.start + x.shape[1]].clone()

    def work(self) -> float:
        """Share of the FFN's tokens that were computed, padding never counted."""
        fed, computed = self.tokens[TokenClass.PADDING + 1 :].sum(0).tolist()
        return computed / fed if fed else 0.0

    def _count(self, token_class: Tensor, moved: Tensor) -> None:
        classes = token_class.flatten().long()
        counts = torch.zeros((len(TokenClass), 2), dtype=torch.int64, device=classes.device)
        counts.index_add_(0, classes, torch.stack((torch.ones_like(classes), moved.flatten().long()), dim=-1))
        self.tokens += counts.cpu()


def _dense(ffn: FeedForward, x: Tensor) -> Tensor:
    return ffn.tapped(x, lambda _, values: values)
