"""How far a row's top-p threshold moves from step to step, which decides what a threshold of the step before is worth.

    python benchmarks/threshold_movement.py --model FOLDER [--out benchmarks/results/threshold_movement_135m.json]

Blocks of 2, 4 and 8 tokens decoded with the dual cache and masked intermediates. Counted per row and layer, of two
forwards that follow each other: thresholds further apart than so many bf16 values (128 to an octave), and their shares
of the row's mass more than so many octaves apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.bench.machine import machine
from dllm_sparse.files import write_json
from dllm_sparse.types import Observer, Site, StepContext

BLOCKS, KEPT = (2, 4, 8), (0.5, 0.8, 0.9)
VALUES, OCTAVES = (32, 64, 128, 256, 512), (0.25, 0.5, 1.0)
PROMPTS = (
    "The history of the city begins with",
    "Once upon a time there was a small",
    "In mathematics, a group is",
    "def read_lines(path):",
    "The recipe needs two eggs and",
    "Dear Sir or Madam, I am writing to",
)


class Movement(Observer):
    """Counts, over forwards of `rows` tokens, the rows whose threshold or share moved further than each distance."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.pairs = 0
        self.moved = torch.zeros(len(VALUES), dtype=torch.int64)
        self.shifted = torch.zeros(len(OCTAVES), dtype=torch.int64)
        self._last: dict[int, tuple[Tensor, Tensor]] = {}

    def on_mask(self, site: Site, values: Tensor, keep: Tensor, context: StepContext) -> None:
        """Compares the thresholds of a forward with those of the one before."""
        values, keep = values.flatten(0, 1), keep.flatten(0, 1)
        if len(values) != self.rows:
            return
        least = torch.where(keep, values.abs(), torch.inf).amin(-1).bfloat16()
        key, share = least.view(torch.int16).int(), least.float() / values.abs().sum(-1)
        if (before := self._last.get(site.layer)) is not None:
            self.pairs += self.rows
            self.moved += ((key - before[0]).abs()[:, None] >= torch.tensor(VALUES)).sum(0)
            self.shifted += ((share / before[1]).log2().abs()[:, None] >= torch.tensor(OCTAVES)).sum(0)
        self._last[site.layer] = key, share

    def shares(self) -> dict[str, Any]:
        """Shares of the compared rows."""
        moved, shifted = ((count / self.pairs).tolist() for count in (self.moved, self.shifted))
        by_octaves = dict(zip(map(str, OCTAVES), shifted, strict=True))
        return {"rows": self.pairs, "values": dict(zip(map(str, VALUES), moved, strict=True)), "octaves": by_octaves}


def measure(lm: ds.LanguageModel) -> Iterator[dict[str, Any]]:
    """One row per block length and p; printed as they come."""
    for block in BLOCKS:
        for p in KEPT:
            movement = Movement(block)
            sampler = ds.SamplerConfig(gen_length=32, block_length=block, cache="dual", execution="eager")
            sparsity = ds.SparsityConfig(p=p, sites="intermediate")
            for prompt in PROMPTS:
                ds.generate(lm, prompt, sampler=sampler, sparsity=sparsity, observers=(movement,))
            row = {"block_length": block, "p": p, **movement.shares()}
            moved = ", ".join(f"{distance} values {share:.3f}" for distance, share in row["values"].items())
            print(f"block {block}, p {p}, {row['rows']} rows: {moved}; share by 2^0.25 {row['octaves']['0.25']:.4f}")
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = ds.load(args.model)
    rows = list(measure(lm))
    if args.out:
        value = {"model": Path(args.model).name, "rows": rows, "machine": machine(lm.device)}
        write_json(args.out, {"schema": "dllm-sparse/threshold-movement@1", **value})


if __name__ == "__main__":
    main()
