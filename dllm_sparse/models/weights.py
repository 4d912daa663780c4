"""The tensors of a checkpoint folder into their parameters: each expected, present once and in shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_sparse.models.families import Family
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import CheckpointError

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fill_weights(transformer: Transformer, folder: Path, family: Family) -> None:
    """Copies every tensor of the folder's safetensors into place; each must be expected, present once and in shape."""
    slots = dict(expected_slots(transformer, family))
    shared = {_key_of(family, "embedding.weight"), _key_of(family, "head.weight")} if transformer.config.tied else set()
    read: set[str] = set()
    extra: list[str] = []
    for key, tensor in _stored_tensors(folder, transformer.embedding.weight.device):
        if key not in slots:
            if not key.endswith("rotary_emb.inv_freq"):  # a buffer some old Llama checkpoints carry; recomputed here
                extra.append(key)
            continue
        slot = slots[key]
        if tensor.shape != slot.shape:
            raise CheckpointError(f"{folder}: tensor {key} is {list(tensor.shape)}, expected {list(slot.shape)}")
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{folder}: tensor {key} is {tensor.dtype}; quantised weights are not supported")
        if key in shared and shared & read and not torch.equal(tensor.to(slot.dtype), slot):
            raise CheckpointError(f"{folder}: {' and '.join(sorted(shared))} differ, but the config ties them")
        slot.copy_(tensor)
        read.add(key)
    optional = shared - {_key_of(family, "embedding.weight")}
    missing = set(slots) - read - optional
    if missing or extra:
        raise CheckpointError(f"{folder}: {_difference(missing, extra)}")


def expected_slots(transformer: Transformer, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, view of the parameter or of its part) for every tensor this model must find."""
    config = transformer.config
    parameters = dict(transformer.named_parameters(remove_duplicate=False))
    for key, target in family.keys.items():
        for layer in range(config.layers) if "{i}" in key else (None,):
            name, _, part = target.replace("{i}", str(layer)).partition("#")
            if name not in parameters:
                continue
            value = parameters[name].data
            if part:
                widths = config.qkv_widths if "qkv_proj" in name else (config.ffn_width, config.ffn_width)
                value = torch.split(value, list(widths))[int(part)]
            yield key.replace("{i}", str(layer)), value


def _key_of(family: Family, parameter: str) -> str:
    return next(key for key, target in family.keys.items() if target == parameter)


def _stored_tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of every shard, one at a time, read straight to the device; a key may occur only once."""
    seen: set[str] = set()
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for key in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if key in seen:
                        raise CheckpointError(f"{file}: tensor {key} is stored twice")
                    seen.add(key)
                    yield key, shard.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error}); download it again") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(f"{folder}: only pickle weights ({pickles[0]}); refused, convert to safetensors")
        raise CheckpointError(f"{folder}: no .safetensors file")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {name!r} is not a .safetensors file beside the index")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index}: shard {name} is missing from the folder")
    return [index.parent / name for name in names]


def _difference(missing: set[str], extra: list[str]) -> str:
    parts = []
    for title, keys in (("missing", sorted(missing)), ("unexpected", sorted(extra))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            parts.append(f"{title} tensors: {', '.join(keys[:3])}{more}")
    return "; ".join(parts)
