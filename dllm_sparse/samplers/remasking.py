"""What a denoising step decides: what rules share, and LLaDA's and Fast-dLLM's. The loop runs forwards, a rule chooses.

Everything random comes from one seeded CPU generator, in the order of the reference programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_sparse.models.finite import not_finite_logits
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.confidence import (
    choose_tokens,
    pick_by_factor,
    pick_by_quota,
    pick_by_threshold,
    token_probabilities,
)
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.schedule import transfer_counts
from dllm_sparse.types import Step


def end_of_text(lm: LanguageModel, config: SamplerConfig) -> int | None:
    """The sampler's end-of-text id, else the model's own."""
    return config.eos_token_id if config.eos_token_id is not None else lm.config.eos_token_id


def ends_of_text(lm: LanguageModel, config: SamplerConfig) -> tuple[int, ...]:
    """The ids that end a row, `end_of_text` first: the sampler's alone, else all of the model's (chat models)."""
    own = lm.config.stop_token_ids if config.eos_token_id is None else ()
    return tuple(token for token in (end_of_text(lm, config), *own) if token is not None)


def leads(lm: LanguageModel, config: SamplerConfig) -> bool:
    """Whether the first forward of a block decides the block's first position alone.

    Where a position is predicted by the one before it, the cached forwards of a block cannot predict its first: they
    do not contain the position before. Fast-dLLM commits it from the full forward (arXiv 2505.22618, its Dream code).
    """
    return lm.config.logit_shift > 0 and config.cache != "none" and config.steps_per_block > 1


class Members(NamedTuple):
    """The rows of a step: B of the canvas's `batch`, the others having left; `awake` of the B have not ended."""

    rows: Tensor  # [B] int64
    awake: int
    batch: int


@dataclass(frozen=True, slots=True)
class Contest:
    """A step's candidates: R consecutive positions of the T tokens fed, some of which compete."""

    step: Step
    logits: Tensor  # [B, R, V] for the token at each position
    eligible: Tensor  # [B, R] bool
    rows: slice  # where the R positions are among the T
    fed: int  # T
    members: Members
    ids: Tensor | None = None  # [B, R] what the positions hold, where some of it may be rewritten:
    editable: Tensor | None = None  # [B, R] bool

    def spread(self, values: Tensor) -> Tensor:
        """Confidences [B, R] as wide as the tokens fed, [B, T], -inf where nothing competes.

        That wide, because which of equal confidences topk prefers depends on the whole row.
        """
        whole = values.new_full((len(values), self.fed), -torch.inf)
        whole[:, self.rows] = torch.where(self.eligible, values, -torch.inf)
        return whole


class Choice(NamedTuple):
    """What a step decided: tokens [B, R], confidence [B, T], picked [B, R]."""

    tokens: Tensor
    confidence: Tensor
    picked: Tensor


class Rule:
    """One way to choose tokens and positions. `lead`: the first step of a block decides its first position alone."""

    def __init__(self, lm: LanguageModel, config: SamplerConfig) -> None:
        self.config, self.lead = config, leads(lm, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.eos, self.ends = end_of_text(lm, config), ends_of_text(lm, config)
        self.eot = config.eot_token_id if config.eot_token_id is not None else lm.config.eot_token_id

    def start_block(self, masks: list[int]) -> None:
        """A block begins with this many masks in each row."""

    def spent(self, index: int) -> bool:
        """Whether the block's step `index` may commit nothing, although masks are left."""
        return False

    def choose(self, contest: Contest) -> Choice:
        """Decides one step; raises NonFiniteActivations where the logits are not finite."""
        raise NotImplementedError  # each rule has its own

    def _pick(self, confidence: Tensor, quota: list[int]) -> Tensor:
        """Positions [B, T] by the rule for sure tokens, else the `quota` of each row."""
        if self.config.threshold is not None:
            return pick_by_threshold(confidence, self.config.threshold)
        if self.config.factor is not None:
            return pick_by_factor(confidence, self.config.factor)
        return pick_by_quota(confidence, quota)

    def _draw(self, contest: Contest, *shape: int, exponential: bool = False, wide: bool = False) -> Tensor:
        """Uniform or exponential numbers [B, *shape], fp64 if `wide`, drawn for all rows of the canvas: those that left
        change nobody's."""
        noise = torch.empty((contest.members.batch, *shape), dtype=torch.float64 if wide else torch.float32)
        noise = (
            noise.exponential_(generator=self.generator) if exponential else noise.uniform_(generator=self.generator)
        )
        rows = contest.members.rows
        return (noise if len(rows) == len(noise) else noise[rows.cpu()]).to(contest.logits.device)

    def _dtype(self, logits: Tensor) -> torch.dtype:
        name = self.config.confidence_dtype
        dtype: torch.dtype = logits.dtype if name == "model" else getattr(torch, name)
        return dtype


class ConfidenceRule(Rule):
    """LLaDA's: the quota is split evenly over a block's steps when it begins, the most probable tokens win."""

    def start_block(self, masks: list[int]) -> None:
        """A block begins with this many masks in each row."""
        self._quotas = [transfer_counts(count, self.config.steps_per_block, lead=self.lead) for count in masks]

    def choose(self, contest: Contest) -> Choice:
        """Decides one step; raises NonFiniteActivations where the logits are not finite."""
        config, logits = self.config, contest.logits
        tokens = choose_tokens(logits, config.temperature, self._noise(contest))
        check_finite(logits, tokens, contest.step)
        confidence = contest.spread(self._confidence(contest, tokens))
        index = contest.step.index_in_block
        quota = [quotas[index] for quotas in self._quotas] if config.by_quota else []
        return Choice(tokens, confidence, self._pick(confidence, quota)[:, contest.rows])

    def _noise(self, contest: Contest) -> Tensor | None:
        """Uniform fp64 [B, R, V], drawn for all tokens fed as the reference programs do; None at temperature 0."""
        config = self.config
        if config.temperature == 0:
            return None
        shape = (contest.fed, contest.logits.shape[-1])
        if config.cache == "prefix" and contest.step.index_in_block > 0:
            self._draw(contest, *shape, wide=True)  # Fast-dLLM draws and discards one
        return self._draw(contest, *shape, wide=True)[:, contest.rows]

    def _confidence(self, contest: Contest, tokens: Tensor) -> Tensor:
        config, logits = self.config, contest.logits
        if config.confidence_eos_eot_inf:
            # As published: the EOS confidence falls to 0 only at temperature 0.
            silenced = [self.eot, self.eos if config.temperature == 0 else None]
            logits[..., [token for token in silenced if token is not None]] = -torch.inf
        if config.remasking == "random":
            return self._draw(contest, contest.fed)[:, contest.rows]
        return token_probabilities(logits, tokens, self._dtype(logits))


def check_finite(logits: Tensor, tokens: Tensor, step: Step) -> None:
    """The largest logit of a position is NaN or +Inf exactly when something went wrong; -Inf is a silenced token."""
    if not bool(torch.isfinite(logits.gather(-1, tokens.unsqueeze(-1))).all()):
        raise not_finite_logits(step.index)
