"""The sparsified FFN inside captured forwards: select, skip what nobody kept, count; nothing read by the host.

Masks are those of the plain path (top-p per token on the 16-bit values, ties kept); every forward recomputes them.
Whether a product reads only the listed rows of its weight or all of them is decided per layer and site when a shape
is captured, from how many channels its first forward kept together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sparse.engine.forward import FixedForward
from dllm_sparse.kernels import reference
from dllm_sparse.kernels.dispatch import listing_pays
from dllm_sparse.kernels.packing import Selected, select
from dllm_sparse.kernels.streaming import MAX_STREAMED, Listed, add_norm, can_stream, on_gpu, stream_matmul
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.models.transformer import Block
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.types import Site, SiteName, TokenClass

SITES: tuple[SiteName, ...] = ("input", "intermediate")


@dataclass(slots=True)
class _Rows:
    """State of forwards of M rows; layers and sites in front: keys, kept [L, 2, M] and union [L, 2], int32.

    `union`, the channels some row kept, is measured at every forward where the list is made (padding is in it then, so
    forwards with padding do not count), and else until `settled`: finding it costs more than the products could save.
    """

    keys: Tensor
    kept: Tensor
    union: Tensor
    listing: list[list[bool]]
    dense: list[list[bool]]
    listed: Tensor  # [L, 2] bool: the union comes from the list
    exact: Tensor  # [L, 2] bool: it is measured without padding, or known
    settled: bool = False


class GraphSparseFFN:
    """An `FFNRunner` for one model and one sparsity configuration."""

    def __init__(self, forward: FixedForward, config: SparsityConfig, *, always: bool) -> None:
        self.forward, self.config, self._always = forward, config, always
        net = forward.net.config
        self._shape = (net.layers, len(SITES))
        self._widths = (net.width, net.ffn_width)
        self._device = forward.net.embedding.weight.device
        knobs = [[config.p_at(0.0, layer)] for layer in range(net.layers)]
        self._p = torch.tensor(knobs, dtype=torch.float64, device=self._device)
        self._rows: dict[int, _Rows] = {}
        self._classes = torch.zeros(0)
        self._entries = torch.tensor(self._widths, device=self._device)
        self._kept = torch.zeros((*self._shape, len(TokenClass)), dtype=torch.int64, device=self._device)
        self._tokens = torch.zeros(len(TokenClass), dtype=torch.int64, device=self._device)
        self._union = torch.zeros(self._shape, dtype=torch.int64, device=self._device)
        self._union_calls = torch.zeros(self._shape, dtype=torch.int64, device=self._device)
        self._call_sparsity = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        self._calls = torch.zeros(1, dtype=torch.int64, device=self._device)

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels ran, rather than their plain twins."""
        return on_gpu(self.forward.net.embedding.weight)

    def reset(self) -> None:
        """A generation begins: forgets what was counted."""
        for total in (self._kept, self._tokens, self._union, self._union_calls, self._call_sparsity, self._calls):
            total.zero_()

    def begin(self, classes: Tensor) -> None:
        """A forward of tokens with these classes [B, T] begins."""
        self._classes = classes.flatten()
        rows = len(self._classes)
        if rows not in self._rows:
            zeros = torch.zeros((*self._shape, rows), dtype=torch.int32, device=self._device)
            union = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            every = [[True] * len(SITES) for _ in range(self._shape[0])]
            never = [[False] * len(SITES) for _ in range(self._shape[0])]
            long = self.config.where == "faster" and rows > MAX_STREAMED
            flags = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            state = _Rows(zeros, zeros.clone(), union, every, every if long else never, flags, flags.clone())
            self._rows[rows] = state
            self._count_dense(state)
            self._say_how_unions_come(state, rows)

    def __call__(self, block: Block, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One layer; see `FFNRunner`."""
        ffn = block.ffn
        assert isinstance(ffn, FeedForward)  # masks inside experts are the plain path's
        if delta is not None:
            x = x + delta
        state = self._rows[x.shape[0]]
        if "input" in self.config.site_names and not state.dense[ffn.layer][0]:
            chosen = self._select(ffn.layer, 0, x, (block.ffn_norm.weight, block.ffn_norm.eps), ffn.gate_up_proj)
        else:
            chosen = Selected(add_norm(x, None, block.ffn_norm.weight, block.ffn_norm.eps)[1], None)
        if chosen.listed is not None:
            hidden = self._product(chosen.listed, ffn.gate_up_proj, activation=self.forward.net.config.activation)
        else:
            assert chosen.masked is not None
            hidden = self.forward.gated(ffn, chosen.masked)
        if "intermediate" not in self.config.site_names or state.dense[ffn.layer][1]:
            return self.forward.residual(hidden, ffn.down_proj, x)
        chosen = self._select(ffn.layer, 1, hidden, None, ffn.down_proj)
        if chosen.listed is not None:
            return self._product(chosen.listed, ffn.down_proj, residual=x), None
        assert chosen.masked is not None
        return self.forward.residual(chosen.masked, ffn.down_proj, x)

    def end(self) -> None:
        """Adds this forward's counts to the totals."""
        state = self._rows[len(self._classes)]
        member = torch.nn.functional.one_hot(self._classes, len(TokenClass))
        member[:, TokenClass.PADDING] = 0
        kept = (state.kept.double() @ member.double()).long()
        live = member.sum()
        self._kept += kept
        self._tokens += member.sum(0)
        clean = (self._classes != TokenClass.PADDING).all()
        counted = (state.exact | (state.listed & clean)) & (live > 0)
        self._union += torch.where(counted, state.kept[..., 0] if len(self._classes) == 1 else state.union, 0)
        self._union_calls += counted
        entries = live * self._entries
        self._call_sparsity += torch.where(live > 0, 1 - kept.sum(-1).double() / entries.clamp_min(1), 0.0)
        self._calls += live > 0

    def settle(self, rows: int) -> None:
        """Lists the kept channels only where the first forward of M rows kept few enough of them together."""
        state = self._rows[rows]
        union = state.kept[..., 0] if rows == 1 else state.union
        density = union.double().cpu() / torch.tensor(self._widths)
        pays = [[self._always or listing_pays(rows, d) for d in layer] for layer in density.tolist()]
        state.listing = [[self.on_gpu and one for one in layer] for layer in pays]
        if self.config.where == "faster":
            state.dense = [[not listed for listed in layer] for layer in state.listing]
            self._count_dense(state)
        state.settled = self.on_gpu  # elsewhere measuring costs nothing that matters
        self._say_how_unions_come(state, rows)

    def _say_how_unions_come(self, state: _Rows, rows: int) -> None:
        """Fixes, for the forwards to come, where the union is found and whether padding is in it."""
        for layer, sites in enumerate(state.listing):
            for place, listing in enumerate(sites):
                lists = listing and self.on_gpu and rows <= MAX_STREAMED and not state.dense[layer][place]
                state.listed[layer, place] = lists
                known = state.dense[layer][place] or rows == 1
                state.exact[layer, place] = known or (not lists and not state.settled)

    def _count_dense(self, state: _Rows) -> None:
        """Sites that run dense keep everything."""
        for layer, sites in enumerate(state.dense):
            for place, width in enumerate(self._widths):
                if sites[place]:
                    state.kept[layer, place] = width
                    state.union[layer, place] = width

    def collect(self, counts: SparsityCounts) -> None:
        """Adds the totals to `counts`; waits for the device."""
        calls = int(self._calls)
        for layer in range(self._shape[0]):
            for place, name in enumerate(SITES):
                if calls and name in self.config.site_names:
                    counts.add_totals(
                        Site(layer, name),
                        self._kept[layer, place],
                        self._tokens,
                        self._union[layer, place],
                        self._call_sparsity[layer, place],
                        calls,
                        int(self._union_calls[layer, place]),
                        self._widths[place],
                    )

    def _select(
        self, layer: int, place: int, x: Tensor, norm: tuple[Tensor, float] | None, consumer: torch.nn.Linear
    ) -> Selected:
        state = self._rows[x.shape[0]]
        kept, union = state.kept[layer, place], state.union[layer, place : place + 1]
        if not on_gpu(x):
            p = self.config.p_at(0.0, layer)
            values = x if norm is None else reference.rms_norm(x, *norm)
            chosen = Selected(reference.select(values, p), None)
            assert chosen.masked is not None
            kept.copy_(chosen.masked.count_nonzero(-1))
        else:
            listing = state.listing[layer][place] and can_stream(x, consumer.weight.t())
            chosen = select(x, self._p[layer], state.keys[layer, place], kept, norm=norm, listing=listing, count=union)
        if chosen.listed is None and not state.settled:
            assert chosen.masked is not None
            counted = (self._classes != TokenClass.PADDING)[:, None]
            union.copy_(((chosen.masked != 0) & counted).any(0).sum())
        return chosen

    def _product(
        self,
        listed: Listed,
        layer: torch.nn.Linear,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        weight = layer.weight.t()
        scratch = self.forward.scratch
        return stream_matmul(listed, weight, scratch, activation=activation, bias=layer.bias, residual=residual)
