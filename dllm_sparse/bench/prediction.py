"""What skipping could buy at most: the floor of a forward without the weights that none of its tokens needs.

A channel's weights are read if any token of the forward keeps it, so the unions must be those of forwards of as many
tokens. The prediction takes dense and sparse at their floors and selection for free; what is measured beside it pays
for selection, gathers and whatever keeps either from its floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from dllm_sparse.bench.floors import Cost, Fed, Rates, floor_seconds, forward_costs, total
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.sparsity.gains import weights_saved

Unions = Mapping[int, Mapping[str, float]]
"""Shares of the channels that no token keeps: {tokens of the forward: {site: share}}."""

NO_UNIONS: Unions = MappingProxyType({})


def sparse_cost(config: TransformerConfig, fed: Fed, element_bytes: int, skippable: Mapping[str, float]) -> Cost:
    """The cost of a forward that neither reads nor multiplies the weights of skipped channels."""
    dense = total(forward_costs(config, fed, element_bytes))
    saved = weights_saved(config, skippable)
    return Cost(dense.bytes - saved * element_bytes, dense.flops - 2 * saved * fed.batch * fed.tokens)


def predicted_speed_up(
    config: TransformerConfig, fed: Sequence[Fed], element_bytes: int, unions: Unions, rates: Rates
) -> float | None:
    """Dense floor over sparse floor of forwards of these shapes; None for experts and where no union was measured."""
    if config.experts or any(shape.batch * shape.tokens not in unions for shape in fed):
        return None
    dense = fmean(floor_seconds(total(forward_costs(config, shape, element_bytes)), rates) for shape in fed)
    costs = (sparse_cost(config, shape, element_bytes, unions[shape.batch * shape.tokens]) for shape in fed)
    return dense / fmean(floor_seconds(cost, rates) for cost in costs)


def union_density(fed: Sequence[Fed], unions: Unions) -> dict[str, float] | None:
    """Share of each site's channels that some token keeps, the mean over forwards; None where not measured."""
    found = [unions.get(shape.batch * shape.tokens) for shape in fed]
    known = [sites for sites in found if sites is not None]
    return {site: 1 - fmean(one[site] for one in known) for site in known[0]} if len(known) == len(found) else None


def beside_dense(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per kind of forward of two rows of `bench_engine`: ms of both, union density, predicted and measured speed-up."""
    return [
        {
            "forward": step["forward"],
            "tokens": step["tokens"],
            "dense_ms": base["ms"]["median"],
            "ms": step["ms"]["median"],
            "union_density": step["union_density"],
            "predicted_speed_up": step["predicted_speed_up"],
            "measured_speed_up": base["ms"]["median"] / step["ms"]["median"],
        }
        for base, step in zip(dense["steps"], sparse["steps"], strict=True)
    ]
