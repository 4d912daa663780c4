"""What a step of block diffusion decides: LLaDA2's rule, which is SDAR's too, and LLaDA2.1's token editing."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.confidence import keep_likely, pick_by_threshold_or_quota, race
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.remasking import Choice, Contest, Rule, check_finite
from dllm_sparse.samplers.schedule import transfer_counts


class Turn(NamedTuple):
    """What one step may do to a block of L tokens in B rows: [B, L] bool, and [B] bool for whole rows."""

    masked: Tensor  # [B, L] masks to be decided
    unmasking: Tensor  # [B] rows that have some
    editing: Tensor  # [B] rows that have none and only edit
    editable: Tensor  # [B, L] decoded tokens that may be rewritten

    @classmethod
    def of(cls, masked: Tensor, given: Tensor, live: Tensor, posts: Tensor, most_posts: int) -> Turn:
        """From masked and given positions [B, L], rows that still take part [B], and their editing steps so far [B]."""
        masked = masked & live[:, None]
        unmasking = masked.any(-1)
        editing = ~unmasking & live & (posts < most_posts)
        return cls(masked, unmasking, editing, (unmasking | editing)[:, None] & ~masked & ~given)

    def posts(self, before: Tensor, written: Tensor, most_posts: int) -> Tensor:
        """Editing steps [B] after this one, which wrote [B, L]: a row that found nothing to edit has had them all."""
        edited = (written & ~self.masked).any(-1)
        return torch.where(self.editing & ~edited, most_posts, before + self.editing)


class BlockRule(Rule):
    """Commits every masked token surer than `threshold`, or the step's quota of the surest where those are fewer.

    Without a threshold it is the quota alone. The quotas split the whole block, also where a prompt fills a part of it.
    With `editing_threshold` a decoded token gives way to another one surer than that. Confidence is the probability
    under the distribution sampled from: the temperature, `top_k` and `top_p` applied. Random numbers per step:
    exponential noise [B, W, V] at temperature > 0, then fp32 confidences [B, W] under random remasking.
    Source: LLaDA2.0 (arXiv 2512.15745), LLaDA2.1's code; SDAR (arXiv 2510.06303): low_confidence_dynamic and, without
    a threshold, low_confidence_static.
    """

    def __init__(self, lm: LanguageModel, config: SamplerConfig) -> None:
        super().__init__(lm, config)
        steps = config.steps // config.blocks if config.steps else config.block_length
        quotas = transfer_counts(config.block_length, steps)
        self.quotas = [max(quota, config.minimal_topk) for quota in quotas if quota]
        self.left = 0  # unmasking steps that the block may still take

    @property
    def steps(self) -> int:
        """Unmasking steps of a block, at most."""
        return len(self.quotas)

    def sure_steps(self, masks: int) -> int:
        """The fewest unmasking steps that a block with so many masks in some row may take."""
        if not self.config.by_quota:
            return 1
        return 1 + sum(total < masks for total in accumulate(self.quotas))

    @property
    def most_posts(self) -> int:
        """Steps that only edit, at most, once no token of a block is masked."""
        return self.config.max_post_steps if self.config.editing_threshold is not None else 0

    def start_block(self, masks: list[int]) -> None:
        """A block begins with this many masks in each row."""
        self.left = self.steps

    def choose(self, contest: Contest) -> Choice:
        """Decides one step; raises NonFiniteActivations where the logits are not finite."""
        tokens, sure = self._sample(contest)
        confidence = contest.spread(sure)
        picked = self._pick_masked(confidence)[:, contest.rows] if bool(contest.eligible.any()) else contest.eligible
        if contest.editable is not None and self.config.editing_threshold is not None:
            assert contest.ids is not None
            surer = (sure > self.config.editing_threshold) & (tokens != contest.ids)
            picked = picked | (contest.editable & surer)
        return Choice(tokens, confidence, picked)

    def _sample(self, contest: Contest) -> tuple[Tensor, Tensor]:
        """Tokens and confidences [B, R]."""
        config, logits = self.config, contest.logits
        wide = logits.to(self._dtype(logits))
        if config.temperature > 0:
            wide = keep_likely(keep_likely(wide / config.temperature, top_k=config.top_k), top_p=config.top_p)
        probabilities = wide.softmax(-1)
        tokens = wide.argmax(-1)
        if config.temperature > 0:
            noise = self._draw(contest, contest.fed, logits.shape[-1], exponential=True)
            tokens = race(probabilities, noise[:, contest.rows]).argmax(-1)
        check_finite(logits, tokens, contest.step)
        if config.remasking == "random":
            return tokens, self._draw(contest, contest.fed)[:, contest.rows]
        return tokens, probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def _pick_masked(self, confidence: Tensor) -> Tensor:
        quota = [self.quotas[-self.left]] * len(confidence)
        self.left -= 1
        if self.config.threshold is not None:
            return pick_by_threshold_or_quota(confidence, self.config.threshold, quota)
        return self._pick(confidence, quota)
