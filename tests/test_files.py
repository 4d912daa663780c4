"""Files: the old content or the new, never half of either; CSV that no spreadsheet computes; a system that refuses."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dllm_sparse.files import atomic_path, check_folder, read_csv, write_csv, write_json, write_text
from dllm_sparse.types import FileNotWritten
from tests.helpers import small_files_only

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "'=1", "''", '=HYPERLINK("x")', "\uff1d1", "-")
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00")) | st.sampled_from(FORMULAS)


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
    with small_files_only(1000), pytest.raises(FileNotWritten, match=r"a\.txt cannot be written .*too large"):
        write_text(path, "x" * 2000)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_takes_no_files_is_named_before_any_work(tmp_path: Path) -> None:
    check_folder(None)
    check_folder(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotWritten, match="file cannot be written"):
        check_folder(tmp_path / "file")


@given(st.lists(st.tuples(CELLS, CELLS, st.floats(-1e9, 1e9) | st.integers() | st.none()), max_size=4))
@example([(formula, "", -1.5) for formula in FORMULAS])
def test_csv_says_what_was_written_and_computes_nothing(tmp_path_factory: Any, rows: list[Any]) -> None:
    names = ("=name", "text", "number")
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    write_csv(path, [dict(zip(names, row, strict=True)) for row in rows], columns=names)
    assert [tuple(row.values()) for _, row in read_csv(path)] == [
        (one, two, "" if number is None else str(number)) for one, two, number in rows
    ]
    with path.open(newline="", encoding="utf-8") as file:
        header, *stored = csv.reader(file)
    assert header == ["'=name", "text", "number"]
    for *texts, number in stored:
        assert not any(text.strip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20") and text.strip() for text in texts)
        assert not number or math.isfinite(float(number))  # numbers stay numbers, negative ones too


def test_a_table_that_is_none_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for content, words in (
        ("a,b\n1,2\n3\n", "line 3 has 1 cells, the header 2"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells"),
        ("a,a\n1,2\n", "column 'a' is there twice"),
        ('a,b\n"1,2\n', "line 2"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_csv(path)
    path.write_text("\ufeffa,b\n\n1,2\n")
    assert read_csv(path) == [(3, {"a": "1", "b": "2"})]
