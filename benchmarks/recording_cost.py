"""What recording costs: the same masked generation with and without a MaskRecorder, time and peak memory.

    python benchmarks/recording_cost.py --model FOLDER --out benchmarks/results/recording_cost.json

Every run is a fresh process on one thread; the two kinds take turns, and each kind's fastest run counts. Time is the
CPU time of the generation (on a shared machine the wall clock measures the neighbours), memory the peak resident set
of the generation alone: Linux forgets the peak of loading on request.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "Once upon a time, a small brown fox"


def run_once(arguments: argparse.Namespace) -> dict[str, float]:
    """CPU and wall seconds of one generation, and the peak resident memory while it ran, in MiB."""
    import torch

    import dllm_sparse as ds
    from dllm_sparse.analysis.recorder import MaskRecorder
    from dllm_sparse.bench.machine import peak_memory, reset_peak_memory

    torch.set_num_threads(arguments.threads)
    lm = ds.load(arguments.model, device="cpu")
    sampler = ds.SamplerConfig(gen_length=arguments.gen_length, steps=arguments.steps)
    observers = (MaskRecorder(lm.kind, sampler),) if arguments.record else ()
    reset_peak_memory(lm.device)
    started = time.process_time()
    out = ds.generate(lm, [PROMPT], sampler=sampler, sparsity=ds.SparsityConfig(p=arguments.p), observers=observers)
    seconds = time.process_time() - started
    return {"seconds": seconds, "wall_seconds": out.seconds, "peak_mib": peak_memory(lm.device) / 2**20}


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Runs both kinds in turn and reports their ratio and difference."""
    runs: dict[str, list[dict[str, float]]] = {"masked": [], "recorded": []}
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    for _ in range(arguments.repeats):
        for kind, flags in (("masked", []), ("recorded", ["--record"])):
            done = subprocess.run([*command, *flags], check=True, stdout=subprocess.PIPE, text=True)
            runs[kind].append(json.loads(done.stdout))
            print(kind, runs[kind][-1], file=sys.stderr)
    fastest = {kind: min(run["seconds"] for run in found) for kind, found in runs.items()}
    peak = {kind: max(run["peak_mib"] for run in found) for kind, found in runs.items()}
    return {
        "model": Path(arguments.model).name,
        "gen_length": arguments.gen_length,
        "steps": arguments.steps,
        "p": arguments.p,
        "threads": arguments.threads,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "runs": runs,
        "time_ratio": fastest["recorded"] / fastest["masked"],
        "extra_peak_mib": peak["recorded"] - peak["masked"],
    }


def main() -> None:
    """Parses the command line; a child prints one run, the parent compares and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-diffusion")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--p", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    result = run_once(arguments) if arguments.child else compare(arguments)
    text = json.dumps(result, indent=None if arguments.child else 2)
    if arguments.out and not arguments.child:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
