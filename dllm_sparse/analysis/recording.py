"""Generates from many prompts, batch by batch, under a recorder; an interruption keeps the batches already done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dllm_sparse.analysis.recorded_batches import RecordedBatches, Recording
from dllm_sparse.analysis.recorder import MaskRecorder
from dllm_sparse.fields import listed
from dllm_sparse.generation import encode, generate, left_padded
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.loops import fitted
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.sparsity.sparsifier import sparsify
from dllm_sparse.types import Observers, UsageError

Prompts = Sequence[str] | Sequence[Sequence[int]]
"""Texts, or rows of token ids for a model without a tokenizer."""


def checked(prompts: str | Prompts) -> Prompts:
    """The prompts, a text alone being one of them; raises UsageError unless all are texts, or all rows of ids."""
    rows: Prompts = listed(prompts)
    kinds: set[type] = {type(row) for row in rows}
    if str in kinds and len(kinds) > 1:
        raise UsageError("prompts are either texts or rows of token ids, not both")
    if int in kinds:
        raise UsageError("prompts are texts or rows of token ids; give a single row as [[..]]")
    return rows


def record(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: SamplerConfig,
    sparsity: SparsityConfig,
    *,
    batch_size: int = 8,
    chat: bool = False,
    snapshot_every: int = 0,
    deltas: tuple[int, ...] = (),
    apply: bool = True,
    observers: Observers = (),
    kept: RecordedBatches | None = None,
) -> Recording:
    """Decodes all prompts under `sparsity` and records their masks; with `apply=False` those of dense decoding.

    `kept` stores every finished batch and is asked for it first: a recording that was killed resumes.
    Raises UsageError for impossible options, and KeyboardInterrupt only when no batch was finished.
    """
    sampler = fitted(lm, sampler)
    recorder = MaskRecorder(lm.kind, sampler, snapshot_every, deltas)
    done = Recording(recorder.counts(), [], [])
    try:
        for number, (ids, mask) in enumerate(batches(lm, prompts, batch_size, chat=chat)):
            batch = kept.get(number) if kept else None
            if batch is None:
                recorder = MaskRecorder(lm.kind, sampler, snapshot_every, deltas)
                with sparsify(lm, sparsity, (recorder,), apply=apply) as handle:
                    watching = (recorder, handle, *observers)
                    out = generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, observers=watching)
                generated = out.ids[:, out.prompt_length :].tolist()
                batch = Recording(recorder.counts(), generated, out.commit_step.tolist())
                if kept:
                    kept.put(number, batch)
            else:
                done.resumed += 1
            done.add(batch)
    except KeyboardInterrupt:
        if not done.ids:
            raise
        done.complete = False
    return done


def batches(
    lm: LanguageModel, prompts: Prompts, batch_size: int, *, chat: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(ids [B, P], mask [B, P] or None) of every `batch_size` `checked` prompts. Raises UsageError for no prompt."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
    if not len(prompts):
        raise UsageError("no prompt was given")
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        texts = [row for row in rows if isinstance(row, str)]
        yield encode(lm, texts, chat=chat) if texts else left_padded(lm, [[int(id) for id in row] for row in rows])
