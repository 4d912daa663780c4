"""A recorder's counts as one safetensors file, so that processes and machines can add theirs up exactly."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dllm_sparse.analysis.tallies import MaskCounts, SiteTally
from dllm_sparse.files import write_bytes
from dllm_sparse.types import DllmSparseError, Kind, Site, SiteName

_TENSORS = tuple(f.name for f in fields(SiteTally) if f.name != "width")


def save_counts(counts: MaskCounts, path: Path) -> Path:
    """Writes the counts atomically; integers stay integers."""
    tensors: dict[str, Tensor] = {f"canvas/{name}": value for name, value in counts.canvas.items()}
    for site, tally in counts.sites.items():
        tensors |= {f"site/{_key(site)}/{name}": getattr(tally, name) for name in _TENSORS}
    settings = {
        "kind": counts.kind,
        "blocks": counts.blocks,
        "deltas": counts.deltas,
        "snapshot_every": counts.snapshot_every,
        "sites": [(*site, tally.width) for site, tally in counts.sites.items()],
        "canvas": list(counts.canvas),
    }
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    return write_bytes(path, save(contiguous, metadata={"settings": json.dumps(settings)}))


def load_counts(path: Path) -> MaskCounts:
    """Reads what `save_counts` wrote; raises DllmSparseError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return _counts(settings, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DllmSparseError(f"{path} is not a file of mask counts ({error!r}); remove it and run again") from error


def _counts(settings: dict[str, Any], tensors: dict[str, Tensor]) -> MaskCounts:
    """The counts; whatever does not fit together raises ValueError, KeyError or TypeError."""
    blocks = [(int(block), int(index)) for block, index in settings["blocks"]]
    counts = MaskCounts(
        cast(Kind, _one_of(settings["kind"], get_args(Kind))),
        blocks=blocks,
        deltas=tuple(map(int, settings["deltas"])),
        snapshot_every=int(settings["snapshot_every"]),
    )
    for layer, name, expert, width in settings["sites"]:
        site = Site(int(layer), cast(SiteName, _one_of(name, get_args(SiteName))), int(expert))
        tally = SiteTally(int(width), *(tensors[f"site/{_key(site)}/{part}"] for part in _TENSORS))
        rows = counts.prompts or tally.steps.shape[0]
        _check_like(tally, SiteTally.empty(rows, len(blocks), tally.width, len(counts.deltas), torch.device("meta")))
        counts.sites[site] = tally
    for name in settings["canvas"]:
        counts.canvas[cast(SiteName, name)] = canvas = tensors[f"canvas/{name}"]
        if canvas.dim() != 4 or canvas.shape[:2] != (counts.prompts, len(blocks)) or canvas.shape[3] != 2:
            raise ValueError(f"canvas of {name} is {list(canvas.shape)}")
    return counts


def _key(site: Site) -> str:
    return "/".join(map(str, site))


def _one_of(name: object, allowed: tuple[str, ...]) -> str:
    if name not in allowed:
        raise ValueError(f"{name!r} is none of {', '.join(allowed)}")
    return str(name)


def _check_like(tally: SiteTally, pattern: SiteTally) -> None:
    for part in _TENSORS:
        found, expected = getattr(tally, part), getattr(pattern, part)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise ValueError(f"{part} is {list(found.shape)} {found.dtype}, expected {list(expected.shape)}")
