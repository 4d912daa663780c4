"""CUDA graphs of whole micro-batches: forward and backward of a small model cost more to launch than to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dllm_sparse.training.objectives import Example

_WARMUP = 3  # runs before the capture: compilation, workspaces and the rotary table must be in place


class GraphedMicroBatch:
    """One micro-batch shape, captured once and replayed; gradients are added to `parameter.grad`, which must exist.

    `share` is this micro-batch's part of the step's loss. Calling it returns `factor` times the summed loss, a scalar
    tensor. Only for one process: gradients are not averaged.
    """

    def __init__(self, model: nn.Module, example: Example, share: float, device: torch.device) -> None:
        self.model, self.share = model, share
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parts = [torch.from_numpy(part).to(device) for part in example[:3]]
        self.factor = torch.zeros((), device=device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self._compute()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self._compute()

    def _compute(self) -> Tensor:
        loss: Tensor = self.model(*self.parts) * self.factor
        # autograd.grad, not backward: gradient accumulation nodes remember the stream they were made on.
        gradients = torch.autograd.grad(loss * self.share, self.parameters)
        torch._foreach_add_([_gradient(parameter) for parameter in self.parameters], gradients)
        return loss.detach()

    def __call__(self, example: Example, factor: float) -> Tensor:
        """Runs the graph on new data of the captured shape."""
        for part, values in zip(self.parts, example[:3], strict=True):
            part.copy_(torch.from_numpy(values), non_blocking=True)
        self.factor.fill_(factor)
        self.graph.replay()
        return self.loss.clone()


def allocate_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Zero gradients at fixed addresses, for graphs to add to."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
