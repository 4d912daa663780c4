"""What reuse across steps costs and saves, measured against dense decoding.

Two ways to save work from one step to the next: keep the masks of an earlier step (refresh every k steps), or keep the
whole FFN output of a token whose input has barely moved. Fidelity is measured on the dense trajectory and once more by
decoding freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dllm_sparse.analysis.probe import FidelityProbe, Variant
from dllm_sparse.analysis.tallies import TAUS
from dllm_sparse.analysis.token_reuse import TokenReuse
from dllm_sparse.generation import Generation, generate
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.gains import ffn_gain
from dllm_sparse.sparsity.sparsifier import Sparsifier, overriding
from dllm_sparse.types import Observers


@dataclass(frozen=True, slots=True)
class ReuseRow:
    """A line of the table. KL in nats per position; the rest are shares in [0, 1]. None where undefined."""

    variant: str
    refresh_every: int | None
    tau: float | None
    ffn_work: float  # of the dense FFN's multiply-adds
    selections: float | None  # of the steps that choose masks anew
    kl: float
    kl_by_age: dict[int, float]
    token_agreement: float
    position_agreement: float | None
    tokens_equal: float
    exact_match: float


def measure_reuse(
    lm: LanguageModel,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    sampler: SamplerConfig,
    sparsity: SparsityConfig,
    refresh: Sequence[int] = (1, 2, 4, 8),
    taus: Sequence[float] = TAUS,
    observers: Observers = (),
) -> list[ReuseRow]:
    """Runs every variant over batches of (ids [B, P], mask [B, P] or None) and compares it with dense decoding.

    The comparison runs without cache and guidance, whatever the sampler says, so that reuse is the only approximation.
    An autoregressive model has no token to reuse (every position is new): only masks are measured there.
    """
    sampler = replace(sampler, cache="none", cfg_scale=0.0)
    variants = _variants(lm, sparsity, refresh, taus if lm.kind == "diffusion" else ())
    probe = FidelityProbe(lm, variants)
    equal = {variant.name: [0, 0, 0, 0] for variant in variants}  # tokens, equal tokens, rows, equal rows
    for ids, mask in batches:
        dense = generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, observers=(probe, *observers))
        for variant in variants:
            free = _decode_freely(lm, ids, mask, sampler, variant)
            _add_equal(equal[variant.name], dense, free)
    return [_row(variant, lm, equal[variant.name]) for variant in variants]


def _variants(
    lm: LanguageModel, sparsity: SparsityConfig, refresh: Sequence[int], taus: Sequence[float]
) -> list[Variant]:
    configs = [replace(sparsity, refresh_every=k) for k in refresh]
    masks = [Variant(f"masks every {c.refresh_every} steps", Sparsifier(lm, c), c) for c in configs]
    return masks + [Variant(f"FFN outputs, tau {tau:g}", TokenReuse(tau)) for tau in taus]


def _decode_freely(
    lm: LanguageModel, ids: Tensor, mask: Tensor | None, sampler: SamplerConfig, variant: Variant
) -> Generation:
    if variant.sparsity is not None:
        return generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, sparsity=variant.sparsity)
    assert variant.tau is not None
    fresh = TokenReuse(variant.tau)
    with overriding(lm, fresh):
        return generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, observers=(fresh,))


def _add_equal(counts: list[int], dense: Generation, free: Generation) -> None:
    width = min(dense.ids.shape[1], free.ids.shape[1])
    same = dense.ids[:, dense.prompt_length : width] == free.ids[:, dense.prompt_length : width]
    whole = same.all(-1) & (dense.ids.shape[1] == free.ids.shape[1])
    for place, value in enumerate((same.numel(), int(same.sum()), len(whole), int(whole.sum()))):
        counts[place] += value


def _row(variant: Variant, lm: LanguageModel, equal: list[int]) -> ReuseRow:
    fidelity, override = variant.fidelity, variant.override
    every = variant.sparsity.refresh_every if variant.sparsity else None
    if isinstance(override, TokenReuse):
        work = override.work()
    else:
        work = 1 - ffn_gain({name: override.sparsity[name] for name in override.config.site_names})["ffn_flops_saved"]
    return ReuseRow(
        variant=variant.name,
        refresh_every=every,
        tau=variant.tau,
        ffn_work=work,
        selections=1 / every if every else None,
        kl=fidelity.divergence / max(fidelity.positions, 1),
        kl_by_age={age: total / count for age, (total, count) in sorted(fidelity.by_age.items())},
        token_agreement=fidelity.same_token / max(fidelity.committed, 1),
        position_agreement=fidelity.same_position / max(fidelity.committed, 1) if lm.kind == "diffusion" else None,
        tokens_equal=equal[1] / max(equal[0], 1),
        exact_match=equal[3] / max(equal[2], 1),
    )
