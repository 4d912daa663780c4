"""Decoding from uniform noise, with no mask token: transformers' own loop and sampler, watched step by step.

DiffusionGemma denoises canvases of fixed length one after the other. At every step the decoder predicts the whole
canvas, its entropy-bound sampler (arXiv 2505.24857) accepts the surest positions and draws all others anew; the canvas
ends after its steps, or when the prediction is stable and sure, as the most likely tokens. Then the encoder reads it.
Ids are those of transformers' `generate` after `torch.manual_seed(seed)`.

Classes of the canvas before a step: MASKED holds noise, COMMITTED a token accepted by the step before for the first
time in a row, DECODED one accepted longer. What the encoder reads belongs to the step that follows: the prompt, and
finished canvases as DECODED. Rows that ended are PADDING: transformers goes on computing them, and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.models.finite import locating, not_finite_logits
from dllm_sparse.models.hooked_denoiser import HookedDenoiser
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.canvas import Decoded
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.types import Observers, Step, StepContext, StepResult, TokenClass, UsageError

_USED = ("gen_length", "steps", "block_length", "execution", "eos_token_id", "stop_at_eos", "early_block_exit", "seed")
"""Sampler options with a meaning here. Ends of text always stop a row, and a canvas that has converged its steps."""


def fitted(lm: LanguageModel, config: SamplerConfig) -> SamplerConfig:
    """The options as the loop takes them: whole canvases as blocks, the checkpoint's own steps where none are given.

    `gen_length` is rounded up to whole canvases. Raises UsageError for options that transformers' sampler has not.
    """
    plain, canvas = SamplerConfig(), lm.transformer.config.canvas_length  # type: ignore[attr-defined]
    given, defaults = config.to_dict(), plain.to_dict()
    if unused := [name for name in given if name not in _USED and given[name] != defaults[name]]:
        raise UsageError(
            f"{', '.join(unused)}: not options of {lm.name}, which is denoised by transformers' own sampler; "
            "gen_length, steps, eos_token_id and seed are"
        )
    if config.execution == "graph":
        raise UsageError("execution 'graph' cannot run this: the model runs through transformers; use execution 'auto'")
    if config.block_length not in (plain.block_length, canvas):
        raise UsageError(f"block_length is {config.block_length}; the canvas of {lm.name} is {canvas} tokens")
    length = math.ceil(config.gen_length / canvas) * canvas
    assert isinstance(lm.transformer, HookedDenoiser)
    steps = config.steps or lm.transformer.generation_config().max_denoising_steps * (length // canvas)
    config = replace(config, gen_length=length, block_length=canvas, steps=steps)
    config.check_blocks()
    return config


def denoise_uniform(
    lm: LanguageModel, prompt: Tensor, attention_mask: Tensor | None, config: SamplerConfig, observers: Observers
) -> Decoded:
    """Decodes canvases behind prompt [B, P] int64; `attention_mask` [B, P] is 0 on left padding.

    Ends early once every row holds an end of text. `forward_passes` counts the encoder's, too. A position's commit step
    is the last at which it became accepted, or the canvas's last.
    """
    network = lm.transformer
    assert isinstance(network, HookedDenoiser)
    options: dict[str, Any] = {
        "max_new_tokens": config.gen_length,
        "max_denoising_steps": config.steps_per_block,
        "disable_compile": True,  # taps are Python
        "return_dict_in_generate": False,
    }
    if config.eos_token_id is not None:
        options["eos_token_id"] = config.eos_token_id
    watch = _Watch(network, prompt, attention_mask, config, observers, network.generation_config(**options))
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    with network.watched(watch.encoding, watch.denoising), _seeded(config.seed), watch.finite_logits():
        ids = network.model.generate(prompt, **options)  # type: ignore[operator]
    return Decoded(ids, watch.forwards, watch.commit_step[:, : ids.shape[1] - prompt.shape[1]])


class _Watch:
    """Follows transformers' loop: which positions are accepted, which rows ended, and what the step is."""

    def __init__(
        self,
        network: HookedDenoiser,
        prompt: Tensor,
        mask: Tensor | None,
        config: SamplerConfig,
        observers: Observers,
        settings: Any,
    ) -> None:
        self.network, self.config, self.observers = network, config, observers
        self.prompt_length, self.length = prompt.shape[1], config.block_length
        ends = settings.eos_token_id if settings.eos_token_id is not None else []
        self.ends = torch.tensor(ends, device=prompt.device, dtype=torch.int64).flatten()
        fill = settings.pad_token_id if settings.pad_token_id is not None else 0
        self.ids = torch.nn.functional.pad(prompt, (0, config.gen_length), value=fill)
        self.classes = torch.full_like(self.ids, TokenClass.MASKED, dtype=torch.int8)
        self.classes[:, : self.prompt_length] = TokenClass.PROMPT
        if mask is not None:
            self.classes[:, : self.prompt_length][mask == 0] = TokenClass.PADDING
        self.commit_step = torch.full_like(self.ids[:, self.prompt_length :], -1)
        self.ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        self.accepted = torch.zeros(len(prompt), self.length, dtype=torch.bool, device=prompt.device)
        self.index = self.forwards = self.index_in_block = 0
        self.block = -1
        for observer in observers:
            observer.on_start(self.ids, self.classes)

    @property
    def step(self) -> Step:
        total = self.config.blocks * self.config.steps_per_block
        return Step(self.index, total, self.block, self.index_in_block)

    @property
    def window(self) -> slice:
        """The canvas that is being denoised."""
        start = self.prompt_length + self.block * self.length
        return slice(start, start + self.length)

    def encoding(self, ids: Tensor) -> StepContext:
        """Before the encoder reads the prompt, or the canvas [B, C] that was finished last."""
        read = slice(0, self.prompt_length)
        if self.block >= 0:
            read = self.window
            self._finish(ids)
        self.block, self.index_in_block = self.block + 1, 0
        self.accepted = torch.zeros_like(self.accepted)
        self.classes[:, self.window] = TokenClass.MASKED
        self.classes[self.ended, self.window] = TokenClass.PADDING
        self.forwards += 1
        return StepContext(self.step, self.classes[:, read].clone(), read.start)

    def denoising(self, run: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One step of transformers' loop, and what it decided."""
        resting = arguments["finished_denoising"] | self.ended
        step, classes = self.step, self.classes[:, self.window].clone()
        window = self.window.start, self.window.stop
        context = StepContext(step, classes, self.window.start, block=window)
        with self.network.running(context), locating(self.network, partial(run, **arguments)):
            result = run(**arguments)
        _, draft, _, finished = result
        last = finished | (self.index_in_block + 1 == self.config.steps_per_block)
        accepted = arguments["sampler"].accepted_token_mask
        committed = (accepted | last[:, None]) & ~self.accepted & ~resting[:, None]
        self.accepted = torch.where(resting[:, None], self.accepted, accepted)
        self._note(step, draft, committed, resting | last)
        self.index, self.index_in_block, self.forwards = self.index + 1, self.index_in_block + 1, self.forwards + 1
        return result

    def _note(self, step: Step, draft: Tensor, committed: Tensor, resting: Tensor) -> None:
        """Keeps the draft [B, C] and what was committed; tells the observers."""
        window = self.window
        self.ids[:, window] = draft
        places = slice(window.start - self.prompt_length, window.stop - self.prompt_length)
        self.commit_step[:, places][committed] = step.index
        classes = torch.where(self.accepted, TokenClass.DECODED, TokenClass.MASKED)
        classes[committed & self.accepted] = TokenClass.COMMITTED
        classes[resting] = TokenClass.PADDING
        self.classes[:, window] = classes.to(torch.int8)
        whole = torch.zeros_like(self.ids, dtype=torch.bool)
        whole[:, window] = committed
        for observer in self.observers:
            observer.on_step(step, StepResult(self.ids, whole))

    def _finish(self, ids: Tensor) -> None:
        """Takes over the canvas as it was left: behind an end of text nothing counts."""
        self.ids[:, self.window] = ids
        ends = torch.isin(ids, self.ends)
        after = ends.cumsum(-1) - ends.long() > 0
        classes = torch.full_like(ids, TokenClass.DECODED, dtype=torch.int8)
        classes[after | self.ended[:, None]] = TokenClass.PADDING
        self.classes[:, self.window] = classes
        self.ended |= ends.any(-1)

    @contextmanager
    def finite_logits(self) -> Iterator[None]:
        """Raises NonFiniteActivations where the head gives NaN or +Inf: drawing from them ends in a stranger error."""

        def check(module: Any, arguments: Any, logits: Tensor) -> None:
            if not bool(torch.isfinite(logits.amax())):
                raise not_finite_logits(self.index)

        handle = self.network.model.get_output_embeddings().register_forward_hook(check)  # type: ignore[operator]
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """transformers draws from torch's global generators: seeded inside the block, as they were afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
