"""Held-out text from files: what is read, and what is said of a line that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_sparse.evaluation.texts import bundled_texts, read_texts, texts_of
from dllm_sparse.types import PromptFileError


def test_a_file_is_one_text_and_json_lines_are_one_each(tmp_path: Path) -> None:
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text("one\n\ntwo\n")
    lines.write_text('\ufeff{"text": "one"}\n\n{"text": "two\u2028three", "id": 3}\n')
    assert read_texts(plain) == ["one\n\ntwo\n"]
    assert texts_of(lines) == ["one", "two\u2028three"]
    assert texts_of(None) == bundled_texts()


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', "[" * 100_000])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(PromptFileError, match=r"texts\.jsonl, line 2: expected a"):
        read_texts(file)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.txt", "missing.txt"):
        with pytest.raises(PromptFileError, match=rf"text file .*{name} cannot be read"):
            read_texts(tmp_path / name)
