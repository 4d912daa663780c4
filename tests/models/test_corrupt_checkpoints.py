"""Whatever is done to a checkpoint's files: a clear error that names the folder, or exactly the model it was."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dllm_sparse as ds
from dllm_sparse.models.resolve import BUNDLED_FOLDER
from dllm_sparse.types import CheckpointError, DllmSparseError
from tests.helpers import GOLDEN
from tests.models.checkpoints import UP, configure, refused, shard

NAMES = ("llada-tiny", "llama-tiny")
SIZES = (
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_hidden_size", "embedding_size", "vocab_size"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
)
"""Fields of both families that decide shapes: any other value than the true one must be refused, or change nothing."""

_NUMBERS = (0, -1, 1, 3, 1.5, 1e308, 10**30, 2**31, 2**63, float("nan"), float("inf"))
_LISTS = ([], [1], [[1]], ["x"], [10**30])
_OBJECTS = ({}, {"a": 1}, {"rope_type": "linear", "factor": "x"}, {"rope_type": ["x"]})
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, "", "1", "\x1b[2J", *_NUMBERS, *_LISTS, *_OBJECTS]
) | st.recursive(st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a golden checkpoint; every example puts back what it damaged."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path_factory.mktemp("corrupt") / request.param))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of the golden LLaDA checkpoint for one test alone."""
    return Path(shutil.copytree(GOLDEN / "llada-tiny", tmp_path / "llada"))


@contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """The file with another content for a while."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


def weights_after(folder: Path) -> dict[str, torch.Tensor] | None:
    """The loaded weights, or None where loading was refused in words that name the folder."""
    try:
        return dict(ds.load(str(folder), device="cpu", engine="native").transformer.named_parameters())
    except DllmSparseError as error:
        assert str(folder) in str(error)  # noqa: PT017
        return None


def same(weights: dict[str, torch.Tensor], name: str) -> bool:
    true = dict(ds.load(str(GOLDEN / name), device="cpu").transformer.named_parameters())
    return weights.keys() == true.keys() and all(torch.equal(value, true[key]) for key, value in weights.items())


@given(data=st.data())
def test_any_value_of_any_config_field(folder: Path, data: st.DataObject) -> None:
    raw = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from([*raw, *SIZES, "rope_parameters", "rope_scaling", "sliding_window", "model_type"]))
    content = json.dumps({**raw, key: data.draw(ODD)}).encode("utf-8", "surrogatepass")
    with replaced(folder / "config.json", content):
        weights = weights_after(folder)
    assert weights is None or same(weights, folder.name)


@given(key=st.sampled_from(["bos_token_id", "eos_token_id", "pad_token_id"]), value=ODD)
def test_any_token_id(folder: Path, key: str, value: Any) -> None:
    with replaced(folder / "generation_config.json", json.dumps({key: value}).encode("utf-8", "surrogatepass")):
        try:
            config = ds.load(str(folder), device="cpu").config
        except DllmSparseError as error:
            assert str(folder) in str(error)  # noqa: PT017
        else:
            assert getattr(config, key) is None or 0 <= getattr(config, key) < config.vocab_size


@given(data=st.data())
def test_any_damage_outside_the_weight_bytes(folder: Path, data: st.DataObject) -> None:
    """Length of the header, header, truncation, bytes too many: refused, or harmless."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    how = data.draw(st.sampled_from(["length", "header", "digits", "cut", "longer", "inserted"]))
    if how in ("length", "header", "digits"):
        places = st.integers(0, 7) if how == "length" else st.integers(8, header - 1)
        values = st.integers(ord("0"), ord("9")) if how == "digits" else st.integers(0, 255)
        for place, value in data.draw(st.lists(st.tuples(places, values), min_size=1, max_size=3)):
            content[place] = value
    elif how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "longer":
        content += data.draw(st.binary(min_size=1, max_size=20))
    else:
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    with replaced(file, bytes(content)):
        weights = weights_after(folder)
    assert weights is None or same(weights, folder.name)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["model.safetensors", "../x.safetensors"]),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weight_map", "a"]), inner),
        max_leaves=5,
    )
)
def test_any_index(folder: Path, index: Any) -> None:
    content = json.dumps(index).encode("utf-8", "surrogatepass")
    with replaced(folder / "model.safetensors.index.json", content):
        weights = weights_after(folder)
    assert weights is None or same(weights, folder.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(own: Path, value: float) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors[UP][3, 5] = value
    save_file(tensors, own / "model.safetensors")
    refused(own, "model.safetensors", UP, "NaN or Inf")


def test_a_type_too_narrow_for_the_weights_is_named(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors[UP][3, 5] = 1e5
    save_file(tensors, own / "model.safetensors")
    assert ds.load(str(own), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN or Inf as float16.*wider --dtype"):
        ds.load(str(own), device="cpu", dtype="float16")


def test_a_config_that_asks_for_weights_its_family_never_stores(own: Path) -> None:
    configure(own, include_bias=True)
    refused(own, "config.json", "o_proj.bias", "LLaDA")


def test_sizes_no_machine_could_hold_cost_nothing(own: Path) -> None:
    configure(own, n_layers=1 << 24)
    refused(own, "16777216 layers", "21 tensors")
    configure(own, n_layers=2, embedding_size=1 << 24)
    refused(own, "[256, 64]", "[16777216, 64]")


def test_links_stay_in_the_folder_or_lead_to_the_hub_caches_blobs(own: Path, tmp_path: Path) -> None:
    """The hub's cache keeps a snapshot as links into ../../blobs; any other way out is refused."""
    shard(own, 2, index=True)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(own.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    weights = weights_after(snapshot)
    assert weights is not None
    assert same(weights, "llada-tiny")
    linked = tmp_path / "elsewhere"
    linked.symlink_to(snapshot)
    assert weights_after(linked) is not None
    outside = Path(shutil.move(own / "model-00002-of-00002.safetensors", tmp_path / "outside.safetensors"))
    (own / "model-00002-of-00002.safetensors").symlink_to(outside)
    refused(own, "model-00002-of-00002.safetensors", str(outside), "outside its folder")
    outside.unlink()
    refused(own, "model-00002-of-00002.safetensors")


def test_what_a_killed_writer_left_behind_is_no_shard(own: Path) -> None:
    (own / ".model.safetensors.x.safetensors").write_bytes(b"half")
    weights = weights_after(own)
    assert weights is not None
    assert same(weights, "llada-tiny")


def test_a_tokenizer_that_cannot_encode_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUNDLED_FOLDER / "tiny-diffusion", tmp_path / "twin"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, "model_max_length": "many"}))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="twin: the tokenizer cannot be read"):
        _ = ds.load(str(folder), device="cpu").tokenizer
