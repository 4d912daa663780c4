"""The published comparison's settings for diffusion models, one confound at a time and all together.

arXiv 2509.00454's released LLaDA code differs from its autoregressive code in three ways: one mask over a whole
sequence, a gate projection whose input stays dense, and an unweighted mean over hooks and calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dllm_sparse.analysis.critical import Critical, finite
from dllm_sparse.evaluation.critical import SiteCurves, SweepPlan, site_curves
from dllm_sparse.evaluation.sweep import Sweep
from dllm_sparse.sparsity.config import SparsityConfig


def published_settings(config: SparsityConfig) -> dict[str, SparsityConfig]:
    """Named settings besides the corrected one; a dense gate input means something only where the input is masked."""
    if "input" not in config.site_names:
        return {"as published": replace(config, scope="sequence")}
    return {
        "sequence scope": replace(config, scope="sequence"),
        "gate input dense": replace(config, gate_input="dense"),
        "as published": replace(config, scope="sequence", gate_input="dense"),
    }


def as_published(
    sweep: Sweep, settings: Mapping[str, SparsityConfig], plan: SweepPlan, corrected: SiteCurves
) -> dict[str, dict[str, Any]]:
    """Critical sparsity of every setting under both averages, and how far each is from the corrected one.

    The last entry, `as published`, is read under the hook mean, as published; the corrected one under elements.
    """
    reference = _both(corrected, plan)
    found = {
        "corrected": _entry(reference, reference, "element"),
        "hook mean": _entry(reference, reference, "hook_mean"),
    }
    for name, config in settings.items():
        measured = _both(site_curves(sweep, config, plan), plan)
        found[name] = _entry(measured, reference, "hook_mean" if name == "as published" else "element")
    return found


def _both(curves: SiteCurves, plan: SweepPlan) -> dict[str, Critical]:
    main = curves.main()
    return {
        "element": main.critical("element", plan.retain)[0],
        "hook_mean": main.critical("hook_mean", plan.retain)[0],
    }


def _entry(measured: Mapping[str, Critical], reference: Mapping[str, Critical], average: str) -> dict[str, Any]:
    crossing = measured[average].crossing
    return {
        "average": average,
        "crossing": finite(crossing.value),
        "low": crossing.low,
        "high": crossing.high,
        "grid_max": finite(measured[average].grid_max.value),
        "censored": measured[average].censored,
        "confound": finite(crossing.value - reference["element"].crossing.value),
    }
