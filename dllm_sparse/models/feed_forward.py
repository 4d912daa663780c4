"""The gated FFN of a layer, and what may listen to it or replace it.

Shapes: B rows, T tokens of this forward, D width, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.types import SiteName, Step, StepContext, TokenClass

Tap = Callable[[SiteName, Tensor], Tensor]
"""Sees the values at a site and returns what the layer goes on with."""


class Tapped(Protocol):
    """What a tap may ask of the module it listens to, whichever engine runs it."""

    @property
    def layer(self) -> int:
        """Its layer."""
        ...

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        ...


class TappedFFN(Tapped, Protocol):
    """A tapped FFN also says what its values are worth in the output."""

    def down(self, intermediate: Tensor) -> Tensor:
        """The output [..., D] fp32 that intermediate values [..., F] make, without the bias."""
        ...


class Tapper(Protocol):
    """An override that can work value by value: what experts and hooks need."""

    dense_gate: bool

    def tap(self, module: Tapped, context: StepContext, expert: int = -1) -> Tap:
        """The tap of one module (or expert) in one forward."""
        ...


Product = Callable[[nn.Linear, Tensor], Tensor]
"""A linear layer applied to values [B, T, K] -> [B, T, N]; backends bring ones that skip zeros."""

FFNOverride = Callable[["FeedForward", Tensor, StepContext | None], Tensor]
"""Replaces the dense FFN of one layer: (ffn, x [B, T, D], context) -> [B, T, D]."""


def known_context(x: Tensor, context: StepContext | None) -> StepContext:
    """The context of values [B, T, D]; where none was given, that of one step over a prompt."""
    if context is not None:
        return context
    return StepContext(Step(0, 1), torch.full(x.shape[:2], TokenClass.PROMPT, dtype=torch.int8, device=x.device))


class FeedForward(nn.Module):
    """Gated FFN, down(act(gate x) * up x), with the paper's four sites exposed to a tap.

    gate and up are one matrix [2F, D], gate rows first. `override`, when set, computes the layer instead: that
    is how the sparsifier gets in, and the only thing it changes on the model.
    """

    def __init__(self, config: TransformerConfig, layer: int, width: int | None = None) -> None:
        super().__init__()
        width = width or config.ffn_width
        self.layer = layer
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up_proj = nn.Linear(config.width, 2 * width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.width, bias=config.mlp_bias)
        self.override: FFNOverride | None = None

    @property
    def parts(self) -> tuple[FeedForward]:
        """What overrides are set on, as in a mixture of experts."""
        return (self,)

    def forward(self, x: Tensor, context: StepContext | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.override is not None:
            return self.override(self, x, context)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out

    def halves(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight [F, D] and bias [F] of the gate projection, and of the up projection."""
        gate, up = self.gate_up_proj.weight.chunk(2)
        bias = self.gate_up_proj.bias
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return (gate, gate_bias), (up, up_bias)

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        consumer = self.gate_up_proj if site == "input" else self.down_proj
        norms: Tensor = consumer.weight.float().norm(dim=0)
        return norms

    def down(self, intermediate: Tensor) -> Tensor:
        """The output [..., D] fp32 that intermediate values [..., F] make, without the bias."""
        weight: Tensor = self.down_proj.weight
        return F.linear(intermediate.to(weight.dtype), weight).float()

    def tapped(self, x: Tensor, tap: Tap, *, dense_gate: bool = False, product: Product = nn.Linear.__call__) -> Tensor:
        """The same computation with `tap` called at input, gate, up and intermediate, in that order.

        `dense_gate` lets the gate projection see x as it was: only the up projection gets the tapped input.
        `product` applies the two matrices to tapped values.
        """
        gate, up = product(self.gate_up_proj, tap("input", x)).chunk(2, dim=-1)
        if dense_gate:
            gate = self.gate_up_proj(x).chunk(2, dim=-1)[0]
        gate, up = tap("gate", self.activation(gate)), tap("up", up)
        return product(self.down_proj, tap("intermediate", gate * up))
