"""Checksums in every form they are written in, of every file that is read, wherever a download keeps them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub._local_folder import write_download_metadata
from huggingface_hub.utils import filter_repo_objects

from dllm_sparse.models.checksums import check_files
from dllm_sparse.models.resolve import _PATTERNS
from dllm_sparse.types import CheckpointError
from tests.recorded import COMMIT, downloaded, etag, files_of, flipped, notes, refused, summed

READ = ("tekken.json", "tiktoken.model", "sentencepiece.bpe.model", "spiece.model", "additional_chat_templates/a.jinja")
"""What transformers reads of some models besides what every model has."""


def with_others(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / "additional_chat_templates").mkdir()
    for name in READ:
        (target / name).write_text(f"content of {name}")
    return target


@pytest.mark.parametrize("ends", [b"\n\n", b"\r\n\r\n", b"\n \t\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_blank_lines_and_byte_order_marks_say_nothing(toy: Path, tmp_path: Path, start: bytes, ends: bytes) -> None:
    folder = summed(toy, tmp_path / "model")
    sums = folder / "SHA256SUMS"
    sums.write_bytes(start + sums.read_bytes().replace(b"\n", ends))
    assert notes(folder) == []
    count = len(sums.read_bytes().splitlines())
    with sums.open("a") as file:
        file.write("nonsense\n")
    with refused(sums, f"SHA256SUMS, line {count + 1}: expected 64"):
        pass


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
@pytest.mark.parametrize("name", ["a\nb", "a\\b", "\\n", "a\\\nb", "back\\slash\nand\\nline", "new\r\nline", "\\"])
def test_names_that_sha256sum_escapes(toy: Path, tmp_path: Path, name: str) -> None:
    folder = summed(toy, tmp_path / "model")
    (folder / name).write_text("text")
    with (folder / "SHA256SUMS").open("a") as sums:
        subprocess.run(["sha256sum", "--", name], cwd=folder, stdout=sums, check=True, timeout=60)
    assert (folder / "SHA256SUMS").read_bytes().splitlines()[-1].startswith(b"\\")
    assert folder / name in check_files(folder).same
    with flipped(folder / name, 0), refused(folder / name, "is damaged"):
        pass


@pytest.mark.parametrize("name", [r"config\.json", r"config.json" + "\\", r"\x63onfig.json"])
def test_escapes_nobody_writes_are_malformed(toy: Path, tmp_path: Path, name: str) -> None:
    folder = summed(toy, tmp_path / "model")
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"\\{'0' * 64}  {name}\n")
    with refused(folder / "SHA256SUMS", "expected 64"):
        pass


@pytest.mark.parametrize("layout", ["local-dir", "cache"])
def test_a_mirror_may_name_files_by_their_plain_sha1(toy: Path, tmp_path: Path, layout: str) -> None:
    digests = {file.name: hashlib.sha1(file.read_bytes()).hexdigest() for file in toy.iterdir()}
    if layout == "local-dir":
        folder = Path(shutil.copytree(toy, tmp_path / "model"))
        for name, digest in digests.items():
            write_download_metadata(folder, name, COMMIT, digest)
    else:
        blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / COMMIT
        for path in (blobs, folder):
            path.mkdir(parents=True)
        for name, digest in digests.items():
            shutil.copy(toy / name, blobs / digest)
            (folder / name).symlink_to(Path("../../blobs") / digest)
    assert notes(folder) == []
    for file in files_of(folder):
        with flipped(file, file.stat().st_size // 2), refused(file, "is damaged"):
            pass


@pytest.mark.parametrize("name", READ)
def test_all_that_transformers_reads_is_checked(toy: Path, tmp_path: Path, name: str) -> None:
    source = with_others(toy, tmp_path / "source")
    local = Path(shutil.copytree(source, tmp_path / "local"))
    for file in (file for file in source.rglob("*") if file.is_file()):
        write_download_metadata(local, file.relative_to(source).as_posix(), COMMIT, etag(file))
    assert notes(local) == []
    assert local / name in check_files(local).same
    with flipped(local / name, 3), pytest.raises(CheckpointError, match=re.escape(f"{local / name} is damaged")):
        check_files(local)
    assert [*filter_repo_objects([name], allow_patterns=_PATTERNS)] == [name]  # what is read is downloaded


def test_all_that_transformers_reads_is_named_and_the_way_out_works(toy: Path, tmp_path: Path) -> None:
    folder = with_others(summed(toy, tmp_path / "source"), tmp_path / "model")
    (note,) = notes(folder)
    unknown = sorted(str(file.relative_to(folder)) for file in check_files(folder).unknown)
    assert unknown == sorted(READ)
    assert "sha256sum *.json *.model additional_chat_templates/*.jinja >> SHA256SUMS" in note
    subprocess.run(note[note.index("(cd ") :], shell=True, check=True, timeout=60)
    assert notes(folder) == []


def test_a_subfolder_of_a_download_is_checked(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "local"
    folder = Path(shutil.copytree(toy, root / "below" / "model"))
    for file in toy.iterdir():
        write_download_metadata(root, f"below/model/{file.name}", COMMIT, etag(file))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (folder, Path(), Path("..") / "model", tmp_path / "link"):
        assert {file.name for file in check_files(path).same} == {file.name for file in toy.iterdir()}
    weights = folder / "model.safetensors"
    with flipped(weights, weights.stat().st_size - 1), refused(weights, "is damaged"):
        os.utime(weights)
    # A download of the folder alone knows better than that of the whole.
    nearer = downloaded(toy, tmp_path / "nearer" / "model")
    write_download_metadata(tmp_path / "nearer", "model/config.json", COMMIT, "0" * 40)
    assert notes(nearer) == []
