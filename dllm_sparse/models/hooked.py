"""A transformers model behind the interface of the native network: same call, same list of FFNs, other insides.

Shapes: B rows, T tokens, N flat positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.hooked_attention import HookedAttention
from dllm_sparse.models.hooked_experts import HookedExperts
from dllm_sparse.models.hooked_ffn import HookedFFN, aligned
from dllm_sparse.models.layouts import Found
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import Step, StepContext, TokenClass


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedConfig(TransformerConfig):
    """What is known of a transformers model in the terms of the native ones."""

    architecture: str
    parameter_count: int
    canvas_length: int = 0  # tokens denoised together from uniform noise; 0: no such model

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return self.parameter_count


@dataclass(slots=True)
class HookedCache:
    """transformers' own cache; its positions are those of the canvas."""

    past: Any
    length: int

    def spread(self, rows: Tensor, length: int) -> HookedCache:
        """A cache of `length` positions that begins with copies of these rows [R]; this one is used up."""
        self.past.reorder_cache(rows)
        return HookedCache(self.past, length)


class HookedTransformer(Transformer):
    """The native network's interface over a transformers causal LM: same call, same FFN list, other insides."""

    config: HookedConfig

    def __init__(self, model: nn.Module, config: HookedConfig, found: Found) -> None:
        nn.Module.__init__(self)
        self.config, self.model, self.found = config, model, found
        self._hooked = hooked_ffns(self, found)
        self._attentions: list[HookedAttention] | None = None
        self.context: StepContext | None = None
        self.experts_implementation: str | None = None  # transformers' own, while ours stands in for it
        self._accepted = inspect.signature(model.forward).parameters

    @property
    def ffns(self) -> Sequence[Any]:
        """The FFNs, in the order of the layers; a layer with shared experts has two."""
        return self._hooked

    @property
    def attentions(self) -> Sequence[Any]:
        """The attention of every layer, found when first asked for: only some sites need it."""
        if self._attentions is None:
            self._attentions = hooked_attentions(self, self.found)
        return self._attentions

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

    @property
    def shares_prefixes(self) -> bool:
        """Where keys and values are all the model keeps: recurrent states may be continued by single tokens only."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        if self.model._is_stateful or not {"cache", "past_key_values"} & set(self._accepted):
            return False
        return all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.new_cache(1, 1).past.layers
        )

    @contextmanager
    def running(self, context: StepContext) -> Iterator[None]:
        """The context of the forward inside the block."""
        self.context = context
        try:
            yield
        finally:
            self.context = None

    def context_for(self, device: torch.device) -> StepContext:
        """The context of the running forward, its classes where the layer is."""
        context = self.context
        assert context is not None
        if context.token_class.device == device:
            return context
        return replace(context, token_class=context.token_class.to(device))

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
            options["cache" if "cache" in self._accepted else "past_key_values"] = cache.past  # its name since 5.24
        with self.running(context), self._only(rows):
            logits: Tensor = self.model(input_ids=ids, **options).logits
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


def hooked_ffns(network: HookedTransformer, found: Found) -> list[HookedFFN | HookedExperts]:
    """What was found, ready for hooks."""
    return [HookedFFN(network, ffn) if ffn.experts is None else HookedExperts(network, ffn) for ffn in found.ffns]


def hooked_attentions(network: HookedTransformer, found: Found) -> list[HookedAttention]:
    """The attentions of the layers whose FFNs were found, ready for hooks."""
    blocks = {ffn.layer: ffn.root for ffn in found.ffns}
    return [HookedAttention(network, layer, block) for layer, block in sorted(blocks.items())]
