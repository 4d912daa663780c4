"""SmolLM2-135M through the native engine and through transformers: the same critical sparsity.

    python benchmarks/engines_135m.py --model FOLDER --wikitext wikitext-2-test.txt --out results/engines_135m.json

Both engines sweep the same p on the same items: WikiText-2 passages (perplexity) and tiny-cloze (accuracy), in the same
batches; a context of the cloze runs once for its four continuations in either.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import dllm_sparse as ds
from dllm_sparse.files import write_json

GRIDS = ((0.98, 0.95, 0.9, 0.8), (0.9, 0.8, 0.7, 0.6, 0.5, 0.4))  # perplexity gives way earlier than answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--wikitext", required=True, help="wiki.test.tokens")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--cloze", type=int, default=24)
    parser.add_argument("--sites", default="all_inputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tasks = {f"wikitext2-passages-local={asked.wikitext}": asked.passages, "tiny-cloze": asked.cloze}
    results: dict[str, Any] = {}
    logits = {}
    ids = torch.arange(64)[None] * 7 + 11
    for engine in ("native", "transformers"):
        lm = ds.load(asked.model, device="cpu", engine=engine)
        logits[engine] = lm.logits(ids)
        for (task, limit), grid in zip(tasks.items(), GRIDS, strict=True):
            started = time.perf_counter()
            report = ds.critical_sparsity(lm, [task], asked.sites.split(","), grid, limit=limit)
            # by its name: the folder is a matter of this machine
            named = ({**row, "model": Path(asked.model).name} for row in report.rows())
            rows = [row for row in named if row["task"] != "average"]
            results.setdefault(task.partition("=")[0], {})[engine] = {
                "seconds": time.perf_counter() - started,
                "rows": rows,
                "points": {site: [point_of(p) for p in _points(report, site)] for site in report.sites},
            }
    largest = max(_gap(found) for found in results.values())
    measured = max(_point_gap(found) for found in results.values())
    difference = float((logits["native"] - logits["transformers"]).abs().max())
    value = {
        "model": "SmolLM2-135M",
        "dtype": "float32",
        "device": "cpu",
        "largest_difference_in_critical_sparsity": largest,
        "largest_difference_at_one_p": measured,
        "largest_difference_of_logits": difference,
        "tasks": results,
    }
    write_json(asked.out, value)
    print(f"largest difference in critical sparsity {100 * largest:.3f} points, of logits {difference:.2g}")


def _points(report: ds.CriticalReport, site: str) -> list[dict[str, Any]]:
    return [p for task in report.value["results"][site]["tasks"].values() for p in task["points"]]


def point_of(point: dict[str, Any]) -> dict[str, float]:
    return {key: point[key] for key in ("p", "element", "hook_mean", "score", "kept")}


def _gap(found: dict[str, Any]) -> float:
    """Largest difference between the engines over sites and both readings."""
    pairs = zip(found["native"]["rows"], found["transformers"]["rows"], strict=True)
    keys = ("element_crossing", "element_grid_max", "hook_mean_crossing")
    return max(abs((a[key] or 0) - (b[key] or 0)) for a, b in pairs for key in keys)


def _point_gap(found: dict[str, Any]) -> float:
    """Largest difference between the engines at one p, of both sparsities and of the score relative to dense."""
    pairs = [
        (ours, theirs)
        for site, points in found["native"]["points"].items()
        for ours, theirs in zip(points, found["transformers"]["points"][site], strict=True)
    ]
    return max(abs(a[key] - b[key]) for a, b in pairs for key in ("element", "hook_mean", "kept"))


if __name__ == "__main__":
    main()
