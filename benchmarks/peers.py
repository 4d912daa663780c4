"""What the side-by-side scripts share: one workload, our model, the other project's weights, turns, the ratio.

Both sides run in one process on the same weights: the other model is built without memory of its own and gets views of
ours. Runs take turns; seconds are medians over the repeats with 20 and 80 % quantiles.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.bench.machine import machine
from dllm_sparse.bench.timing import Timing, time_calls
from dllm_sparse.bench.workload import EngineWorkload, random_prompts
from dllm_sparse.files import write_json
from dllm_sparse.models.families import FAMILIES
from dllm_sparse.models.loading import NoInitialValues, random_model
from dllm_sparse.models.weights import expected_slots

Run = Callable[[], tuple[Tensor, int]]
"""One generation: ids [B, P + generated] and how many forwards it took."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all scripts have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = options.add_mutually_exclusive_group(required=True)
    weights.add_argument("--shape", help="random weights of this shape, e.g. llada-8b")
    weights.add_argument("--model", help="a checkpoint folder, alias or hub id")
    options.add_argument("--prompt-length", type=int, default=512)
    options.add_argument("--gen-length", type=int, default=128)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--execution", default="auto", choices=("auto", "eager", "graph"), help="ours")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--out", type=Path, help="JSON file")
    return options


def our_model(args: argparse.Namespace) -> ds.LanguageModel:
    if args.shape:
        return random_model(args.shape, device=args.device, dtype=args.dtype)
    return ds.load(args.model, device=args.device, dtype=args.dtype)


def our_run(
    lm: ds.LanguageModel, args: argparse.Namespace, sampler: ds.SamplerConfig
) -> tuple[Run, Tensor, dict[str, Any]]:
    """Our generation of the workload, its prompts on the model's device, and the workload for the record."""
    sampler = replace(sampler, execution=args.execution)
    workload = EngineWorkload(
        sampler=sampler,
        batch=args.batch,
        prompt_length=args.prompt_length,
        repeats=args.repeats,
    )
    prompts = random_prompts(lm, workload)

    def run() -> tuple[Tensor, int]:
        out = ds.generate(lm, prompt_ids=prompts, sampler=sampler)
        return out.ids, out.forward_passes

    return run, prompts.to(lm.device), workload.to_dict()


def share_weights(lm: ds.LanguageModel, family: str, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The other project's model, made on the meta device, with our parameters under the checkpoint's names.

    Buffers that are no weights stay empty: the caller makes them. A model that insists on a CPU gets pages that nobody
    ever touches, since nothing is initialised.
    """
    with torch.device("meta"), NoInitialValues():
        model = build()
    state = dict(expected_slots(lm.transformer, FAMILIES[family]))
    if lm.config.tied:  # one matrix under two names, of which the other model may know one
        state = {key: value for key, value in state.items() if key in model.state_dict()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    left = [name for name, _ in model.named_parameters() if name in missing]
    if unexpected or left:
        raise SystemExit(f"the other model does not take these weights: unknown {unexpected}, empty {left}")
    return model.requires_grad_(False).eval()


def import_from(folder: Path, module: str, package: str) -> ModuleType:
    """`folder/module.py` of a checkout as `package.module`, so that its relative imports work. Runs its code."""
    if not (folder / f"{module}.py").is_file():
        raise SystemExit(f"{folder} has no {module}.py; give the folder of a checkout")
    spec = importlib.util.spec_from_loader(package, loader=None, is_package=True)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    made.__path__ = [str(folder)]
    sys.modules[package] = made
    return importlib.import_module(f"{package}.{module}")


def race(
    ours: Run,
    theirs: dict[str, Run],
    lm: ds.LanguageModel,
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Times all sides in turn, prints and saves milliseconds per forward, the ratio, and whether they agree."""
    sides = {"ours": ours, **theirs}
    answers = {name: run() for name, run in sides.items()}  # also compiles and warms up
    timings = time_calls(sides, lm.device, repeats=args.repeats, warm_up=1)
    ids, forwards = answers["ours"]
    rows = {}
    for name, timing in timings.items():
        their_ids, their_forwards = answers[name]
        rows[name] = {
            "ms": timing.to_dict(),
            "forwards": their_forwards,
            "ms_per_forward": scaled(timing, their_forwards),
            "ratio_to_ours": timing.median / timings["ours"].median,
            "same_forwards": their_forwards == forwards,
            "same_tokens": agreement(ids, their_ids.cpu(), args.prompt_length),
        }
    result = {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **facts,
        "sides": rows,
        "machine": machine(lm.device),
    }
    for name, row in rows.items():
        per_forward = Timing(**row["ms_per_forward"]).text()
        print(
            f"{name}: {Timing(**row['ms']).text(1)} ms, {row['forwards']} forwards, {per_forward} ms each, "
            f"{row['ratio_to_ours']:.2f}x our time, {row['same_tokens']:.1%} of our tokens"
        )
    if args.out:
        write_json(args.out, result)
    return result


def scaled(timing: Timing, forwards: int) -> dict[str, float | int]:
    return Timing(timing.median / forwards, timing.low / forwards, timing.high / forwards, timing.samples).to_dict()


def agreement(ids: Tensor, others: Tensor, prompt_length: int) -> float:
    """Share of generated positions that hold the same token."""
    width = min(ids.shape[1], others.shape[1])
    return float((ids[:, prompt_length:width] == others[:, prompt_length:width]).double().mean())
