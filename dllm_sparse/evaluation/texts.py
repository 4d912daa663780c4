"""Held-out text for losses: a file of yours, or what ships with the bundled tasks."""

from __future__ import annotations

import json
from pathlib import Path

from dllm_sparse.types import PromptFileError

_BUNDLED = Path(__file__).parent / "tasks" / "bundled" / "data" / "infill.jsonl"


def bundled_texts() -> list[str]:
    """1,000 passages of about 80 tokens from documents the bundled twins never saw."""
    items = (json.loads(line) for line in _BUNDLED.read_text(encoding="utf-8").splitlines())
    return [f"{item['prefix']} {item['target']}{item['suffix']}" for item in items]


def read_texts(path: Path) -> list[str]:
    """Texts of a file: one JSON object with a string `text` a line (.jsonl), else the whole file as one text.

    Raises PromptFileError naming file and line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"text file {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptFileError(f"{path}, line {number}: expected a JSON object; {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise PromptFileError(f'{path}, line {number}: expected a string "text"; found {line[:60]!r}')
        texts.append(value["text"])
    return texts


def texts_of(path: Path | None) -> list[str]:
    """The texts of a file, or the bundled ones."""
    return bundled_texts() if path is None else read_texts(path)
