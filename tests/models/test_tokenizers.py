"""A folder's tokenizer is read when it is asked for; one that does not belong to the weights is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dllm_sparse as ds
from dllm_sparse.types import CheckpointError
from tests.helpers import write_toy_tokenizer
from tests.models.checkpoints import configure


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    lm = ds.load(str(folder), device="cpu")  # ids can be scored without it
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read") as raised:
        _ = lm.tokenizer
    assert str(folder) in str(raised.value)


def test_the_mask_of_model_and_tokenizer_must_be_one_token(folder: Path) -> None:
    write_toy_tokenizer(folder)
    assert ds.load(str(folder), device="cpu").tokenizer is not None
    configure(folder, mask_token_id=200)
    lm = ds.load(str(folder), device="cpu")
    with pytest.raises(CheckpointError, match=r"mask id is 200, but its tokenizer's mask token '<mask>' is 250; set"):
        _ = lm.tokenizer
    described = folder / "tokenizer_config.json"
    values = json.loads(described.read_text())
    described.write_text(json.dumps({**values, "mask_token": None}))
    assert ds.load(str(folder), device="cpu").tokenizer is not None, "a tokenizer need not name its mask"
