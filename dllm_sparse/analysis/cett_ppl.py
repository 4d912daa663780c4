"""CETT-PPL-p%: the loosest CETT that raises perplexity by less than p %, and the static thresholds it means per layer.

Source: Sparsing Law (arXiv 2411.02335), alg. 1 and app. F. For a diffusion model the masked cross-entropy takes the
place of the loss. Shapes: T tokens, D width, F FFN width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_sparse.analysis.cett import relative_error
from dllm_sparse.analysis.exploitable import UnionCounter, shares
from dllm_sparse.analysis.heldout import HeldOut, evaluate
from dllm_sparse.analysis.values import SiteValues, real_tokens
from dllm_sparse.models.feed_forward import TappedFFN
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.gains import FFNGain, ffn_gain
from dllm_sparse.sparsity.sparsifier import overriding
from dllm_sparse.types import Site, StepContext, UsageError

CANDIDATES = 65536
"""Thresholds the published search distinguishes, between the smallest norm and the 0.99 quantile of a sample."""


_CALIBRATION_TOKENS = 2048


class Calibration:
    """Dense intermediate values of every layer on some text, from which thresholds for any CETT follow."""

    def __init__(self, lm: LanguageModel, data: HeldOut) -> None:
        if lm.config.experts:
            raise UsageError("CETT is defined for dense FFNs; for experts use top-p (`dllm-sparse layers`)")
        self.ffns: dict[int, TappedFFN] = {ffn.layer: ffn for ffn in lm.transformer.ffns}
        self.values: dict[int, Tensor] = {}
        rows = max(_CALIBRATION_TOKENS // data.ids.shape[1], 1)
        with overriding(lm, SiteValues(self._collect)):
            evaluate(lm, data[:rows])
        self.norms = {layer: ffn.column_norms("intermediate") for layer, ffn in self.ffns.items()}
        self.outputs = {layer: self.ffns[layer].down(v).norm(dim=-1) for layer, v in self.values.items()}

    def _collect(self, site: Site, values: Tensor, context: StepContext) -> None:
        if site.name == "intermediate":
            fresh = real_tokens(values, context).float()
            old = self.values.get(site.layer)
            self.values[site.layer] = fresh if old is None else torch.cat((old, fresh))

    @torch.inference_mode()
    def thresholds(self, cett: float) -> tuple[float, ...]:
        """Per layer the largest neuron norm ||n_i|| that may be dropped (the published search)."""
        return tuple(self._threshold(layer, cett) for layer in sorted(self.values))

    def _threshold(self, layer: int, cett: float) -> float:
        """Bisection over evenly spaced candidates for the largest whose mean relative error is within the target."""
        values = self.values[layer]
        norms = values.abs() * self.norms[layer]
        sample = norms.flatten()[:: max(norms.numel() // CANDIDATES, 1)]
        # numpy in fp64: torch.quantile takes 16M values at most.
        low, high = float(norms.min()), float(np.quantile(sample.double().cpu().numpy(), 0.99))
        candidates = np.linspace(low, high, CANDIDATES)
        fits, fails = -1, CANDIDATES
        while fails - fits > 1:
            middle = (fits + fails) // 2
            dropped = self.ffns[layer].down(values * (norms <= float(candidates[middle])))
            within = float(relative_error(dropped.norm(dim=-1), self.outputs[layer])) <= cett
            fits, fails = (middle, fails) if within else (fits, middle)
        return float(candidates[fits]) if fits >= 0 else 0.0


@dataclass(frozen=True, slots=True)
class CettPpl:
    """The search's result: CETT, and of every model its dense loss and the ratio of perplexities at that CETT."""

    cett: float
    increase: float
    dense: tuple[float, ...]
    ratios: tuple[float, ...]
    evaluations: int


@dataclass(frozen=True, slots=True)
class CettPoint:
    """One model at one CETT. `activation` is 1 - sparsity over all (token, neuron) pairs; losses in nats a token.

    `exploitable`: what the FFN gains at best where so many neighbouring tokens share a pass, by their number.
    """

    cett: float
    thresholds: tuple[float, ...]
    sparsity: float
    by_layer: tuple[float, ...]
    loss: float
    dense: float
    exploitable: dict[str, FFNGain]

    @property
    def activation(self) -> float:
        """Share of neurons that stay active."""
        return 1 - self.sparsity

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        ratio = float(np.exp(self.loss - self.dense))
        names = ("cett", "sparsity", "by_layer", "loss", "dense", "thresholds", "activation", "exploitable")
        return {**{name: getattr(self, name) for name in names}, "perplexity_ratio": ratio}


def cett_config(thresholds: Sequence[float]) -> SparsityConfig:
    """Neurons with ||n_i|| at or below their layer's threshold are dropped, for every token alike."""
    above = tuple(float(np.nextafter(np.float32(t), np.float32(np.inf))) if t > 0 else 0.0 for t in thresholds)
    return SparsityConfig(rule="threshold", p=0.0, sites="intermediate", score="weighted", layer_p=above)


def cett_ppl(
    models: Sequence[tuple[LanguageModel, HeldOut]],
    increase: float = 0.01,
    tolerance: float = 1e-3,
    calibrations: Sequence[Calibration] | None = None,
) -> CettPpl:
    """Algorithm 1: bisection on the CETT that all models share until the mean perplexity ratio meets 1 + `increase`.

    `models`: the last checkpoints of one run, each with its held-out text (the paper uses five), or one model.
    """
    if not 0 < increase < 10:
        raise UsageError(f"the allowed increase of perplexity is {increase}; give a share such as 0.01")
    if not models:
        raise UsageError("no model to search a CETT for")
    known = calibrations or [Calibration(lm, data) for lm, data in models]
    dense = tuple(evaluate(lm, data).loss for lm, data in models)
    low, high, count = 0.0, 1.0, 0

    def ratios(cett: float) -> tuple[float, ...]:
        found = (
            evaluate(lm, data, cett_config(calibration.thresholds(cett))).loss
            for (lm, data), calibration in zip(models, known, strict=True)
        )
        return tuple(float(np.exp(loss - base)) for loss, base in zip(found, dense, strict=True))

    while high - low > tolerance:
        middle = (low + high) / 2
        count += 1
        if float(np.mean(ratios(middle))) < 1 + increase:
            low = middle
        else:
            high = middle
    cett = (low + high) / 2
    return CettPpl(cett, increase, dense, ratios(cett), count)


def cett_point(
    lm: LanguageModel, data: HeldOut, cett: float, calibration: Calibration | None = None, dense: float | None = None
) -> CettPoint:
    """Thresholds, measured sparsity and loss of one model at a given CETT."""
    calibration = calibration or Calibration(lm, data)
    thresholds = calibration.thresholds(cett)
    unions = UnionCounter()
    point = evaluate(lm, data, cett_config(thresholds), (unions,))
    assert point.counts is not None
    rows, sparsity = point.counts.to_dict()["by_layer"], point.counts.summary()["intermediate"]
    skippable = {"1": {"intermediate": sparsity}, **shares(unions.totals())}
    return CettPoint(
        cett,
        thresholds,
        sparsity,
        tuple(row["sparsity"] for row in rows),
        point.loss,
        evaluate(lm, data).loss if dense is None else dense,
        {tokens: ffn_gain(sites) for tokens, sites in skippable.items()},
    )
