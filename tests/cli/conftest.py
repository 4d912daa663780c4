"""Calls of the command line in this process, with what it printed; the toy model loaded."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dllm_sparse as ds
from tests.helpers import call_cli


@dataclass
class Answer:
    """Exit code and the two streams of one call."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        value: dict[str, Any] = json.loads(self.stdout)
        return value


Cli = Callable[..., Answer]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `dllm-sparse ARGUMENTS`; `stdin` is what is piped in, None is /dev/null."""
    for name in ("DLLM_SPARSE_DEBUG", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object, stdin: str | None = None) -> Answer:
        with Path(os.devnull).open(encoding="utf-8") if stdin is None else io.StringIO(stdin) as source:
            monkeypatch.setattr("sys.stdin", source)
            capsys.readouterr()
            code = call_cli(*(str(argument) for argument in arguments))
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def toy_lm(toy: Path) -> ds.LanguageModel:
    return ds.load(str(toy), device="cpu")
