"""A disk that is full at some moment: the error names a file, what was finished stays, and the same command ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.helpers import small_files_only
from tests.interrupted import cases, temporary_files

LIMITS = {"critical-sparsity": (0, 3_000, 12_000), "drift-report": (0, 900, 40_000), "train": (0, 2_000, 60_000)}
"""Bytes a file may have: nothing can be written; something; all but the last files."""


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder nobody may write to, root not excepted: root steps down for the while."""
    with tempfile.TemporaryDirectory(prefix="read-only-") as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if user == 0:
                os.seteuid(user)
            folder.chmod(0o755)


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "toy"])
@pytest.mark.parametrize("name", LIMITS)
def test_a_full_disk_costs_nothing_that_was_finished(cli: Cli, tmp_path: Path, name: str, small: bool) -> None:
    case = cases(tmp_path, small=small)[name]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli(*case.call(whole)).code == 0
    for limit in LIMITS[name][1:2] if small else LIMITS[name]:
        before = case.finished(out)
        with small_files_only(limit):
            answer = cli(*case.call(out))
        assert (answer.code, answer.stdout) == (1, ""), (limit, answer.stderr)
        assert "Traceback" not in answer.stderr
        message = answer.stderr.splitlines()[-1]
        assert message.startswith(f"error: {out}")
        assert "cannot be written (File too large)" in message
        assert case.lost(before, out) == []
        assert temporary_files(out) == []
    ended = cli(*case.call(out))
    assert ended.code == 0, ended.stderr
    assert case.result(out) == case.result(whole)


@pytest.mark.parametrize(
    "call",
    [
        ("generate", "--prompt", "a", "--gen-length", "4", "--block-length", "4"),
        ("drift-report", "--limit", "1", "--gen-length", "4", "--block-length", "4"),
        ("critical-sparsity", "--limit", "1"),
        ("compare", "--limit", "1"),
        ("layers", "--windows", "2"),
        ("cett", "--windows", "2"),
        ("laws", "--published"),
        ("train",),
        ("bench", "engine", "--repeats", "1", "--gen-length", "4", "--block-length", "4"),
        ("bench", "sparse", "--repeats", "1", "--gen-length", "4", "--block-length", "4"),
    ],
    ids=lambda call: "-".join(word for word in call[:2] if not word.startswith("-")),
)
def test_a_read_only_folder_is_said_before_any_work(cli: Cli, read_only: Path, call: tuple[str, ...]) -> None:
    answer = cli(*call, "--out", read_only)
    assert (answer.code, answer.stdout) == (1, "")
    assert answer.stderr.splitlines()[-1].startswith(f"error: {read_only}")
    assert "cannot be written (Permission denied)" in answer.stderr
    assert "choose another folder" in answer.stderr
