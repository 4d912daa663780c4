"""The corrupted micro-batches of a run: those it trains on, and the held-out ones it is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dllm_sparse.training.data import Prepared, Rows, rows_at
from dllm_sparse.training.objectives import Example, masked_diffusion, next_token
from dllm_sparse.training.recipe import Mix, Recipe
from dllm_sparse.types import Kind

HELD_OUT_ROWS = 256


def draw_example(recipe: Recipe, kind: Kind, prepared: Prepared, entry: int, mix: Mix, step: int) -> Example:
    """The corrupted micro-batch number `entry` of a step, over all processes; the rows do not depend on `kind`."""
    source = "skills" if mix.source == "skills" else "train"
    rows = rows_at(prepared.sets[source], mix, recipe.seed, entry, step, prepared.special["eos"])
    options: dict[str, Any] = {"prefix_share": mix.prefix_share, "min_time": recipe.min_time}
    return _corrupted(rows, kind, prepared, (recipe.seed, entry, step), **options)


def held_out_examples(recipe: Recipe, kind: Kind, prepared: Prepared) -> Iterator[Example]:
    """Held-out documents, the same rows and masks every time."""
    mix = recipe.mix[0]
    for step in range(max(1, HELD_OUT_ROWS // mix.rows)):
        rows = rows_at(prepared.sets["held_out"], mix, 0, 0, step, prepared.special["eos"])
        yield _corrupted(rows, kind, prepared, (0, step))


def _corrupted(rows: Rows, kind: Kind, prepared: Prepared, seed: tuple[int, ...], **options: Any) -> Example:
    if kind == "autoregressive":
        return next_token(*rows)
    mask = prepared.special["mask"]
    return masked_diffusion(*rows, mask_token_id=mask, rng=np.random.default_rng(seed), **options)
