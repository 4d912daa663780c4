"""The autoregressive baseline: prefill, then one cached forward per token, with the same steps and observers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm_sparse.engine.observing import GraphableObserver, StepClock, rows_may_leave
from dllm_sparse.models.finite import locating
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.language_model import LanguageModel, rotary_positions
from dllm_sparse.samplers.autoregressive_steps import AutoregressiveGraphs
from dllm_sparse.samplers.canvas import Canvas, Decoded
from dllm_sparse.samplers.confidence import choose_tokens, token_probabilities
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.graph_buffers import kept_graphs, on_device
from dllm_sparse.samplers.graph_steps import graphable
from dllm_sparse.samplers.remasking import check_finite, end_of_text, ends_of_text
from dllm_sparse.types import Observers, Step, StepContext, StepResult, TokenClass


def decode_token_by_token(
    lm: LanguageModel, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig, observers: Observers
) -> Decoded:
    """Decodes up to `gen_length` tokens behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding.

    Greedy at temperature 0 (identical to transformers in fp32), else Gumbel sampling in fp64. With `stop_at_eos`
    finished rows are filled with the pad id and the loop ends when all rows are finished. Step 0 is the prefill.
    """
    as_graphs, masking = graphable(lm, config, observers, config.gen_length)
    if as_graphs:
        with lm.graphs_lock, on_device(lm):
            return _decode_as_graphs(lm, prompt, attention_mask, config, observers, masking)
    loop = _Loop(lm, prompt, attention_mask, config, observers)
    for index in range(config.gen_length):
        loop.run_step(Step(index, config.gen_length, 0, index))
        if config.stop_at_eos and bool(loop.finished.all()):
            break
    return Decoded(loop.ids[:, : loop.length], loop.forwards, loop.commit_step[:, : loop.length - loop.prompt_length])


def _decode_as_graphs(
    lm: LanguageModel,
    prompt: Tensor,
    attention_mask: Tensor | None,
    config: SamplerConfig,
    observers: Observers,
    masking: GraphableObserver | None,
) -> Decoded:
    """The same decoding, each token one replay of a captured graph.

    If rows may end, the host reads which have while the next token is under way. Once all have, that token is one too
    many: it fed ended rows only, which changes nothing, and does not count.
    """
    stop_ids, fill = _end_ids(lm, config)
    canvas = Canvas(prompt, attention_mask, config.gen_length, fill)
    stop = stop_ids if config.stop_at_eos else None
    ends = tuple(stop_ids.tolist()) if config.stop_at_eos else None
    masks = masking.graph_key() if masking else None
    key = ("autoregressive", tuple(canvas.ids.shape), canvas.padded, ends, fill, masks)
    ffn = masking.graph_ffn if masking else None
    graphs = kept_graphs(lm, key, lambda: AutoregressiveGraphs(lm, canvas, stop, fill, ffn))
    clocks = [observer for observer in observers if isinstance(observer, StepClock)]
    for observer in clocks:
        observer.on_start(canvas.ids, torch.zeros_like(canvas.ids))
    graphs.load(canvas)
    leaves, forwards = rows_may_leave(lm, observers), 1
    if config.stop_at_eos:
        graphs.flags.post()
    while forwards < config.gen_length:
        _tell(clocks, forwards - 1, config)
        graphs.run()
        if config.stop_at_eos:
            graphs.flags.post()
            ended = graphs.flags.read()
            if all(ended):
                break
            if leaves:
                graphs.leave(ended, config.gen_length - forwards, keep_cache=True)
        forwards += 1
    else:
        _tell(clocks, forwards - 1, config)
    graphs.store(canvas)
    if masking is not None and graphs.ffn is not None:
        masking.graph_stop(graphs.ffn)
    ids = canvas.ids[:, : canvas.prompt_length + forwards]
    return Decoded(ids, forwards, canvas.commit_step[:, :forwards], "graph")


def _tell(clocks: list[StepClock], index: int, config: SamplerConfig) -> None:
    for clock in clocks:
        clock.graph_step(Step(index, config.gen_length, 0, index))


class _Loop:
    """One token per step for the `rows` [R] that are fed: rows that ended leave, if nobody needs them."""

    def __init__(
        self,
        lm: LanguageModel,
        prompt: Tensor,
        attention_mask: Tensor | None,
        config: SamplerConfig,
        observers: Observers,
    ) -> None:
        self.lm, self.config, self.observers = lm, config, observers
        self.generator = torch.Generator().manual_seed(config.seed)
        self.prompt_length = self.length = prompt.shape[1]
        total = self.length + config.gen_length
        self.stop_ids, self.fill = _end_ids(lm, config)
        self.ids = torch.nn.functional.pad(prompt, (0, config.gen_length), value=self.fill)
        self.mask = None
        self.positions = torch.arange(total, device=prompt.device)[None].expand(prompt.shape[0], -1)
        if attention_mask is not None and not bool(attention_mask.all()):
            self.mask = torch.nn.functional.pad(attention_mask, (0, config.gen_length), value=1)
            self.positions = rotary_positions(self.mask)
        self.cache = lm.transformer.new_cache(prompt.shape[0], total)
        self.rows = torch.arange(prompt.shape[0], device=prompt.device)
        self._rows_leave = isinstance(self.cache, KVCache) and rows_may_leave(lm, observers)
        self.finished = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        self.commit_step = torch.full_like(self.ids[:, self.prompt_length :], -1)
        self.forwards = 0
        for observer in observers:
            observer.on_start(self.ids, self._classes(0, total))

    def run_step(self, step: Step) -> None:
        """One forward over what is not cached yet, one token per row."""
        logits = self._forward(step, 0 if step.index == 0 else self.length - 1, self.cache)
        self.forwards += 1
        # Once more, if need be, from the start: transformers' caches would hold the token twice.
        with locating(self.lm.transformer, lambda: self._forward(step, 0, None)):
            token, confidence = self._decide(logits, step)
        self._commit(token, confidence, step)

    def _forward(self, step: Step, start: int, cache: Any) -> Tensor:
        """Logits [R, 1, V] behind the last token; what is before `start` is in the cache."""
        window = slice(start, self.length)
        context = StepContext(step, self._classes(start, self.length)[self.rows], start)
        mask = None if self.mask is None else self.mask[self.rows, : self.length]
        return self.lm.transformer(  # type: ignore[no-any-return]
            self.ids[self.rows, window],
            start=start,
            attention_mask=mask,
            positions=self.positions[self.rows, window],
            cache=cache,
            rows=slice(-1, None),
            context=context,
        )

    def _decide(self, logits: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        uniform = None
        if self.config.temperature > 0:
            # Drawn for all rows: those that left change nobody's numbers.
            shape = (len(self.ids), *logits.shape[1:])
            drawn = torch.rand(shape, dtype=torch.float64, generator=self.generator)
            uniform = drawn[self.rows.cpu()].to(logits.device)
        token = choose_tokens(logits, self.config.temperature, uniform)
        check_finite(logits, token, step)
        return token.squeeze(1), token_probabilities(logits, token, torch.float32).squeeze(1)

    def _commit(self, token: Tensor, confidence: Tensor, step: Step) -> None:
        fresh = ~self.finished
        self.ids[self.rows, self.length] = torch.where(fresh[self.rows], token, self.fill)
        self.commit_step[fresh, self.length - self.prompt_length] = step.index
        if self.config.stop_at_eos:
            self.finished[self.rows] |= torch.isin(token, self.stop_ids)
        if self.observers:
            committed = torch.zeros_like(self.ids, dtype=torch.bool)
            committed[:, self.length] = fresh
            whole = torch.full(self.ids.shape, -torch.inf, device=self.ids.device)
            whole[self.rows, self.length] = confidence
            for observer in self.observers:
                observer.on_step(step, StepResult(self.ids, committed, whole))
        self.length += 1
        if self.config.stop_at_eos and self._rows_leave:
            self._leave()

    def _leave(self) -> None:
        awake = (~self.finished[self.rows]).nonzero().squeeze(1)
        if 0 < len(awake) < len(self.rows):
            self.rows, self.cache = self.rows[awake], self.cache.take(awake)

    def _classes(self, start: int, stop: int) -> Tensor:
        """The token fed to a decoding step was committed by the step before; rows that ended are padding."""
        classes = torch.full(
            (self.ids.shape[0], stop - start), TokenClass.DECODED, dtype=torch.int8, device=self.ids.device
        )
        if start < self.prompt_length:
            classes[:, : self.prompt_length - start] = TokenClass.PROMPT
            classes[:, self.prompt_length - start :] = TokenClass.MASKED
        else:
            classes[:, -1] = TokenClass.COMMITTED
            classes[self.finished, -1] = TokenClass.PADDING
        if self.mask is not None:
            classes[self.mask[:, start:stop] == 0] = TokenClass.PADDING
        return classes


def _end_ids(lm: LanguageModel, config: SamplerConfig) -> tuple[Tensor, int]:
    """The ids that end a row, and the id finished rows are filled with."""
    fill = next((token for token in (lm.config.pad_token_id, end_of_text(lm, config)) if token is not None), 0)
    return torch.tensor(ends_of_text(lm, config), dtype=torch.int64, device=lm.device), fill
