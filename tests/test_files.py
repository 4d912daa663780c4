"""Atomic files: the old content or the new, never half of either."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from dllm_sparse.files import atomic_path, write_json, write_text


def test_files_appear_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    path = write_json(tmp_path / "new" / "a.json", {"text": "é", "value": 1.5})
    assert path.read_text(encoding="utf-8") == '{\n  "text": "é",\n  "value": 1.5\n}\n'
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"value": math.nan})
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
