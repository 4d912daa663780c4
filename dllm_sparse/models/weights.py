"""Weights of a checkpoint folder: which tensors its safetensors hold, whether a model expects them, and reading them.

Names, shapes and types are compared from the files' headers before any memory is allocated, so that a config.json that
does not belong to the weights costs nothing, whatever sizes it claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_sparse.models.families import Family
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import CheckpointError

_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_IGNORED = "rotary_emb.inv_freq"  # a buffer some old Llama checkpoints carry; recomputed here
_BUILT_SOON = 512  # layers or experts an outline takes seconds for, whatever the weights hold


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file's header says of a tensor; `dtype` by its safetensors name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of every shard by name, from the headers alone; a name may occur only once.

    Raises CheckpointError for pickle, for unreadable or missing files, and for files outside the folder.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if key in found:
                        raise CheckpointError(f"{file}: tensor {key} is stored twice")
                    part = shard.get_slice(key)
                    found[key] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    return found


def check_layers(layers: int, stored: Mapping[str, StoredTensor], folder: Path, experts: int = 0) -> None:
    """Raises CheckpointError for layers or experts of a layer that no weights can fill and no machine could build.

    Fewer are compared by name.
    """
    for count, name in ((layers, "layers"), (experts, "experts")):
        if count > max(len(stored), _BUILT_SOON):
            raise CheckpointError(
                f"{folder}: config.json names {count} {name}, but the weights hold only {len(stored)} tensors"
            )


def check_weights(transformer: Transformer, folder: Path, stored: Mapping[str, StoredTensor], family: Family) -> None:
    """Every expected tensor must be stored, in shape, and nothing else; works on a model without memory."""
    slots = dict(expected_slots(transformer, family))
    if unnamed := sorted(_parameters_of(transformer).keys() - {name for _, name, _ in _slots(transformer, family)}):
        raise CheckpointError(
            f"{folder}: config.json asks for {unnamed[0]}, which {family.name} checkpoints never hold"
        )
    for key, tensor in stored.items():
        if key in slots and tensor.shape != slots[key].shape:
            expected = list(slots[key].shape)
            raise CheckpointError(f"{tensor.file}: tensor {key} is {list(tensor.shape)}, expected {expected}")
        if key in slots and tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{tensor.file}: tensor {key} is stored as {tensor.dtype}; quantised weights are not supported"
            )
    optional = {_key_of(family, "head.weight")} if transformer.config.tied else set()
    missing = set(slots) - set(stored) - optional
    extra = {key for key in stored if key not in slots and not key.endswith(_IGNORED)}
    if missing or extra:
        raise CheckpointError(f"{folder}: {_difference(missing, extra)}")


def fill_weights(transformer: Transformer, stored: Mapping[str, StoredTensor], family: Family) -> None:
    """Copies every tensor into place, read straight to the device. What is stored has been checked before.

    Raises CheckpointError for NaN and Inf, and for two tied matrices that differ.
    """
    slots = dict(expected_slots(transformer, family))
    shared = {_key_of(family, "embedding.weight"), _key_of(family, "head.weight")} if transformer.config.tied else set()
    read: set[str] = set()
    device = str(transformer.embedding.weight.device)
    for file, keys in groupby((key for key in stored if key in slots), key=lambda key: stored[key].file):
        try:
            with safe_open(file, framework="pt", device=device) as shard:
                for key in keys:
                    tensor, slot = shard.get_tensor(key), slots[key]
                    if key in shared and shared & read and not torch.equal(tensor.to(slot.dtype), slot):
                        pair = " and ".join(sorted(shared))
                        raise CheckpointError(f"{file}: {pair} differ, but the config ties them")
                    slot.copy_(tensor)
                    check_finite(f"{file}: tensor {key}", slot)
                    read.add(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error


def check_finite(name: str, values: Tensor) -> None:
    """Raises CheckpointError for NaN and Inf, also those a narrower type makes; one pass, no copy."""
    if values.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(values)):
        dtype = str(values.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} holds NaN or Inf as {dtype}; the file is damaged or needs a wider --dtype")


def expected_slots(transformer: Transformer, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, view of the parameter or of its part) for every tensor this model must find."""
    return ((key, value) for key, _, value in _slots(transformer, family))


def _slots(transformer: Transformer, family: Family) -> Iterator[tuple[str, str, Tensor]]:
    """(checkpoint key, name of the parameter, view of it or of its part)."""
    config = transformer.config
    parameters = _parameters_of(transformer)
    for key, target in family.keys.items():
        for layer in range(config.layers) if "{i}" in key else (None,):
            name, _, part = target.replace("{i}", str(layer)).partition("#")
            name, _, by_expert = name.partition("[")
            if name not in parameters:
                continue
            whole = parameters[name].data
            for expert, value in enumerate(whole) if by_expert else ((None, whole),):
                if part:
                    widths = config.qkv_widths if "qkv_proj" in name else (len(value) // 2, len(value) // 2)
                    value = value.split(list(widths))[int(part)]
                yield key.replace("{i}", str(layer)).replace("{e}", str(expert)), name, value


def _parameters_of(transformer: Transformer) -> dict[str, Tensor]:
    return dict(transformer.named_parameters(remove_duplicate=False))


def _key_of(family: Family, parameter: str) -> str:
    return next(key for key, target in family.keys.items() if target == parameter)


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: not a readable safetensors file ({error}); download it again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a folder's tensors are in. Raises CheckpointError for pickle, missing and outside files."""
    index = folder / "model.safetensors.index.json"
    # Hidden files are halves that a killed writer left behind.
    here = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    files = _indexed_files(index) if index.exists() else here
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(f"{folder}: only pickle weights ({pickles[0]}); refused, convert to safetensors")
        raise CheckpointError(f"{folder}: no .safetensors file")
    for file in files:
        _check_place(file)
    return files


def _check_place(file: Path) -> None:
    """A regular file of this folder, or a link within it or into the blobs of the hub's cache it belongs to."""
    if not file.is_file():
        raise CheckpointError(f"{file}: not a file (a link that leads nowhere?); download it again")
    home, target = file.parent.resolve(), file.resolve()
    repository = home.parent.parent
    # A blob of the repository may be a link in its turn, into the blobs all repositories of a cache share.
    blobs = (repository / "blobs", repository.parent / "blobs") if home.parent.name == "snapshots" else ()
    if not any(target.is_relative_to(place) for place in (home, *blobs)):
        raise CheckpointError(f"{file}: a link to {target}, outside its folder; copy the file or load {target.parent}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {name!r} is not a .safetensors file beside the index")
        if "\0" in name or not (index.parent / name).exists():
            raise CheckpointError(f"{index}: shard {name!r} is missing from the folder")
    return [index.parent / name for name in names]


def _difference(missing: set[str], extra: set[str]) -> str:
    parts = []
    for title, keys in (("missing", sorted(missing)), ("unexpected", sorted(extra))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            parts.append(f"{title} tensors: {', '.join(keys[:3])}{more}")
    return "; ".join(parts)
