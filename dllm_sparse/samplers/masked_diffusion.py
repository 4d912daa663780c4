"""The ONE denoising loop: semi-autoregressive blocks, with Fast-dLLM's caches; what a step commits is a rule's choice.

Token- and forward-identical in fp32 to the official LLaDA sampler (cache "none", quota), to Fast-dLLM's three
(confidence_dtype "float64"), to Dream's (its rules, whole canvas) and to Fast-dLLM's for Dream (single rows: the same
rules behind a cache, "maskgit_plus" with a threshold), random numbers included. Caches are approximations; they change
tokens. Fast-dLLM's loop for Dream is left where it need not end (a model that chooses the mask token behind a cache),
feeds blocks of one token twice, or leaves masks in blocks of one step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dllm_sparse.engine.observing import GraphableObserver, StepClock, rows_may_leave
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Canvas, Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.dream_rules import BudgetRule, TimestepRule
from dllm_sparse.samplers.graph_buffers import kept_graphs, on_device
from dllm_sparse.samplers.graph_steps import DiffusionGraphs, graphable
from dllm_sparse.samplers.remasking import ConfidenceRule, Rule, ends_of_text, leads
from dllm_sparse.samplers.schedule import transfer_counts
from dllm_sparse.samplers.steps import Steps
from dllm_sparse.types import Observers, Step


def denoise(
    lm: LanguageModel, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig, observers: Observers
) -> Decoded:
    """Decodes `gen_length` masks behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding.

    Source: LLaDA (arXiv 2502.09992), alg. 4 and app. B.4; Fast-dLLM (arXiv 2505.22618), sec. 3; Dream (2508.15487).
    """
    assert lm.mask_token_id is not None
    canvas = Canvas(prompt, attention_mask, config.gen_length, lm.mask_token_id)
    for observer in observers:
        observer.on_start(canvas.ids, canvas.token_class())
    planned = config.gen_length if not config.by_quota else config.blocks * config.steps_per_block
    as_graphs, masking = graphable(lm, config, observers, planned)
    # Masks in the prompt compete too: which rows need logits is then known only step by step.
    if as_graphs and not bool(canvas.masked()[:, : canvas.prompt_length].any()):
        with lm.graphs_lock, on_device(lm):
            decoded = _GraphLoop(lm, canvas, config, observers, masking).decode()
        if decoded is not None:
            return decoded
        canvas = Canvas(prompt, attention_mask, config.gen_length, lm.mask_token_id)
    loop = _Loop(lm, canvas, config, observers)
    for block in range(config.blocks):
        loop.run_block(block)
        loop.gather()
        if config.stop_at_eos and canvas.end_rows(loop.rule.ends, block_end(canvas, config, block)):
            break
    return Decoded(canvas.ids, loop.forwards, canvas.commit_step)


def block_end(canvas: Canvas, config: SamplerConfig, block: int) -> int:
    """The canvas position behind a block."""
    return canvas.prompt_length + (block + 1) * config.block_length


class _GraphLoop:
    """The same steps as `_Loop`, each one replay of a captured graph; the host waits for nothing but a threshold.

    There it reads one flag a row and step. To launch the next step before would be exact, but it would feed a finished
    block for nothing once per block, which costs more than the gaps between launches.
    """

    def __init__(
        self,
        lm: LanguageModel,
        canvas: Canvas,
        config: SamplerConfig,
        observers: Observers,
        masking: GraphableObserver | None,
    ) -> None:
        self.clocks = [observer for observer in observers if isinstance(observer, StepClock)]
        self.canvas, self.config, self.masking = canvas, config, masking
        self.ends, self.lead = ends_of_text(lm, config), leads(lm, config)
        choice = (config.threshold, config.factor, config.by_budget, config.confidence_dtype)
        rules = (config.cache, config.block_length, *choice)
        key = ("diffusion", tuple(canvas.ids.shape), canvas.padded, rules, masking.graph_key() if masking else None)
        ffn = masking.graph_ffn if masking else None
        self.graphs = kept_graphs(lm, key, lambda: DiffusionGraphs(lm, canvas, config, ffn))
        self.leaves = rows_may_leave(lm, observers)
        self.ended = [False] * len(canvas.ids)
        self.forwards = 0

    def decode(self) -> Decoded | None:
        """Runs all blocks; None where the model chose the mask token, whose position goes on competing later."""
        graphs, canvas, config = self.graphs, self.canvas, self.config
        graphs.load(canvas)
        for block in range(config.blocks):
            self._run_block(block)
            if config.stop_at_eos:
                graphs.store(canvas)
                if canvas.end_rows(self.ends, block_end(canvas, config, block)):
                    break
                graphs.take(canvas)
                self.ended = canvas.ended.tolist()
        else:
            graphs.store(canvas)
        if bool(graphs.masks_won):
            return None
        if self.masking is not None and graphs.ffn is not None:
            self.masking.graph_stop(graphs.ffn)
        return Decoded(canvas.ids, self.forwards, canvas.commit_step, "graph")

    def _run_block(self, block: int) -> None:
        config, length = self.config, self.canvas.ids.shape[1]
        begin = self.canvas.prompt_length + block * config.block_length
        left = (config.blocks - block) * config.steps_per_block
        self.graphs.begin_block(self.ended, left, leave=self.leaves)
        for index, quota in enumerate(self._quotas()):
            cached = config.cache != "none" and index > 0
            start = begin if cached else 0
            stop = begin + config.block_length if cached and config.cache == "dual" else length
            leading = self.lead and index == 0
            competing = 1 if leading else config.block_length
            self.graphs.run(start, stop, begin, competing, quota)
            for clock in self.clocks:
                clock.graph_step(Step(self.forwards, config.blocks * config.steps_per_block, block, index))
            self.forwards += 1
            if config.by_quota or leading:
                continue
            resting = self.graphs.resting_rows()
            if all(resting):
                return
            if self.leaves:
                self.graphs.leave(resting, left - index, keep_cache=self.graphs.cached)

    def _quotas(self) -> Sequence[int | None]:
        """What a row commits in each step of a block, or may under a budget; None where confidence alone decides."""
        config, length = self.config, self.config.block_length
        if config.by_budget:
            planned = transfer_counts(length, config.steps or 1)
            return [*planned, *[0] * length][:length]
        if not config.by_quota:
            return [None] * length
        quotas = transfer_counts(length, config.steps_per_block, lead=self.lead)
        if config.early_block_exit or config.cache != "none":
            quotas = [quota for quota in quotas if quota]
        return quotas


def rule_of(lm: LanguageModel, config: SamplerConfig) -> Rule:
    """The rule a config asks for."""
    if config.by_budget:
        return BudgetRule(lm, config)
    return TimestepRule(lm, config) if config.by_timesteps else ConfidenceRule(lm, config)


class _Loop(Steps):
    """Runs blocks of one canvas under bidirectional attention."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, config: SamplerConfig, observers: Observers) -> None:
        super().__init__(lm, canvas, config, observers, rule_of(lm, config))
        if config.cache != "none":
            self.use_cache()

    def run_block(self, block: int) -> None:
        """Decodes one block, left to right in blocks."""
        self.begin_block()
        config, canvas = self.config, self.canvas
        end = block_end(canvas, config, block)
        begin = end - config.block_length
        self.block = begin, end
        self.rule.start_block(canvas.masked()[:, begin:end].sum(-1).tolist())
        # Every step decides one competing position at least; a model that predicts the mask token must not loop on.
        competing = int(canvas.masked()[:, :end].sum(-1).max())
        for index in range(config.steps_per_block if config.by_quota else competing):
            if self.rule.spent(index) or (self._may_exit() and not bool(self.canvas.masked()[:, begin:end].any())):
                return
            if not config.by_quota:  # a planned block ends for all rows at once
                self.leave(end)
            step = Step(self.index, config.blocks * config.steps_per_block, block, index)
            self._run_step(step, begin, end)
            self.index += 1

    def _may_exit(self) -> bool:
        """LLaDA's plain loop runs its planned steps even when nothing is left to decode; the others stop."""
        unplanned = not (self.config.by_quota or self.config.by_budget)
        return self.config.early_block_exit or self.cache is not None or unplanned

    def _run_step(self, step: Step, begin: int, end: int) -> None:
        canvas, config = self.canvas, self.config
        cached = self.cache is not None and step.index_in_block > 0
        start = begin if cached else 0
        stop = end if cached and config.cache == "dual" else canvas.ids.shape[1]
        eligible = canvas.masked()[:, start:end]  # masks in the prompt compete too, as in LLaDA
        if self.rule.lead and step.index_in_block == 0:
            eligible[:, : begin - start] = eligible[:, begin + 1 - start :] = False
        self.take(step, start, stop, eligible)
