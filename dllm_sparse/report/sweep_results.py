"""Reading the JSON-ready value of a sweep or a comparison: the two differ in one level only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def results_by_model(value: Mapping[str, Any]) -> dict[str, Any]:
    """{model: {site: result}} of either kind of value."""
    if "model" in value:
        return {str(value["model"]): value["results"]}
    return dict(value["results"])
