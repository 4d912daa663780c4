"""Checksums of a checkpoint's files, wherever one was recorded. Nothing else tells that a weight is not what it was.

Recorded are: `SHA256SUMS` in the folder (format of coreutils' sha256sum); the names of the hub cache's blobs; and what
`hf download --local-dir` wrote under `.cache/huggingface`. The hub knows a large file by its SHA-256 and a small one by
git's blob id, SHA-1 of "blob <size>\\0" and the content. SHA256SUMS is the user's own word and goes first.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import NamedTuple

from dllm_sparse.files import file_sha256, write_text
from dllm_sparse.models import resolve
from dllm_sparse.models.weights import weight_files
from dllm_sparse.types import CheckpointError

SUMS = "SHA256SUMS"
_TEXTS = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json"),
    *("merges.txt", "vocab.txt"),
)
"""What is read besides the weights."""
_LINE = re.compile(rb"([0-9a-fA-F]{64}) [ *](.+)")
_ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 1 << 20
_LONG = 1 << 31  # bytes that take more than a second


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The SHA-256 or git's blob id of a file; when it was downloaded (Unix time), if known; if SHA256SUMS says so."""

    digest: str
    downloaded: float | None = None
    listed: bool = False


class Checked(NamedTuple):
    """The files loading reads, by what is known of them."""

    same: list[Path]
    unknown: list[Path]
    edited: list[Path]

    def note(self, folder: Path) -> str | None:
        """One line on the files that nothing vouches for, with the way out; None where there are none."""
        kinds = (("no checksum is known of {}", self.unknown), ("{} changed since the download", self.edited))
        said = "; ".join(text.format(_names(files)) for text, files in kinds if files)
        patterns = " ".join(sorted({f"*{file.suffix}" for file in (*self.unknown, *self.edited)}))
        command = f"(cd {shlex.quote(str(folder))} && sha256sum {patterns} >> {SUMS})"
        return f"{folder}: {said}; to have damage noticed from now on: {command}" if said else None


def check_files(folder: Path, report: Callable[[str], None] | None = None) -> Checked:
    """Compares every file whose checksum is known, those loading reads and whatever SHA256SUMS lists.

    A text that differs and was written after its download counts as edited. `report` is told of a check that takes
    seconds. Raises CheckpointError for a file that differs or is missing, and for a malformed SHA256SUMS.
    """
    read = _files_read(folder)
    recorded = {file: found for file in read if (found := _downloaded(file))} | _listed(folder / SUMS)
    size = sum(file.stat().st_size for file in recorded)
    if report is not None and size > _LONG:
        report(f"comparing {size / 2**30:.1f} GiB with their checksums")
    same = _compare(recorded)
    return Checked(
        [file for file, equal in same.items() if equal],
        [file for file in read if file not in recorded],
        [file for file, equal in same.items() if not equal],
    )


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Writes SHA256SUMS of files of a folder and returns its path."""
    lines = (f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in sorted(files))
    return write_text(folder / SUMS, "".join(lines))


def _files_read(folder: Path) -> list[Path]:
    """The files loading reads. Weights that cannot be listed are left to the reader of weights, which says why."""
    try:
        weights = {*weight_files(folder), folder / "model.safetensors"}  # transformers takes it before an index
    except CheckpointError:
        weights = set()
    return [file for file in (*sorted(weights), *(folder / name for name in _TEXTS)) if _is_file(file)]


def _names(files: list[Path]) -> str:
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return ", ".join(file.name for file in files[:2]) + more


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder closed to us
        return False


def _listed(sums: Path) -> dict[Path, _Recorded]:
    """What SHA256SUMS says, if there is one."""
    if not os.path.lexists(sums):
        return {}
    if not _is_file(sums):
        raise CheckpointError(f"{sums}: not a file")
    try:
        lines = sums.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{sums}: cannot be read ({error.strerror})") from error
    found: dict[Path, _Recorded] = {}
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        where = f"{sums}, line {number}"
        match = _LINE.fullmatch(line.removesuffix(b"\r"))
        name = PurePosixPath(os.fsdecode(match[2]) if match else "")
        file = sums.parent / name
        if match is None or name.is_absolute() or ".." in name.parts or file in (sums, sums.parent):
            raise CheckpointError(f"{where}: expected 64 hexadecimal digits, two spaces and the name of a file in here")
        if not _is_file(file):
            raise CheckpointError(f"{where}: {name} is not in the folder; download it, or remove the line")
        digest = match[1].decode().lower()
        if found.setdefault(file, _Recorded(digest, listed=True)).digest != digest:
            raise CheckpointError(f"{where}: another SHA-256 of {name} than in a line before; remove one of them")
    return found


def _downloaded(file: Path) -> _Recorded | None:
    """What the hub said of a file, if it came from there. Unreadable records are none, as for huggingface_hub."""
    if file.is_symlink():
        # One link, not all: the blob itself may be a link into a store where names are hashes of another kind.
        blob = file.readlink()
        return _Recorded(blob.name) if blob.parent.name == "blobs" and _ETAG.fullmatch(blob.name) else None
    record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        _, etag, downloaded = record.read_text(encoding="ascii").splitlines()
        return _Recorded(etag, float(downloaded)) if _ETAG.fullmatch(etag) else None
    except (OSError, ValueError):
        return None


def _compare(recorded: Mapping[Path, _Recorded]) -> dict[Path, bool]:
    """Whether each file is what was recorded, in one thread a file; False only for an edited text."""
    stop = Event()

    def compare(file: Path) -> bool:
        return _is_recorded(file, recorded[file], stop)

    with ThreadPoolExecutor(max(1, min(len(recorded), os.cpu_count() or 1))) as pool:
        try:
            return dict(zip(recorded, pool.map(compare, recorded), strict=True))
        finally:  # one difference is enough, and Ctrl-C must not wait for gigabytes
            stop.set()


def _is_recorded(file: Path, recorded: _Recorded, stop: Event) -> bool:
    """True where the digest is the one recorded, False for an edited text; raises CheckpointError for damage."""
    try:
        status = file.stat()
        digest = _digest(file, len(recorded.digest) == 40, status.st_size, stop)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if digest == recorded.digest:
        return True
    # A second's grace, as in huggingface_hub. Weights are not edited by hand: theirs is damage whatever the date.
    late = recorded.downloaded is not None and status.st_mtime - 1 > recorded.downloaded
    if late and file.suffix != ".safetensors":
        return False
    raise CheckpointError(_damage(file, recorded, digest))


def _damage(file: Path, recorded: _Recorded, digest: str) -> str:
    if file.is_relative_to(resolve.BUNDLED_FOLDER):
        remedy = "reinstall dllm-sparse"
    elif recorded.listed:
        remedy = f"download or copy it again; if you changed it yourself, correct its line in {SUMS}"
    else:  # what is there already is not downloaded again
        remedy = f"delete {file.resolve()} and download it again; if you changed it yourself, list it in {SUMS}"
    kind = "SHA-256" if len(digest) == 64 else "git blob id"
    return f"{file} is damaged: its {kind} is {digest[:12]}.., {recorded.digest[:12]}.. was recorded; {remedy}"


def _digest(file: Path, as_git: bool, size: int, stop: Event) -> str:
    """SHA-256 or git's blob id of a file; an unfinished one when `stop` is set."""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if as_git else hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as content:
        while not stop.is_set() and (count := content.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()
