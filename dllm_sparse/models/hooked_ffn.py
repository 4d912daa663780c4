"""FFNs of a transformers model under forward hooks: values pass through a tap, weights are not touched.

Hooks run outside the forward that accelerate wraps, so offloaded weights are no danger.
Shapes: B rows, T tokens, D width, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dllm_sparse.models.feed_forward import Tapper
from dllm_sparse.models.layouts import FoundFFN
from dllm_sparse.models.structure import Layout
from dllm_sparse.types import ATTENTION_SITES, SiteName, UsageError

if TYPE_CHECKING:
    from dllm_sparse.models.hooked import HookedTransformer


class HookedModule:
    """What FFNs, experts and attentions share: the override that hooks are installed for."""

    def __init__(self, network: HookedTransformer, layer: int) -> None:
        self.network, self.layer = network, layer
        self.listening: Tapper | None = None
        self.undo: list[Callable[[], None]] = []
        self.twin: HookedModule | None = None  # the same weights in another module, tapped along with these

    @property
    def override(self) -> Tapper | None:
        """What listens, or None."""
        return self.listening

    @override.setter
    def override(self, override: Tapper | None) -> None:
        while self.undo:
            self.undo.pop()()
        self.listening = None
        if self.twin is not None:
            self.twin.override = override
        if override is None:
            return
        if not hasattr(override, "tap"):
            raise UsageError("replacing whole FFN outputs needs the native engine; this model runs in transformers")
        self.install(override)
        self.listening = override

    def install(self, override: Tapper) -> None:
        raise NotImplementedError  # each kind has its own

    def before(self, module: nn.Module, site: SiteName) -> None:
        """Passes what a module is given through the tap."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (self.tapped(site, args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: self.tapped(site, kwargs[name])}

        self.undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def tapped(self, site: SiteName, values: Tensor) -> Tensor:
        """The values a tap makes of [B, T, n]; some models flatten rows and tokens."""
        assert self.listening is not None
        context = self.network.context_for(values.device)
        shaped = values.reshape(*context.token_class.shape, values.shape[-1])
        return self.listening.tap(self, context)(site, shaped).reshape(values.shape)

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        raise NotImplementedError  # each kind has its own weights


class HookedFFN(HookedModule):
    """A dense FFN (or shared expert) of one layer."""

    def __init__(self, network: HookedTransformer, found: FoundFFN) -> None:
        super().__init__(network, found.layer)
        assert found.layout is not None
        self.layout: Layout = found.layout
        self.root = found.root

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        paths = (self.layout.gate, self.layout.first) if site == "input" else (self.layout.down,)
        return column_norms(self.root.get_submodule(path) for path in paths if path is not None)

    def down(self, intermediate: Tensor) -> Tensor:
        """The output [..., D] fp32 that intermediate values [..., F] make, without the bias."""
        module: Any = self.root.get_submodule(self.layout.down)
        with aligned(module):
            weight = module.weight.T if hasattr(module, "nx") else module.weight
            return nn.functional.linear(intermediate.to(weight), weight).float()

    def install(self, override: Tapper) -> None:
        wanted = getattr(override, "site_names", self.layout.sites)
        if missing := [name for name in wanted if name not in (*self.layout.sites, *ATTENTION_SITES)]:
            raise UsageError(
                f"{self.network.config.architecture} has no site {missing[0]!r} ({self.layout}); "
                f"it has {', '.join(self.layout.sites)}"
            )
        into = self.layout.first if override.dense_gate and self.layout.gate else self.layout.module
        if override.dense_gate and self.layout.fused:
            raise UsageError("gate_input='dense' needs separate gate and up projections; here they are one matrix")
        self.before(self.root.get_submodule(into), "input")
        self.before(self.root.get_submodule(self.layout.down), "intermediate")
        if self.layout.gated:
            self._after(self.layout.first, "up")
        if self.layout.gated and self.layout.activation is not None:
            self._after(self.layout.activation, "gate")

    def _after(self, path: str, site: SiteName) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if site == "up" and self.layout.fused:
                gate, up = output.chunk(2, dim=-1)
                return torch.cat((gate, self.tapped(site, up)), dim=-1)
            return self.tapped(site, output)

        self.undo.append(self.root.get_submodule(path).register_forward_hook(hook).remove)


def column_norms(projections: Iterable[nn.Module]) -> Tensor:
    """L2 norm [in] fp32 of the columns of projections that read the same values."""
    squares = sum(_column_squares(module) for module in projections)
    assert isinstance(squares, Tensor)
    return squares.sqrt()


def _column_squares(module: nn.Module) -> Tensor:
    """Squared column norms [in] fp32 of a projection; GPT-2's Conv1D stores [in, out]."""
    with aligned(module):
        weight: Tensor = module.weight.detach().float()  # type: ignore[operator]
        return weight.pow(2).sum(dim=1 if hasattr(module, "nx") else 0)


@contextmanager
def aligned(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Brings offloaded weights of one module in for a moment; nothing to do where they are in, as in its forward."""
    away = any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))
    if not (away and hasattr(module, "_hf_hook")):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, device):
        yield
