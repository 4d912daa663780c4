"""What was recorded of a file: a line of SHA256SUMS, the name of a blob, or what a download wrote down."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dllm_sparse.files import file_sha256, write_text
from dllm_sparse.types import CheckpointError

SUMS = "SHA256SUMS"
_LINE = re.compile(rb"([0-9a-fA-F]{64}) [ *](.+)")
_ESCAPED_LINE = re.compile(rb"\\([0-9a-fA-F]{64}) [ *]((?:[^\\]|\\[nr\\])+)")
_ESCAPES = {rb"\n": b"\n", rb"\r": b"\r", rb"\\": b"\\"}
_ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file's digest in hexadecimal; when it was downloaded (Unix time), if known; if SHA256SUMS says so.

    64 digits are its SHA-256, 40 its git blob id or its SHA-1.
    """

    digest: str
    downloaded: float | None = None
    listed: bool = False


def listed(sums: Path) -> dict[Path, Recorded]:
    """What SHA256SUMS says, if there is one. Raises CheckpointError for a line that says nothing of a file in here."""
    if not os.path.lexists(sums):
        return {}
    if not is_file(sums):
        raise CheckpointError(f"{sums}: not a file")
    try:
        lines = sums.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{sums}: cannot be read ({error.strerror})") from error
    found: dict[Path, Recorded] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{sums}, line {number}"
        digest, name = _parsed(line.removesuffix(b"\r")) or ("", PurePosixPath())
        file = sums.parent / name
        if not digest or name.is_absolute() or ".." in name.parts or file in (sums, sums.parent):
            raise CheckpointError(f"{where}: expected 64 hexadecimal digits, two spaces and the name of a file in here")
        if not is_file(file):
            raise CheckpointError(f"{where}: {name} is not in the folder; download it, or remove the line")
        if found.setdefault(file, Recorded(digest, listed=True)).digest != digest:
            raise CheckpointError(f"{where}: another SHA-256 of {name} than in a line before; remove one of them")
    return found


def _parsed(line: bytes) -> tuple[str, PurePosixPath] | None:
    """SHA-256 and name of a line; after a leading backslash, backslashes and line ends of the name are escaped."""
    if match := _LINE.fullmatch(line):
        name = match[2]
    elif match := _ESCAPED_LINE.fullmatch(line):
        name = re.sub(rb"\\.", lambda escape: _ESCAPES[escape[0]], match[2])
    else:
        return None
    return match[1].decode().lower(), PurePosixPath(os.fsdecode(name))


def downloaded(file: Path) -> Recorded | None:
    """What the hub said of a file, if it came from there. Unreadable records are none, as for huggingface_hub."""
    if file.is_symlink():
        # One link, not all: the blob itself may be a link into a store where names are hashes of another kind.
        blob = file.readlink()
        return Recorded(blob.name) if blob.parent.name == "blobs" and _ETAG.fullmatch(blob.name) else None
    place = file.parent.resolve() / file.name
    for root in place.parents:  # a download keeps the records of its subfolders in its own
        record = root / ".cache" / "huggingface" / "download" / f"{place.relative_to(root)}.metadata"
        if is_file(record):
            return _read(record)
    return None


def _read(record: Path) -> Recorded | None:
    try:
        _, etag, time = record.read_text(encoding="ascii").splitlines()
        return Recorded(etag, float(time)) if _ETAG.fullmatch(etag) else None
    except (OSError, ValueError):
        return None


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Writes SHA256SUMS of files of a folder and returns its path."""
    lines = (f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in sorted(files))
    return write_text(folder / SUMS, "".join(lines))


def is_file(path: Path) -> bool:
    """False also where the system refuses to say."""
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder closed to us
        return False
