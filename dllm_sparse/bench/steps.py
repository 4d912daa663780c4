"""Which forward every step of a generation ran, how long it took, and the floor of that forward.

Observers watch the real loop: one marks the end of each step; in a run of its own, another counts the experts that the
tokens of each step chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dllm_sparse.bench.floors import Fed, Rates, bound_by, expected_experts, floor_seconds, forward_costs, total
from dllm_sparse.bench.prediction import NO_UNIONS, Unions, predicted_speed_up, union_density
from dllm_sparse.bench.timing import Stopwatch, Timing
from dllm_sparse.bench.workload import EngineWorkload
from dllm_sparse.engine.observing import StepClock
from dllm_sparse.generation import Generation
from dllm_sparse.kernels.routing import Routing
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.moe import Router
from dllm_sparse.types import Step, StepResult

Run = Callable[..., Generation]
"""Generates the workload under the `observers` it is given."""


class Ran(NamedTuple):
    """A step that ran; one that does not decide feeds tokens for their keys and values alone."""

    step: Step
    decides: bool = True


class _StepLog(StepClock):
    """Keeps the steps of one generation, in order; reads nothing from the device."""

    def __init__(self) -> None:
        self.ran: list[Ran] = []

    def on_step(self, step: Step, result: StepResult) -> None:
        self.note(Ran(step, result.confidence is not None))

    def graph_step(self, step: Step, *, decides: bool = True) -> None:
        self.note(Ran(step, decides))

    def note(self, ran: Ran) -> None:
        """A step ended, or was launched."""
        self.ran.append(ran)


class _Clock(_StepLog):
    """Marks the end of every step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._watch = Stopwatch(device)

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        self._watch.mark()

    def note(self, ran: Ran) -> None:
        super().note(ran)
        self._watch.mark()

    def times(self) -> list[tuple[Ran, float]]:
        """Every step with its milliseconds."""
        return [(ran, self._watch.milliseconds(n, n + 1)) for n, ran in enumerate(self.ran)]


class ExpertCount(_StepLog):
    """Counts the distinct experts that the tokens of each step chose: the mean over the layers that have experts.

    It hears the routers, in captured steps too, where its few operations are captured with them. They take time, so a
    timed run has none of it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self._lm = lm
        self._routers = [module for module in lm.transformer.modules() if isinstance(module, Router)]
        self._chosen = torch.zeros(len(self._routers), lm.config.experts, dtype=torch.bool, device=lm.device)
        self._counts: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block routers are heard; steps captured before or inside it are captured anew where needed."""
        with ExitStack() as undo:
            self._lm.graphs = None
            undo.callback(setattr, self._lm, "graphs", None)
            for chosen, router in zip(self._chosen, self._routers, strict=True):
                undo.callback(router.register_forward_hook(partial(_mark_chosen, chosen)).remove)
            yield

    def note(self, ran: Ran) -> None:
        super().note(ran)
        self._counts.append(self._chosen.sum() / len(self._routers))

    def counts(self) -> list[tuple[Ran, float]]:
        """Every step with its experts per layer."""
        return [(ran, float(count)) for ran, count in zip(self.ran, self._counts, strict=True)]


def _mark_chosen(chosen: Tensor, _router: nn.Module, _inputs: Any, routing: Routing) -> None:
    chosen.zero_().scatter_(0, routing.experts.flatten(), True)


def step_rows(
    lm: LanguageModel, workload: EngineWorkload, rates: Rates, run: Run, unions: Unions = NO_UNIONS
) -> list[dict[str, Any]]:
    """Per kind of forward: how many, tokens fed, ms, floor, share of the floor reached, and what bounds it.

    The floor is that of the dense forward; `unions` tell what a masked one could gain. The floor of a mixture counts
    the experts that were chosen, not those that random routing would choose.
    """
    times: dict[str, list[float]] = {}
    fed: dict[str, list[Fed]] = {}
    for _ in range(workload.repeats):
        clock = _Clock(lm.device)
        run(observers=(clock,))
        for ran, milliseconds in clock.times():
            kind, shape = forward_of(lm, workload, *ran)
            times.setdefault(kind, []).append(milliseconds)
            fed.setdefault(kind, []).append(shape)
    chosen = _chosen_experts(lm, workload, run)
    element = torch.empty((), dtype=lm.dtype).element_size()
    return [
        {
            **_row(lm, rates, kind, Timing.of(times[kind]), shapes, workload.repeats, chosen.get(kind)),
            "union_density": union_density(shapes, unions) if workload.sparsity else None,
            "predicted_speed_up": predicted_speed_up(lm.config, shapes, element, unions, rates),
        }
        for kind, shapes in fed.items()
    ]


