"""The two objectives, as data: what the model sees, what it must say, and what each position counts.

Shapes: B rows, L positions, V vocabulary. All draws come from a numpy generator keyed by seed and step, so the same
step gives the same example on a CPU, a GPU or eight of them, before and after a resume.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class Example(NamedTuple):
    """One corrupted micro-batch: `loss = sum(weights * CE(logits(inputs), targets)) / normaliser`."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    normaliser: float


def stratified_times(rows: int, offset: float, min_time: float = 1e-3) -> NDArray[np.float64]:
    """Masking ratios t [B] in [min_time, 1]: one uniform `offset` in [0, 1) shifts an even grid over the batch.

    Each t is marginally uniform while the batch covers (0, 1) evenly, which lowers the variance of the bound
    (Kingma et al. 2021, "Variational Diffusion Models", app. I.1).
    """
    grid = (offset + np.arange(rows) / rows) % 1.0
    return min_time + (1.0 - min_time) * grid


def masked_diffusion(
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    *,
    mask_token_id: int,
    rng: np.random.Generator,
    prefix_share: float = 0.0,
    min_time: float = 1e-3,
) -> Example:
    """LLaDA's objective (arXiv 2502.09992, eq. 3 and 5): mask each eligible token with probability t, weigh by 1/t.

    `ids` and `weights` are [B, L]. Positions of weight 0 are a prompt: never masked, never scored. In a `prefix_share`
    of the rows a prefix of uniform random length joins them. The loss is the negative evidence bound a token, in nats.
    """
    rows, length = ids.shape
    times = stratified_times(rows, rng.random(), min_time)[:, None]
    prefix = np.where(rng.random(rows) < prefix_share, np.floor(rng.random(rows) * length), 0)[:, None]
    eligible = (weights > 0) & (np.arange(length)[None] >= prefix)
    masked = eligible & (rng.random((rows, length)) < times)
    scored = np.where(masked, weights / times, 0.0).astype(np.float32)
    return Example(np.where(masked, mask_token_id, ids), ids, scored, float((weights * eligible).sum()))


def next_token(ids: NDArray[np.int64], weights: NDArray[np.float32]) -> Example:
    """Position i predicts token i+1, weighted by that token's weight; the last position predicts nothing."""
    targets = np.concatenate((ids[:, 1:], ids[:, -1:]), axis=1)
    shifted = np.concatenate((weights[:, 1:], np.zeros_like(weights[:, :1])), axis=1)
    return Example(ids, targets, shifted, float(shifted.sum()))


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross entropy, a sum in nats (fp32 scalar): logits [B, L, V], targets [B, L], weights [B, L]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return torch.dot(losses, weights.flatten())
