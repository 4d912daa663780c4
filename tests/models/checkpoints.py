"""Changing a checkpoint folder, and what must then be said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.types import CheckpointError

Tensors = dict[str, Tensor]
UP = "model.transformer.blocks.1.up_proj.weight"
"""A tensor of the golden LLaDA checkpoint."""


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def shard(folder: Path, parts: int, *, index: bool) -> Tensors:
    """Splits the weights over `parts` files, with or without the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-{parts:05}.safetensors" for number in range(1, parts + 1)]
    where = {key: names[number % parts] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


def refused(folder: Path, *words: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        ds.load(str(folder), device="cpu")
    for word in words:
        assert word in str(caught.value)
