"""What a denoising step decides by Dream's rules: a share of the masks left, or what a threshold and a budget allow."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.confidence import keep_likely, pick_by_budget, race, sureness
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.remasking import Choice, Contest, Rule, check_finite
from dllm_sparse.samplers.schedule import timestep_count, timestep_shares, transfer_counts


class TimestepRule(Rule):
    """Dream's: each step commits a share of the masks still there, by one of three confidences or by chance.

    Random numbers per step: "origin" draws fp32 [N] for the N masks that compete and samples only those it commits;
    sampling draws exponential noise [N, V], `alg_temp` then [B, T]. Behind a cache they come as in Fast-dLLM: a block's
    first forward draws for all T tokens and no position, a threshold's later ones also for the masks behind the block.
    """

    def __init__(self, lm: LanguageModel, config: SamplerConfig) -> None:
        super().__init__(lm, config)
        self._shares = timestep_shares(config.steps_per_block, config.eps) if config.by_quota else []

    def choose(self, contest: Contest) -> Choice:
        """Decides one step; raises NonFiniteActivations where the logits are not finite."""
        sampled = eligible = contest.eligible
        if self.config.remasking == "origin":
            drawn = torch.rand(int(eligible.sum()), generator=self.generator) < self._share(contest)
            sampled = eligible.masked_scatter(eligible, drawn.to(eligible.device))
        found, sure = self._sample(contest, sampled)
        tokens = torch.zeros_like(eligible, dtype=torch.int64).masked_scatter_(sampled, found)
        confidence = sure.new_full(eligible.shape, -torch.inf).masked_scatter_(sampled, sure)
        confidence = contest.spread(confidence)
        if self.config.remasking == "origin":
            return Choice(tokens, confidence, sampled)
        return Choice(tokens, confidence, self._positions(contest, confidence)[:, contest.rows])

    def _leading(self, contest: Contest) -> bool:
        """Whether this step decides the first position of its block alone."""
        return self.lead and contest.step.index_in_block == 0

    def _share(self, contest: Contest) -> float:
        """The share of the masks that compete that this step commits."""
        return self._shares[contest.step.index_in_block] if self._shares and not self._leading(contest) else 1.0

    def _sample(self, contest: Contest, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and confidences [N] of the positions `sampled` [B, R] bool."""
        config, logits = self.config, contest.logits[sampled]
        wide = logits.to(self._dtype(logits))
        if config.temperature > 0:
            wide = wide / config.temperature
        probabilities = keep_likely(wide, config.top_p, config.top_k).softmax(-1)
        tokens = probabilities.argmax(-1)
        if config.temperature > 0:
            tokens = race(probabilities, self._noise(contest, sampled, probabilities)).argmax(-1)
        check_finite(logits, tokens, contest.step)
        return tokens, sureness(probabilities, tokens, config.remasking)

    def _noise(self, contest: Contest, sampled: Tensor, like: Tensor) -> Tensor:
        """Exponential noise [N, V] as wide as `like`, in fp32 at least: bf16 noise would tie."""
        number, vocabulary = like.shape
        if self._leading(contest):
            wide = like.dtype == torch.float64
            everywhere = self._draw(contest, contest.fed, vocabulary, exponential=True, wide=wide)
            return everywhere[:, contest.rows][sampled]
        behind = 0 if self.config.by_quota else contest.members.batch * (contest.fed - contest.rows.stop)
        noise = torch.empty((number + behind, vocabulary), dtype=torch.promote_types(like.dtype, torch.float32))
        return noise.exponential_(generator=self.generator)[:number].to(like.device)

    def _positions(self, contest: Contest, confidence: Tensor) -> Tensor:
        """Positions picked [B, T] by their confidences [B, T], or drawn in proportion to their exponentials."""
        count = timestep_count(int(contest.eligible.sum()), contest.members.awake, self._share(contest))
        quota = [count] * len(confidence)
        if self.config.alg_temp == 0 or count == 0 or self._leading(contest):
            return self._pick(confidence, quota)
        noise = self._draw(contest, contest.fed, exponential=True)
        drawn = race((confidence / self.config.alg_temp).softmax(-1), noise)
        return self._pick(drawn.masked_fill(confidence == -torch.inf, -torch.inf), quota)


class BudgetRule(TimestepRule):
    """Fast-dLLM's for Dream without a cache: tokens at least as sure as `threshold`, within what the steps plan.

    A step may commit its even part of the row's masks and what the steps before it left of theirs; the surest token is
    always committed. What is left after the last step goes on in more steps. Fast-dLLM refuses steps that do not divide
    the masks, and batches: here the first steps take one more, and every row is decoded as if alone.
    Source: Fast-dLLM (arXiv 2505.22618), its code for Dream, `confidence_threshold`.
    """

    def choose(self, contest: Contest) -> Choice:
        """Decides one step; raises NonFiniteActivations where the logits are not finite."""
        if contest.step.index_in_block == 0:  # of the whole canvas: masks in the prompt compete, too
            steps, masks = self.config.steps or 1, contest.eligible.sum(-1).tolist()
            self._planned = torch.tensor([transfer_counts(count, steps) for count in masks])
            self._left = torch.zeros(len(masks), dtype=torch.int64)
        return super().choose(contest)

    def spent(self, index: int) -> bool:
        """True where the model chose the mask token itself, which uses up a budget and leaves a mask."""
        return index > 0 and not bool(self._left.any() or self._planned[:, index:].any())

    def _positions(self, contest: Contest, confidence: Tensor) -> Tensor:
        assert self.config.threshold is not None
        index, rows = contest.step.index_in_block, contest.members.rows.cpu()
        budget = self._left[rows] + self._planned[rows, index : index + 1].sum(-1)
        picked = pick_by_budget(confidence, self.config.threshold, budget.tolist())
        self._left[rows] = budget - picked.sum(-1).cpu()
        return picked
