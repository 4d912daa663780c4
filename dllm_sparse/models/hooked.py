"""A transformers model behind the interface of the native network: FFNs by forward hooks, experts by transformers' own
extension point, weights untouched. Hooks run outside the forward that accelerate wraps, so offloading is safe.

Shapes: B rows, T tokens, D width, F FFN width, N tokens routed to an expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.layouts import Found, FoundFFN, Layout
from dllm_sparse.models.transformer import Tap, TappedFFN, Transformer
from dllm_sparse.types import SiteName, Step, StepContext, TokenClass, UnsupportedArchitecture, UsageError

EXPERTS_NAME = "dllm_sparse"
"""Our entry in transformers' registry of experts implementations."""


class Tapper(Protocol):
    """An override that can work value by value: what hooks need."""

    dense_gate: bool

    def tap(self, ffn: TappedFFN, context: StepContext, expert: int = -1) -> Tap:
        """The tap of one FFN (or expert) in one forward."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedConfig(TransformerConfig):
    """What is known of a transformers model in the terms of the native ones."""

    architecture: str
    parameter_count: int
    experts: int = 0

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return self.parameter_count


@dataclass(slots=True)
class HookedCache:
    """transformers' own cache; its positions are those of the canvas."""

    past: Any
    length: int


class _HookedModule:
    """What dense and expert FFNs share: the override that hooks are installed for."""

    def __init__(self, network: HookedTransformer, layer: int) -> None:
        self.network, self.layer = network, layer
        self._override: Tapper | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def override(self) -> Tapper | None:
        """What listens, or None."""
        return self._override

    @override.setter
    def override(self, override: Tapper | None) -> None:
        while self._undo:
            self._undo.pop()()
        self._override = None
        if override is None:
            return
        if not hasattr(override, "tap"):
            raise UsageError("replacing whole FFN outputs needs the native engine; this model runs in transformers")
        self._install(override)
        self._override = override

    def _install(self, override: Tapper) -> None:
        raise NotImplementedError


