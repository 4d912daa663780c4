"""The points laws are fitted to: read from a CSV file, or measured on the snapshots of a training run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_sparse.files import read_csv, read_sealed, write_sealed
from dllm_sparse.types import UsageError

POINTS_FILE = "activation.json"
JOINT = 5
"""Last checkpoints of a run the CETT is searched on together (Sparsing Law, app. E)."""


@dataclass(frozen=True, slots=True)
class LawPoint:
    """One checkpoint of one run: D in billions of tokens, the activation ratio under CETT-PPL-p%, and others beside it.

    `parameters` without embeddings. What a CSV file leaves out is None (or empty).
    """

    run: str
    tokens_billions: float
    activation_ratio: float
    kind: str = ""
    activation: str = ""
    parameters: float | None = None
    width_depth: float | None = None
    cett: float | None = None
    top_p_ratio: float | None = None  # activation ratio of top-p at p
    zero_ratio: float | None = None  # share of nonzero gates
    loss: float | None = None


def read_points(path: Path) -> list[LawPoint]:
    """Points of a CSV file with a header.

    Needed: `tokens_billions` (or `tokens`) and `activation_ratio` (or `sparsity`). Optional: `run`, `kind`,
    `activation`, `parameters`, `width_depth` (or `width` and `layers`). Raises UsageError naming file and line.
    """
    try:
        rows = read_csv(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as CSV: {error}") from error
    if not rows:
        raise UsageError(
            f"{path} holds no point; expected a header and lines such as 'tokens_billions,activation_ratio'"
        )
    return [_point(row, f"{path}, line {number}", path.stem) for number, row in rows]


def _point(row: dict[str, str], where: str, name: str) -> LawPoint:
    tokens = _number(row, where, "tokens_billions", "tokens")
    ratio = _number(row, where, "activation_ratio", "sparsity")
    if tokens is None or ratio is None:
        raise UsageError(f"{where}: needs tokens_billions (or tokens) and activation_ratio (or sparsity)")
    if not row.get("tokens_billions"):
        tokens /= 1e9
    if not row.get("activation_ratio"):
        ratio = 1 - ratio
    width, layers = _number(row, where, "width"), _number(row, where, "layers")
    shape = _number(row, where, "width_depth")
    if shape is None and width and layers:
        shape = width / layers
    return LawPoint(
        run=row.get("run") or name,
        tokens_billions=tokens,
        activation_ratio=ratio,
        kind=row.get("kind") or "",
        activation=row.get("activation") or "",
        parameters=_number(row, where, "parameters"),
        width_depth=shape,
        **{key: _number(row, where, key) for key in ("cett", "top_p_ratio", "zero_ratio", "loss")},
    )


def _number(row: dict[str, str], where: str, *names: str) -> float | None:
    """The first of the columns that is filled."""
    name = next((name for name in names if row.get(name)), None)
    if name is None:
        return None
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: {name} is {row[name]!r}; expected a number")
    return value


def point_rows(points: Sequence[LawPoint]) -> list[dict[str, Any]]:
    """Rows for a CSV file that `read_points` reads again."""
    return [asdict(point) for point in points]


@dataclass(frozen=True, slots=True)
class Measurement:
    """How snapshots are measured: windows x length tokens of text, the allowed rise of perplexity, top-p's p."""

    windows: int = 64
    length: int = 128
    increase: float = 0.01
    p: float = 0.9
    tolerance: float = 1e-3


def measure_run(
    run: Path,
    texts: Sequence[str],
    how: Measurement | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> list[LawPoint]:
    """Measures every snapshot of a run, or returns what an earlier call with the same settings stored beside them.

    Raises UsageError for a folder without snapshots.
    """
    from dllm_sparse.models.snapshots import snapshots_of

    snapshots = snapshots_of(run)
    if not snapshots:
        raise UsageError(f"{run} holds no snapshots; make some with `dllm-sparse train --snapshots 12 --out {run}`")
    how = how or Measurement()
    text = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    settings = {**asdict(how), "steps": [snapshot.step for snapshot in snapshots], "text": text}
    stored = run / POINTS_FILE
    if stored.exists():
        found = read_sealed(stored, "a file of measured points")
        if found["settings"] == settings:
            return [LawPoint(**row) for row in found["points"]]
    points = _measure(run, snapshots, texts, how, device, report)
    write_sealed(stored, {"settings": settings, "points": point_rows(points)})
    return points


def _measure(
    run: Path,
    snapshots: Sequence[Any],
    texts: Sequence[str],
    how: Measurement,
    device: str,
    report: Callable[[str], None],
) -> list[LawPoint]:
    from dllm_sparse.analysis.cett_ppl import Calibration, cett_point, cett_ppl
    from dllm_sparse.analysis.heldout import evaluate, held_out, windows_of
    from dllm_sparse.models.loading import load
    from dllm_sparse.sparsity.config import SparsityConfig

    loaded = []
    said: dict[str, list[str]] = {}  # what loading reports, by what it says of any snapshot
    for snapshot in snapshots:
        lines: list[str] = []
        lm = load(str(snapshot.path), device=device, dtype="float32", report=lines.append)
        for line in lines:
            said.setdefault(line.replace(snapshot.path.name, ""), []).append(line)
        loaded.append((lm, held_out(lm, windows_of(lm, texts, how.windows, how.length))))
    for first, *more in said.values():
        report(first + (f" (the same for {len(more)} more of its snapshots)" if more else ""))
    calibrations = [Calibration(lm, data) for lm, data in loaded]
    report(f"{run.name}: searching CETT on the last {min(JOINT, len(loaded))} of {len(loaded)} snapshots")
    search = cett_ppl(loaded[-JOINT:], how.increase, how.tolerance, calibrations[-JOINT:])
    points = []
    for snapshot, (lm, data), calibration in zip(snapshots, loaded, calibrations, strict=True):
        report(f"{run.name}: step {snapshot.step}")
        found = cett_point(lm, data, search.cett, calibration)
        shares = [
            evaluate(lm, data, config).counts
            for config in (
                SparsityConfig(p=how.p, sites="intermediate"),
                SparsityConfig(rule="threshold", p=0.0, sites="gate"),
            )
        ]
        top_p, zero = (1 - counts.summary()["mean"] for counts in shares if counts is not None)
        points.append(
            LawPoint(
                run=run.name,
                tokens_billions=snapshot.tokens / 1e9,
                activation_ratio=found.activation,
                kind=lm.kind,
                activation=lm.config.activation,
                parameters=lm.config.parameters - lm.config.vocab_size * lm.config.width * (1 if lm.config.tied else 2),
                width_depth=lm.config.width / lm.config.layers,
                cett=search.cett,
                top_p_ratio=top_p,
                zero_ratio=zero,
                loss=found.dense,
            )
        )
    return points


def gather(inputs: Sequence[Path], measure: Callable[[Path], list[LawPoint]]) -> list[LawPoint]:
    """Points of CSV files and of run folders (or folders of run folders), in order. Raises UsageError for others."""
    points: list[LawPoint] = []
    for path in inputs:
        if path.is_file():
            points += read_points(path)
        elif (path / "snapshots").is_dir():
            points += measure(path)
        elif path.is_dir() and (runs := sorted(found.parent for found in path.glob("*/snapshots"))):
            for run in runs:
                points += measure(run)
        else:
            raise UsageError(f"{path} is neither a CSV file nor a folder with snapshots of `train --snapshots`")
    return points
