"""Statistics as plain values of the report's schema: arrays become lists, NaN becomes null."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from dllm_sparse.analysis.drift import Curve, Lag, Similarity, Statistics, Union, ratio
from dllm_sparse.analysis.masks import Floats
from dllm_sparse.analysis.recorded_batches import Recording
from dllm_sparse.analysis.recording import Prompts
from dllm_sparse.analysis.reuse import ReuseRow
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.report.schema import (
    Canvas,
    CurveValues,
    Exploitable,
    LagValues,
    Numbers,
    Pooled,
    ReuseValues,
    RuleVariant,
    SimilarityValues,
    UnionValues,
)
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.gains import ffn_gain, weights_saved
from dllm_sparse.types import ROUTED

CANVASES = 4
"""Canvases kept in a report; every prompt counts in the statistics."""

_DIGITS = 4


def variant_values(lm: LanguageModel, sparsity: SparsityConfig, recording: Recording, prompts: Prompts) -> RuleVariant:
    """Everything measured under one rule."""
    statistics = Statistics(recording.counts)
    groups = statistics.token_groups()
    unions = [union for name, layer in statistics.selections() for union in statistics.unions(name, layer)]
    return {
        "scope": sparsity.scope,
        "sparsity": sparsity.to_dict(),
        "measured_sparsity": _measured(statistics, lm.config),
        "steps": [{"block": block, "index_in_block": index} for block, index in recording.counts.blocks],
        "curves": [
            _curve(statistics.curve(name, layer, tokens))
            for name, layer in statistics.selections()
            for tokens in groups
        ],
        "unions": [_union(union) for union in unions],
        "exploitable": _exploitable([union for union in unions if union.layer is None], lm.config),
        "lags": _lags(statistics, groups),
        "canvases": _canvases(lm, recording, prompts),
    }


def reuse_values(row: ReuseRow) -> ReuseValues:
    """One line of the reuse table."""
    values = asdict(row) | {"kl_by_age": {str(age): kl for age, kl in row.kl_by_age.items()}}
    return values  # type: ignore[return-value]


def _measured(statistics: Statistics, config: TransformerConfig) -> dict[str, float]:
    """Sparsity per site and, pooled over all entries, their mean; padding and unconditional rows left out.

    Entries are what a token's FFN computed: of a mixture, the channels of the experts it was sent to.
    """
    counts, found, all_kept, all_entries = statistics.counts, {}, 0.0, 0.0
    routed = config.moe.experts_per_token / config.moe.experts if config.moe is not None else 1.0
    for name in counts.site_names:
        here = {site: tally for site, tally in counts.sites.items() if site.name == name}
        curve = statistics.curve(name, None, "all")
        tokens = float(curve.count.sum())
        kept = curve.density_overall * tokens * sum(tally.width for tally in here.values())
        entries = tokens * sum(t.width * (routed if site.expert == ROUTED else 1) for site, t in here.items())
        found[name] = 1 - kept / entries
        all_kept, all_entries = all_kept + kept, all_entries + entries
    return found | {"mean": 1 - all_kept / all_entries}


def _curve(curve: Curve) -> CurveValues:
    return {
        "site": curve.site,
        "layer": curve.layer,
        "tokens": curve.tokens,
        "count": numbers(curve.count),
        "density": numbers(curve.density),
        "density_overall": number(curve.density_overall),
        "jaccard": _similarity(curve.jaccard),
        "jaccard_overall": _pooled(curve.jaccard_overall),
        "drift": _similarity(curve.drift),
        "half_life": number(curve.half_life),
        "movement": {
            "median": numbers(curve.moved_median),
            "p90": numbers(curve.moved_p90),
            "share_above": {f"{tau:g}": numbers(share) for tau, share in curve.moved_share.items()},
            "overall": {name: number(value) for name, value in curve.moved_overall.items()},
        },
    }


def _similarity(found: Similarity) -> SimilarityValues:
    return {
        "micro": numbers(found.micro),
        "token_mean": numbers(found.token_mean),
        "chance": numbers(found.chance),
        "corrected": numbers(found.corrected),
        "low": numbers(found.low),
        "high": numbers(found.high),
    }


def _pooled(found: Similarity) -> Pooled:
    values = {name: value[0] for name, value in _similarity(found).items()}  # type: ignore[index]
    return values  # type: ignore[return-value]


def _union(union: Union) -> UnionValues:
    return {
        "site": union.site,
        "layer": union.layer,
        "tokens": union.tokens,
        "density": round(union.density, _DIGITS),
        "low": number(union.low),
        "high": number(union.high),
        "independent": number(union.independent),
    }


def _exploitable(unions: Sequence[Union], config: TransformerConfig) -> list[Exploitable]:
    """Best possible speed-ups at each T, all layers pooled. A forward also reads attention, norms and the head."""
    # A lookup reads one row of an untied embedding per token; a tied one is read whole, as the head.
    forward = config.parameters - (0 if config.tied else config.vocab_size * config.width)
    found: list[Exploitable] = []
    for tokens in dict.fromkeys(union.tokens for union in unions):
        skippable: dict[str, float] = {union.site: 1 - union.density for union in unions if union.tokens == tokens}
        gain, saved = ffn_gain(skippable), weights_saved(config, skippable)
        found.append(
            {
                "tokens": tokens,
                "ffn_bytes": round(1 - gain["ffn_bytes_saved"], _DIGITS),
                "ffn_bytes_saved": round(gain["ffn_bytes_saved"], _DIGITS),
                "ffn_flops_saved": round(gain["ffn_flops_saved"], _DIGITS),
                "ffn_speedup": number(gain["ffn_speedup_bound"]),
                "forward_speedup": round(forward / (forward - saved), _DIGITS),
            }
        )
    return found


def _lags(statistics: Statistics, groups: Sequence[str]) -> list[LagValues]:
    found = (
        _lag(lag)
        for name, layer in statistics.selections()
        for tokens in groups
        for lag in statistics.lags(name, layer, tokens)
    )
    return [lag for lag in found if lag["steps"]]


def _lag(lag: Lag) -> LagValues:
    """Only the steps that had a snapshot to be compared with."""
    values = _similarity(lag.similarity)
    steps = [step for step, value in enumerate(values["micro"]) if value is not None]
    kept = {name: [line[step] for step in steps] for name, line in values.items()}  # type: ignore[index]
    return {
        "site": lag.site,
        "layer": lag.layer,
        "tokens": lag.tokens,
        "delta": lag.delta,
        "steps": steps,
        "similarity": kept,  # type: ignore[typeddict-item]
    }


def _canvases(lm: LanguageModel, recording: Recording, prompts: Prompts) -> list[Canvas]:
    """The first prompts' canvases. A position's similarity at a step pools all layers of the site."""
    found: list[Canvas] = []
    for row, ids in enumerate(recording.ids[:CANVASES]):
        similar = {
            name: [numbers(line) for line in _position_similarity(canvas[row].double().numpy())]
            for name, canvas in recording.counts.canvas.items()
        }
        tokens = [
            {
                "text": token_text(lm, id),
                "step": recording.commit_steps[row][place],
                "similarity": {name: lines[place] for name, lines in similar.items()},
            }
            for place, id in enumerate(ids)
        ]
        found.append({"prompt": prompt_text(lm, prompts[row]), "tokens": tokens})  # type: ignore[typeddict-item]
    return found


def _position_similarity(canvas: Floats) -> Floats:
    """[S, G, 2] intersections and unions -> Jaccard [G, S], rounded to what a picture shows."""
    return ratio(canvas[..., 0], canvas[..., 1]).T.round(3)


def prompt_text(lm: LanguageModel, prompt: str | Sequence[int]) -> str:
    """A prompt as text, also where it was given as token ids."""
    return prompt if isinstance(prompt, str) else " ".join(token_text(lm, int(id)) for id in prompt)


def token_text(lm: LanguageModel, id: int) -> str:
    """A token as text; its number where the model has no tokenizer."""
    return str(id) if lm.tokenizer is None else str(lm.tokenizer.decode([id]))


def number(value: float | None) -> float | None:
    """A rounded number, None for NaN."""
    return None if value is None or not math.isfinite(value) else round(float(value), _DIGITS)


def numbers(values: Floats) -> Numbers:
    """Rounded numbers, None for NaN."""
    return [number(value) for value in values.tolist()]
