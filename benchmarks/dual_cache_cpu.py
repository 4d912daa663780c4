"""What caches and parallel decoding buy the bundled diffusion twin on a CPU, and what they cost in quality.

    python benchmarks/dual_cache_cpu.py [--threads 2] [--limit N] [--out FILE]

Speed: 128 tokens in blocks of 32, one prompt at a time, all variants in turn; behind beginnings of stories, which leave
the twin unsure, and behind problems of tiny-skills, whose short answers it is sure of.
Quality: exact match on tiny-skills (32 tokens, one block) under the same variants. tiny-cloze is scored by likelihoods,
which decode nothing; its answers under both samplers are compared all the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import dllm_sparse as ds
from dllm_sparse.analysis.prompts import bundled_prompts
from dllm_sparse.bench.machine import machine
from dllm_sparse.bench.timing import Timing
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.scorer import Scorer
from dllm_sparse.evaluation.tasks_loading import load_tasks
from dllm_sparse.files import write_json

VARIANTS: dict[str, dict[str, Any]] = {
    "uncached": {},
    "dual": {"cache": "dual"},
    "threshold 0.9": {"threshold": 0.9},
    "dual, threshold 0.9": {"cache": "dual", "threshold": 0.9},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="items of tiny-skills")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = ds.load("tiny-diffusion", device="cpu", dtype="float32")
    (task,) = load_tasks(["tiny-skills"], 6)
    problems = [str(request.arguments[0]) for request in task.requests]
    speeds = {}
    for kind, prompts in (("problems", problems), ("stories", bundled_prompts(8))):
        speeds[kind] = speed(lm, prompts, args.rounds)
        for name, row in speeds[kind].items():
            ms = Timing(**row["ms"]).text(0)
            line = f"{kind}, {name}: {ms} ms a prompt, {row['speedup']:.2f}x, {row['forwards']:.1f} forwards"
            print(line, flush=True)
    scores = skills(lm, args.limit)
    for name, row in scores.items():
        print(f"{name}: tiny-skills {row['score']:.1%} ± {row['standard_error']:.1%} of {row['items']}", flush=True)
    same = cloze_answers(lm, "uncached") == cloze_answers(lm, "dual, threshold 0.9")
    print(f"tiny-cloze, 50 items: answers {'equal' if same else 'DIFFER'} under both samplers")
    if args.out:
        facts = {"model": "tiny-diffusion", "dtype": "float32", "gen_length": 128, "block_length": 32}
        result = {**facts, "speed": speeds, "tiny-skills": scores, "cloze_answers_equal": same}
        write_json(args.out, {**result, "machine": machine(lm.device)})


def speed(lm: ds.LanguageModel, prompts: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of one generation, over prompts and rounds; the variants take turns on every prompt."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    forwards = dict.fromkeys(VARIANTS, 0)
    for turn in range(rounds + 1):
        for prompt in prompts if turn else prompts[:1]:  # the first turn warms up
            for name, options in VARIANTS.items():
                sampler = ds.SamplerConfig(gen_length=128, block_length=32, **options)
                out = ds.generate(lm, [prompt], sampler=sampler)
                if turn:
                    times[name].append(out.seconds * 1e3)
                    forwards[name] += out.forward_passes
    timings = {name: Timing.of(values) for name, values in times.items()}
    return {
        name: {
            "ms": timing.to_dict(),
            "speedup": timings["uncached"].median / timing.median,
            "forwards": forwards[name] / timing.samples,
        }
        for name, timing in timings.items()
    }


def skills(lm: ds.LanguageModel, limit: int | None) -> dict[str, dict[str, Any]]:
    """Exact match on tiny-skills under every variant."""
    (task,) = load_tasks(["tiny-skills"], limit)
    rows = {}
    for name, options in VARIANTS.items():
        scorer = Scorer(lm, sampler=ds.SamplerConfig(gen_length=32, block_length=32, **options))
        answers, _ = scorer.run(scorer.prepare(task.requests))
        values = task.values(answers).numerator[0]
        error = values.std(ddof=1) / len(values) ** 0.5
        rows[name] = {"items": len(values), "score": float(values.mean()), "standard_error": float(error)}
    return rows


def cloze_answers(lm: ds.LanguageModel, name: str) -> list[Any]:
    """What the scorer answers to 50 cloze items with a variant's sampler."""
    (task,) = load_tasks(["tiny-cloze"], 50)
    scorer = Scorer(lm, ScoringOptions(mc_num=8), ds.SamplerConfig(gen_length=32, block_length=32, **VARIANTS[name]))
    answers, _ = scorer.run(scorer.prepare(task.requests))
    return answers


if __name__ == "__main__":
    main()
