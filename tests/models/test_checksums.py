"""No changed byte of a file whose checksum is known is ever accepted; and where none is known, loading says so."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_sparse as ds
from dllm_sparse.models import checksums
from dllm_sparse.models.checksums import check_files
from dllm_sparse.types import CheckpointError
from tests.damage import damaged
from tests.recorded import LAYOUTS, downloaded, files_of, flipped, notes, refused, regions, summed


@pytest.fixture(scope="module", params=LAYOUTS)
def recorded(request: pytest.FixtureRequest, toy_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with recorded checksums; every test puts back what it damages."""
    return LAYOUTS[request.param](toy_chat, tmp_path_factory.mktemp("recorded") / "model")


@pytest.fixture
def listed(toy: Path, tmp_path: Path) -> Path:
    """A checkpoint with SHA256SUMS, for one test alone."""
    return summed(toy, tmp_path / "listed")


@pytest.fixture
def local(toy: Path, tmp_path: Path) -> Path:
    """A download into a folder, for one test alone."""
    return downloaded(toy, tmp_path / "local")


def edit(file: Path, old: str, new: str, *, seconds: float) -> None:
    """Changes a text, which bears a date so many seconds from now."""
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, (time.time() + seconds,) * 2)


def test_a_sound_checkpoint_loads_without_a_word(recorded: Path) -> None:
    assert notes(recorded) == []
    assert {file.name for file in check_files(recorded).same} == {file.name for file in files_of(recorded)}


def test_one_byte_of_every_region(recorded: Path) -> None:
    for file in files_of(recorded):
        for place in regions(file).values():
            with flipped(file, place), refused(file, "is damaged"):
                pass
    assert notes(recorded) == []


