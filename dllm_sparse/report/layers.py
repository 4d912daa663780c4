"""`layer_report`: effective rank, tolerance and budget layer by layer, and expert by expert in a mixture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dllm_sparse.analysis import experts as expert_tables
from dllm_sparse.analysis.heldout import held_out, windows_of
from dllm_sparse.analysis.layers import (
    LossCurve,
    allocated_curve,
    layer_sensitivity,
    loss_curve,
    rank_windows,
    site_ranks,
    weight_scores,
)
from dllm_sparse.evaluation.texts import bundled_texts
from dllm_sparse.fields import listed, plain_arguments
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.report.layer_files import write_layers
from dllm_sparse.report.result_folder import check_results
from dllm_sparse.report.stored_probe import StoredProbe, probe_of
from dllm_sparse.sparsity.config import Sites, SparsityConfig
from dllm_sparse.types import UsageError

SCHEMA = "dllm-sparse/layers@1"


@dataclass(slots=True)
class LayerReport:
    """What `layer_report` returns: the JSON-ready value and the files written."""

    value: dict[str, Any]
    files: list[Path] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer: ranks by site, sparsity at the model's critical point, critical sparsity alone."""
        return layer_rows(self.value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self.value


@plain_arguments
def layer_report(
    lm: LanguageModel,
    texts: str | Sequence[str] | None = None,
    *,
    sites: Sites = "all_inputs",
    retain: float = 0.99,
    windows: int = 32,
    length: int = 128,
    sensitivity: bool = True,
    published_rank: bool = False,
    strength: float = 0.5,
    seed: int = 0,
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LayerReport:
    """Measures a model layer by layer on held-out text (the bundled passages by default), by its perplexity.

    A setting passes while dense perplexity / its perplexity >= `retain`. `sensitivity` adds every layer alone and two
    allocations of p at the same mean: one from the weights alone (data-free), one from the measured sensitivities.
    Ranks are taken over more windows where `windows` has fewer tokens than four times the widest site.
    `published_rank` adds the paper's batch-dependent rank. With `out`, points are stored as they finish and JSON, CSV,
    PNG and HTML are written. Raises UsageError.
    """
    if not 0 < retain < 1:
        raise UsageError(f"retain is {retain}; allowed: between 0 and 1 (for example 0.99)")
    started = time.perf_counter()
    check_results(out, "layers.json")
    texts = listed(texts or bundled_texts())
    probe = probe_of(lm, texts, windows, length, seed, out)
    base = SparsityConfig(sites=sites)
    say("effective ranks")
    many = windows_of(lm, texts, max(windows, rank_windows(lm, length)), length)
    ranks = [rank.to_dict() for rank in site_ranks(lm, held_out(lm, many, seed), published=published_rank)]
    say("the uniform rule")
    uniform = loss_curve(probe, base, retain, evaluations=9)
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "model": lm.name,
        "config": {"sites": sites, "retain": retain, "strength": strength, "seed": seed, **probe.record()},
        "dense_loss": probe.dense,
        "ranks": ranks,
        "uniform": {**uniform.to_dict(retain), "by_layer": _at_crossing(uniform, retain)},
        "alone": [],
        "allocations": {},
        "experts": _experts(uniform, retain, lm.config.experts),
    }
    if sensitivity:
        alone = layer_sensitivity(probe, base, retain, say)
        value["alone"] = [{"layer": layer, **curve.to_dict(retain)} for layer, curve in enumerate(alone)]
        value["allocations"] = _allocations(probe, base, alone, uniform, retain, strength, say)
    report = LayerReport(value)
    if out is not None:
        run = {"seconds": time.perf_counter() - started, "points_reused": probe.store.reused}
        report.files = write_layers(
            Path(out), value, layer_rows(value), {**run, "points_computed": probe.store.computed}
        )
    return report


def _at_crossing(curve: LossCurve, retain: float) -> list[dict[str, Any]]:
    """Every layer's sparsity per site where the uniform rule's score crosses the line."""
    low, high, share = curve.bracket(retain)
    after = {(row["layer"], row["site"]): row["sparsity"] for row in curve.counts[high]["by_layer"]}
    return [
        {**row, "sparsity": row["sparsity"] + share * (after[row["layer"], row["site"]] - row["sparsity"])}
        for row in curve.counts[low]["by_layer"]
    ]


def _experts(curve: LossCurve, retain: float, experts: int) -> dict[str, Any] | None:
    """Experts at the model's critical point; None in a dense model."""
    if not experts:
        return None
    low, high, share = curve.bracket(retain)
    rows = expert_tables.interpolated(curve.counts[low]["by_expert"], curve.counts[high]["by_expert"], share)
    settings = [
        {"p": p, "layers": [found.to_dict() for found in expert_tables.by_layer(counts["by_expert"], experts)]}
        for p, counts in zip(curve.p, curve.counts, strict=True)
    ]
    summary = [found.to_dict() for found in expert_tables.by_layer(rows, experts)]
    return {"per_layer": experts, "rows": rows, "layers": summary, "by_p": settings}


def _allocations(
    probe: StoredProbe,
    base: SparsityConfig,
    alone: Sequence[LossCurve],
    uniform: LossCurve,
    retain: float,
    strength: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Critical sparsity when the same mean p is spread unevenly, and what that adds to the uniform rule."""
    # A layer that tolerates much alone gets a low p: the score is what it does not tolerate.
    measured = [1 - curve.critical(retain)[0] for curve in alone]
    scores: dict[str, list[float]] = {"sensitivity": measured}
    if not probe.lm.config.experts:
        weights = weight_scores(probe.lm)
        scores = {"weights": weights.tolist(), "weights_reversed": (-weights).tolist(), **scores}
    reference, found = uniform.critical(retain)[0], {}
    for name, values in scores.items():
        say(f"p allocated by {name.replace('_', ' ')}")
        curve = allocated_curve(probe, replace(base), values, retain, strength)
        result = curve.to_dict(retain)
        found[name] = {"scores": values, "added": result["critical"] - reference, **result}
    return found


def layer_rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per layer; what was not measured is None."""
    ranks = {(rank["layer"], rank["site"]): rank for rank in value["ranks"]}
    uniform = {(row["layer"], row["site"]): row["sparsity"] for row in value["uniform"]["by_layer"]}
    alone = {entry["layer"]: entry for entry in value["alone"]}
    layers = sorted({layer for layer, _ in [*ranks, *uniform]})
    rows = []
    for layer in layers:
        row: dict[str, Any] = {"layer": layer}
        for site in ("input", "gate", "up", "intermediate"):
            rank = ranks.get((layer, site))
            row[f"rank_{site}"] = None if rank is None else rank["rank"]
            row[f"normalised_rank_{site}"] = None if rank is None else rank["normalised"]
        for site in ("input", "gate", "up", "intermediate"):
            row[f"critical_{site}"] = uniform.get((layer, site))
        row["critical_alone"] = alone[layer]["critical"] if layer in alone else None
        row["alone_censored"] = alone[layer]["censored"] if layer in alone else None
        rows.append(row)
    return rows


def correlations(value: dict[str, Any]) -> dict[str, float]:
    """Rank correlations (Spearman) over layers of normalised effective rank with sparsity at the critical point."""
    from scipy import stats

    found, rows = {}, layer_rows(value)
    for site in ("input", "intermediate"):
        pairs = [(row[f"normalised_rank_{site}"], row[f"critical_{site}"]) for row in rows]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(known) > 3 and len({b for _, b in known}) > 1:
            found[site] = float(stats.spearmanr(*np.array(known).T).statistic)
    return found
