"""Checksums of a checkpoint's files, wherever one was recorded. Nothing else tells that a weight is not what it was.

Recorded are: `SHA256SUMS` in the folder (format of coreutils' sha256sum); the names of the hub cache's blobs; and what
`hf download --local-dir` wrote under `.cache/huggingface`. The hub knows a large file by its SHA-256 and a small one by
git's blob id, SHA-1 of "blob <size>\\0" and the content; a mirror may give the content's own SHA-1. SHA256SUMS is the
user's own word and goes first.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import NamedTuple

from dllm_sparse.models import resolve
from dllm_sparse.models.recorded import SUMS, Recorded, downloaded, is_file, listed
from dllm_sparse.models.weights import weight_files
from dllm_sparse.types import CheckpointError

_TEXTS = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "*.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "emoji.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""What is read besides the weights, here or by transformers. Not any *.json: results and notes may lie beside them."""
_CHUNK = 1 << 20
_LONG = 1 << 31  # bytes that take more than a second


class Checked(NamedTuple):
    """The files loading reads, by what is known of them."""

    same: list[Path]
    unknown: list[Path]
    edited: list[Path]

    def note(self, folder: Path) -> str | None:
        """One line on the files that nothing vouches for, with the way out; None where there are none."""
        kinds = (("no checksum is known of {}", self.unknown), ("{} changed since the download", self.edited))
        said = "; ".join(text.format(_names(files, folder)) for text, files in kinds if files)
        patterns = " ".join(sorted({_pattern(file.relative_to(folder)) for file in (*self.unknown, *self.edited)}))
        command = f"(cd {shlex.quote(str(folder))} && sha256sum {patterns} >> {SUMS})"
        return f"{folder}: {said}; to have damage noticed from now on: {command}" if said else None


def check_files(folder: Path, report: Callable[[str], None] | None = None) -> Checked:
    """Compares every file whose checksum is known, those loading reads and whatever SHA256SUMS lists.

    A text that differs and was written after its download counts as edited. `report` is told of a check that takes
    seconds. Raises CheckpointError for a file that differs or is missing, and for a malformed SHA256SUMS.
    """
    read = _files_read(folder)
    recorded = {file: found for file in read if (found := downloaded(file))} | listed(folder / SUMS)
    size = sum(file.stat().st_size for file in recorded)
    if report is not None and size > _LONG:
        report(f"comparing {size / 2**30:.1f} GiB with their checksums")
    same = _compare(recorded)
    return Checked(
        [file for file, equal in same.items() if equal],
        [file for file in read if file not in recorded],
        [file for file, equal in same.items() if not equal],
    )


def _files_read(folder: Path) -> list[Path]:
    """The files loading reads. Weights that cannot be listed are left to the reader of weights, which says why."""
    try:
        weights = {*weight_files(folder), folder / "model.safetensors"}  # transformers takes it before an index
    except CheckpointError:
        weights = set()
    texts = (file for pattern in _TEXTS for file in sorted(folder.glob(pattern)))
    return [file for file in (*sorted(weights), *texts) if is_file(file)]


def _names(files: list[Path], folder: Path) -> str:
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return ", ".join(file.relative_to(folder).as_posix() for file in files[:2]) + more


def _pattern(name: Path) -> str:
    """The files beside this one with its suffix, as a shell finds them."""
    beside = f"*{name.suffix}"
    return beside if name.parent == Path() else f"{shlex.quote(name.parent.as_posix())}/{beside}"


def _compare(recorded: Mapping[Path, Recorded]) -> dict[Path, bool]:
    """Whether each file is what was recorded, in one thread a file; False only for an edited text."""
    stop = Event()

    def compare(file: Path) -> bool:
        return _is_recorded(file, recorded[file], stop)

    with ThreadPoolExecutor(max(1, min(len(recorded), os.cpu_count() or 1))) as pool:
        try:
            return dict(zip(recorded, pool.map(compare, recorded), strict=True))
        finally:  # one difference is enough, and Ctrl-C must not wait for gigabytes
            stop.set()


def _is_recorded(file: Path, recorded: Recorded, stop: Event) -> bool:
    """True where the digest is the one recorded, False for an edited text; raises CheckpointError for damage."""
    try:
        status = file.stat()
        digests = _digests(file, len(recorded.digest) == 40, status.st_size, stop)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if recorded.digest in digests:
        return True
    # A second's grace, as in huggingface_hub. Weights are not edited by hand: theirs is damage whatever the date.
    late = recorded.downloaded is not None and status.st_mtime - 1 > recorded.downloaded
    if late and file.suffix != ".safetensors":
        return False
    raise CheckpointError(_damage(file, recorded, digests[0]))


def _damage(file: Path, recorded: Recorded, digest: str) -> str:
    if file.is_relative_to(resolve.BUNDLED_FOLDER):
        remedy = "reinstall dllm-sparse"
    elif recorded.listed:
        remedy = f"download or copy it again; if you changed it yourself, correct its line in {SUMS}"
    else:  # what is there already is not downloaded again
        remedy = f"delete {file.resolve()} and download it again; if you changed it yourself, list it in {SUMS}"
    kind = "SHA-256" if len(digest) == 64 else "git blob id"
    return f"{file} is damaged: its {kind} is {digest[:12]}.., {recorded.digest[:12]}.. was recorded; {remedy}"


def _digests(file: Path, as_git: bool, size: int, stop: Event) -> list[str]:
    """SHA-256 of a file, or git's blob id and SHA-1; unfinished ones when `stop` is set."""
    if as_git:
        hashes = [hashlib.sha1(start, usedforsecurity=False) for start in (b"blob %d\0" % size, b"")]
    else:
        hashes = [hashlib.sha256()]
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as content:
        while not stop.is_set() and (count := content.readinto(buffer)):
            for one in hashes:
                one.update(buffer[:count])
    return [one.hexdigest() for one in hashes]
