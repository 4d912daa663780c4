"""Golden checkpoints of two families, free to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import GOLDEN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden LLaDA checkpoint, free to be damaged."""
    return Path(shutil.copytree(GOLDEN / "llada-tiny", tmp_path / "llada"))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A copy of the golden Llama checkpoint, whose head is its embedding."""
    return Path(shutil.copytree(GOLDEN / "llama-tiny", tmp_path / "llama"))
