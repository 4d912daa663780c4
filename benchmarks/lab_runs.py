"""The models of the lab (`lab.py`): eight runs for the laws, more shapes at one size, and their recipes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from dllm_sparse.training.recipe import DataRecipe, Mix, ModelRecipe, OptimiserRecipe, Recipe
from dllm_sparse.types import Kind

HEAD = 32
SMALL, LARGE = (160, 6), (256, 9)
SHAPES = ((128, 9), (224, 3), (288, 2), (384, 1))  # with SMALL five ratios of width to depth at 1.7 to 2.2M parameters


@dataclass(frozen=True, slots=True)
class Run:
    """One model to train: its objective, activation and shape."""

    kind: Kind
    activation: str
    width: int
    layers: int

    @property
    def name(self) -> str:
        return f"{'ar' if self.kind == 'autoregressive' else 'diffusion'}-{self.activation}-{self.width}x{self.layers}"


def all_runs(shapes_of: tuple[Kind, ...]) -> list[Run]:
    """The eight law runs, large ones first (they take longest), then the shapes."""
    kinds: tuple[Kind, ...] = ("diffusion", "autoregressive")
    runs = [Run(k, a, *size) for size in (LARGE, SMALL) for k in kinds for a in ("relu", "silu")]
    return runs + [Run(kind, "relu", *shape) for kind in shapes_of for shape in SHAPES]


def recipe_of(run: Run, asked: argparse.Namespace) -> Recipe:
    """One micro-batch a step, constant rate behind the warmup (the stable stage of the paper's schedule)."""
    scale = 4 if asked.toy else 1
    width = run.width // scale // 8 * 8 if asked.toy else run.width
    model: dict[str, Any] = {"width": width, "layers": min(run.layers, 3) if asked.toy else run.layers}
    length, rows = (48, 8) if asked.toy else (256, 128)
    return Recipe(
        name=run.name,
        seed=asked.seed,
        steps=asked.steps,
        model=ModelRecipe(
            **model,
            heads=max(width // HEAD, 1),
            ffn_width=3 * width,
            max_positions=max(length, 64),
            activation=run.activation,  # type: ignore[arg-type]
        ),
        data=data_recipe(asked),
        optimiser=OptimiserRecipe(
            peak_rate=2e-3 if run.width <= 224 else 1.5e-3, warmup_steps=max(asked.steps // 40, 1), final_fraction=1.0
        ),
        mix=(Mix(source="stream", length=length, rows=rows),),
        checkpoint_every=max(asked.steps // 6, 1),
        evaluate_every=max(asked.steps // 6, 1),
    )


def data_recipe(asked: argparse.Namespace) -> DataRecipe:
    """What the corpus becomes; all runs share it."""
    small = {"vocab_size": 420, "held_out_per_mille": 100, "min_characters": 60}
    return DataRecipe(**small, skill_problems=100) if asked.toy else DataRecipe(vocab_size=4096, skill_problems=1000)
