"""Which backend computes a sparse FFN. An explicit request that cannot run raises; `auto` falls back."""

from __future__ import annotations

import torch

from dllm_sparse.types import BackendUnavailable

_NOT_BUILT = "this version masks through the reference backend only; use --backend auto or reference"


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that will run for a requested one; raises BackendUnavailable with the reason."""
    if name in ("auto", "reference"):
        return "reference"
    if name == "triton" and device.type != "cuda":
        raise BackendUnavailable("backend 'triton' needs a CUDA GPU and the model is on the CPU; use --backend auto")
    raise BackendUnavailable(f"backend {name!r} cannot run here: {_NOT_BUILT}")