@given(data=st.data())
def test_no_flipped_byte_is_accepted(recorded: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files_of(recorded)))
    place, bits = data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(1, 255))
    with flipped(file, place, bits), refused(file, "is damaged"):
        pass


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_both_engines_refuse(engine: str, toy_ar: Path, tmp_path: Path) -> None:
    folder = summed(toy_ar, tmp_path / "causal")
    file = folder / "model.safetensors"
    with flipped(file, file.stat().st_size - 1), pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        ds.load(str(folder), device="cpu", engine=engine)  # type: ignore[arg-type]
    assert ds.load(str(folder), device="cpu", engine=engine).kind == "autoregressive"  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole_sums(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint, and its SHA256SUMS as it was."""
    folder = summed(toy, tmp_path_factory.mktemp("damaged") / "model")
    return folder, (folder / "SHA256SUMS").read_bytes()


@given(data=st.data())
def test_damaged_sums(whole_sums: tuple[Path, bytes], data: st.DataObject) -> None:
    """SHA256SUMS itself: a line or a file is named, or the model loads, with a note if a file has lost its sum."""
    folder, content = whole_sums
    changed = data.draw(damaged(content))
    (folder / "SHA256SUMS").write_bytes(changed)
    try:
        said = notes(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        lost = [file.name for file in files_of(folder) if file.name.encode() not in changed]
        assert bool(said) == bool(lost)


def test_what_sha256sum_may_write(listed: Path) -> None:
    """Text and binary marks, either case, the line ends of Windows, a leading ./, and files in folders below."""
    (listed / "below").mkdir()
    shutil.copy(listed / "config.json", listed / "below" / "config.json")
    content = (listed / "SHA256SUMS").read_text()
    digest = hashlib.sha256((listed / "config.json").read_bytes()).hexdigest()
    for changed in (content.replace("  ", " *"), content.replace("\n", "\r\n"), content.replace("  ", "  ./")):
        (listed / "SHA256SUMS").write_bytes((changed + f"{digest.upper()}  below/config.json").encode())
        assert notes(listed) == []
    below = listed / "below" / "config.json"
    with flipped(below, 5), pytest.raises(CheckpointError, match=r"below/config\.json is damaged"):
        ds.load(str(listed), device="cpu")


HEX = "0" * 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("# a comment", "expected 64"),
        (f"{HEX[1:]}  config.json", "expected 64"),
        (f"{HEX[1:]}g  config.json", "expected 64"),
        (f"{HEX} config.json", "expected 64"),
        (f"{HEX}  ", "expected 64"),
        (f"SHA256 (config.json) = {HEX}", "expected 64"),
        (f"{HEX}  ../config.json", "a file in here"),
        (f"{HEX}  /etc/hostname", "a file in here"),
        (f"{HEX}  .", "a file in here"),
        (f"{HEX}  SHA256SUMS", "a file in here"),
        (f"{HEX}  other.json", "other.json is not in the folder"),
        (f"{HEX}  {'x' * 5000}", "is not in the folder"),
        (f"{HEX}  a\0b", "is not in the folder"),
        (f"{HEX}  config.json", "another SHA-256 of config.json"),
    ],
)
def test_a_line_that_says_nothing_is_named(listed: Path, line: str, words: str) -> None:
    sums = listed / "SHA256SUMS"
    count = len(sums.read_text().splitlines())
    with sums.open("a") as file:
        file.write(line + "\n")
    with refused(sums, f"SHA256SUMS, line {count + 1}: ", words):
        pass


def test_sums_that_are_no_file(listed: Path) -> None:
    sums = listed / "SHA256SUMS"
    sums.unlink()
    with refused(sums, "not a file"):
        sums.mkdir()
    sums.rmdir()
    with refused(sums, "not a file"):
        sums.symlink_to("nowhere")


def test_an_unlisted_file_is_said_once_and_the_way_out_works(toy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "it's a folder"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds.load(str(folder), device="cpu")
    (note,) = (str(warning.message) for warning in caught)
    assert caught[0].filename == __file__
    assert "\n" not in note
    assert note.startswith(f"{folder}: no checksum is known of model.safetensors, config.json and 3 more; ")
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    subprocess.run(note[note.index("(cd ") :], shell=True, check=True, timeout=60)
    assert notes(folder) == []
    with flipped(folder / "config.json", 9), refused(folder / "config.json", "is damaged"):
        pass


def test_an_edited_text_is_no_damage_but_is_said(local: Path) -> None:
    edit(local / "config.json", '"max_sequence_length": 256', '"max_sequence_length": 128', seconds=60)
    (note,) = notes(local)
    assert note.startswith(f"{local}: config.json changed since the download; ")
    assert ds.load(str(local), device="cpu", report=print).config.max_positions == 128
    digest = hashlib.sha256((local / "config.json").read_bytes()).hexdigest()
    (local / "SHA256SUMS").write_text(f"{digest}  config.json\n")
    assert notes(local) == []


def test_dates_excuse_neither_weights_nor_an_earlier_change(local: Path) -> None:
    weights, config = local / "model.safetensors", local / "config.json"
    with flipped(weights, weights.stat().st_size - 1), refused(weights, f"delete {weights}"):
        os.utime(weights, (time.time() + 60,) * 2)
    with refused(config, "git blob id", f"delete {config}"):
        edit(config, '"max_sequence_length": 256', '"max_sequence_length": 128', seconds=-60)


def test_a_copy_of_a_download_with_new_dates_is_checked(local: Path) -> None:
    for file in files_of(local):
        os.utime(file, (time.time() + 60,) * 2)
    assert notes(local) == []


@pytest.mark.parametrize("content", [b"", b"one line", b"a\nb\nc\n", b"a\n" + b"0" * 40 + b"\nx\n", b"\xff"])
def test_metadata_nobody_can_read_are_none(local: Path, content: bytes) -> None:
    (local / ".cache/huggingface/download/model.safetensors.metadata").write_bytes(content)
    (note,) = notes(local)
    assert "no checksum is known of model.safetensors;" in note


def test_a_long_check_is_announced(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_LONG", 0)
    assert notes(listed) == ["comparing 0.0 GiB with their checksums"]


def test_what_is_compared_is_what_is_loaded(listed: Path, toy: Path) -> None:
    ids = torch.arange(5)[None]
    assert torch.equal(ds.load(str(listed), device="cpu").logits(ids), ds.load(str(toy), device="cpu").logits(ids))
