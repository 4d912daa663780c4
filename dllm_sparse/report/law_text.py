"""The result of `laws` in lines and sentences."""

from __future__ import annotations

from typing import Any

from dllm_sparse.analysis.critical import finite


def law_row(run: dict[str, Any]) -> dict[str, Any]:
    """The kept form of a run in one line; `limit_low` and `limit_high` are the ends of the limit's 95 % profile."""
    best = run["forms"].get(run["best"]) if run["best"] else None
    row = {key: run[key] for key in ("run", "kind", "activation", "parameters", "width_depth", "points", "best")}
    limit = None if best is None else best["parameters"]["A0"]
    error = None if best is None else finite(best["standard_errors"]["A0"])
    interval = (None, None) if best is None or best["limit_interval"] is None else best["limit_interval"]
    row |= {"limit": limit, "limit_error": error, "limit_low": interval[0], "limit_high": interval[1]}
    for name in ("alpha", "b", "c"):
        row[name] = None if best is None else best["parameters"].get(name)
    for name in ("rms_residual", "akaike_weight", "runs_p_value", "trend_p_value", "rejected"):
        row[name] = None if best is None else best[name]
    reasons = None if best is None else "; ".join(best["open"])
    return {**row, "determined": reasons == "", "open": reasons, "problem": run["problem"]}


def sentences(value: dict[str, Any]) -> list[str]:
    """What came out, in words."""
    found = []
    for run in value["runs"]:
        row = law_row(run)
        if row["best"] is None:
            found.append(f"{row['run']}: not fitted ({row['problem']}).")
            continue
        found.append(_run_sentence(row))
    for test in value["scale"]:
        found.append(_scale_sentence(f"{test['kind']} {test['activation']}".strip() or "all runs", test))
    for fit in value["width_depth"]:
        proven = fit["knee_p_value"] is not None and fit["knee_p_value"] < 0.05
        name = f"{fit['kind']} {fit['activation']}".strip() or "all runs"
        bend = f"bends at {fit['bottleneck']:.0f}" if proven else "shows no proven bottleneck"
        found.append(
            f"Width over depth, {name}: the activation ratio changes by {1000 * fit['slope']:+.2f} per 1000 of "
            f"d / layers and {bend} ({fit['points']} shapes)."
        )
    if value["published"]:
        found += [_scale_sentence(f"published {form}", test) for form, test in value["published"]["scale"].items()]
    return found


def _run_sentence(row: dict[str, Any]) -> str:
    if row["rejected"]:
        return f"{row['run']}: the {row['best']} form fits better, but the lack-of-fit test refuses it; no law."
    if not row["determined"]:
        return f"{row['run']}: the {row['best']} form fits better, but does not fix its limit: {row['open']}."
    return (
        f"{row['run']}: the {row['best']} form (Akaike weight {row['akaike_weight']:.2f}) has its limit at an "
        f"activation ratio of {row['limit']:.3f} [{row['limit_low']:.3f}, {row['limit_high']:.3f}]."
    )


def _scale_sentence(name: str, test: dict[str, Any]) -> str:
    words = {True: "scale matters little", False: "scale matters", None: "these runs cannot tell"}
    return (
        f"Scale, {name}: a model ten times larger moves the limit by {100 * test['per_decade']:+.1f} points "
        f"[{100 * test['low']:+.1f}, {100 * test['high']:+.1f}]; within +-{100 * test['margin']:g} points: "
        f"{words[test['insensitive']]}."
    )
