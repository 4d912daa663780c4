"""Packed experts of a transformers model under taps, through transformers' own registry of experts implementations.

Shapes: B rows, T tokens, k experts a token, D width, F FFN width, N tokens routed to an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dllm_sparse.kernels.experts import combine
from dllm_sparse.kernels.routing import sort_pairs
from dllm_sparse.models.feed_forward import Tap, Tapper
from dllm_sparse.models.hooked_ffn import HookedModule, aligned
from dllm_sparse.models.layouts import FoundFFN
from dllm_sparse.models.moe import check_listener, expert_parts
from dllm_sparse.types import SiteName, UnsupportedArchitecture, UsageError

if TYPE_CHECKING:
    from dllm_sparse.models.hooked import HookedTransformer

EXPERTS_NAME = "dllm_sparse"
"""Our entry in transformers' registry of experts implementations."""


class HookedExperts(HookedModule):
    """The packed experts of one layer: every expert is a GLU (or plain MLP) over the tokens routed to it."""

    def __init__(self, network: HookedTransformer, found: FoundFFN) -> None:
        super().__init__(network, found.layer)
        module: Any = found.experts
        if not hasattr(module, "has_gate"):
            raise UnsupportedArchitecture(
                f"{type(module).__name__} is no class of transformers' experts interface; its experts cannot be "
                "reached from outside"
            )
        self.module, self.experts = module, int(module.num_experts)
        module.dllm_sparse_hooked = self

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets in one expert."""
        name = "down_proj" if site != "input" else "gate_up_proj" if self.module.has_gate else "up_proj"
        with aligned(self.module):
            weight: Tensor = getattr(self.module, name)[expert].detach().float()
            norms: Tensor = weight.norm(dim=1 if self.module.is_transposed else 0)
            return norms

    def down(self, intermediate: Tensor) -> Tensor:
        """Experts have no output projection in common."""
        raise UsageError("an expert layer has no output projection in common")

    def install(self, override: Tapper) -> None:
        check_listener(override)
        if not self.module.has_gate and {"gate", "up"} & set(getattr(override, "site_names", ())):
            raise UsageError("these experts are plain MLPs; their sites are input and intermediate")
        _register_experts()
        settings = self.module.config
        before = settings._experts_implementation
        if before != EXPERTS_NAME:
            self.network.experts_implementation = before
        settings._experts_implementation = EXPERTS_NAME
        self.undo.append(lambda: setattr(settings, "_experts_implementation", before))

    def run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[B * T, D] and its routing [B * T, k] -> [B * T, D], expert by expert.

        Where no tap changed a value, transformers' own implementation decides the last bits.
        """
        assert self.listening is not None
        touched = False

        def noted(tap: Tap) -> Tap:
            def watching(name: SiteName, values: Tensor) -> Tensor:
                nonlocal touched
                masked = tap(name, values)
                touched |= masked is not values
                return masked

            return watching

        pairs, places = sort_pairs(top_k_index, self.experts), top_k_index.shape[1]
        rows = hidden[pairs.order // places]
        outputs = [
            self._expert(expert, rows[span], noted(self.listening.tap(self, part, expert)))
            for expert, span, part in expert_parts(pairs, places, self.network.context_for(hidden.device))
        ]
        if not touched:
            return self._dense(hidden, top_k_index, top_k_weights)
        return combine(torch.cat(outputs), pairs.order, top_k_weights)

    def _dense(self, *arguments: Tensor) -> Tensor:
        settings = self.module.config
        settings._experts_implementation = self.network.experts_implementation
        try:
            output: Tensor = self.module.forward(*arguments)
            return output
        finally:
            settings._experts_implementation = EXPERTS_NAME

    def _expert(self, expert: int, x: Tensor, tap: Tap) -> Tensor:
        """One expert's FFN on [N, D]; taps see [1, N, n]."""
        module = self.module
        x = tap("input", x[None])[0]
        wide = self._project("gate_up_proj" if module.has_gate else "up_proj", expert, x)
        if not module.has_gate:
            hidden = module.act_fn(wide)
        elif type(module)._apply_gate.__name__ == "_default_apply_gate" and module.is_concatenated:
            gate, up = wide.chunk(2, dim=-1)
            gate, up = tap("gate", module.act_fn(gate)[None])[0], tap("up", up[None])[0]
            hidden = gate * up
        else:
            hidden = module._apply_gate(wide)  # a gate of its own kind: only input and intermediate are tapped
        output = self._project("down_proj", expert, tap("intermediate", hidden[None])[0])
        return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self.module, name)[expert]
        bias = getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else None
        return nn.functional.linear(x, weight.T if self.module.is_transposed else weight, bias)


def _register_experts() -> None:
    """Adds our experts implementation to transformers' registry; the layers look it up by name at every forward."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if EXPERTS_NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _run_experts)


def _run_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return self.dllm_sparse_hooked.run(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
