"""A result folder belongs to one command where another would write files of the same names: nothing is lost unsaid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from dllm_sparse.files import check_folder
from dllm_sparse.types import UsageError

_SWEEP = frozenset({"points.csv", "curves.png", "run.json"})
_SHARED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "critical-sparsity.json": _SWEEP,
        "compare.json": _SWEEP,
        "cett.json": frozenset({"run.json"}),
        "layers.json": frozenset({"run.json", "layers.png"}),
        "laws.json": frozenset({"points.csv"}),
        "report.json": frozenset({"layers.png"}),
    }
)
"""The file only one command writes, by which its results are known, and those of its files that others write, too."""


def check_results(out: str | Path | None, own: str) -> None:
    """Proves, before any work, that `out` takes files and that writing the results of `own` replaces no other's.

    The same command goes on in its folder: its results are made anew from the points stored there. Raises UsageError
    for a folder with another command's results, FileNotWritten for one that takes no files.
    """
    if out is None:
        return
    folder = Path(out)
    check_folder(folder)
    for other, names in _SHARED.items():
        lost = sorted(name for name in names & _SHARED[own] if (folder / name).exists())
        if other != own and lost and (folder / other).is_file():
            both_sweep = _SHARED[own] == names == _SWEEP
            again = f"; with a copy of {folder / 'points'} in it nothing is computed twice" if both_sweep else ""
            raise UsageError(
                f"{folder} holds other results ({other}), whose {', '.join(lost)} would be overwritten; "
                f"give another folder with --out{again}"
            )


def check_inputs(out: str | Path | None, inputs: Iterable[Path], written: Iterable[str]) -> None:
    """Raises UsageError for an input file that is one of the files `written` in the folder `out`."""
    replaced = {(Path(out) / name).resolve() for name in written} if out is not None else set()
    for given in inputs:
        if given.is_file() and given.resolve() in replaced:
            raise UsageError(f"{given} would be overwritten by the results in {out}; give another folder with --out")
