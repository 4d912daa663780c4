"""Killed at random moments, by Ctrl-C and by SIGKILL: nothing finished is lost, and what is resumed ends the same.

A few kills here; `benchmarks/kills.py` makes hundreds, of larger runs.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.kills import torment
from tests.cli.conftest import Cli
from tests.interrupted import cases

SLOW = pytest.mark.slow  # they draw pictures in every run, and are killed in their own folders' tests, too


@pytest.mark.parametrize(
    "name", ["train", pytest.param("drift-report", marks=SLOW), pytest.param("critical-sparsity", marks=SLOW)]
)
def test_kills_cost_nothing(cli: Cli, tmp_path: Path, name: str) -> None:
    case = cases(tmp_path, small=True)[name]
    assert cli(*case.call(tmp_path / "first")).code == 0  # forks then find everything imported
    told = torment(name, case, tmp_path, kills=2, fresh=0.0, rng=random.Random(1))
    assert (told["SIGINT"], told["SIGKILL"]) == (1, 1)
