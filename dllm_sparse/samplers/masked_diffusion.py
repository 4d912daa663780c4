"""The ONE denoising loop: LLaDA's semi-autoregressive sampler, with Fast-dLLM's caches and parallel decoding.

Token- and forward-identical in fp32 to the official LLaDA sampler (cache "none", quota) and to Fast-dLLM's three
(confidence_dtype "float64"). Random numbers come from one CPU generator in the documented order: per forward, first
fp64 noise [B, rows fed, V] if temperature > 0 (drawn twice in a cached prefix forward), then fp32 confidences
[B, rows fed] under random remasking. Caches are approximations; they change tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sparse.models.loading import LanguageModel
from dllm_sparse.models.transformer import KVCache
from dllm_sparse.samplers.confidence import (
    choose_tokens,
    pick_by_factor,
    pick_by_quota,
    pick_by_threshold,
    token_probabilities,
)
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.schedule import transfer_counts
from dllm_sparse.types import NonFiniteActivations, Observers, Step, StepContext, StepResult, TokenClass, UsageError


@dataclass(slots=True)
class Decoded:
    """What a loop returns: ids [B, L] with the prompt in front, forwards run, and the step that committed each
    generated position, [B, gen_length] (-1 where none did)."""

    ids: Tensor
    forward_passes: int
    commit_step: Tensor


class _Canvas:
    """The state of one generation: ids, which positions are masks, and what the last step committed."""

    def __init__(self, lm: LanguageModel, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig) -> None:
        assert lm.mask_token_id is not None
        self.mask_id = lm.mask_token_id
        self.prompt_length = prompt.shape[1]
        self.ids = torch.nn.functional.pad(prompt, (0, config.gen_length), value=self.mask_id)
        self.attention_mask = attention_mask
        if attention_mask is not None:
            self.attention_mask = torch.nn.functional.pad(attention_mask, (0, config.gen_length), value=1)
        # CFG: the unconditional copy masks whatever was given at the start, padding included (as LLaDA does).
        self.given = self.ids != self.mask_id
        self.committed = torch.zeros_like(self.given)
        self.commit_step = torch.full_like(self.ids[:, self.prompt_length :], -1)

    def masked(self) -> Tensor:
        """Positions [B, L] that still hold a mask."""
        return self.ids == self.mask_id

    def token_class(self) -> Tensor:
        """Class [B, L] int8 of every position before the next step."""
        classes = torch.full_like(self.ids, TokenClass.DECODED, dtype=torch.int8)
        classes[:, : self.prompt_length] = TokenClass.PROMPT
        classes[self.committed] = TokenClass.COMMITTED
        classes[self.masked()] = TokenClass.MASKED
        if self.attention_mask is not None:
            classes[self.attention_mask == 0] = TokenClass.PADDING
        return classes

    def commit(self, picked: Tensor, tokens: Tensor, start: int, step: Step) -> None:
        """Writes tokens [B, T] where picked [B, T], from canvas position `start` on."""
        window = slice(start, start + picked.shape[1])
        self.ids[:, window] = torch.where(picked, tokens, self.ids[:, window])
        self.committed = torch.zeros_like(self.committed)
        self.committed[:, window] = picked
        self.commit_step[self.committed[:, self.prompt_length :]] = step.index


@torch.inference_mode()
def denoise(
    lm: LanguageModel,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    config: SamplerConfig | None = None,
    observers: Observers = (),
) -> Decoded:
    """Decodes `gen_length` masks behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding.

    Raises UsageError for impossible blocks or a prompt that does not fit, NonFiniteActivations for NaN logits.
    Source: LLaDA (arXiv 2502.09992), alg. 4 and app. B.4; Fast-dLLM (arXiv 2505.22618), sec. 3.
    """
    config = config or SamplerConfig()
    config.check_blocks()
    check_context(lm, prompt.shape[1], config.gen_length)
    prompt = prompt.to(lm.device)
    canvas = _Canvas(lm, prompt, None if attention_mask is None else attention_mask.to(lm.device), config)
    loop = _Loop(lm, canvas, config, observers)
    for observer in observers:
        observer.on_start(canvas.ids, canvas.token_class())
    for block in range(config.blocks):
        loop.run_block(block)
        if config.stop_at_eos and loop.all_ended(block):
            break
    return Decoded(canvas.ids, loop.forwards, canvas.commit_step)


def check_context(lm: LanguageModel, prompt_length: int, gen_length: int) -> None:
    """Raises UsageError when prompt and generation do not fit the model's context."""
    limit = lm.config.max_positions
    if prompt_length + gen_length > limit:
        room = limit - prompt_length
        advice = f"try gen_length {room} or less" if room > 0 else f"shorten the prompt below {limit} tokens"
        raise UsageError(
            f"prompt of {prompt_length} tokens + gen_length {gen_length} exceeds the context of {limit}; {advice}"
        )


