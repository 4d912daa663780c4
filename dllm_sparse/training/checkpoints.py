"""Training checkpoints without pickle: tensors in safetensors, the rest in JSON, the whole folder renamed into place.

A folder named step-N is complete by construction, so whatever kills a run leaves the last one usable.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dllm_sparse.files import write_json
from dllm_sparse.types import CheckpointError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any]
) -> Path:
    """Writes folder/step-N (weights, AdamW moments, `facts`) and then removes older ones."""
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = dict(model.named_parameters())
    moments = {
        f"{name}.{key}": optimiser.state[parameter][key].detach().cpu().contiguous()
        for name, parameter in names.items()
        for key in _MOMENTS
    }
    save_file({name: value.detach().cpu().contiguous() for name, value in names.items()}, partial / "model.safetensors")
    save_file(moments, partial / "optimiser.safetensors")
    write_json(partial / "state.json", {"step": step, **facts})
    for file in partial.iterdir():
        _sync(file)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    for other in folder.glob("*step-*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Fills model and optimiser in place and returns the facts; raises CheckpointError for an unreadable folder."""
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimiser.safetensors")
        facts = _facts(path / "state.json")
        fused = any(group.get("fused") for group in optimiser.param_groups)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])
            # AdamW counts steps on the CPU unless it is fused; where the counter lives decides which kernel runs.
            homes = (parameter.device if fused else torch.device("cpu"), parameter.device, parameter.device)
            optimiser.state[parameter] = {
                key: moments[f"{name}.{key}"].to(home) for key, home in zip(_MOMENTS, homes, strict=True)
            }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"cannot resume from {path}: {error}; remove that folder to start again") from error
    return facts


def _facts(path: Path) -> dict[str, Any]:
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not isinstance(facts["step"], int):
        raise ValueError(f"{path.name} does not say which step it is of")
    return {**facts, "seconds": float(facts["seconds"])}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
