"""The sparsified FFN inside captured forwards: select, skip what nobody kept, count; nothing read by the host.

Masks are those of the plain path (top-p in any scope, ties kept); every forward recomputes them. Whether a product
reads only the listed rows of its weight or all of them is decided per layer and site when a shape is captured, from how
many channels its first forward kept together, and again between generations (`kernels/dispatch.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_sparse.engine.forward import FixedForward
from dllm_sparse.kernels.histogram import Histogram
from dllm_sparse.kernels.listing import Listed, list_kept
from dllm_sparse.kernels.packing import Selected, can_be_counted, select
from dllm_sparse.kernels.reference import ACTIVATIONS
from dllm_sparse.kernels.streaming import MAX_STREAMED, add_norm, can_list, can_stream, linear, on_gpu, stream_matmul
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.models.transformer import Block
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.sparsity.graph_rows import GraphRows
from dllm_sparse.sparsity.scopes import scoped_mask
from dllm_sparse.types import NonFiniteActivations, SiteName, Step, StepContext, TokenClass

SITES: tuple[SiteName, ...] = ("input", "gate", "intermediate")
"""The sites it can mask."""


class GraphSparseFFN:
    """An `FFNRunner` for one model and one sparsity configuration."""

    def __init__(self, forward: FixedForward, config: SparsityConfig, *, always: bool) -> None:
        self.forward, self.config, self._always = forward, config, always
        net = forward.net.config
        self._widths = {name: net.width if name == "input" else net.ffn_width for name in config.site_names}
        self._places = {name: place for place, name in enumerate(config.site_names)}
        self._device = forward.net.embedding.weight.device
        knobs = [[config.p_at(0.0, layer)] for layer in range(net.layers)]
        self._p = torch.tensor(knobs, dtype=torch.float64, device=self._device)
        self.by_rows: dict[int, GraphRows] = {}
        self._context = StepContext(Step(0, 1), torch.zeros(0))
        bf16 = forward.net.embedding.weight.dtype == torch.bfloat16
        self._counting = config.scope == "token" and (always or self.on_gpu) and bf16
        self._forward = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broken_at = torch.full_like(self._forward, -1)  # the first forward with NaN or Inf
        self._watched: tuple[Tensor, Tensor | None] | None = None  # what is read aside

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels ran, rather than their plain twins."""
        return on_gpu(self.forward.net.embedding.weight)

    def reset(self) -> list[int]:
        """A generation begins: forgets what was counted; returns the M whose forwards must be captured anew."""
        stale = [rows for rows, state in self.by_rows.items() if state.stale]
        for state in self.by_rows.values():
            state.stale = False
            state.reset()
        self._forward.zero_()
        self._broken_at.fill_(-1)
        return stale

    def begin(self, classes: Tensor) -> None:
        """A forward of tokens with these classes [B, T] begins; launched aside."""
        self._context = StepContext(Step(0, 1), classes)
        rows = classes.numel()
        if rows not in self.by_rows:
            long = self.config.where == "faster" and rows > MAX_STREAMED
            layers, lists = self.forward.net.config.layers, self.on_gpu or self._always
            counting = self._counting and "intermediate" in self._places
            self.by_rows[rows] = GraphRows(
                layers, self._widths, rows, self._device, listing=lists, dense=long, counting=counting
            )
        self.by_rows[rows].begin()

    def __call__(self, block: Block, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One layer; see `FFNRunner`."""
        blocks, aside = self.forward.net.blocks, self.forward.aside
        if block is blocks[0]:
            aside.join()
        x, delta = self._masked(block, x, delta)
        if block is blocks[-1]:
            self._watched = x, delta
            with aside:
                self._count(x if delta is None else x + delta)
        return x, delta

    def _masked(self, block: Block, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ffn = block.ffn
        assert isinstance(ffn, FeedForward)  # masks inside experts are the plain path's
        if delta is not None:
            x = x + delta
        norm = (block.ffn_norm.weight, block.ffn_norm.eps)
        counted = self._histogram(ffn, x)
        if self._masks("input", ffn.layer):
            hidden = self._gated(ffn, self._select("input", ffn.layer, x, ffn.gate_up_proj, norm), counted)
        elif self._masks("gate", ffn.layer):
            return self._gate_first(ffn, add_norm(x, None, *norm)[1], x)
        else:
            hidden = self.forward.gated(ffn, add_norm(x, None, *norm)[1], counted)
        if not self._masks("intermediate", ffn.layer):
            return self.forward.residual(hidden, ffn.down_proj, x)
        chosen = self._select("intermediate", ffn.layer, hidden, ffn.down_proj, histogram=counted)
        return self._down(ffn, chosen, x)

    def end(self) -> None:
        """The forward ended: what it added to the totals is there."""
        self.forward.aside.join()
        self._watched = None

    def settle(self, rows: int) -> None:
        """Decides how the products of M rows run, from their first forward."""
        faster = self.config.where == "faster"
        self.by_rows[rows].settle(always=self._always, on_gpu=self.on_gpu, or_dense=faster)

    def collect(self, counts: SparsityCounts) -> None:
        """Adds the totals to `counts`, and from them decides again how products run; waits for the device.

        Raises NonFiniteActivations where a forward met NaN or Inf.
        """
        if (step := int(self._broken_at)) >= 0:
            raise NonFiniteActivations(
                f"NaN or Inf in the activations at step {step}; execution 'eager' names layer and site"
            )
        for state in self.by_rows.values():
            totals = state.totals()
            state.add_to(counts, totals)
            if self.on_gpu and not self._always:
                state.decide_again(totals, or_dense=self.config.where == "faster")

    def _count(self, x: Tensor) -> None:
        """Adds this forward's counts to the totals; notes NaN or Inf in what the last layer leaves, x [M, D].

        Masks keep what is not finite, and nothing that is added to it makes it finite: this sees what any layer met.
        Padding counts nowhere.
        """
        classes = self._context.token_class.flatten()
        broken = (~torch.isfinite(x.sum(-1, dtype=torch.float32)) & (classes != TokenClass.PADDING)).any()
        self._broken_at.copy_(torch.where(broken & (self._broken_at < 0), self._forward, self._broken_at))
        self.by_rows[len(classes)].add(classes)
        self._forward += 1

    def _masks(self, name: SiteName, layer: int) -> bool:
        state = self.by_rows[self._context.token_class.numel()]
        return name in self._places and not state.dense[layer][self._places[name]]

    def _histogram(self, ffn: FeedForward, x: Tensor) -> Histogram | None:
        """Where act(gate) * up of rows like x [M, D] is counted; None where its selection has no use for that."""
        if not self._counting or not self._masks("intermediate", ffn.layer) or not can_be_counted(x):
            return None
        state, weights = self.by_rows[x.shape[0]], (ffn.gate_up_proj.weight.t(), ffn.down_proj.weight.t())
        listing = state.listing[ffn.layer][self._places["intermediate"]]
        return state.histogram(ffn.layer) if listing and all(can_stream(x, weight) for weight in weights) else None

    def _gated(self, ffn: FeedForward, chosen: Selected, counted: Histogram | None) -> Tensor:
        """act(gate) * up of a masked input."""
        if chosen.listed is not None:
            activation = self.forward.net.config.activation
            return self._product(chosen.listed, ffn.gate_up_proj, activation=activation, histogram=counted)
        assert chosen.masked is not None
        return self.forward.gated(ffn, chosen.masked, counted)

    def _gate_first(self, ffn: FeedForward, normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masks the gate alone; then only the rows of `down_proj` that it kept are read.

        The columns of up that it kept are not picked out: the weight is stored by input, where 16 neighbouring outputs
        share the 32 bytes memory gives at least, so that at density d a share 1 - (1 - d)^16 of them is read anyway:
        all but 2e-5 at d = 0.5, 81 % at 0.1. Stored by output they could be, but then no input could be skipped.
        """
        gate, up = linear(normed, ffn.gate_up_proj, self.forward.scratch).chunk(2, dim=-1)
        gate = ACTIVATIONS[self.forward.net.config.activation](gate).contiguous()
        chosen = self._select("gate", ffn.layer, gate, ffn.down_proj)
        if chosen.listed is not None:
            values, rows, length = chosen.listed
            listed = Listed(values * up.index_select(1, rows.clamp(0, up.shape[1] - 1)), rows, length)
            return self._down(ffn, Selected(None, listed), x)
        assert chosen.masked is not None
        return self._down(ffn, Selected(chosen.masked * up, None), x)

    def _down(self, ffn: FeedForward, chosen: Selected, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x plus the output of masked intermediate values; see `FixedForward.residual`."""
        if chosen.listed is not None:
            return self._product(chosen.listed, ffn.down_proj, residual=x), None
        assert chosen.masked is not None
        return self.forward.residual(chosen.masked, ffn.down_proj, x)

    def _select(
        self,
        name: SiteName,
        layer: int,
        x: Tensor,
        consumer: nn.Linear,
        norm: tuple[Tensor, float] | None = None,
        histogram: Histogram | None = None,
    ) -> Selected:
        """Masks rows [M, n] at a site; listed where that was decided and the consumer can read a list."""
        state, place = self.by_rows[x.shape[0]], self._places[name]
        state.listable[layer][place] = can_list(x, consumer.weight.t())
        listing = state.listing[layer][place] and state.listable[layer][place]
        kept, union = state.kept[layer, place], state.union[layer, place]
        if self.config.scope == "token":
            chosen = select(
                x, self._p[layer], state.guesses[layer, place], kept, norm=norm, listing=listing, count=union,
                marks=state.marks[layer, place], histogram=histogram,
            )  # fmt: skip
        else:
            masked = self._shared(layer, x if norm is None else add_norm(x, None, *norm)[1])
            kept.copy_(masked.count_nonzero(-1))
            chosen = Selected(masked, list_kept(masked, union[:1]) if listing else None)
        if chosen.listed is None and state.measures:
            assert chosen.masked is not None
            counted = (self._context.token_class.flatten() != TokenClass.PADDING)[:, None]
            union[0] = ((chosen.masked != 0) & counted).any(0).sum()
        return chosen

    def _shared(self, layer: int, x: Tensor) -> Tensor:
        """Rows [M, n] masked by groups or by sequences, as the plain path does."""
        values = x.view(*self._context.token_class.shape, -1)
        p = self.config.p_at(0.0, layer)
        keep = scoped_mask(values, p, self.config, self._context, None, check=False)
        return torch.where(keep, values, 0).flatten(0, 1)

    def _product(
        self,
        listed: Listed,
        layer: nn.Linear,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        histogram: Histogram | None = None,
    ) -> Tensor:
        return stream_matmul(
            listed, layer.weight.t(), self.forward.scratch, activation=activation, bias=layer.bias, residual=residual,
            histogram=histogram,
        )  # fmt: skip
