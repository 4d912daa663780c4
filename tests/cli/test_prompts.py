"""Prompts from options, files and stdin; a bad line stops everything and is named."""

from __future__ import annotations

import io
import os
import pty
from pathlib import Path

import pytest

from dllm_sparse.cli.prompts import gather_prompts, read_prompts
from dllm_sparse.types import PromptFileError, UsageError


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo three\n\n  \nfour", ["one", "two three", "four"]),
        ("a.txt", "one\r\ntwo\r\n", ["one", "two"]),
        ("a.txt", "\ufeffone\n", ["one"]),
        ("a.txt", "one\u2028still one\x0bstill\n", ["one\u2028still one\x0bstill"]),
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": "t\\nwo", "id": 3}\n', ["one", "t\nwo"]),
        ("a.jsonl", '{"prompt": "one\u2028two\x85three"}\n', ["one\u2028two\x85three"]),
        ("a.jsonl", '\ufeff{"prompt": "one"}\r\n', ["one"]),
    ],
)
def test_good_files(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    assert read_prompts(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": }\n', "a.jsonl, line 3: expected a JSON object"),
        ("a.jsonl", '{"prompt": "one"}\n["two"]\n', 'line 2: expected a JSON object with a non-empty string "prompt"'),
        ("a.jsonl", '{"text": "one"}\n', "line 1: expected"),
        ("a.jsonl", '{"prompt": ""}\n', "line 1: expected"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: expected"),
        ("a.txt", "one\nt\x00wo\n", "a.txt, line 2: expected text, found binary data"),
        ("a.txt", b"one\ntwo\nthr\xe9e\n", "a.txt, line 3: expected UTF-8 text"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": "\xff"}\n', "a.jsonl, line 2: expected UTF-8 text"),
        ("a.txt", "", "holds no prompt"),
        ("a.txt", " \n\n", "holds no prompt"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(PromptFileError) as caught:
        read_prompts(written(tmp_path, name, content))
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for file in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(PromptFileError, match=r"cannot be read"):
            read_prompts(file)


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("piped", [True, False])
def test_empty_pipes_and_files_are_no_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, *, piped: bool
) -> None:
    """`failed | dllm-sparse generate` and `< empty.txt` must not become a story nobody asked for."""
    reading, writing = os.pipe() if piped else (os.open(written(tmp_path, "a.txt", content), os.O_RDONLY), None)
    if writing is not None:
        os.write(writing, content.encode())
        os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(UsageError, match="stdin holds no prompt"):
            gather_prompts([], None, piped=True)


def test_where_nobody_gives_an_input_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = map(os.fdopen, pty.openpty())
    closed, nothing = io.StringIO(), Path(os.devnull)
    closed.close()
    with master, terminal, nothing.open() as null, nothing.open("w") as unreadable:  # nohup leaves such a one
        for stdin in (None, closed, terminal, null, unreadable):
            monkeypatch.setattr("sys.stdin", stdin)
            assert gather_prompts([], None, piped=True) == []


def test_order_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "a.txt", "three\nfour\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert gather_prompts(["one", "two"], file) == ["one", "two", "three", "four"]
    assert gather_prompts([], None) == []
    assert gather_prompts([], None, piped=True) == ["from a pipe"]
    with pytest.raises(UsageError, match="stdin holds no prompt; give --prompt") as caught:
        gather_prompts([], None, piped=True)
    assert caught.value.exit_code == 2
    assert gather_prompts([""], None, piped=True) == [""]
    with pytest.raises(UsageError, match="prompt 2 is not valid UTF-8"):
        gather_prompts(["one", "\ud800"], None)
