"""One folder, one command: what another would overwrite is refused before any work, and resuming goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dllm_sparse.report.result_folder import check_results
from dllm_sparse.types import FileNotWritten, UsageError
from tests.cli.conftest import Cli, cli  # noqa: F401 (fixture)

SWEEP = ("--tasks", "tiny-cloze", "--limit", 2, "--mc-num", 1, "--grid", "0.8", "--resamples", 100)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_compare_leaves_the_results_of_critical_sparsity_alone(
    cli: Cli,  # noqa: F811
    toy: Path,
    toy_ar: Path,
    tmp_path: Path,
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    single = ("critical-sparsity", "--model", toy, *SWEEP, "--out", alone)
    pair = ("compare", "--model", toy, "--model", toy_ar, *SWEEP, "--out")
    assert cli(*single).code == 0
    before = contents(alone)
    refused = cli(*pair, alone)
    assert (refused.code, refused.stdout) == (2, "")
    assert "critical-sparsity.json" in refused.stderr
    assert "run.json would be overwritten; give another folder with --out" in refused.stderr
    assert contents(alone) == before
    shutil.copytree(alone / "points", both / "points")  # as it says
    assert "2 points computed, 2 taken from the store" in cli(*pair, both).stderr
    again = cli(*single)
    assert again.code == 0, again.stderr
    assert "0 points computed, 2 taken from the store" in again.stderr


@pytest.mark.parametrize(
    ("there", "own", "refused"),
    [
        (("compare.json", "run.json"), "critical-sparsity.json", "run.json"),
        (("cett.json", "run.json"), "layers.json", "run.json"),
        (("report.json", "layers.png"), "layers.json", "layers.png"),
        (("laws.json", "points.csv"), "compare.json", "points.csv"),
        (("compare.json", "run.json", "points.csv"), "compare.json", None),
        (("report.json",), "layers.json", None),  # without pictures nothing is lost
        (("laws.json", "points.csv"), "report.json", None),
        (("run.json",), "cett.json", None),
    ],
)
def test_only_what_would_be_lost_is_refused(
    tmp_path: Path, there: tuple[str, ...], own: str, refused: str | None
) -> None:
    for name in there:
        (tmp_path / name).write_text("a result")
    if refused is None:
        check_results(tmp_path, own)
        return
    with pytest.raises(UsageError, match=f"{there[0]}.*whose {refused} would be overwritten"):
        check_results(tmp_path, own)


def test_folders_that_take_no_files_are_found_too(tmp_path: Path) -> None:
    check_results(None, "laws.json")
    check_results(tmp_path / "new", "laws.json")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileNotWritten):
        check_results(tmp_path / "file", "laws.json")
