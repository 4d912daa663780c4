"""`sparsify`: the only place that touches a model. Masks activations while a `with` block lasts.

Masks are recomputed at every step from the step's own activations, applied, counted and offered to observers. The
sparsifier stores none of them, except under `refresh_every`, whose point is to reuse them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.engine.forward import FFNRunner, FixedForward
from dllm_sparse.engine.observing import GraphableObserver, StepClock
from dllm_sparse.kernels.selection import MAX_ROW
from dllm_sparse.models.feed_forward import FeedForward, FFNOverride, Tap, Tapped, known_context
from dllm_sparse.models.finite import not_finite
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.transformer import Attention
from dllm_sparse.sparsity.backends import MaskedFFN, sparse_ffn
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.sparsity.graph_ffn import SITES, GraphSparseFFN
from dllm_sparse.sparsity.scopes import scoped_mask
from dllm_sparse.types import (
    ATTENTION_SITES,
    NonFiniteActivations,
    Observer,
    Site,
    SiteName,
    StepContext,
    UsageError,
)


class Sparsifier(GraphableObserver):
    """Handle of an active `sparsify` block: computes the masks and knows the sparsity measured so far.

    With `apply=False` the masks are counted and offered to observers, but the values go on dense.
    """

    def __init__(
        self, lm: LanguageModel, config: SparsityConfig, observers: Sequence[Observer] = (), *, apply: bool = True
    ) -> None:
        self.config = config
        self.apply = apply
        self._sparse = sparse_ffn(config, lm)
        self._dense = MaskedFFN()
        self.counts = SparsityCounts()
        self._observers = observers
        self._causal = lm.config.causal
        # Masks inside experts are the plain path's.
        self._fits = max(lm.config.width, lm.config.ffn_width) <= MAX_ROW and not lm.config.experts
        _check_layers(config, lm.config.layers)
        self._norms: dict[Site, Tensor] = {}
        self._stored: dict[Site, Tensor] = {}
        self._graphed_on_gpu = False

    @property
    def backend(self) -> str:
        """What computed the FFNs so far."""
        return "triton" if self._graphed_on_gpu else self._sparse.name

    @property
    def sparsity(self) -> dict[str, float]:
        """Measured sparsity so far per site, `mean` over all counted entries, `hook_mean` over hooks and calls."""
        return self.counts.summary()

    @property
    def needs_every_row(self) -> bool:
        """Masks kept for reuse belong to rows; those of one step need no other."""
        return self.config.refresh_every > 1 or any(observer.needs_every_row for observer in self._observers)

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        """A new canvas: masks kept for reuse belong to the old one."""
        self._stored.clear()

    def graph_key(self) -> str | None:
        """What the captured FFN computes; None where only the plain path does it (see `GraphableObserver`)."""
        config = self.config
        plain = (
            config.rule != "top_p"
            or config.score != "magnitude"
            or config.ties != "keep"
            or config.gate_input != "masked"
            or any(name not in SITES for name in config.site_names)
            or config.schedule is not None
            or config.refresh_every > 1
            or config.layers is not None
            or config.backend in ("reference", "cpu")
            or not self._fits
        )
        identity = any(config.is_identity(p) for p in config.layer_p or (config.p,))
        watched = any(not isinstance(observer, StepClock) for observer in self._observers)
        if plain or identity or watched or not self.apply:
            return None
        shared = (config.scope, config.group_size)
        return repr((config.p, config.layer_p, config.sites, config.backend, config.where, *shared))

    def graph_ffn(self, forward: FixedForward) -> FFNRunner:
        """The FFN of captured forwards."""
        return GraphSparseFFN(forward, self.config, always=self.config.backend == "triton")

    def graph_stop(self, ffn: FFNRunner) -> None:
        """A generation ended: takes over its counts."""
        assert isinstance(ffn, GraphSparseFFN)
        ffn.collect(self.counts)
        self._graphed_on_gpu = ffn.on_gpu

    def __call__(self, ffn: FeedForward, x: Tensor, context: StepContext | None) -> Tensor:
        """The sparsified FFN of one layer, [B, T, D] -> [B, T, D]."""
        context = known_context(x, context)
        return self._computes(ffn, context)(ffn, x, self.tap(ffn, context), dense_gate=self.dense_gate)

    def project(self, attention: Attention, site: SiteName, values: Tensor, context: StepContext | None) -> Tensor:
        """A projection of one layer's attention on values [B, T, n] masked at its site."""
        context = known_context(values, context)
        masked = self.tap(attention, context)(site, values)
        return self._computes(attention, context).product(attention.projection(site), masked)

    def _computes(self, module: Tapped, context: StepContext) -> MaskedFFN:
        return self._sparse if self._masks(module.layer, context) else self._dense

    def _masks(self, layer: int, context: StepContext) -> bool:
        """False where nothing is masked, so that nothing can be skipped: the dense products, to the last bit."""
        masked = self.config.layers is None or layer in self.config.layers
        return self.apply and masked and not self.config.is_identity(self.config.p_at(context.step.fraction, layer))

    @property
    def site_names(self) -> tuple[SiteName, ...]:
        """The sites it taps."""
        return self.config.site_names

    @property
    def dense_gate(self) -> bool:
        """Whether the gate projection sees x as it was."""
        return self.config.gate_input == "dense"

    def tap(self, module: Tapped, context: StepContext, expert: int = -1) -> Tap:
        """What masks the values [B, T, n] of one layer (or of one of its experts) in one forward."""
        masked = self.config.layers is None or module.layer in self.config.layers

        def tap(name: SiteName, values: Tensor) -> Tensor:
            chosen = masked and name in self.config.site_names
            return self._masked(module, Site(module.layer, name, expert), values, context) if chosen else values

        return tap

    def _masked(self, module: Tapped, site: Site, values: Tensor, context: StepContext) -> Tensor:
        p = self.config.p_at(context.step.fraction, site.layer)
        identity = self.config.is_identity(p)
        keep = None if identity else self._reused(site, context)
        if keep is None:
            keep = self._fresh(site, module, values, p, context)
            if self.config.refresh_every > 1:
                self._store(site, keep, context.start)
        self.counts.add(site, keep, context.token_class)
        for observer in self._observers:
            observer.on_mask(site, values, keep, context)
        return _zeroed(values, keep) if self.apply and not identity else values

    def _fresh(self, site: Site, module: Tapped, values: Tensor, p: float, context: StepContext) -> Tensor:
        norms = self._weight_norms(site, module) if self.config.score == "weighted" else None
        try:
            return scoped_mask(values, p, self.config, context, norms)
        except NonFiniteActivations:
            raise not_finite(site, context.step.index, "values to be masked") from None

    def _weight_norms(self, site: Site, module: Tapped) -> Tensor:
        """L2 norm [n] of the weight column each value of the site meets (WINA's score)."""
        if site not in self._norms:
            self._norms[site] = module.column_norms(site.name, site.expert)
        return self._norms[site]

    def _reused(self, site: Site, context: StepContext) -> Tensor | None:
        """The mask kept from an earlier step for these positions; None where this step must compute its own.

        A causal model's token is new at every step, so it takes over the mask of the position before it.
        """
        if context.step.index % self.config.refresh_every == 0 or site not in self._stored:
            return None
        stored, tokens = self._stored[site], context.token_class.shape[1]
        if stored.shape[0] != context.token_class.shape[0]:
            return None
        if self._causal:
            return stored[:, -1:].expand(-1, tokens, -1)
        return stored[:, context.start : context.start + tokens] if context.start + tokens <= stored.shape[1] else None

    def _store(self, site: Site, keep: Tensor, start: int) -> None:
        if self._causal or start == 0 or site not in self._stored:
            self._stored[site] = keep.clone()
        else:
            self._stored[site] = widened(self._stored[site], start + keep.shape[1])
            self._stored[site][:, start : start + keep.shape[1]] = keep


