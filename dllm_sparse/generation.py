"""`generate`: prompts in, texts and measurements out, for both kinds of model. Glue, no mathematics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.fields import listed
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.loops import decode, fitted
from dllm_sparse.samplers.remasking import ends_of_text
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.sparsifier import sparsify
from dllm_sparse.types import Observer, UsageError


@dataclass(slots=True)
class Generation:
    """What `generate` returns. `ids` is [B, P + generated] with the prompt and its left padding in front.

    `forward_passes` counts a guided (CFG) step once, full and cached forwards once each. `tokens_per_second` counts
    generated tokens before the first end-of-text; `canvas_tokens_per_second` counts every generated position.
    """

    texts: list[str]
    ids: Tensor
    prompt_length: int
    forward_passes: int
    seconds: float
    generated_tokens: int
    commit_step: Tensor
    execution: str = "eager"
    sparsity: dict[str, float] | None = None
    sparsity_report: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens before the first end-of-text, per second of decoding."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def canvas_tokens_per_second(self) -> float:
        """All generated positions per second of decoding."""
        positions = self.ids.shape[0] * (self.ids.shape[1] - self.prompt_length)
        return positions / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "texts": self.texts,
            "ids": self.ids.tolist(),
            "prompt_length": self.prompt_length,
            "forward_passes": self.forward_passes,
            "seconds": self.seconds,
            "generated_tokens": self.generated_tokens,
            "tokens_per_second": self.tokens_per_second,
            "canvas_tokens_per_second": self.canvas_tokens_per_second,
            "commit_step": self.commit_step.tolist(),
            "execution": self.execution,
            "sparsity": self.sparsity,
            "sparsity_report": self.sparsity_report,
        }


def generate(
    lm: LanguageModel,
    prompts: Sequence[str] | str | None = None,
    prompt_ids: Tensor | Sequence[Sequence[int]] | None = None,
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    sampler: SamplerConfig | None = None,
    sparsity: SparsityConfig | None = None,
    observers: Sequence[Observer] = (),
    chat: bool = False,
) -> Generation:
    """Decodes one batch, under step-aware sparsity if a config is given.

    Give either `prompts` (texts; left-padded to one length, `chat=True` applies the tokenizer's chat template) or
    `prompt_ids` [B, P] with an optional 0/1 `attention_mask` [B, P]. Observers see steps and masks and change nothing.
    Raises UsageError for impossible options, NonFiniteActivations for NaN or Inf.
    """
    sampler = fitted(lm, sampler or SamplerConfig())
    if (prompts is None) == (prompt_ids is None):
        raise UsageError("give either prompts or prompt_ids")
    if prompts is not None:
        if attention_mask is not None:
            raise UsageError("attention_mask goes with prompt_ids; texts are padded and masked here")
        ids, mask = encode(lm, listed(prompts), chat=chat)
    else:
        assert prompt_ids is not None
        if chat:
            raise UsageError("a chat template is for texts; give prompts, or prompt_ids without chat")
        ids, mask = _given_ids(lm, prompt_ids, attention_mask)
    with sparsify(lm, sparsity, observers) if sparsity else nullcontext() as handle:
        watching = (*observers, handle) if handle else tuple(observers)
        _synchronize(lm)
        started = time.perf_counter()
        decoded = decode(lm, ids, mask, sampler, watching)
        _synchronize(lm)
        seconds = time.perf_counter() - started
    result = _generation(lm, decoded, ids.shape[1], sampler, seconds)
    if handle:
        result.sparsity = handle.sparsity
        result.sparsity_report = {"backend": handle.backend, **handle.counts.to_dict()}
    return result


def encode(lm: LanguageModel, prompts: Sequence[str], *, chat: bool = False) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, P] int64, left-padded, and their 0/1 mask [B, P] (None when nothing is padded)."""
    if lm.tokenizer is None:
        raise UsageError(f"{lm.name} has no tokenizer; give prompt_ids instead of text")
    if not prompts:
        raise UsageError("no prompt was given")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError("prompts are texts; give rows of token ids as prompt_ids")
    rows = [_encode_one(lm, prompt, chat=chat) for prompt in prompts]
    if not all(rows):
        raise UsageError("a prompt is empty and the model has no BOS token to start from")
    return left_padded(lm, rows)


def left_padded(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Rows of token ids as one [B, P] int64, padded in front, and their 0/1 mask [B, P] (None when nothing is).

    Never padded with masks, which would be decoded.
    """
    width = max(len(row) for row in rows)
    known = (lm.config.pad_token_id, lm.config.eos_token_id, 0, 1)
    pad = next(token for token in known if token is not None and token != lm.mask_token_id)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    if all(len(row) == width for row in rows):
        return ids, None
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _encode_one(lm: LanguageModel, prompt: str, *, chat: bool) -> list[int]:
    assert lm.tokenizer is not None
    if not chat:
        ids = lm.token_ids(prompt)
        if not ids and lm.config.bos_token_id is not None:
            ids = [lm.config.bos_token_id]
        return ids
    if not getattr(lm.tokenizer, "chat_template", None):
        raise UsageError(f"{lm.name}'s tokenizer has no chat template; use --no-chat")
    message = [{"role": "user", "content": prompt}]
    text = lm.chat_text(message, add_generation_prompt=True)
    return lm.token_ids(text, add_special_tokens=False)


def _given_ids(
    lm: LanguageModel,
    prompt_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | Sequence[Sequence[int]] | None,
) -> tuple[Tensor, Tensor | None]:
    ids = torch.as_tensor(prompt_ids, dtype=torch.int64)
    if ids.dim() != 2 or not ids.numel():
        raise UsageError(f"prompt_ids must be [B, P] with B and P at least 1; got shape {list(ids.shape)}")
    lm.check_ids("prompt_ids", ids)
    mask = None if attention_mask is None else torch.as_tensor(attention_mask, dtype=torch.int64)
    if mask is not None and mask.shape != ids.shape:
        raise UsageError(f"attention_mask is {list(mask.shape)}, prompt_ids {list(ids.shape)}")
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all() & (mask.diff(dim=1) >= 0).all()):
        raise UsageError("attention_mask must be 0 on left padding and 1 behind it")
    return ids, mask


def _generation(
    lm: LanguageModel, decoded: Decoded, prompt_length: int, sampler: SamplerConfig, seconds: float
) -> Generation:
    """Cuts each row at its first end-of-text for texts and token counts; ids stay whole."""
    texts, count = [], 0
    for row in decoded.ids[:, prompt_length:].tolist():
        kept = before_end(lm, row, sampler)
        count += len(kept)
        if lm.tokenizer is not None:
            texts.append(str(lm.tokenizer.decode(kept, skip_special_tokens=True)))
    return Generation(
        texts=texts,
        ids=decoded.ids.cpu().clone(),  # outside inference mode: an ordinary tensor, free to be changed
        prompt_length=prompt_length,
        forward_passes=decoded.forward_passes,
        seconds=seconds,
        generated_tokens=count,
        commit_step=decoded.commit_step.cpu().clone(),
        execution=decoded.execution,
    )


def before_end(lm: LanguageModel, ids: Sequence[int], sampler: SamplerConfig) -> Sequence[int]:
    """Generated ids up to the first end of text."""
    ends = ends_of_text(lm, sampler)
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _synchronize(lm: LanguageModel) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
