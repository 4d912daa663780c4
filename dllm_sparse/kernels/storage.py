"""How a linear layer's weight lies in memory: by output (PyTorch's) or by input, where one input's weights are a row.

Kernels that skip inputs need the second, those that skip outputs the first. The shape stays [N, K] and every product
still works, on the same storage: there is no second copy of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def store_by_input(linear: nn.Linear) -> None:
    """Rewrites the weight once so that `linear.weight.t()` [K, N] is contiguous; a second call does nothing.

    Values and shape are unchanged; the order of a dense product's additions may not be, so its last bits can differ.
    """
    if linear.weight.t().is_contiguous():
        return
    with torch.inference_mode(False):  # a weight must stay an ordinary tensor, also when a decoding loop is running
        linear.weight.data = linear.weight.data.t().contiguous().t()


def by_output(linear: nn.Linear) -> Tensor:
    """The weight as a contiguous [N, K] tensor, stored by output again first if it is not."""
    if not linear.weight.is_contiguous():
        with torch.inference_mode(False):
            linear.weight.data = linear.weight.data.contiguous()
    return linear.weight


def by_input(linear: nn.Linear) -> Tensor:
    """The weight as a contiguous [K, N] view, stored by input first if it is not yet."""
    store_by_input(linear)
    return linear.weight.t()
