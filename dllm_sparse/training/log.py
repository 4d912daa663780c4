"""The run's record: one JSON object a line, and the loss curve drawn from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_sparse.figures import COLOURS, figure_grid, save_figure
from dllm_sparse.files import write_text
from dllm_sparse.types import DllmSparseError


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, in order; a last line cut short by a crash is left out. Raises DllmSparseError."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line]


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
        if isinstance(entry["step"], int) and isinstance(entry["losses"], list):
            return entry
        raise ValueError("no step or no losses")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DllmSparseError(f"{where} is no entry of a training log ({error!r:.200}); remove the line") from error


def rewind_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops what was logged after `step`, so that a resumed run reads like an uninterrupted one."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept


def append_log(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds one line in a single write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def draw_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Training and held-out loss (nats a token) over token positions seen, one pair of lines a run, as a PNG."""
    from matplotlib.ticker import EngFormatter

    figure, ((axes,),) = figure_grid(1, 1, (7.0, 4.2))
    for number, (name, log) in enumerate(logs.items()):
        colour = COLOURS[number % len(COLOURS)]
        held = [(entry["tokens"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]
        text = [(entry["tokens"], entry["losses"][0]) for entry in log]
        axes.plot(*zip(*text, strict=True), color=colour, alpha=0.3, linewidth=0.8, label=f"{name}, training")
        if held:
            axes.plot(*zip(*held, strict=True), color=colour, marker="o", markersize=3, label=f"{name}, held out")
    axes.set(xlabel="token positions seen", ylabel="loss (nats a token)")
    tops = [entry["losses"][0] for log in logs.values() for entry in log[len(log) // 50 :]]
    axes.set_ylim(bottom=min(tops) - 0.2, top=min(max(tops), min(tops) + 4.0))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()
    axes.grid(alpha=0.3)
    return save_figure(path, figure)
