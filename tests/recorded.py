"""Checkpoints whose checksums are recorded in one of the three ways, and bytes that change without a trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub._local_folder import write_download_metadata
from huggingface_hub.utils.sha import git_hash

import dllm_sparse as ds
from dllm_sparse.types import CheckpointError

COMMIT = "c" * 40


def summed(source: Path, target: Path) -> Path:
    """A copy with the SHA256SUMS that `sha256sum *` writes."""
    shutil.copytree(source, target)
    lines = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(target.iterdir()))
    (target / "SHA256SUMS").write_text("".join(lines))
    return target


def cached(source: Path, target: Path) -> Path:
    """The hub's cache: links to blobs, and the weights' blob in its turn one to the store shared by repositories."""
    repository = target / "models--a--b"
    snapshot, blobs, shared = repository / "snapshots" / COMMIT, repository / "blobs", target / "blobs" / "ab"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for file in source.iterdir():
        blob = blobs / etag(file)
        if file.suffix == ".safetensors":
            store = shared / f"ab{'1' * 62}"  # a Xet hash, which is no SHA-256
            shutil.copy(file, store)
            blob.symlink_to(Path("../../blobs/ab") / store.name)
        else:
            shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def downloaded(source: Path, target: Path) -> Path:
    """`hf download --local-dir`, by huggingface_hub's own writer of metadata."""
    shutil.copytree(source, target)
    for file in source.iterdir():
        write_download_metadata(target, file.name, COMMIT, etag(file))
    return target


def etag(file: Path) -> str:
    """What the hub calls a file: large ones by their SHA-256, small ones by git's blob id."""
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest() if file.suffix == ".safetensors" else git_hash(content)


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {"sums": summed, "cache": cached, "local-dir": downloaded}


def files_of(folder: Path) -> list[Path]:
    """The checkpoint's own files."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name != "SHA256SUMS")


def regions(file: Path) -> dict[str, int]:
    """A place in each region of a file: of weights the header and the first, middle and last byte of each tensor."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}
    start = 8 + struct.unpack("<Q", content[:8])[0]
    places = {"length": 0, "header": 8, "end of the header": start - 1}
    for name, tensor in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, end = (start + offset for offset in tensor["data_offsets"])
            places |= {f"first of {name}": first, f"middle of {name}": (first + end) // 2, f"last of {name}": end - 1}
    return places


@contextmanager
def flipped(file: Path, place: int, bits: int = 1) -> Iterator[None]:
    """For a while one byte is another, and the file's times are what they were: bits rot without a date."""
    times = file.stat()

    def flip() -> None:
        with file.open("r+b") as content:
            content.seek(place)
            (byte,) = content.read(1)
            content.seek(place)
            content.write(bytes([byte ^ bits]))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    flip()
    try:
        yield
    finally:
        flip()


def notes(folder: Path) -> list[str]:
    """What loading a folder reports."""
    said: list[str] = []
    ds.load(str(folder), device="cpu", report=said.append)
    return said


@contextmanager
def refused(file: Path, *words: str) -> Iterator[None]:
    """Loading the folder of a file raises a CheckpointError that names it."""
    yield
    with pytest.raises(CheckpointError) as caught:
        ds.load(str(file.parent), device="cpu")
    assert str(file) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
