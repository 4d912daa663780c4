"""`cett_report`: the sparsity of a model at CETT-PPL-p%, and other rules beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dllm_sparse.analysis.cett_ppl import Calibration, cett_point, cett_ppl
from dllm_sparse.analysis.exploitable import TOKENS
from dllm_sparse.analysis.heldout import held_out, windows_of
from dllm_sparse.analysis.pareto import affordable, pareto
from dllm_sparse.evaluation.fingerprints import git_revision, model_fingerprint, versions
from dllm_sparse.evaluation.texts import bundled_texts
from dllm_sparse.fields import listed, plain_arguments
from dllm_sparse.figures import COLOURS, figure_grid, save_figure
from dllm_sparse.files import write_csv, write_json, write_text
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.report.pictures_page import Part, pictures_page, shown
from dllm_sparse.report.result_folder import check_results

SCHEMA = "dllm-sparse/cett@1"
RULE_NAMES = {
    "cett": "CETT (static, per layer)",
    "top_p": "top-p (per token)",
    "top_k": "top-k (per token)",
    "top_k_gate": "top-k on |s|",
    "fat_eps": "FAT-eps on |s|",
    "zero": "exact zeros",
}


@dataclass(slots=True)
class CettReport:
    """What `cett_report` returns: the JSON-ready value and the files written."""

    value: dict[str, Any]
    files: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self.value


@plain_arguments
def cett_report(
    models: Sequence[LanguageModel],
    texts: str | Sequence[str] | None = None,
    *,
    increase: float = 0.01,
    compare_rules: bool = False,
    windows: int = 64,
    length: int = 128,
    tolerance: float = 1e-3,
    seed: int = 0,
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> CettReport:
    """Searches one CETT for all models together (checkpoints of a run, or one model) and measures each at it.

    Text: the bundled passages by default. `compare_rules` adds perplexity against sparsity for CETT, top-p, top-k,
    FAT-eps and exact zeros, for every model. An interrupted call keeps nothing: it is minutes, not hours. Raises
    UsageError.
    """
    started = time.perf_counter()
    check_results(out, "cett.json")
    texts = listed(texts or bundled_texts())
    pairs = [(lm, held_out(lm, windows_of(lm, texts, windows, length), seed)) for lm in models]
    calibrations = [Calibration(lm, data) for lm, data in pairs]
    say(f"searching CETT-PPL-{100 * increase:g}% on {len(pairs)} model(s)")
    search = cett_ppl(pairs, increase, tolerance, calibrations)
    found: list[dict[str, Any]] = []
    for (lm, data), calibration, dense in zip(pairs, calibrations, search.dense, strict=True):
        point = cett_point(lm, data, search.cett, calibration, dense).to_dict()
        points = pareto(lm, data, calibration, say) if compare_rules else []
        found.append(
            {
                "model": lm.name,
                "fingerprint": model_fingerprint(lm),
                "tokens": data.tokens,
                **point,
                "rules": [entry.to_dict() for entry in points],
                "affordable": affordable(points, increase) if points else {},
            }
        )
    value = {
        "schema": SCHEMA,
        "config": {"increase": increase, "tolerance": tolerance, "seed": seed, "windows": windows, "length": length}
        | {"versions": versions(), "git_revision": git_revision()},
        "cett": search.cett,
        "mean_ratio": float(np.mean(search.ratios)),
        "evaluations": search.evaluations,
        "models": found,
    }
    report = CettReport(value)
    if out is not None:
        report.files = _write(Path(out), value, time.perf_counter() - started)
    return report


def model_rows(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per model: what the table and the CSV summary show."""
    names = ("model", "cett", "sparsity", "activation", "dense", "loss", "perplexity_ratio")
    return [
        {
            **{name: entry[name] for name in names},
            **{f"exploitable_T{n}": entry["exploitable"].get(n, {}).get("ffn_bytes_saved") for n in TOKENS},
            **{f"affordable_{rule}": sparsity for rule, sparsity in entry["affordable"].items()},
        }
        for entry in value["models"]
    ]


def _write(out: Path, value: Mapping[str, Any], seconds: float) -> list[Path]:
    """cett.json, cett.csv, rules.csv, rules.png, cett.html, run.json."""
    rows = model_rows(value)
    files = [write_json(out / "cett.json", value), write_csv(out / "cett.csv", rows)]
    rules = [{"model": entry["model"], **point} for entry in value["models"] for point in entry["rules"]]
    parts = [Part("At the searched CETT", headers=list(rows[0]), rows=[[shown(c) for c in r.values()] for r in rows])]
    if rules:
        files.append(write_csv(out / "rules.csv", rules))
    if rules and find_spec("matplotlib") is not None:
        picture = _draw(out / "rules.png", value)
        files.append(picture)
        parts.append(Part("Rules", picture=(picture, "Perplexity over dense perplexity against sparsity, per rule")))
    files.append(write_text(out / "cett.html", pictures_page("CETT-PPL", f"{len(rows)} model(s)", parts)))
    run = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds}
    return [*files, write_json(out / "run.json", run)]


def _draw(path: Path, value: Mapping[str, Any]) -> Path:
    models = [entry for entry in value["models"] if entry["rules"]]
    figure, axes = figure_grid(1, len(models))
    limit = 1 + 6 * value["config"]["increase"]
    for axis, entry in zip(axes[0], models, strict=True):
        for number, (rule, name) in enumerate(RULE_NAMES.items()):
            points = sorted((p["sparsity"], p["ratio"]) for p in entry["rules"] if p["rule"] == rule)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[number], label=name)
        axis.axhline(1 + value["config"]["increase"], color="black", linewidth=0.7, linestyle="--")
        axis.set(title=entry["model"], xlabel="sparsity", ylabel="perplexity / dense", ylim=(0.99, limit), xlim=(0, 1))
    axes[0][0].legend(fontsize=7)
    return save_figure(path, figure)
