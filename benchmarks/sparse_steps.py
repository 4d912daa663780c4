"""What masks buy in whole steps on a GPU: dense and sparse generations of the same random weights, in one process.

    python benchmarks/sparse_steps.py --out benchmarks/results/sparse_steps_h200.json [--shape smollm2-135m]

Prompts of 512 random tokens, bf16, greedy. Random weights keep channels as independent Gaussians would: a trained model
at the same density has more overlap between tokens, not less. One line a kind of forward: dense ms, sparse ms, their
ratio, the union density it ran at and what that density allows at most. The eager rows are the same model step by step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dllm_sparse as ds
from dllm_sparse.bench.engine import bench_engine
from dllm_sparse.bench.machine import rates
from dllm_sparse.bench.prediction import beside_dense
from dllm_sparse.bench.workload import EngineWorkload
from dllm_sparse.files import write_json
from dllm_sparse.models.loading import random_model


class Setting(NamedTuple):
    """One sampler, and the sparsities measured beside its dense run: (p, where)."""

    shape: str
    sampler: dict[str, Any]
    sparsities: tuple[tuple[float, Literal["everywhere", "faster"]], ...]


def dual(block: int, **more: Any) -> dict[str, Any]:
    return {"gen_length": 64, "block_length": block, "cache": "dual", **more}


SETTINGS = (
    Setting(
        "llama-3.1-8b",
        {"gen_length": 64},
        ((0.97, "faster"), (0.84, "everywhere"), (0.7, "everywhere"), (0.5, "everywhere")),
    ),
    Setting("llada-8b", dual(4), ((0.45, "everywhere"), (0.35, "everywhere"))),
    Setting("llada-8b", dual(8), ((0.33, "everywhere"), (0.27, "everywhere"))),
    Setting("llada-8b", dual(32), ((0.9, "faster"), (0.5, "faster"), (0.9, "everywhere"))),
    Setting("llada-8b", dual(32, execution="eager"), ()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="this shape instead of the two: for a dry run")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = list(measure(args.shape, args.prompt_length, args.repeats))
    if args.out:
        write_json(args.out, {"schema": "dllm-sparse/bench-sparse@2", "rows": rows})


def measure(shape: str | None, prompt_length: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per setting and sparsity, the dense one first; printed as they come."""
    lm, built = None, ""
    for setting in SETTINGS:
        if built != (shape or setting.shape):
            lm = None  # the old weights go before the new ones come
            built = shape or setting.shape
            lm = random_model(built)
        assert lm is not None
        dense: dict[str, Any] = {}
        for sparsity in (None, *(ds.SparsityConfig(p=p, where=where) for p, where in setting.sparsities)):
            sampler = ds.SamplerConfig(**setting.sampler)
            workload = EngineWorkload(sampler=sampler, sparsity=sparsity, prompt_length=prompt_length, repeats=repeats)
            row = bench_engine(lm, workload, rates(lm.device, lm.dtype))
            dense = dense or row
            row["beside_dense"] = beside_dense(dense, row)
            say(row)
            yield row


def say(row: dict[str, Any]) -> None:
    knobs = "dense" if row["sparsity"] is None else f"p {row['sparsity']['p']} {row['sparsity']['where']}"
    generation = row["ms_per_forward"]["median"]
    print(f"{row['model']}, block {row['sampler']['block_length']}, {row['execution']}, {knobs}: {generation:.2f} ms")
    for step in row["beside_dense"]:
        density = {site: round(value, 2) for site, value in (step["union_density"] or {}).items()}
        most = f", at most {step['predicted_speed_up']:.2f}x" if step["predicted_speed_up"] else ""
        print(f"  {step['forward']:<8} {step['ms']:7.3f} ms, {step['measured_speed_up']:.2f}x{most} {density or ''}")


if __name__ == "__main__":
    main()
