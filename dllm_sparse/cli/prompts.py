"""Prompts from --prompt, from a .txt or .jsonl file, or from stdin."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from dllm_sparse.types import PromptFileError, UsageError

DEFAULT_PROMPT = "Once upon a time"
"""What is continued where nothing was asked: a base model goes on with it, and a chat model answers it, too."""


def gather_prompts(given: Sequence[str], file: Path | None, *, piped: bool = False) -> list[str]:
    """All prompts of a call, in order; `piped`: without --prompt and --prompts, stdin is read as one.

    Empty where nobody gives any. Raises UsageError for a prompt that is no text and for an empty pipe or file on stdin
    (what should have filled it has failed), PromptFileError for the first bad line of a file.
    """
    prompts = list(given)
    if file is not None:
        prompts += read_prompts(file)
    if piped and not prompts and _is_fed():
        prompts = [sys.stdin.read().rstrip("\n")]
        if not prompts[0]:
            raise UsageError('stdin holds no prompt; give --prompt "Once upon a time", --prompts FILE or text on stdin')
    for number, prompt in enumerate(prompts, start=1):
        if not _encodable(prompt):
            raise UsageError(f"prompt {number} is not valid UTF-8: {prompt[:60]!r}")
    return prompts


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file: one a line (.txt), or one JSON object a line with a string `prompt` (.jsonl)."""
    try:
        # Not splitlines(): a JSON string may hold U+2028 and other characters that are line ends to Python.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{file}, line {number}: expected UTF-8 text, found {error.reason}") from error
    except OSError as error:
        raise PromptFileError(f"prompts file {file} cannot be read: {error}") from error
    parse = _from_json if file.suffix == ".jsonl" else _from_text
    prompts = [parse(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise PromptFileError(f"prompts file {file} holds no prompt")
    return prompts


def _from_text(line: str, file: Path, number: int) -> str:
    if "\x00" in line:
        raise PromptFileError(f"{file}, line {number}: expected text, found binary data")
    return line


def _from_json(line: str, file: Path, number: int) -> str:
    expected = 'expected a JSON object with a non-empty string "prompt"'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{file}, line {number}: {expected}; {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt or not _encodable(prompt):
        raise PromptFileError(f"{file}, line {number}: {expected}; found {line[:60]!r}")
    return prompt


def _is_fed() -> bool:
    """False where nobody gives an input: stdin is a terminal, /dev/null or closed."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return False
    try:
        status = os.fstat(sys.stdin.fileno())
    except OSError:  # no file of the system's
        return True
    return not (stat.S_ISCHR(status.st_mode) and status.st_rdev == Path(os.devnull).stat().st_rdev)


def _encodable(text: str) -> bool:
    """False for lone surrogates: no text has them, but JSON's escapes and undecodable bytes of a shell become such."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
