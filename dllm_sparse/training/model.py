"""The trained module: a transformer that returns its loss, and its initial weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dllm_sparse.models.transformer import Transformer
from dllm_sparse.training.objectives import weighted_loss

_STD = 0.02  # GPT-2's and Llama's


class LossModel(nn.Module):
    """Loss in, gradient out: logits never leave the mixed-precision region, which saves an fp32 copy of [B, L, V]."""

    def __init__(self, transformer: Transformer, compiled: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.loss = weighted_loss
        if compiled:
            # One graph serves all blocks: seconds of compilation where the whole model takes minutes.
            for block in transformer.blocks:
                block.compile(dynamic=False)
            self.loss = torch.compile(weighted_loss, dynamic=False)

    def forward(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of cross entropies, in nats, for [B, L] tensors."""
        return self.loss(self.transformer(inputs), targets, weights)


def initialise(transformer: Transformer, seed: int) -> None:
    """Normal weights, the same for both twins; matrices that write to the residual scaled by 1/sqrt(2 layers).

    Drawn on the CPU: a seed means the same weights on any device. Scaling: GPT-2 (Radford et al. 2019, sec. 2.3).
    """
    generator = torch.Generator().manual_seed(seed)
    residual = _STD / math.sqrt(2 * transformer.config.layers)
    for name, parameter in transformer.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else _STD
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
