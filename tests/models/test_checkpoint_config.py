"""What a config.json says of the type its weights were saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sparse.models.checkpoint_config import read_config
from dllm_sparse.types import CheckpointError
from tests.layouts import llada_moe


def folder_with(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**llada_moe()[0], **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ({"torch_dtype": None}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"torch_dtype": "float16", "dtype": "float64"}, torch.float64),
    ],
)
def test_the_stored_type_is_the_one_named(values: dict[str, Any], stored: torch.dtype, tmp_path: Path) -> None:
    assert read_config(folder_with(tmp_path, **values))[2] == stored


@pytest.mark.parametrize("values", [{"dtype": "float8_e4m3fn"}, {"torch_dtype": 16}, {"torch_dtype": {"text": "half"}}])
def test_an_unknown_type_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    ((key, value),) = values.items()
    with pytest.raises(CheckpointError) as raised:
        read_config(folder_with(tmp_path, **values))
    assert f"{key} is {value!r}; expected float32, bfloat16, float16, float64" in str(raised.value)
