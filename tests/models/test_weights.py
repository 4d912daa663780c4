"""Weights as they come: shards, extras, damage. Every refusal names the file or tensor and what was expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dllm_sparse as ds
from tests.helpers import GOLDEN, random_ids
from tests.models.checkpoints import UP, change, refused, shard

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("index", [True, False])
def test_shards_load_like_one_file(folder: Path, llada: ds.LanguageModel, index: bool) -> None:
    shard(folder, 3, index=index)
    ids = random_ids(1, 12)
    assert torch.equal(ds.load(str(folder), device="cpu").logits(ids), llada.logits(ids))


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path, tied: Path) -> None:
    change(folder, lambda tensors: tensors.pop(UP))
    refused(folder, "missing tensors", UP)
    change(folder, lambda tensors: tensors.update({UP: torch.zeros(112, 63)}))
    refused(folder, UP, "[112, 63]", "[112, 64]")
    change(folder, lambda tensors: tensors.update({UP: torch.zeros(112, 64, dtype=torch.int8)}))
    refused(folder, UP, "I8", "quantised")
    change(folder, lambda tensors: tensors.update({UP: torch.zeros(112, 64), "model.new": torch.zeros(1)}))
    refused(folder, "unexpected tensors", "model.new")
    change(tied, lambda tensors: tensors.pop(EMBEDDING))
    refused(tied, "missing tensors", EMBEDDING)


def test_biases_the_config_does_not_name_are_unexpected(tied: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.bias"
    change(tied, lambda tensors: tensors.update({key: torch.zeros(64)}))
    refused(tied, "unexpected tensors", key)


def test_old_rotary_buffers_are_harmless(tied: Path, llama: ds.LanguageModel) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tied, lambda tensors: tensors.update({key: torch.zeros(8)}))
    assert torch.equal(ds.load(str(tied), device="cpu").logits(random_ids(1, 5)), llama.logits(random_ids(1, 5)))


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tied: Path, llama: ds.LanguageModel) -> None:
    change(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert torch.equal(ds.load(str(tied), device="cpu").logits(random_ids(1, 5)), llama.logits(random_ids(1, 5)))
    for keys in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):  # whichever is read first
        tensors = {**load_file(GOLDEN / "llama-tiny" / "model.safetensors")}
        tensors[HEAD] = tensors[EMBEDDING] + 1
        (tied / "model.safetensors").unlink(missing_ok=True)
        save_file({key: value for key, value in tensors.items() if key != keys[1]}, tied / "a.safetensors")
        save_file({keys[1]: tensors[keys[1]]}, tied / "b.safetensors")
        refused(tied, HEAD, EMBEDDING, "the config ties them")


def test_a_tensor_stored_twice_is_named(folder: Path) -> None:
    tensors = shard(folder, 2, index=False)
    save_file({UP: tensors[UP]}, folder / "z.safetensors")
    refused(folder, "z.safetensors", UP, "twice")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_files_are_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors", "not a readable safetensors file", "download it again")


def test_pickle_is_refused_and_nothing_is_not_found(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickle", "pytorch_model.bin", "convert to safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no .safetensors file")


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("name", ["missing.safetensors", "../other.safetensors", "/etc/passwd", "weights.bin", 3])
def test_an_index_stays_inside_its_folder(folder: Path, name: Any) -> None:
    if name == "../other.safetensors":
        shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: name}}))
    refused(folder, "model.safetensors.index.json", str(name))
