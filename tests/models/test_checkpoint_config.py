"""What a config.json must say, and what is said of one that cannot be read; the type its weights were saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.models.checkpoint_config import read_config
from dllm_sparse.models.families import ALIASES, FAMILIES
from dllm_sparse.types import CheckpointError, UnsupportedArchitecture
from tests.layouts import llada_moe
from tests.models.checkpoints import configure, refused


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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"model_type": "mamba", "architectures": ["MambaLM"]},
            ("MambaLM", "LLaDA (llada)", "Qwen3"),
        ),
        (
            {"model_type": "new", "architectures": ["MixtureLM"], "num_experts": 64},
            ("MixtureLM", "with experts", "LLaDA (llada)", "LLaDA-MoE (llada)"),
        ),
        ({"block_type": "sequential"}, ("block_type is 'sequential'", "'llama'")),
        ({"multi_query_attention": True}, ("multi_query_attention is True",)),
        ({"activation_type": "swish2"}, ("swish2", "silu")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ("yarn", "default, linear, llama3")),
    ],
)
def test_unsupported_architectures_are_named(folder: Path, values: dict[str, Any], words: tuple[str, ...]) -> None:
    configure(folder, **values)
    refused(folder, "config.json", *words, kind=UnsupportedArchitecture)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_model": None}, ("d_model", "positive integer")),
        ({"n_layers": "two"}, ("n_layers is 'two'", "positive integer")),
        ({"n_heads": 0}, ("n_heads is 0",)),
        ({"n_kv_heads": 3}, ("4 heads", "3 key/value heads")),
        ({"n_kv_heads": 0}, ("n_kv_heads is 0",)),
        ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps is '1e-5'", "number")),
        ({"mask_token_id": 256}, ("mask_token_id 256", "vocabulary of 256")),
        ({"mask_token_id": None}, ("must name its mask_token_id",)),
        ({"rope_scaling": {"type": "linear"}}, ("rope scaling", "factor")),
    ],
)
def test_contradictory_configs_are_named(folder: Path, values: dict[str, Any], words: tuple[str, ...]) -> None:
    configure(folder, **values)
    refused(folder, "config.json", *words)


@pytest.mark.parametrize("content", ["{", "[1]", "", "\xff\xfe"])
def test_an_unreadable_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    refused(folder, "config.json")


def test_ids_come_from_the_generation_config_when_it_is_there(folder: Path, tied: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8, 9], "bos_token_id": 5}')
    config = ds.load(str(folder), device="cpu").config
    assert (config.eos_token_id, config.stop_token_ids, config.bos_token_id) == (7, (8, 9), 5)
    (tied / "generation_config.json").unlink(missing_ok=True)
    configure(tied, pad_token_id=-1, eos_token_id=None)
    config = ds.load(str(tied), device="cpu").config
    assert (config.eos_token_id, config.pad_token_id) == (None, None)


def test_tables_are_consistent() -> None:
    """Every alias names a family; every family's key map and field map lead to things that exist."""
    from dllm_sparse.models.config import MoEConfig, TransformerConfig

    assert {"llada-8b", "llada-8b-base", "llada-1.5", "llama-3.1-8b", "qwen2.5-7b"} <= set(ALIASES)
    assert ALIASES["llada-8b"].repository == "GSAI-ML/LLaDA-8B-Instruct"
    fields = set(TransformerConfig.__dataclass_fields__)
    for alias in ALIASES.values():
        assert alias.family in FAMILIES
    for family in FAMILIES.values():
        assert set(family.fields) | set(family.fixed) | set(family.defaults) <= fields
        assert set(family.mixture) | set(family.mixture_defaults) <= set(MoEConfig.__dataclass_fields__)
        assert len(set(family.keys.values())) == len(family.keys)
