"""Models kept along the way, for laws of how something moves with training: loadable folders, log-spaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from dllm_sparse.files import write_sealed
from dllm_sparse.models.export import export_model
from dllm_sparse.models.snapshots import FACTS
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.training.tokenizer import SPECIAL_TOKENS
from dllm_sparse.types import Kind, UsageError


def log_spaced(steps: int, count: int, first: int | None = None) -> tuple[int, ...]:
    """`count` different steps from `first` (default: a hundredth of the run) to the last, evenly spaced in log."""
    first = max(first or steps // 100, 1)
    if count < 2 or count > steps - first + 1:
        raise UsageError(f"{count} snapshots of a run of {steps} steps; allowed: 2 to {steps - first + 1}")
    chosen = np.unique(np.round(np.geomspace(first, steps, count)).astype(int)).tolist()
    missing = (step for step in range(first, steps + 1) if step not in set(chosen))
    while len(chosen) < count:  # early steps fall together in a short run
        chosen.append(next(missing))
    return tuple(sorted(chosen))


def save_snapshot(
    folder: Path, transformer: Transformer, kind: Kind, tokenizer: Tokenizer, facts: dict[str, Any]
) -> Path:
    """Writes folder/step-N (bf16, the family's format) with `facts`, which name step and tokens."""
    target = folder / f"step-{facts['step']:08d}"
    family = "llama" if kind == "autoregressive" else "llada"
    export_model(transformer, target, family, tokenizer, SPECIAL_TOKENS, torch.bfloat16)
    write_sealed(target / FACTS, facts)
    return target
