"""Mixtures of experts in the native engine: a router, routed experts in packed weights, shared experts beside them.

A listener hears every expert like an FFN of its own, through a tap that sees the tokens routed to it.
Shapes: B rows, T tokens, M = B * T, E experts, k experts a token, P = M * k pairs (token, expert), D width, F width of
an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparse.kernels.experts import combine, grouped_linear
from dllm_sparse.kernels.mixture import can_mix, mixture, route
from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.kernels.routing import Pairs, RouterRule, Routing, sort_pairs
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.feed_forward import FeedForward, Tap, Tapper, known_context
from dllm_sparse.types import Part, SiteName, StepContext, UsageError


class Router(nn.Module):
    """Scores every expert for every token. A softmax router multiplies in the model's dtype, a sigmoid one in fp32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.rule = RouterRule(
            moe.router, moe.experts_per_token, moe.groups, moe.groups_per_token, moe.renormalise, moe.routed_scaling
        )
        self.weight = nn.Parameter(torch.empty(moe.experts, config.width))
        self.bias = nn.Parameter(torch.zeros(moe.experts)) if moe.expert_bias else None

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """As ever, but the bias stays fp32: it tips choices between experts that 16 bits cannot tell apart."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            self.bias.data = self.bias.data.float()
        return self

    def forward(self, x: Tensor) -> Routing:
        """Experts and weights of tokens [M, D]."""
        return route(x, self.weight, self.bias, self.rule)


class Experts(nn.Module):
    """The routed experts of one layer: gate_up_proj [E, 2F, D], gate rows first, and down_proj [E, D, F].

    `override`, when set, is a `Tapper` and hears the values of every expert.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.layer, self.experts = layer, config.moe.experts
        self._activation = config.activation
        self.gate_up_proj = nn.Parameter(torch.empty(self.experts, 2 * config.moe.expert_width, config.width))
        self.down_proj = nn.Parameter(torch.empty(self.experts, config.width, config.moe.expert_width))
        self._listening: Tapper | None = None

    @property
    def override(self) -> Any:
        """What listens, or None."""
        return self._listening

    @override.setter
    def override(self, override: Any) -> None:
        if override is not None:
            check_listener(override)
        self._listening = override

    def forward(self, x: Tensor, routing: Routing, context: StepContext | None = None) -> Tensor:
        """[B, T, D] and the routing of its B * T tokens -> [B, T, D]."""
        rows = x.flatten(0, -2)
        if self._listening is not None:
            heard = self._heard(rows, routing, known_context(x, context))
            if heard is not None:
                return heard.view_as(x)
        return mixture(rows, routing, self.gate_up_proj, self.down_proj, self._activation).view_as(x)

    def _heard(self, rows: Tensor, routing: Routing, context: StepContext) -> Tensor | None:
        """What the listener makes of tokens [M, D], or None where that is what would come without it.

        The fused launches add in another order. Where they run, who changed nothing must leave their result.
        """
        pairs = sort_pairs(routing.experts, self.experts)
        tap = self._tap(pairs, routing.experts.shape[1], context)
        gathered = rows[pairs.order // routing.experts.shape[1]]
        values = tap("input", gathered)
        gate, up = grouped_linear(values, self.gate_up_proj, pairs.ends).chunk(2, dim=-1)
        active = ACTIVATIONS[self._activation](gate)
        masked_gate, masked_up = tap("gate", active), tap("up", up)
        product = masked_gate * masked_up
        intermediate = tap("intermediate", product)
        changed = values is not gathered or masked_gate is not active or masked_up is not up
        fused = can_mix(rows, self.gate_up_proj, self.down_proj, routing.weights)
        if fused and not changed and intermediate is product:
            return None
        outputs = grouped_linear(intermediate, self.down_proj, pairs.ends)
        return combine(outputs, pairs.order, routing.weights)

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets in one expert."""
        consumer = self.gate_up_proj if site == "input" else self.down_proj
        norms: Tensor = consumer[expert].float().norm(dim=0)
        return norms

    def down(self, intermediate: Tensor) -> Tensor:
        """Experts have no output projection in common."""
        raise UsageError("an expert layer has no output projection in common")

    def _tap(self, pairs: Pairs, places: int, context: StepContext) -> Tap:
        """A tap of all pairs' values [P, n] that shows each expert its own; it returns them where none was changed."""
        listener = self._listening
        assert listener is not None
        parts = list(expert_parts(pairs, places, context))
        taps = [(span, listener.tap(self, part, expert)) for expert, span, part in parts]

        def tap(name: SiteName, values: Tensor) -> Tensor:
            parts = [values[span][None] for span, _ in taps]
            heard = [one(name, part) for part, (_, one) in zip(parts, taps, strict=True)]
            if all(after is before for after, before in zip(heard, parts, strict=True)):
                return values
            return torch.cat([part[0] for part in heard])

        return tap


class MoEFeedForward(nn.Module):
    """Routed experts, plus the shared ones, over the same x."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config)
        self.experts = Experts(config, layer)
        width = config.moe.shared_experts * config.moe.expert_width
        self.shared = FeedForward(config, layer, width) if width else None

    @property
    def parts(self) -> tuple[Experts | FeedForward, ...]:
        """What overrides are set on."""
        return (self.experts,) if self.shared is None else (self.experts, self.shared)

    def forward(self, x: Tensor, context: StepContext | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out: Tensor = self.experts(x, self.router(x.flatten(0, -2)), context)
        return out if self.shared is None else out + self.shared(x, context)


def check_listener(override: Any) -> None:
    """Raises UsageError for an override that experts cannot serve: tokens come to them one by one, in no order."""
    if not hasattr(override, "tap"):
        raise UsageError("replacing whole FFN outputs is for dense FFNs; experts see other tokens at every step")
    config = getattr(override, "config", None)
    if config is not None and (config.scope != "token" or config.refresh_every != 1 or override.dense_gate):
        raise UsageError(
            "the model has experts, whose tokens change from step to step: masks inside them take scope 'token', "
            "refresh_every 1 and gate_input 'masked' only"
        )


def expert_parts(pairs: Pairs, places: int, context: StepContext) -> Iterator[tuple[int, slice, StepContext]]:
    """(expert, where its pairs are, their context) of every expert that some token chose, `places` a token."""
    classes = context.token_class.flatten()
    tokens = pairs.order // places
    begin = 0
    for expert, end in enumerate(pairs.ends.tolist()):
        if end > begin:
            span = slice(begin, end)
            part = Part(context, tokens[span], len(tokens), len(pairs.ends))
            yield expert, span, StepContext(context.step, classes[tokens[span]][None], guided=context.guided, part=part)
        begin = end
