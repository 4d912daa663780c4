"""Which GPU kernels the captured steps of a block take their time in, by the profiler.

    python benchmarks/step_kernels.py --shape llada-8b --batch 8 [--prompt-length 608] [--block-length 32] [--out FILE]

One block is generated behind a dual cache: one full forward and one cached step per further token. The profiler counts
a kernel that starts early (programmatic dependent launch) from its start, waiting included, so that the sum is a few
percent above the time of the steps.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import dllm_sparse as ds
from dllm_sparse.bench.machine import machine
from dllm_sparse.bench.workload import EngineWorkload, random_prompts
from dllm_sparse.files import write_json
from dllm_sparse.models.loading import random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llada-8b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=608)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = random_model(args.shape, device="cuda")
    sampler = ds.SamplerConfig(gen_length=args.block_length, block_length=args.block_length, cache="dual")
    workload = EngineWorkload(sampler=sampler, batch=args.batch, prompt_length=args.prompt_length)
    run = partial(ds.generate, lm, prompt_ids=random_prompts(lm, workload), sampler=sampler)
    for _ in range(2):  # captures, then runs as it will
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    rows = [
        {"kernel": event.key, "launches": event.count, "milliseconds": event.self_device_time_total / 1e3}
        for event in sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    ]
    for row in rows[:20]:
        each = row["milliseconds"] / max(row["launches"], 1) * 1e3
        print(f"{row['milliseconds']:9.3f} ms {row['launches']:6d} x {each:7.1f} us  {row['kernel'][:90]}")
    if args.out:
        write_json(args.out, {"model": lm.name, **workload.to_dict(), "kernels": rows, "machine": machine(lm.device)})


if __name__ == "__main__":
    main()
