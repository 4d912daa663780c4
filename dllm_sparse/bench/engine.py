"""`bench engine`: times the public `generate` on one workload and sets it beside the floor of every forward it ran.

Whole generations are timed unobserved; an observer that only marks the end of each step then gives the time per kind
of forward. Nothing of the loop is re-implemented here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.bench.components import component_milliseconds
from dllm_sparse.bench.floors import Fed, Rates, bound_by, floor_seconds, forward_costs, total
from dllm_sparse.bench.machine import machine, peak_memory, reset_peak_memory
from dllm_sparse.bench.timing import Stopwatch, Timing
from dllm_sparse.engine.observing import StepClock
from dllm_sparse.generation import Generation, generate
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.loops import fitted
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.types import Step, StepResult, UsageError

SCHEMA = "dllm-sparse/bench-engine@1"
COUNT_RULE = (
    "tokens/s counts generated tokens before the first end-of-text of each row; canvas tokens/s counts every generated "
    "position; prompts never count, prefill time always does"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWorkload:
    """What is generated how often: `batch` random prompts of `prompt_length` tokens, after one run to warm up."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    sparsity: SparsityConfig | None = None
    batch: int = 1
    prompt_length: int = 128
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_length", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {name: getattr(self, name) for name in ("batch", "prompt_length", "repeats")}
        sparsity = self.sparsity.to_dict() if self.sparsity is not None else None
        return {**values, "sampler": self.sampler.to_dict(), "sparsity": sparsity}


def bench_engine(lm: LanguageModel, workload: EngineWorkload, rates: Rates) -> dict[str, Any]:
    """One row of results, JSON-ready: seconds, ms per forward, tokens/s, steps beside their floors, memory, components.

    Steps and components are those of the native engine; a model that runs through transformers is timed as a whole.
    Raises UsageError when the workload does not fit the model.
    """
    workload = replace(workload, sampler=fitted(lm, workload.sampler))
    prompts = random_prompts(lm, workload)
    run = partial(generate, lm, prompt_ids=prompts, sampler=workload.sampler, sparsity=workload.sparsity)
    first = run()
    reset_peak_memory(lm.device)
    runs = [run() for _ in range(workload.repeats)]
    memory = peak_memory(lm.device)
    native = lm.engine == "native"
    steps = _step_rows(lm, workload, rates, run) if native else []
    marked = first.execution == "eager" and native
    components = component_milliseconds(lm, lambda: run().forward_passes) if marked else None
    return {
        "model": lm.name,
        "kind": lm.kind,
        "parameters": lm.config.parameters,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **workload.to_dict(),
        "execution": first.execution,
        "measured_sparsity": first.sparsity,
        "exploitable": first.sparsity_report.get("exploitable"),
        "forwards": runs[0].forward_passes,
        "first_seconds": first.seconds,  # compiling, capturing and allocating included
        "seconds": Timing.of([out.seconds for out in runs]).to_dict(),
        "ms_per_forward": Timing.of([out.seconds * 1e3 / out.forward_passes for out in runs]).to_dict(),
        "tokens_per_second": Timing.of([out.tokens_per_second for out in runs]).to_dict(),
        "canvas_tokens_per_second": Timing.of([out.canvas_tokens_per_second for out in runs]).to_dict(),
        "count_rule": COUNT_RULE,
        "steps": steps,
        "components_ms_per_forward": components,
        "peak_memory_bytes": memory,
        "rates": {"bandwidth": rates.bandwidth, "flops": rates.flops, "source": rates.source},
        "machine": machine(lm.device),
    }


def random_prompts(lm: LanguageModel, workload: EngineWorkload) -> Tensor:
    """Ids [batch, prompt_length] of ordinary tokens: never a mask, an end or a padding."""
    config = lm.config
    special = {config.mask_token_id, config.bos_token_id, config.eos_token_id, config.eot_token_id}
    special |= {config.pad_token_id, *config.stop_token_ids}
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 1 << 15)) if token not in special])
    generator = torch.Generator().manual_seed(workload.sampler.seed)
    places = torch.randint(len(ordinary), (workload.batch, workload.prompt_length), generator=generator)
    return ordinary[places]


class _Clock(StepClock):
    """Marks the end of every step; reads nothing."""

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self._steps: list[Step] = []

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        self._watch.mark()

    def on_step(self, step: Step, result: StepResult) -> None:
        self.graph_step(step)

    def graph_step(self, step: Step) -> None:
        self._watch.mark()
        self._steps.append(step)

    def times(self) -> list[tuple[Step, float]]:
        """Every step with its milliseconds."""
        return [(step, self._watch.milliseconds(n, n + 1)) for n, step in enumerate(self._steps)]


def _step_rows(
    lm: LanguageModel, workload: EngineWorkload, rates: Rates, run: Callable[..., Generation]
) -> list[dict[str, Any]]:
    """Per kind of forward: how many, tokens fed, ms, floor, share of the floor reached, and what bounds it."""
    times: dict[str, list[float]] = {}
    fed: dict[str, list[Fed]] = {}
    for _ in range(workload.repeats):
        clock = _Clock(lm.device)
        run(observers=(clock,))
        for step, milliseconds in clock.times():
            kind, shape = forward_of(lm, workload, step)
            times.setdefault(kind, []).append(milliseconds)
            fed.setdefault(kind, []).append(shape)
    element = torch.empty((), dtype=lm.dtype).element_size()
    rows = []
    for kind, values in times.items():
        costs = [total(forward_costs(lm.config, shape, element)) for shape in fed[kind]]
        floor = fmean(floor_seconds(cost, rates) for cost in costs) * 1e3
        timing = Timing.of(values)
        rows.append(
            {
                "forward": kind,
                "per_generation": len(values) // workload.repeats,
                "tokens": fmean(shape.batch * shape.tokens for shape in fed[kind]),
                "ms": timing.to_dict(),
                "floor_ms": floor,
                "share_of_floor": floor / timing.median,
                "bound": bound_by(costs[-1], rates),
                "bytes": fmean(cost.bytes for cost in costs),
                "flops": fmean(cost.flops for cost in costs),
            }
        )
    return rows


def forward_of(lm: LanguageModel, workload: EngineWorkload, step: Step) -> tuple[str, Fed]:
    """The kind and shape of the forward a step runs.

    prefill: the prompt of an autoregressive model; decode: one token behind it; full: the whole canvas; cached: the
    block (dual cache) or the block and all behind it (prefix cache).
    """
    sampler, prompt = workload.sampler, workload.prompt_length
    rows = workload.batch * (2 if lm.kind == "diffusion" and sampler.cfg_scale > 0 else 1)
    if lm.kind == "autoregressive":
        if step.index == 0:
            return "prefill", Fed(rows, prompt, prompt, 1, causal=True)
        return "decode", Fed(rows, 1, prompt + step.index, 1, causal=True)
    canvas, block = prompt + sampler.gen_length, sampler.block_length
    if sampler.cache == "none" or step.index_in_block == 0:
        return "full", Fed(rows, canvas, canvas, block)
    tokens = block if sampler.cache == "dual" else sampler.gen_length - step.block * block
    return "cached", Fed(rows, tokens, canvas, block)
