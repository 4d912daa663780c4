"""The bundled twins in numbers: bundled tasks, training logs, loss figure.

    python benchmarks/twins.py --models tiny-diffusion tiny-ar --device cpu

Writes benchmarks/results/twins.json (a model that is not named keeps its entry) and assets/twins-loss.png from the
training logs in benchmarks/results/twins-*.log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOGS = {name: HERE / "results" / f"twins-{name}.log.jsonl" for name in ("tiny-diffusion", "tiny-ar")}
RESULTS = HERE / "results" / "twins.json"
TASKS = ("tiny-cloze", "tiny-infill", "tiny-skills")


def training(name: str) -> dict[str, Any]:
    """What the training log says: budget, time, losses in nats a token."""
    from dllm_sparse.training.log import read_log

    log = read_log(LOGS[name])
    held = {entry["step"]: entry["held_out_loss"] for entry in log if "held_out_loss" in entry}
    best = min(held, key=lambda step: held[step])
    return {
        "steps": log[-1]["step"],
        "token_positions": log[-1]["tokens"],
        "seconds": log[-1]["seconds"],
        "documents_loss": log[-1]["losses"][0],
        "held_out_loss": held[log[-1]["step"]],
        "lowest_held_out_loss": held[best],
        "lowest_held_out_loss_at_step": best,
        "hardware": "1x NVIDIA H200, torch 2.11.0+cu130, bf16 autocast, CUDA graphs",
    }


def scores(name: str, device: str, mc_num: int, limit: int | None) -> dict[str, Any]:
    """Dense fp32 scores on the bundled tasks, with standard errors over items."""
    import dllm_sparse as ds
    from dllm_sparse.evaluation.infill import infill_hits
    from dllm_sparse.evaluation.options import ScoringOptions
    from dllm_sparse.evaluation.scorer import Scorer
    from dllm_sparse.evaluation.tasks_loading import load_tasks

    lm = ds.load(name, device=device, dtype="float32")
    found: dict[str, Any] = {"parameters": lm.config.parameters}
    scorer = Scorer(lm, ScoringOptions(mc_num=mc_num))
    for task in load_tasks(TASKS, limit):
        started = time.perf_counter()
        answers, _ = scorer.run(scorer.prepare(task.requests))
        values = task.values(answers).numerator[0]
        row = {"items": len(values), "score": values.mean(), "standard_error": values.std(ddof=1) / len(values) ** 0.5}
        found[task.name] = row | {"seconds": time.perf_counter() - started, "device": str(lm.device)}
        if task.name == "tiny-cloze" and lm.kind == "diffusion":
            found[task.name]["mc_num"] = mc_num
        if task.name == "tiny-infill" and lm.kind == "diffusion":
            items = [instance.doc for leaf in task.leaves for instance in leaf.instances]
            found["tiny-infill, both sides"] = {
                "items": len(items),
                "score": infill_hits(lm, items).float().mean().item(),
            }
    return found


def main() -> None:
    """Parses the options, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(LOGS), choices=list(LOGS), help="empty: the figure alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mc-num", type=int, default=128)
    parser.add_argument("--limit", type=int, default=None)
    arguments = parser.parse_args()

    from dllm_sparse.files import write_json
    from dllm_sparse.training.log import draw_losses, read_log

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in arguments.models:
        measured = scores(name, arguments.device, arguments.mc_num, arguments.limit)
        results[name] = {"training": training(name), **measured}
        print(name, json.dumps(results[name], indent=2))
    write_json(RESULTS, results)
    draw_losses({name: read_log(path) for name, path in LOGS.items()}, HERE.parent / "assets" / "twins-loss.png")


if __name__ == "__main__":
    main()
