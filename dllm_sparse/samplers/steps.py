"""What every denoising loop does in one step: the forward, the choice of tokens, the report to observers.

Everything random comes from one seeded CPU generator, in the documented order: per forward, first fp64 noise
[B, rows fed, V] if temperature > 0, then fp32 confidences [B, rows fed] under random remasking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.engine.observing import rows_may_leave
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.transformer import KVCache
from dllm_sparse.samplers.canvas import Canvas
from dllm_sparse.samplers.confidence import (
    choose_tokens,
    pick_by_factor,
    pick_by_quota,
    pick_by_threshold,
    token_probabilities,
)
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.types import NonFiniteActivations, Observers, Step, StepContext, StepResult


def end_of_text(lm: LanguageModel, config: SamplerConfig) -> int | None:
    """The sampler's end-of-text id, else the model's own."""
    return config.eos_token_id if config.eos_token_id is not None else lm.config.eos_token_id


class Steps:
    """One canvas being decoded; loops add which positions are fed and which compete, and when a block is finished.

    `canvas` holds the rows that are fed, `rows` [R] of the `whole` canvas: those with nothing left to decide in a block
    leave until the next one. No row's tokens depend on that, and a forward counts once whatever it feeds.
    """

    def __init__(self, lm: LanguageModel, canvas: Canvas, config: SamplerConfig, observers: Observers) -> None:
        self.lm, self.canvas, self.config, self.observers = lm, canvas, config, observers
        self.whole = canvas
        self.rows = torch.arange(len(canvas.ids), device=canvas.ids.device)
        self._rows_leave = rows_may_leave(lm, observers)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.forwards = 0
        self.index = 0
        self.eos = end_of_text(lm, config)
        self.eot = config.eot_token_id if config.eot_token_id is not None else lm.config.eot_token_id
        self.cache: KVCache | None = None
        self._buffers: KVCache | None = None

    def use_cache(self) -> None:
        """Makes the cache of all rows."""
        rows, length = self.whole.ids.shape
        self._buffers = KVCache(self.lm.config, rows * self._copies, length, self.lm.device, self.lm.dtype)
        self.cache = self._buffers

    @property
    def _copies(self) -> int:
        """Rows of a forward per row of the canvas: guidance feeds each twice."""
        return 2 if self.config.cfg_scale > 0 else 1

    def begin_block(self) -> None:
        """All rows that have not ended take part again. The cache is not kept: a block begins with a full forward."""
        self.gather()
        awake = (~self.whole.ended).nonzero().squeeze(1)
        if self._rows_leave and len(awake) < len(self.whole.ids):
            self.canvas, self.rows = self.whole.take(awake), awake
        if self._buffers is not None:
            self.cache = self._buffers.front(len(self.rows) * self._copies)

    def leave(self, end: int) -> None:
        """Rows without a mask before position `end` leave, if nobody needs them; keys and values move together."""
        awake = self.canvas.masked()[:, :end].any(-1).nonzero().squeeze(1)
        fed = len(self.rows)
        if not self._rows_leave or not 0 < len(awake) < fed:
            return
        if self.cache is not None:
            self.cache = self.cache.take(torch.cat([awake + copy * fed for copy in range(self._copies)]))
        canvas, rows = self.canvas.take(awake), self.rows[awake]
        self.gather()
        self.whole.committed.zero_()  # when they come back, other steps will have passed
        self.canvas, self.rows = canvas, rows

    def gather(self) -> None:
        """Brings what was decoded to the whole canvas, which is then the one fed."""
        if self.canvas is not self.whole:
            self.whole.put(self.rows, self.canvas)
            self.canvas = self.whole
            self.rows = torch.arange(len(self.whole.ids), device=self.rows.device)

    def forward(self, step: Step, start: int, stop: int, rows: slice) -> Tensor:
        """Logits [B, rows, V] of canvas positions start..stop after guidance."""
        canvas = self.canvas
        ids, mask, classes = canvas.ids[:, start:stop], canvas.attention_mask, canvas.token_class()[:, start:stop]
        guided = self.config.cfg_scale > 0
        if guided:
            ids = torch.cat((ids, ids.masked_fill(canvas.given[:, start:stop], canvas.mask_id)))
            classes = classes.repeat(2, 1)
            mask = mask.repeat(2, 1) if mask is not None else None
        context = StepContext(step, classes, start, guided)
        logits: Tensor = self.lm.transformer(
            ids, start=start, attention_mask=mask, cache=self.cache, rows=rows, context=context
        )
        self.forwards += 1
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (self.config.cfg_scale + 1) * (conditional - unconditional)
        return logits

    def decide(self, logits: Tensor, step: Step, rows: slice, fed: int, *, discard_draw: bool) -> tuple[Tensor, Tensor]:
        """Tokens and confidences [B, rows]; draws noise for all `fed` positions, as the reference programs do."""
        config = self.config
        if config.logits_eos_inf and self.eos is not None:
            logits[..., self.eos] = -torch.inf
        uniform = None
        if config.temperature > 0:
            for _ in range(2 if discard_draw else 1):
                uniform = self._draw(fed, logits.shape[-1], dtype=torch.float64)
            assert uniform is not None
            uniform = uniform[:, rows].to(logits.device)
        tokens = choose_tokens(logits, config.temperature, uniform)
        _check_finite(logits, tokens, step)
        if config.confidence_eos_eot_inf:
            # As published: the EOS confidence falls to 0 only at temperature 0.
            silenced = [self.eot, self.eos if config.temperature == 0 else None]
            logits[..., [token for token in silenced if token is not None]] = -torch.inf
        if config.remasking == "random":
            return tokens, self._draw(fed)[:, rows].to(logits.device)
        dtype = logits.dtype if config.confidence_dtype == "model" else getattr(torch, config.confidence_dtype)
        return tokens, token_probabilities(logits, tokens, dtype)

    def _draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers [R, *shape] on the CPU, of draws for all rows: those that left change nobody's."""
        drawn = torch.rand((len(self.whole.ids), *shape), dtype=dtype, generator=self.generator)
        return drawn if len(self.rows) == len(drawn) else drawn[self.rows.cpu()]

    def pick(self, confidence: Tensor, quota: list[int] | None) -> Tensor:
        """Which positions [B, T] bool to commit; -inf confidences never are."""
        if quota is not None:
            return pick_by_quota(confidence, quota)
        if self.config.threshold is not None:
            return pick_by_threshold(confidence, self.config.threshold)
        assert self.config.factor is not None
        return pick_by_factor(confidence, self.config.factor)

    def report(self, step: Step, confidence: Tensor, start: int) -> None:
        """Tells the observers what a step committed; confidence [B, T] is that of canvas positions `start` on."""
        everywhere = torch.full(self.whole.ids.shape, -torch.inf, device=confidence.device, dtype=confidence.dtype)
        everywhere[self.rows, start : start + confidence.shape[1]] = confidence
        if self.canvas is not self.whole:
            self.whole.put(self.rows, self.canvas)
        result = StepResult(self.whole.ids, self.whole.committed, everywhere)
        for observer in self.observers:
            observer.on_step(step, result)


def _check_finite(logits: Tensor, tokens: Tensor, step: Step) -> None:
    """The largest logit of a position is NaN or +Inf exactly when something went wrong; -Inf is a silenced token."""
    if not bool(torch.isfinite(logits.gather(-1, tokens.unsqueeze(-1))).all()):
        raise NonFiniteActivations(f"NaN or Inf in the logits at step {step.index}")
