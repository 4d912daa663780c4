"""Perplexity against sparsity for the rules of both papers, and the sparsity each affords at a given loss of quality.

Rules: CETT (static weight-aware thresholds per layer), top-p per token, top-k per token, FAT-eps (one threshold on |s|
for the whole model) and the exact zeros of the activation; s = act(W_g x). Sources: Sparsing Law (arXiv 2411.02335),
sec. 4; arXiv 2509.00454 for top-p.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dllm_sparse.analysis.cett_ppl import Calibration, cett_config
from dllm_sparse.analysis.heldout import HeldOut, evaluate
from dllm_sparse.analysis.values import SiteValues, real_tokens
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.sparsifier import overriding
from dllm_sparse.types import Site, SiteName, StepContext

RuleName = Literal["cett", "top_p", "top_k", "top_k_gate", "fat_eps", "zero"]
CETTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
KEPT_MASS = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
KEPT_SHARE = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_SAMPLE = 1 << 16  # gate values per layer the FAT-eps grid is made of


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One setting: sparsity = share of inactive (token, neuron) pairs, ratio = perplexity / dense perplexity."""

    rule: RuleName
    site: SiteName
    knob: float
    sparsity: float
    loss: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def pareto(
    lm: LanguageModel,
    data: HeldOut,
    calibration: Calibration | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[ParetoPoint]:
    """Every rule over its grid, on one model and one held-out text."""
    calibration = calibration or Calibration(lm, data)
    dense = evaluate(lm, data).loss
    points = []
    for rule, knob, config in settings(lm, data, calibration):
        report(f"{rule} {knob:g}")
        found = evaluate(lm, data, config)
        assert found.counts is not None
        sparsity = found.counts.summary()["mean"]
        ratio = float(np.exp(found.loss - dense))
        points.append(ParetoPoint(rule, config.site_names[0], knob, sparsity, found.loss, ratio))
    return points


def settings(
    lm: LanguageModel, data: HeldOut, calibration: Calibration
) -> list[tuple[RuleName, float, SparsityConfig]]:
    """(rule, knob, configuration) of every point; where there is no gate its rules act on the intermediate."""
    gate = "gate" if has_gate(lm) else "intermediate"
    found: list[tuple[RuleName, float, SparsityConfig]] = [
        ("cett", cett, cett_config(calibration.thresholds(cett))) for cett in CETTS
    ]
    found += [("top_p", p, SparsityConfig(p=p, sites="intermediate")) for p in KEPT_MASS]
    for rule, site in (("top_k", "intermediate"), ("top_k_gate", gate)):
        found += [(rule, k, SparsityConfig(rule="top_k", p=k, sites=site)) for k in KEPT_SHARE]  # type: ignore[arg-type, misc]
    for eps in gate_quantiles(lm, data, gate, [1 - share for share in KEPT_SHARE]):
        found.append(("fat_eps", eps, SparsityConfig(rule="threshold", p=eps, sites=gate)))  # type: ignore[arg-type]
    found.append(("zero", 0.0, SparsityConfig(rule="threshold", p=0.0, sites=gate)))  # type: ignore[arg-type]
    return found


def has_gate(lm: LanguageModel) -> bool:
    """Whether the model's FFNs have a gate to look at; those of the native engine always do."""
    layout = getattr(lm.transformer.ffns[0], "layout", None)
    return layout is None or "gate" in layout.sites


def gate_quantiles(lm: LanguageModel, data: HeldOut, site: str, shares: Sequence[float]) -> list[float]:
    """Thresholds below which these shares of all |s| lie, over all layers, from a sample of one dense forward."""
    seen: list[Tensor] = []

    def collect(where: Site, values: Tensor, context: StepContext) -> None:
        if where.name == site:
            flat = real_tokens(values, context).abs().float().flatten()
            seen.append(flat[:: max(flat.numel() // _SAMPLE, 1)].cpu())

    with overriding(lm, SiteValues(collect)):
        evaluate(lm, data[:8])
    return sorted({float(value) for value in np.quantile(torch.cat(seen).numpy(), shares) if value > 0})


def affordable(points: Sequence[ParetoPoint], increase: float) -> dict[str, float | None]:
    """Per rule the sparsity at which perplexity has risen by `increase`, linearly between two points; None if unknown.

    The curve starts at the dense model, or at the exact zeros, which cost nothing.
    """
    start = max((point.sparsity for point in points if point.rule == "zero"), default=0.0)
    found: dict[str, float | None] = {}
    for rule in dict.fromkeys(point.rule for point in points):
        if rule == "zero":
            found[rule] = start
            continue
        curve = [(start, 1.0), *sorted((p.sparsity, p.ratio) for p in points if p.rule == rule and p.sparsity > start)]
        found[rule] = next(
            (
                s0 + (s1 - s0) * (1 + increase - r0) / (r1 - r0)
                for (s0, r0), (s1, r1) in itertools.pairwise(curve)
                if r0 <= 1 + increase < r1
            ),
            None,
        )
    return found
