"""`bench engine`: times the public `generate` on one workload and sets it beside the floor of every forward it ran.

Whole generations are timed unobserved; an observer that only marks the end of each step then gives the time per kind
of forward. Nothing of the loop is re-implemented here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from dllm_sparse.bench.components import component_milliseconds
from dllm_sparse.bench.floors import Rates
from dllm_sparse.bench.machine import machine, peak_memory, reset_peak_memory
from dllm_sparse.bench.steps import step_rows
from dllm_sparse.bench.timing import Timing
from dllm_sparse.bench.workload import EngineWorkload, random_prompts
from dllm_sparse.generation import generate
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.loops import fitted

SCHEMA = "dllm-sparse/bench-engine@1"
COUNT_RULE = (
    "tokens/s counts generated tokens before the first end-of-text of each row; canvas tokens/s counts every generated "
    "position; prompts never count, prefill time always does"
)


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
    unions = {int(size): sites for size, sites in first.sparsity_report.get("exploitable_by_tokens", {}).items()}
    steps = step_rows(lm, workload, rates, run, unions) if native else []
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
