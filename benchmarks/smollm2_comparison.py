"""SmolLM2-135M against its masked-diffusion adaptation: WikiText-2 perplexity and a cloze task, with stated limits.

    python benchmarks/smollm2_comparison.py --diffusion FOLDER --autoregressive FOLDER \
        --wikitext wikitext-2-test.txt --out results/smollm2

Finished points are kept under OUT/points: the same command resumes. The two tasks have limits of their own, because a
Monte-Carlo likelihood of 135M parameters takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from twins_comparison import slim

import dllm_sparse as ds
from dllm_sparse.files import write_json

GRID = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", required=True)
    parser.add_argument("--autoregressive", required=True)
    parser.add_argument("--wikitext", required=True, help="wiki.test.tokens")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--cloze", type=int, default=24)
    parser.add_argument("--mc-num", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, help="JSON file for the figures without the points' details")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    models = [ds.load(name, device=asked.device) for name in (asked.diffusion, asked.autoregressive)]
    runs = {f"wikitext2-passages-local={asked.wikitext}": asked.passages, "tiny-cloze": asked.cloze}
    summary: dict[str, Any] = {}
    for task, limit in runs.items():
        name = task.partition("=")[0]
        result = ds.compare(
            models=models,
            tasks=[task],
            grid=GRID,
            limit=limit,
            scoring=ds.ScoringOptions(mc_num=asked.mc_num),
            points=asked.out / "points",
            out=asked.out / name,
        )
        summary[name] = slim(result.to_dict())
        for line in result.verdicts:
            print(f"{name}: {line}")
    if asked.summary is not None:
        write_json(asked.summary, summary)


if __name__ == "__main__":
    main()
