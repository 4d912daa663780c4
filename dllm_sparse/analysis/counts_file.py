"""A recorder's counts as one safetensors file, so that processes and machines can add theirs up exactly."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_sparse.analysis.tallies import MaskCounts, SiteTally
from dllm_sparse.files import atomic_path
from dllm_sparse.types import DllmSparseError, Kind, Site, SiteName

_TENSORS = tuple(f.name for f in fields(SiteTally) if f.name != "width")


def save_counts(counts: MaskCounts, path: Path) -> Path:
    """Writes the counts atomically; integers stay integers."""
    tensors: dict[str, Tensor] = {f"canvas/{name}": value for name, value in counts.canvas.items()}
    for site, tally in counts.sites.items():
        tensors |= {f"site/{site.layer}/{site.name}/{name}": getattr(tally, name) for name in _TENSORS}
    settings = {
        "kind": counts.kind,
        "blocks": counts.blocks,
        "deltas": counts.deltas,
        "snapshot_every": counts.snapshot_every,
        "sites": [(site.layer, site.name, tally.width) for site, tally in counts.sites.items()],
    }
    with atomic_path(path) as temporary:
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"settings": json.dumps(settings)})
    return path


def load_counts(path: Path) -> MaskCounts:
    """Reads what `save_counts` wrote; raises DllmSparseError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        sites = {
            Site(layer, cast(SiteName, name)): SiteTally(
                width, *(tensors[f"site/{layer}/{name}/{part}"] for part in _TENSORS)
            )
            for layer, name, width in settings["sites"]
        }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DllmSparseError(f"{path} is not a file of mask counts ({error!r})") from error
    canvas = {cast(SiteName, name[7:]): value for name, value in tensors.items() if name.startswith("canvas/")}
    blocks = [(int(block), int(index)) for block, index in settings["blocks"]]
    return MaskCounts(
        cast(Kind, settings["kind"]), sites, canvas, blocks, tuple(settings["deltas"]), settings["snapshot_every"]
    )
