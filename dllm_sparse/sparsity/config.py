"""What is sparsified, by which rule, how strongly: one frozen, validated, JSON-ready description."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from dllm_sparse.fields import check_fields, check_names
from dllm_sparse.sparsity.rules import Ties, check_fraction
from dllm_sparse.types import ATTENTION_SITES, SiteName, UsageError

Rule = Literal["top_p", "top_k", "max_p", "threshold"]
Sites = Literal["input", "up", "gate", "intermediate", "all_inputs", "all_linear"]
Scope = Literal["token", "sequence", "group"]
Score = Literal["magnitude", "weighted"]
GateInput = Literal["masked", "dense"]
Backend = Literal["auto", "reference", "triton", "cpu"]
Where = Literal["everywhere", "faster"]
Schedule = Callable[[float], float] | Sequence[tuple[float, float]]

_SEVERAL: dict[Sites, tuple[SiteName, ...]] = {
    "all_inputs": ("input", "intermediate"),
    "all_linear": (*ATTENTION_SITES, "input", "intermediate"),
}
IDENTITY: dict[Rule, float] = {"top_p": 1.0, "top_k": 1.0, "max_p": 0.0, "threshold": 0.0}
"""The value of `p` at which a rule changes nothing."""


@dataclass(frozen=True, slots=True)
class SparsityConfig:
    """How the activations are masked: the FFN's, and with `sites="all_linear"` those the attention projections read.

    `p` is the rule's knob: kept L1 mass (top_p), kept fraction (top_k), fraction of the row's maximum (max_p), or an
    absolute magnitude (threshold). `scope`: one mask per token, per `group_size` consecutive tokens (selected on the
    sum of each token's normalised scores) or per sequence (the published LLaDA code). `score="weighted"` ranks by
    |v_j| * ||W_:,j|| of the matrix that consumes v. `schedule` maps the step fraction in [0, 1] to p: a function, or
    points (fraction, p) joined by straight lines. `refresh_every=k` recomputes the masks at every k-th step only.
    `gate_input="dense"` masks the input of the up projection only, as the published LLaDA hook did. `where="faster"`:
    steps decoded as CUDA graphs mask only where skipping beats the dense product; the rest runs dense and counts as
    kept. The first forward of a shape masks everywhere, and its counts decide; those of every generation since decide
    again when it has ended. `layers`: only these are masked and counted (None: all).
    `layer_p`: the knob of every layer, in place of one p for all.

    Raises UsageError for a value outside what is allowed.
    """

    p: float = 0.8
    rule: Rule = "top_p"
    sites: Sites = "all_inputs"
    scope: Scope = "token"
    group_size: int = 32
    score: Score = "magnitude"
    schedule: Schedule | None = None
    refresh_every: int = 1
    backend: Backend = "auto"
    ties: Ties = "keep"
    gate_input: GateInput = "masked"
    where: Where = "everywhere"
    layers: tuple[int, ...] | None = None
    layer_p: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self, ranged=("p",))
        for name in ("group_size", "refresh_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.ties == "trim" and self.rule != "top_p":
            raise UsageError(f"ties='trim' belongs to rule 'top_p', not to {self.rule!r}")
        self._check_p(self.p)
        self._check_layers()
        if self.schedule is not None and not callable(self.schedule):
            object.__setattr__(self, "schedule", self._points(self.schedule))

    @property
    def site_names(self) -> tuple[SiteName, ...]:
        """The sites masked, in the order they are met."""
        return _SEVERAL.get(self.sites) or (cast(SiteName, self.sites),)

    def p_at(self, fraction: float, layer: int = 0) -> float:
        """The knob of a layer at a step fraction in [0, 1]."""
        if self.layer_p is not None:
            return self.layer_p[layer]
        if self.schedule is None:
            return self.p
        if callable(self.schedule):
            p = float(self.schedule(fraction))
            self._check_p(p)
            return p
        return _interpolate(self.schedule, fraction)

    def is_identity(self, p: float) -> bool:
        """True where the rule at this knob keeps every nonzero entry, so that dense values pass untouched."""
        return p == IDENTITY[self.rule]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values. A schedule given as a function is named, not stored."""
        values = asdict(self)
        if callable(self.schedule):
            values["schedule"] = f"function {getattr(self.schedule, '__qualname__', repr(self.schedule))}"
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsityConfig:
        """Inverse of `to_dict`; unknown keys raise UsageError."""
        check_names(cls, values, "unknown sparsity option")
        return cls(**values)

    def _check_layers(self) -> None:
        """Lists become tuples; a knob per layer and a knob per step cannot both decide."""
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
            if not self.layers or min(self.layers) < 0:
                raise UsageError(f"layers is {list(self.layers)}; give layer numbers from 0 on, at least one")
        if self.layer_p is not None:
            object.__setattr__(self, "layer_p", tuple(float(p) for p in self.layer_p))
            if self.schedule is not None:
                raise UsageError("layer_p and schedule both decide p; give one of them")
            for p in self.layer_p:
                self._check_p(p, "layer_p")

    def _points(self, schedule: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
        try:
            points = tuple((float(at), float(p)) for at, p in schedule)
        except (TypeError, ValueError) as error:
            raise UsageError(f"schedule needs (step fraction, p) points; got {schedule!r}") from error
        if not points or any(b <= a for (a, _), (b, _) in itertools.pairwise(points)):
            raise UsageError("schedule needs (step fraction, p) points with increasing fractions")
        for at, p in points:
            check_fraction("a schedule's step fraction", at)
            self._check_p(p, "a schedule's p")
        return points

    def _check_p(self, p: float, name: str = "p") -> None:
        if self.rule == "threshold":
            if not 0 <= p < math.inf:
                raise UsageError(f"{name} is {p}; rule 'threshold' takes a magnitude of at least 0 (for example 0.05)")
        else:
            check_fraction(name, p)


def _interpolate(points: Sequence[tuple[float, float]], fraction: float) -> float:
    if fraction <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if fraction <= x1:
            return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)
    return points[-1][1]
