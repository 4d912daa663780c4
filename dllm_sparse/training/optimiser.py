"""AdamW and its learning rate over a run."""

from __future__ import annotations

import math

import torch

from dllm_sparse.models.transformer import Transformer
from dllm_sparse.training.recipe import OptimiserRecipe


def learning_rate(step: int, steps: int, recipe: OptimiserRecipe) -> float:
    """Linear warmup, then cosine decay to `final_fraction` of the peak at the last step; `step` counts from 0."""
    if step < recipe.warmup_steps:
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    floor = recipe.final_fraction
    return recipe.peak_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimiser_of(transformer: Transformer, recipe: OptimiserRecipe, *, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [parameter for parameter in transformer.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in transformer.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=betas, eps=1e-8, fused=fused)
