"""The documented shape of `report.json` of a drift report. Numbers are numbers; what could not be measured is null.

The schema's name ends in its version, which is raised whenever a field changes its meaning or goes away.
Steps are counted from 0. All similarities, densities and shares lie in [0, 1].
"""

from __future__ import annotations

from typing import Any, TypedDict

DRIFT_SCHEMA = "dllm-sparse/drift-report@1"

Numbers = list[float | None]


class SimilarityValues(TypedDict):
    """Jaccard similarity per step; `low` and `high` bound `micro` (95 %, bootstrap over prompts)."""

    micro: Numbers  # sum of intersections / sum of unions
    token_mean: Numbers  # mean of the tokens' own values
    chance: Numbers  # d / (2 - d): independent masks of the same density
    corrected: Numbers  # (micro - chance) / (1 - chance)
    low: Numbers
    high: Numbers


class Pooled(TypedDict):
    """One similarity pooled over all steps."""

    micro: float | None
    token_mean: float | None
    chance: float | None
    corrected: float | None
    low: float | None
    high: float | None


class Movement(TypedDict):
    """Relative L2 change of a site's values per token and step: per step, and over all steps."""

    median: Numbers
    p90: Numbers
    share_above: dict[str, Numbers]  # by tau
    overall: dict[str, float | None]  # median, p90, share_above_<tau>


class CurveValues(TypedDict):
    """One site, layer (null: all) and selection of tokens over the steps.

    `jaccard` compares with the step before, `drift` with the reference: step 0 for a diffusion model, the prompt's
    consensus mask for an autoregressive one. `half_life`: steps until the chance-corrected drift fell to 1/2.
    """

    site: str
    layer: int | None
    tokens: str  # response | masked | committed | decoded | prompt | all
    count: Numbers  # tokens per step, over all prompts
    density: Numbers
    density_overall: float | None
    jaccard: SimilarityValues
    jaccard_overall: Pooled
    drift: SimilarityValues
    half_life: float | None
    movement: Movement


class UnionValues(TypedDict):
    """Density of the union of the masks of `tokens` neighbours (null: the whole block or prompt)."""

    site: str
    layer: int | None
    tokens: int | None
    density: float
    low: float | None
    high: float | None
    independent: float | None  # were the tokens independent: 1 - (1 - d)^T


class Exploitable(TypedDict):
    """What a memory-bound forward of `tokens` tokens could gain at best: in its FFNs, and over all its weights."""

    tokens: int | None
    ffn_bytes: float  # share of the FFN's weight bytes that must be read
    ffn_bytes_saved: float  # the rest
    ffn_flops_saved: float  # the same: what is not read is not multiplied
    ffn_speedup: float | None  # null where nothing is left to read
    forward_speedup: float


class LagValues(TypedDict):
    """Similarity to the masks `delta` steps earlier, at the later `steps`."""

    site: str
    layer: int | None
    tokens: str
    delta: int
    steps: list[int]
    similarity: SimilarityValues


class CanvasToken(TypedDict):
    """A generated position: its text, the step that committed it, and per site its Jaccard to the step before."""

    text: str
    step: int
    similarity: dict[str, Numbers]


class Canvas(TypedDict):
    """One prompt and what was generated behind it."""

    prompt: str
    tokens: list[CanvasToken]


class StepFacts(TypedDict):
    """Where a step lies: block and step within it."""

    block: int
    index_in_block: int


class RuleVariant(TypedDict):
    """Everything measured under one mask rule. `scope` tells the variants of a report apart."""

    scope: str
    sparsity: dict[str, Any]  # SparsityConfig
    measured_sparsity: dict[str, float]  # per site, and their mean over all entries
    steps: list[StepFacts]
    curves: list[CurveValues]
    unions: list[UnionValues]
    exploitable: list[Exploitable]
    lags: list[LagValues]
    canvases: list[Canvas]


class ReuseValues(TypedDict):
    """One way of reusing work from step to step, against dense decoding. KL in nats per masked position."""

    variant: str
    refresh_every: int | None
    tau: float | None
    ffn_work: float
    selections: float | None
    kl: float
    kl_by_age: dict[str, float]
    token_agreement: float
    position_agreement: float | None
    tokens_equal: float
    exact_match: float


class DriftReport(TypedDict):
    """`report.json`."""

    schema: str
    question: str  # which question this report answers; it depends on the kind of model
    summary: list[str]
    model: dict[str, Any]
    config: dict[str, Any]
    prompts: list[str]
    complete: bool  # false when interrupted: what was finished by then is reported
    variants: list[RuleVariant]
    reuse: list[ReuseValues]
    versions: dict[str, str | None]
    git_revision: str | None
    date: str  # ISO 8601, UTC
    seconds: float
