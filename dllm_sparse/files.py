"""Files: written atomically (a reader sees the old content or the new, also after kill -9), CSV without formulas."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllm_sparse.types import DamagedFile, FileNotWritten

# What spreadsheets take for a formula (CWE-1236), the full-width forms included; quotes are what `_guard` puts before.
_FORMULA = re.compile("[\\s']*[=+\\-@\uff1d\uff0b\uff0d\uff20\t\r\n]")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it replaces `path`, on failure it is removed.

    Raises FileNotWritten for a full disk, a read-only folder and whatever else the system refuses.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise FileNotWritten(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_folder(folder: Path | None) -> None:
    """Proves that a folder, if one is given, can be made and takes files: before the work whose result goes there.

    Raises FileNotWritten; leaves nothing behind.
    """
    if folder is None:
        return
    try:
        with tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())) as file:
            file.write(b"proof")
    except OSError as error:
        raise FileNotWritten(folder, error) from error


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes bytes atomically and returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically and returns the path."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Writes indented JSON atomically; NaN and infinity are refused (write None instead)."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_sealed(path: Path, value: Any) -> Path:
    """Writes JSON that will be read again, with a checksum: `read_sealed` notices whatever happened in between."""
    return write_json(path, {"value": value, "sha256": _seal(value)})


def read_sealed(path: Path, what: str) -> Any:
    """The value `write_sealed` wrote; raises DamagedFile, which says `what` the file should be, for anything else."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["sha256"] != _seal(stored["value"]):
            raise ValueError("its checksum is another")
        return stored["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(path, what, error) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> Path:
    """Writes rows of equal keys as CSV; None is an empty cell. `columns` head a table that may have no rows.

    A text that a spreadsheet would compute gets a quote in front, which `read_csv` takes off again; numbers stay.
    """
    columns = list(rows[0]) if rows else columns
    table = [columns, *([row[column] for column in columns] for row in rows)] if columns else []
    return write_text(path, "".join(map(_csv_line, table)))


def read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header, each with its line number; blank lines are left out.

    Raises ValueError for what is no such table, naming the line, and OSError.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = [(reader.line_num, [_unguard(cell) for cell in row]) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    if not lines:
        return []
    (_, header), *rows = lines
    if twice := {name for name in header if header.count(name) > 1}:
        raise ValueError(f"column {min(twice)!r} is there twice")
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} cells, the header {len(header)}")
    return [(number, dict(zip(header, row, strict=True))) for number, row in rows]


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _csv_line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    # The writer quotes a carriage return inside a cell only where it ends its own lines with one.
    csv.writer(text, lineterminator="\r\n").writerow(map(_guard, cells))
    return text.getvalue().removesuffix("\r\n") + "\n"


def _guard(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _unguard(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
