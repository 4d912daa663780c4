"""Layer by layer: effective rank of every site, what one layer alone tolerates, and how a budget may be spread.

All scores are held-out perplexities: a setting passes while dense perplexity / its perplexity >= retain.
Sources: arXiv 2509.00454 (effective rank, single-layer runs; its uniform p is called a lower bound there).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_sparse.analysis.critical import first_crossing
from dllm_sparse.analysis.heldout import HeldOut, LossProbe, evaluate
from dllm_sparse.analysis.rank import StreamingRank, batch_rank
from dllm_sparse.analysis.search import Evaluated, next_p
from dllm_sparse.analysis.values import SiteValues, real_tokens
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.sparsity.config import IDENTITY, SparsityConfig
from dllm_sparse.sparsity.sparsifier import overriding
from dllm_sparse.types import Site, StepContext, UsageError

Report = Callable[[str], None]
_RANK_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True)
class SiteRank:
    """Effective rank of a site's dense activations over `tokens` tokens of `width` features; normalised by the width.

    `published` is the mean over batches of the batch's own rank, as the paper's code has it (None: not asked for).
    """

    layer: int
    site: str
    width: int
    tokens: int
    rank: float
    published: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        shown = None if self.published is None else self.published / self.width
        return {
            **{name: getattr(self, name) for name in ("layer", "site", "width", "tokens", "rank", "published")},
            "normalised": self.rank / self.width,
            "published_normalised": shown,
        }


def site_ranks(
    lm: LanguageModel, data: HeldOut, *, published: bool = False, memory: int = _RANK_MEMORY
) -> list[SiteRank]:
    """Ranks of all four sites of every layer from dense passes; experts have none of their own.

    One fp64 matrix [width, width] is held per site and layer, for as many layers at a time as fit `memory` bytes.
    """
    found: list[SiteRank] = []
    for layers in _layer_groups(lm, memory):
        found += _ranks_of(lm, data, layers, published=published)
    return found


def rank_windows(lm: LanguageModel, length: int) -> int:
    """Windows that give every site four times as many tokens as features, so that tokens do not bound the rank."""
    return math.ceil(4 * max(lm.config.width, lm.config.ffn_width) / length)


def _layer_groups(lm: LanguageModel, memory: int) -> list[range]:
    each = 8 * (lm.config.width**2 + 3 * lm.config.ffn_width**2)
    size = max(memory // each, 1)
    return [range(start, min(start + size, lm.config.layers)) for start in range(0, lm.config.layers, size)]


def _ranks_of(lm: LanguageModel, data: HeldOut, layers: range, *, published: bool) -> list[SiteRank]:
    """The ranks of some layers from one dense pass."""
    streams: dict[Site, StreamingRank] = {}
    batches: dict[Site, list[float]] = {}

    def collect(site: Site, values: Tensor, context: StepContext) -> None:
        if site.expert >= 0 or site.layer not in layers:
            return
        rows = real_tokens(values, context)
        streams.setdefault(site, StreamingRank(rows.shape[-1], rows.device)).add(rows)
        if published:
            batches.setdefault(site, []).append(batch_rank(rows))

    with overriding(lm, SiteValues(collect)):
        evaluate(lm, data)
    return [
        SiteRank(
            site.layer,
            site.name,
            stream.gram.shape[0],
            stream.tokens,
            stream.value(),
            float(np.mean(batches[site])) if published else None,
        )
        for site, stream in sorted(streams.items())
    ]


@dataclass(slots=True)
class LossCurve:
    """Settings tried at one place, dense first: knob, sparsity, share of the dense score kept, and what was counted."""

    p: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, p: float, point: dict[str, Any], dense: float) -> None:
        """Adds a measured point of a probe."""
        self.p.append(p)
        self.sparsity.append(point["sparsity"]["mean"])
        self.kept.append(float(np.exp(dense - point["loss"])))
        self.counts.append(point)

    def critical(self, retain: float) -> tuple[float, bool]:
        """Interpolated critical sparsity, and whether anything fell below the line (else it is a lower bound)."""
        order = np.argsort(self.sparsity, kind="stable")
        value, crossed = first_crossing(np.array(self.sparsity)[order], np.array(self.kept)[order], retain)
        return float(value), bool(crossed)

    def bracket(self, retain: float) -> tuple[int, int, float]:
        """The two points around the crossing, and how far between them it lies (0 to 1)."""
        order = [int(place) for place in np.argsort(self.sparsity, kind="stable")]
        for before, after in itertools.pairwise(order):
            if self.kept[after] < retain:
                share = (self.kept[before] - retain) / (self.kept[before] - self.kept[after])
                return before, after, min(max(share, 0.0), 1.0)
        return order[-1], order[-1], 0.0

    def to_dict(self, retain: float) -> dict[str, Any]:
        """JSON-ready, without the counts."""
        value, crossed = self.critical(retain)
        return {"critical": value, "censored": not crossed, "p": self.p, "sparsity": self.sparsity, "kept": self.kept}


def loss_curve(
    probe: LossProbe,
    base: SparsityConfig,
    retain: float = 0.99,
    evaluations: int = 7,
    vary: Callable[[float], SparsityConfig] | None = None,
    tolerance: float = 0.01,
) -> LossCurve:
    """Searches the crossing of a setting's knob by its held-out loss, to +-`tolerance` of sparsity where possible.

    `vary` turns a knob into a configuration; by default it replaces `base.p`.
    """
    vary = vary or (lambda p: replace(base, p=p, layer_p=None))
    curve = LossCurve()
    knob: float | None = IDENTITY[base.rule]
    for _ in range(evaluations):
        assert knob is not None
        curve.add(knob, probe(vary(knob)), probe.dense)
        points = [Evaluated(*values) for values in zip(curve.p, curve.sparsity, curve.kept, strict=True)]
        knob = next_p(base.rule, points, retain, tolerance)
        if knob is None:
            break
    return curve


def layer_sensitivity(
    probe: LossProbe, base: SparsityConfig, retain: float = 0.99, report: Report = lambda _: None
) -> list[LossCurve]:
    """The curve of every layer when it alone is sparsified."""
    curves = []
    for layer in range(probe.lm.config.layers):
        report(f"layer {layer} alone")
        curves.append(loss_curve(probe, replace(base, layers=(layer,)), retain, tolerance=0.02))
    return curves


def weight_scores(lm: LanguageModel) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Per layer how evenly its neurons' output norms are spread, [layers] in [0, 1]; data-free.

    The effective number of neurons exp(entropy of ||W_out,i|| / sum) over their number: an even layer has no neurons
    that matter less, so it should keep more.
    """
    scores = []
    for ffn in lm.transformer.ffns:
        if getattr(ffn, "experts", 0):
            raise UsageError("the data-free allocation is defined for dense FFNs")
        norms = ffn.column_norms("intermediate").double()
        share = norms / norms.sum()
        scores.append(float(torch.special.entr(share).sum().exp() / len(share)))
    return np.array(scores)


def allocate(scores: Sequence[float], total: float, strength: float = 0.5) -> tuple[float, ...]:
    """A knob per layer with mean `total`, higher where the score is higher; pure.

    Standardised scores move each layer by up to `strength` of the room that `total` has to the nearer end of [0, 1];
    so every knob stays inside, and equal scores give the uniform rule.
    """
    if not 0 <= total <= 1:
        raise UsageError(f"the mean knob is {total}; allowed: 0 to 1")
    values = np.asarray(scores, dtype=np.float64)
    centred = values - values.mean()
    peak = np.abs(centred).max()
    if peak < 1e-12:
        return (total,) * len(values)
    return tuple((total + strength * min(total, 1 - total) * centred / peak).tolist())


def allocated_curve(
    probe: LossProbe, base: SparsityConfig, scores: Sequence[float], retain: float = 0.99, strength: float = 0.5
) -> LossCurve:
    """The search over the mean knob of an allocation; compare its critical sparsity with the uniform rule's."""

    def vary(total: float) -> SparsityConfig:
        return replace(base, p=total, layer_p=allocate(scores, total, strength))

    return loss_curve(probe, base, retain, vary=vary)