class _Loop:
    """Runs blocks of one canvas. Everything random comes from one seeded CPU generator."""

    def __init__(self, lm: LanguageModel, canvas: _Canvas, config: SamplerConfig, observers: Observers) -> None:
        self.lm, self.canvas, self.config, self.observers = lm, canvas, config, observers
        self.generator = torch.Generator().manual_seed(config.seed)
        self.forwards = 0
        self.index = 0
        self.eos = config.eos_token_id if config.eos_token_id is not None else lm.config.eos_token_id
        self.eot = config.eot_token_id if config.eot_token_id is not None else lm.config.eot_token_id
        self.cache: KVCache | None = None
        if config.cache != "none":
            rows, length = canvas.ids.shape
            rows *= 2 if config.cfg_scale > 0 else 1
            self.cache = KVCache(lm.config, rows, length, lm.device, lm.dtype)

    def run_block(self, block: int) -> None:
        """Decodes one block, left to right in blocks."""
        config, canvas = self.config, self.canvas
        begin = canvas.prompt_length + block * config.block_length
        end = begin + config.block_length
        masks = canvas.masked()[:, begin:end].sum(-1).tolist()
        quotas = [transfer_counts(count, config.steps_per_block) for count in masks]
        # Every step decides one competing position at least; a model that predicts the mask token must not loop on.
        competing = int(canvas.masked()[:, :end].sum(-1).max())
        for index in range(config.steps_per_block if config.by_quota else competing):
            if self._may_exit() and not bool(canvas.masked()[:, begin:end].any()):
                return
            step = Step(self.index, config.blocks * config.steps_per_block, block, index)
            self._run_step(step, begin, end, [quota[index] for quota in quotas] if config.by_quota else None)
            self.index += 1

    def _may_exit(self) -> bool:
        """LLaDA's plain loop runs its planned steps even when nothing is left to decode; the others stop."""
        return self.config.early_block_exit or self.cache is not None or not self.config.by_quota

    def all_ended(self, block: int) -> bool:
        """True once every row holds an EOS in the blocks finished so far; what follows is then filled with EOS."""
        canvas = self.canvas
        end = canvas.prompt_length + (block + 1) * self.config.block_length
        if self.eos is None or not bool((canvas.ids[:, canvas.prompt_length : end] == self.eos).any(-1).all()):
            return False
        canvas.ids[:, end:] = self.eos
        return True

    def _run_step(self, step: Step, begin: int, end: int, quota: list[int] | None) -> None:
        canvas, config = self.canvas, self.config
        cached = self.cache is not None and step.index_in_block > 0
        start = begin if cached else 0
        stop = end if cached and config.cache == "dual" else canvas.ids.shape[1]
        # Only masked positions before the end of the block compete (masks in the prompt too, as in LLaDA), so only
        # their rows need logits.
        eligible = canvas.masked()[:, start:end]
        first = int(eligible.any(0).int().argmax())
        rows = slice(first, end - start)
        logits = self._forward(step, start, stop, rows)
        tokens, decided = self._decide(
            logits, step, rows, stop - start, discard_draw=cached and config.cache == "prefix"
        )
        # As wide as the tokens fed: which of equal confidences topk prefers depends on the whole row.
        confidence = decided.new_full((len(decided), stop - start), -torch.inf)
        confidence[:, rows] = torch.where(eligible[:, rows], decided, -torch.inf)
        picked = self._pick(confidence, quota)[:, rows]
        canvas.commit(picked, tokens, start + first, step)
        if self.observers:
            self._report(step, confidence, start)

    def _forward(self, step: Step, start: int, stop: int, rows: slice) -> Tensor:
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

    def _decide(
        self, logits: Tensor, step: Step, rows: slice, fed: int, *, discard_draw: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokens and confidences [B, rows]; draws noise for all `fed` positions, as the reference programs do."""
        config = self.config
        if config.logits_eos_inf and self.eos is not None:
            logits[..., self.eos] = -torch.inf
        uniform = None
        if config.temperature > 0:
            shape = (logits.shape[0], fed, logits.shape[-1])
            for _ in range(2 if discard_draw else 1):
                uniform = torch.rand(shape, dtype=torch.float64, generator=self.generator)
            assert uniform is not None
            uniform = uniform[:, rows].to(logits.device)
        tokens = choose_tokens(logits, config.temperature, uniform)
        _check_finite(logits, tokens, step)
        if config.confidence_eos_eot_inf:
            # As published: the EOS confidence falls to 0 only at temperature 0.
            silenced = [self.eot, self.eos if config.temperature == 0 else None]
            logits[..., [token for token in silenced if token is not None]] = -torch.inf
        if config.remasking == "random":
            drawn = torch.rand((logits.shape[0], fed), generator=self.generator)
            return tokens, drawn[:, rows].to(logits.device)
        dtype = logits.dtype if config.confidence_dtype == "model" else getattr(torch, config.confidence_dtype)
        return tokens, token_probabilities(logits, tokens, dtype)

    def _pick(self, confidence: Tensor, quota: list[int] | None) -> Tensor:
        if quota is not None:
            return pick_by_quota(confidence, quota)
        if self.config.threshold is not None:
            return pick_by_threshold(confidence, self.config.threshold)
        assert self.config.factor is not None
        return pick_by_factor(confidence, self.config.factor)

    def _report(self, step: Step, confidence: Tensor, start: int) -> None:
        whole = torch.full(self.canvas.ids.shape, -torch.inf, device=confidence.device, dtype=confidence.dtype)
        whole[:, start : start + confidence.shape[1]] = confidence
        result = StepResult(self.canvas.ids, self.canvas.committed, whole)
        for observer in self.observers:
            observer.on_step(step, result)


def _check_finite(logits: Tensor, tokens: Tensor, step: Step) -> None:
    """The largest logit of a position is NaN or +Inf exactly when something went wrong; -Inf is a silenced token."""
    if not bool(torch.isfinite(logits.gather(-1, tokens.unsqueeze(-1))).all()):
        raise NonFiniteActivations(f"NaN or Inf in the logits at step {step.index}")