def _row(
    lm: LanguageModel, rates: Rates, kind: str, timing: Timing, fed: list[Fed], repeats: int, experts: float | None
) -> dict[str, Any]:
    element = torch.empty((), dtype=lm.dtype).element_size()
    costs = [total(forward_costs(lm.config, shape, element, experts)) for shape in fed]
    floor = fmean(floor_seconds(cost, rates) for cost in costs) * 1e3
    moe, active = lm.config.moe, None
    if moe is not None and experts is not None:
        random = fmean(expected_experts(moe, shape.batch * shape.tokens) for shape in fed)
        active = {"measured": experts, "random_routing": random, "of": moe.experts}
    return {
        "forward": kind,
        "per_generation": timing.samples // repeats,
        "tokens": fmean(shape.batch * shape.tokens for shape in fed),
        "ms": timing.to_dict(),
        "floor_ms": floor,
        "share_of_floor": floor / timing.median,
        "bound": bound_by(costs[-1], rates),
        "bytes": fmean(cost.bytes for cost in costs),
        "flops": fmean(cost.flops for cost in costs),
        "active_experts": active,
    }


def _chosen_experts(lm: LanguageModel, workload: EngineWorkload, run: Run) -> dict[str, float]:
    """Experts chosen per layer, by kind of forward, in one more run of the workload; empty for a dense model."""
    if lm.config.moe is None:
        return {}
    counter = ExpertCount(lm)
    with counter.listening():
        run(observers=(counter,))
    found: dict[str, list[float]] = {}
    for ran, count in counter.counts():
        found.setdefault(forward_of(lm, workload, *ran)[0], []).append(count)
    return {kind: fmean(counts) for kind, counts in found.items()}


def forward_of(lm: LanguageModel, workload: EngineWorkload, step: Step, decides: bool = True) -> tuple[str, Fed]:
    """The kind and shape of the forward a step runs.

    Autoregressive: prefill, the prompt; decode, one token behind it. Bidirectional: full, the whole canvas; cached, the
    block (dual cache) or the block and all behind it (prefix cache). Block-causal: prefill, the whole blocks of the
    prompt; block, a denoising step, which feeds one block behind the cached ones; store, a finished block fed once more
    for its keys and values (`decides` False).
    """
    sampler, prompt = workload.sampler, workload.prompt_length
    rows = workload.batch * (2 if lm.kind == "diffusion" and sampler.cfg_scale > 0 else 1)
    if lm.kind == "autoregressive":
        if step.index == 0:
            return "prefill", Fed(rows, prompt, prompt, 1, block=1)
        return "decode", Fed(rows, 1, prompt + step.index, 1, block=1)
    if lm.config.block_length is not None:
        return _block_forward(rows, prompt, lm.config.block_length, step, decides)
    canvas, block = prompt + sampler.gen_length, sampler.block_length
    if sampler.cache == "none" or step.index_in_block == 0:
        return "full", Fed(rows, canvas, canvas, block)
    tokens = block if sampler.cache == "dual" else sampler.gen_length - step.block * block
    return "cached", Fed(rows, tokens, canvas, block)


def _block_forward(rows: int, prompt: int, length: int, step: Step, decides: bool) -> tuple[str, Fed]:
    """A forward of block diffusion, in blocks of `length` counted from the prompt's first token."""
    whole = prompt // length * length
    if not decides and step.index == 0:
        return "prefill", Fed(rows, whole, whole, 0, block=length)
    given = prompt - whole if step.block == 0 else 0
    seen = whole + (step.block + 1) * length
    return ("block" if decides else "store"), Fed(rows, length, seen, (length - given) * decides, block=length)