def widened(kept: Tensor, length: int) -> Tensor:
    """What is kept of the positions fed so far [B, L, n], with zeros up to `length`: blocks may come one by one."""
    return torch.nn.functional.pad(kept, (0, 0, 0, length - kept.shape[1])) if length > kept.shape[1] else kept


def _zeroed(values: Tensor, keep: Tensor) -> Tensor:
    """The values with zeros where the mask is off."""
    # A GPU casts a bool factor in a pass of its own, which `where` does not need; on a CPU the product is 3x faster.
    return torch.where(keep, values, 0) if values.is_cuda else values * keep


def _check_layers(config: SparsityConfig, layers: int) -> None:
    if config.layers is not None and max(config.layers) >= layers:
        raise UsageError(f"layer {max(config.layers)} was asked for; the model has layers 0 to {layers - 1}")
    if config.layer_p is not None and len(config.layer_p) != layers:
        raise UsageError(f"layer_p has {len(config.layer_p)} values; the model has {layers} layers")


@contextmanager
def sparsify(
    lm: LanguageModel, config: SparsityConfig, observers: Sequence[Observer] = (), *, apply: bool = True
) -> Iterator[Sparsifier]:
    """Sparsifies the model inside the block; afterwards nothing is left behind, also after an exception.

    Yields the handle; `handle.sparsity` is the measured sparsity, e.g. {"input": .., "intermediate": .., "mean": ..}.
    Observers see every mask through `on_mask`; with `apply=False` they see the masks of a dense model, which stays
    dense. Raises UsageError when the model is already sparsified, BackendUnavailable when an explicit backend cannot
    run.
    """
    handle = Sparsifier(lm, config, observers, apply=apply)
    with overriding(lm, handle):
        yield handle


@contextmanager
def overriding(lm: LanguageModel, override: FFNOverride) -> Iterator[None]:
    """Lets `override` compute every FFN inside the block; raises UsageError when something else already does.

    A sparsifier with sites in the attention computes its projections, too.
    """
    modules: list[Any] = list(lm.transformer.ffns)
    if any(ffn.override is not None for ffn in modules):
        raise UsageError("the model is already sparsified; leave the surrounding `sparsify` block first")
    if isinstance(override, Sparsifier) and set(override.site_names) & set(ATTENTION_SITES):
        modules += lm.transformer.attentions
    with ExitStack() as undo:
        for module in modules:
            undo.callback(setattr, module, "override", None)
            module.override = override
        yield
