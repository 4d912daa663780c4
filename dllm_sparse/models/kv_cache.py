"""The cache of keys and values of the native transformer."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.models.config import TransformerConfig


class KVCache:
    """Static post-RoPE keys and values, addressed by canvas position; a forward rewrites its own slice in place."""

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        layers: int | None = None,
    ) -> None:
        shape = (layers or config.layers, batch, config.kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def length(self) -> int:
        """Canvas positions the buffers can hold."""
        return self.keys.shape[3]

    def front(self, rows: int) -> KVCache:
        """The cache of the first rows alone, in the same memory."""
        view = copy(self)
        view.keys, view.values = self.keys[:, :rows], self.values[:, :rows]
        return view

    def spread(self, rows: Tensor, length: int) -> KVCache:
        """A new cache of `length` positions that begins with copies of these rows [R], which may repeat."""
        copied = copy(self)
        room = (0, 0, 0, length - self.length)
        copied.keys, copied.values = (F.pad(buffer[:, rows], room) for buffer in (self.keys, self.values))
        return copied

    def take(self, rows: Tensor) -> KVCache:
        """The cache of these rows [R], ascending, which move to the front of the same memory."""
        places = torch.arange(len(rows), device=rows.device)
        away = rows != places
        self.move(rows[away], places[away])
        return self.front(len(rows))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies rows [N] `source` to the places [N] `target`; layer by layer, so that little memory is needed."""
        for buffer in (self.keys, self.values):
            for layer in buffer:
                layer[target] = layer[source]

    def update(self, layer: int, start: int, key: Tensor, value: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Stores [B, kv_heads, T, head_dim] at `start` and returns the first `visible` positions."""
        stop = start + key.shape[2]
        self.keys[layer, :, :, start:stop] = key
        self.values[layer, :, :, start:stop] = value
        return self.keys[layer, :, :, :visible], self.values[layer, :, :, :visible]
