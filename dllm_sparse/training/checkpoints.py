"""Training checkpoints without pickle: tensors in safetensors, the rest in JSON, the whole folder renamed into place.

A folder named step-N is complete by construction, so whatever kills a run leaves the last one usable.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from dllm_sparse.files import file_sha256, read_sealed, write_bytes, write_sealed
from dllm_sparse.types import CheckpointError, DamagedFile

_FILES, _STATE = ("model.safetensors", "optimiser.safetensors"), "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any]
) -> Path:
    """Writes folder/step-N (weights, AdamW moments, `facts`) and then removes older ones."""
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}"
    try:
        _write(partial, step, model, optimiser, facts)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:  # a half checkpoint would fill the disk that could not hold it
        shutil.rmtree(partial, ignore_errors=True)
    _sync(folder)
    for other in folder.glob("*step-*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def _write(folder: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    names = dict(model.named_parameters())
    moments = {
        f"{name}.{key}": optimiser.state[parameter][key].detach().cpu().contiguous()
        for name, parameter in names.items()
        for key in _MOMENTS
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in names.items()}
    for name, tensors in zip(_FILES, (weights, moments), strict=True):
        write_bytes(folder / name, save(tensors))
    files = (folder / name for name in _FILES)
    write_sealed(folder / _STATE, {"step": step, **facts, "sha256": {file.name: file_sha256(file) for file in files}})
    _sync(folder)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Fills model and optimiser in place and returns the facts; raises CheckpointError for an unreadable folder."""
    try:
        facts = read_sealed(path / _STATE, "the state of a training run")
        for name in _FILES:
            if file_sha256(path / name) != facts["sha256"][name]:
                raise DamagedFile(path / name, "what was saved", "its checksum is another")
        weights, moments = (load_file(path / name) for name in _FILES)
        fused = any(group.get("fused") for group in optimiser.param_groups)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])
            # AdamW counts steps on the CPU unless it is fused; where the counter lives decides which kernel runs.
            homes = (parameter.device if fused else torch.device("cpu"), parameter.device, parameter.device)
            optimiser.state[parameter] = {
                key: moments[f"{name}.{key}"].to(home) for key, home in zip(_MOMENTS, homes, strict=True)
            }
    except (OSError, SafetensorError, DamagedFile, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"cannot resume from {path}: {error}; remove that folder to start again") from error
    return dict(facts)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