class HookedFFN(_HookedModule):
    """A dense FFN (or shared expert) of one layer."""

    def __init__(self, network: HookedTransformer, found: FoundFFN) -> None:
        super().__init__(network, found.layer)
        assert found.layout is not None
        self.layout: Layout = found.layout
        self.root = found.root

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        paths = (self.layout.gate, self.layout.first) if site == "input" else (self.layout.down,)
        squares = sum(_column_squares(self.root.get_submodule(path)) for path in paths if path is not None)
        assert isinstance(squares, Tensor)
        return squares.sqrt()

    def down(self, intermediate: Tensor) -> Tensor:
        """The output [..., D] fp32 that intermediate values [..., F] make, without the bias."""
        module: Any = self.root.get_submodule(self.layout.down)
        with aligned(module):
            weight = module.weight.T if hasattr(module, "nx") else module.weight
            return nn.functional.linear(intermediate.to(weight), weight).float()

    def _install(self, override: Tapper) -> None:
        wanted = getattr(override, "site_names", self.layout.sites)
        if missing := [name for name in wanted if name not in self.layout.sites]:
            raise UsageError(
                f"{self.network.config.architecture} has no site {missing[0]!r} ({self.layout}); "
                f"it has {', '.join(self.layout.sites)}"
            )
        into = self.layout.first if override.dense_gate and self.layout.gate else self.layout.module
        if override.dense_gate and self.layout.fused:
            raise UsageError("gate_input='dense' needs separate gate and up projections; here they are one matrix")
        self._before(into, "input")
        self._before(self.layout.down, "intermediate")
        if self.layout.gated:
            self._after(self.layout.first, "up")
        if self.layout.gated and self.layout.activation is not None:
            self._after(self.layout.activation, "gate")

    def _before(self, path: str, site: SiteName) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (self._tapped(site, args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: self._tapped(site, kwargs[name])}

        handle = self.root.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        self._undo.append(handle.remove)

    def _after(self, path: str, site: SiteName) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if site == "up" and self.layout.fused:
                gate, up = output.chunk(2, dim=-1)
                return torch.cat((gate, self._tapped(site, up)), dim=-1)
            return self._tapped(site, output)

        self._undo.append(self.root.get_submodule(path).register_forward_hook(hook).remove)

    def _tapped(self, site: SiteName, values: Tensor) -> Tensor:
        """The values a tap makes of [B, T, n]; some models flatten rows and tokens."""
        assert self._override is not None
        context = self.network.context_for(values.device)
        shaped = values.reshape(*context.token_class.shape, values.shape[-1])
        return self._override.tap(self, context)(site, shaped).reshape(values.shape)


class HookedExperts(_HookedModule):
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

    def _install(self, override: Tapper) -> None:
        config = getattr(override, "config", None)
        if config is not None and (config.scope != "token" or config.refresh_every != 1 or override.dense_gate):
            raise UsageError("experts take scope 'token', refresh_every 1 and gate_input 'masked' only")
        if not self.module.has_gate and {"gate", "up"} & set(getattr(override, "site_names", ())):
            raise UsageError("these experts are plain MLPs; their sites are input and intermediate")
        _register_experts()
        settings = self.module.config
        before = settings._experts_implementation
        settings._experts_implementation = EXPERTS_NAME
        self._undo.append(lambda: setattr(settings, "_experts_implementation", before))

    def run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[B * T, D] and its routing [B * T, k] -> [B * T, D], expert by expert."""
        assert self._override is not None
        context = self.network.context_for(hidden.device)
        classes = context.token_class.flatten()
        result = torch.zeros_like(hidden)
        for expert in range(self.experts):
            tokens, place = torch.where(top_k_index == expert)
            if not len(tokens):
                continue
            part = StepContext(context.step, classes[tokens][None], guided=context.guided)
            output = self._expert(expert, hidden[tokens], self._override.tap(self, part, expert))
            weighted = output * top_k_weights[tokens, place, None]
            result.index_add_(0, tokens, weighted.to(result.dtype))
        return result

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


class HookedTransformer(Transformer):
    """The native network's interface over a transformers causal LM: same call, same FFN list, other insides."""

    config: HookedConfig

    def __init__(self, model: nn.Module, config: HookedConfig, found: Found) -> None:
        nn.Module.__init__(self)
        self.config, self.model, self.found = config, model, found
        self._hooked: list[HookedFFN | HookedExperts] = [
            HookedFFN(self, ffn) if ffn.experts is None else HookedExperts(self, ffn) for ffn in found.ffns
        ]
        self._context: StepContext | None = None
        self._accepted = inspect.signature(model.forward).parameters

    @property
    def ffns(self) -> Sequence[Any]:
        """The FFNs, in the order of the layers; a layer with shared experts has two."""
        return self._hooked

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """The model's own input embedding."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's execution device under accelerate."""
        hook = getattr(self.embedding, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return self.embedding.weight.device if device is None else torch.device(device)

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache of the kind the model uses."""
        from transformers import DynamicCache

        return HookedCache(DynamicCache(config=self.model.config), length)

    def context_for(self, device: torch.device) -> StepContext:
        """The context of the running forward, its classes where the layer is."""
        context = self._context
        assert context is not None
        if context.token_class.device == device:
            return context
        return StepContext(context.step, context.token_class.to(device), context.start, context.guided)

    def forward(
        self,
        ids: Tensor,
        *,
        start: int = 0,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        rows: slice | Tensor = slice(None),
        context: StepContext | None = None,
    ) -> Tensor:
        """Logits [B, rows, V] (or [N, V] for flat indices) as the native network gives them."""
        if context is None:
            classes = torch.full(ids.shape, TokenClass.PROMPT, dtype=torch.int8, device=ids.device)
            context = StepContext(Step(0, 1), classes, start)
        if positions is None:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": cache is not None}
        if "position_ids" in self._accepted:
            options["position_ids"] = positions.expand(ids.shape)
        if cache is not None:
            options["past_key_values"] = cache.past
        self._context = context
        try:
            with self._only(rows):
                logits: Tensor = self.model(input_ids=ids, **options).logits
        finally:
            self._context = None
        return logits if isinstance(rows, slice) else logits[0]

    @contextmanager
    def _only(self, rows: slice | Tensor) -> Iterator[None]:
        """Feeds the head the wanted positions alone; what comes behind it (soft caps, scales) then applies to them."""

        def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            picked = hidden[:, rows] if isinstance(rows, slice) else hidden.flatten(0, 1)[rows.to(hidden.device)][None]
            return (picked, *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
        try:
            yield
        finally:
            handle.remove()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As ever, with the real values of weights that accelerate keeps elsewhere."""
        tied = {f"model.{name}" for name in getattr(self.model, "all_tied_weights_keys", None) or ()}
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            own = name.removeprefix(f"{prefix}.")
            if remove_duplicate and own in tied:  # offloading makes copies of shared weights
                continue
            if parameter.device.type != "meta":
                yield name, parameter
                continue
            module, _, leaf = own.rpartition(".")
            with aligned(self.get_submodule(module), torch.device("cpu")):
                yield name, getattr(self.get_submodule(module), leaf)


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


def _register_experts() -> None:
    """Adds our experts implementation to transformers' registry; the layers look it up by name at every forward."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if EXPERTS_NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _run_experts)


def _run_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return self.dllm_sparse_hooked.run(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
