"""How likelihoods are estimated: one frozen, validated description for both kinds of model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dllm_sparse.fields import check_fields
from dllm_sparse.types import UsageError

Estimator = Literal["monte_carlo", "distinct", "pseudo"]


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """Likelihood options of diffusion models (LLaDA's names); an autoregressive model is exact and uses none but seed.

    `monte_carlo`: the official stratified bound from `mc_num` masked copies, drawn in groups of `mc_batch` (None: one
    group, the best stratification; LLaDA's scripts use 8). `distinct`: the same bound from as many copies without
    repeats, hence with less noise and, for short targets, none. `pseudo`: exact sum of the conditionals with one target
    position masked at a time, L forwards of one row; another quantity, for ranking. A target of one token is exact
    under all. `cfg_scale` guides against a copy whose prompt is masked. `check_greedy` decides is_greedy of targets
    longer than a token, at the cost of one forward a token. `max_length` bounds the context; `batch_tokens` bounds one
    forward (None: by device and vocabulary) and decides no result.
    """

    mc_num: int = 128
    mc_batch: int | None = None
    cfg_scale: float = 0.0
    estimator: Estimator = "monte_carlo"
    check_greedy: bool = True
    seed: int = 0
    max_length: int | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mc_num < 1 or self.group < 1 or self.mc_num % self.group:
            raise UsageError(
                f"mc_num {self.mc_num} is not a multiple of mc_batch {self.group}; try mc_num {max(self.group, 1) * 8}"
            )
        if self.cfg_scale < 0:
            raise UsageError(f"cfg_scale is {self.cfg_scale}; it must be at least 0")
        for name in ("max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UsageError(f"{name} is {value}; it must be at least 2")

    @property
    def group(self) -> int:
        """Masked copies drawn together, stratified over the number of masks."""
        return self.mc_num if self.mc_batch is None else self.mc_batch

    def identity(self) -> dict[str, Any]:
        """What decides results: everything but the batching."""
        return {name: value for name, value in asdict(self).items() if name != "batch_tokens"}
