"""Files that are read again, after something happened to them: the error names the file, or nothing has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_sparse as ds
from dllm_sparse.analysis.recorded_batches import RecordedBatches
from dllm_sparse.analysis.recording import record
from dllm_sparse.evaluation.store import PointStore
from dllm_sparse.files import read_sealed, write_sealed
from dllm_sparse.models.snapshots import snapshots_of
from dllm_sparse.training.checkpoints import load_checkpoint, save_checkpoint
from dllm_sparse.training.data import load_prepared, prepare, prepared_for
from dllm_sparse.training.log import read_log
from dllm_sparse.training.recipe import load_recipe
from dllm_sparse.training.snapshots import save_snapshot
from dllm_sparse.types import DllmSparseError
from tests.damage import damaged
from tests.helpers import tiny_lm
from tests.training.conftest import corpus_file, recipe_file  # noqa: F401 (fixtures)

Reader = Callable[[], Any]
IDENTITY = {"model": "m", "p": 0.5}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(value=JSON, data=st.data())
def test_a_sealed_file_is_what_was_written_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: Any, data: st.DataObject
) -> None:
    path = write_sealed(tmp_path_factory.mktemp("sealed") / "a.json", value)
    assert read_sealed(path, "a test") == value
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        again = read_sealed(path, "a test")
    except DllmSparseError as error:
        assert f"{path} is not a test" in str(error)  # noqa: PT017
    else:
        assert json.dumps(again, sort_keys=True) == json.dumps(value, sort_keys=True)


def points(folder: Path) -> Reader:
    PointStore(folder).put(IDENTITY, {"score": 0.25, "items": [1, 0, None]})
    return lambda: PointStore(folder).get(IDENTITY)


def batches(folder: Path) -> Reader:
    lm, sampler = tiny_lm(), ds.SamplerConfig(gen_length=2, block_length=2)
    store = RecordedBatches(folder, "k" * 24)
    record(lm, [[1, 2], [3]], sampler, ds.SparsityConfig(p=0.7), kept=store)

    def read() -> Any:
        batch = RecordedBatches(folder, "k" * 24).get(0)
        assert batch is not None
        steps = {site: tally.steps.tolist() for site, tally in batch.counts.sites.items()}
        return batch.ids, batch.commit_steps, steps

    return read


def checkpoint(folder: Path) -> Reader:
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    path = save_checkpoint(folder, 3, model, optimiser, {"recipe": "r", "seconds": 1.0})

    def read() -> Any:
        other = torch.nn.Linear(2, 2)
        facts = load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))
        return facts, [value.tolist() for value in other.state_dict().values()]

    return read


def snapshot(folder: Path) -> Reader:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    save_snapshot(folder / "snapshots", tiny_lm().transformer, "diffusion", tokenizer, {"step": 3, "tokens": 9})
    for file in folder.glob("snapshots/*/*"):
        if file.name != "training.json":  # the model's own files are read by `load`
            file.unlink()
    return lambda: [(one.step, one.tokens, one.facts) for one in snapshots_of(folder)]


@pytest.fixture(scope="module", params=[points, batches, checkpoint, snapshot])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reader]:
    """A folder of files, and what reads them."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, request.param(folder)


@given(data=st.data())
def test_what_is_resumed_is_whole_or_named(kept: tuple[Path, Reader], data: st.DataObject) -> None:
    folder, read = kept
    whole = read()
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = file.read_bytes()
    file.write_bytes(data.draw(damaged(content)))
    try:
        assert read() == whole
    except DllmSparseError as error:
        assert str(file) in str(error) or str(file.parent) in str(error)  # noqa: PT017
        assert "remove" in str(error)  # noqa: PT017
    finally:
        file.write_bytes(content)


@given(data=st.data())
def test_a_renamed_point_is_no_other_point(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("points")
    ps = data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True))
    for p in ps:
        PointStore(folder).put({**IDENTITY, "p": p}, {"score": p})
    one, two = folder.iterdir()
    shutil.copy(one, two)
    read, named = [], 0
    for p in ps:
        try:
            read.append((p, PointStore(folder).get({**IDENTITY, "p": p})))
        except DllmSparseError as error:
            named += str(two) in str(error)
    assert named == 1
    assert [point for _, point in read] == [{"score": p} for p, _ in read]


@pytest.fixture(scope="module")
def data(corpus_file: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:  # noqa: F811
    """A prepared folder and its recipe."""
    folder, recipe = tmp_path_factory.mktemp("prepared"), load_recipe(recipe_file)
    prepare(corpus_file, recipe, folder)
    return folder, recipe


@given(draw=st.data())
def test_prepared_data_are_whole_or_named(data: tuple[Path, Any], draw: st.DataObject) -> None:
    folder, recipe = data
    file = draw.draw(st.sampled_from(sorted(folder.iterdir())))
    content = file.read_bytes()
    changed = draw.draw(damaged(content))
    file.write_bytes(changed)
    try:
        assert prepared_for(recipe, folder)
        load_prepared(folder)
        assert changed == content or file.suffix == ".json"
    except DllmSparseError as error:
        assert str(folder) in str(error)  # noqa: PT017
    finally:
        file.write_bytes(content)


@given(draw=st.data())
def test_a_damaged_log_is_named_with_its_line(tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    lines = [{"step": step, "loss": 1.5, "losses": [1.5]} for step in range(3)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(draw.draw(damaged(content)))
    try:
        assert all(isinstance(entry["step"], int) for entry in read_log(path))
    except DllmSparseError as error:
        assert f"{path}, line " in str(error)  # noqa: PT017
