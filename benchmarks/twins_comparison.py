"""The bundled twins compared: diffusion against autoregressive, all five sites, three tasks, one rule, one average.

    python benchmarks/twins_comparison.py --out results/twins --dtype float32
    accelerate launch --num_processes 2 benchmarks/twins_comparison.py --out results/twins

Finished points are kept under OUT/points: the same command resumes. With --seconds it stops before a site it cannot
finish in time and reports the sites it has. Several processes (GPUs) give the same numbers as one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import dllm_sparse as ds
from dllm_sparse.evaluation.processes import Processes, join, leave
from dllm_sparse.report.compare import Comparison

SITES = ("all_inputs", "intermediate", "input", "up", "gate")
GRID = (0.99, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.5)


class Log:
    """Says in one line a point what was done, in the first process."""

    def __init__(self, *, speaks: bool) -> None:
        self.speaks, self.begun, self.title, self.points = speaks, time.perf_counter(), "", 0

    def planned(self, points: int) -> None:
        """Ignored: the plan is corrected at every site."""

    def started(self, title: str) -> None:
        """Remembers what runs."""
        self.title, self.since = title, time.perf_counter()

    def advanced(self, share: float) -> None:
        """Ignored."""

    def finished(self, *, reused: bool) -> None:
        """Prints computed points with their seconds."""
        self.points += not reused
        if self.speaks and not reused:
            now = time.perf_counter()
            print(f"{now - self.begun:7.1f} s  {self.title}: {now - self.since:.2f} s", flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", default="tiny-diffusion")
    parser.add_argument("--autoregressive", default="tiny-ar")
    parser.add_argument("--tasks", default="tiny-cloze,tiny-infill,tiny-skills")
    parser.add_argument("--sites", default=",".join(SITES))
    parser.add_argument("--grid", default=",".join(map(str, GRID)), help="values of p; '' for the search alone")
    parser.add_argument("--mc-num", type=int, default=32)
    parser.add_argument("--noise-seeds", type=int, default=4)
    parser.add_argument("--published", default="all_inputs", help="sites to rerun as published; '' for none")
    parser.add_argument("--limit", type=int, help="first N items of each task")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time budget")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    asked = options()
    started = time.perf_counter()
    processes, device = join(asked.device)
    models = {
        "diffusion": ds.load(asked.diffusion, device=device, dtype=asked.dtype),
        "autoregressive": ds.load(asked.autoregressive, device=device, dtype=asked.dtype),
    }
    settings: dict[str, Any] = {
        "tasks": asked.tasks.split(","),
        "grid": [float(p) for p in asked.grid.split(",") if p] or None,
        "search": True,
        "limit": asked.limit,
        "scoring": ds.ScoringOptions(mc_num=asked.mc_num),
        "points": asked.out / "points",
        "processes": processes,
        "watcher": Log(speaks=processes.first),
        **models,
    }
    result, done, slowest = None, [], 0.0

    def may_go_on(expected: float) -> bool:
        return bool(processes.agree(time.perf_counter() - started + expected < asked.seconds))

    for site in asked.sites.split(","):
        if not may_go_on(slowest):
            break
        begun = time.perf_counter()
        done.append(site)
        result = ds.compare(sites=done, out=asked.out, **settings)
        slowest = max(slowest, time.perf_counter() - begun)
    noise = None
    if asked.noise_seeds and done and may_go_on(slowest):
        noise = ds.compare(sites=done[:1], noise_seeds=asked.noise_seeds, out=asked.out / "noise", **settings)
    published = None
    if asked.published and may_go_on(2 * slowest):
        sites = asked.published.split(",")
        searched = {**settings, "grid": None}
        published = ds.compare(sites=sites, published=True, out=asked.out / "as-published", **searched)
    if processes.first:
        report(result, noise, published, done, time.perf_counter() - started, processes)
    leave()


def report(
    result: Comparison | None,
    noise: Comparison | None,
    published: Comparison | None,
    done: list[str],
    seconds: float,
    processes: Processes,
) -> None:
    """A short table, last, so that it is what a truncated log still shows."""
    if result is None:
        print("no site fitted the time budget")
        return
    if published is not None:
        for model, sites in published.value["as_published"].items():
            for site, found in sites.items():
                for name, entry in found.items():
                    span = f"{cell(entry['crossing'])} [{cell(entry['low'])}, {cell(entry['high'])}]"
                    print(f"{model} {site} {name} ({entry['average']}): {span}, confound {cell(entry['confound'])}")
    if noise is not None:
        for model, found in noise.value["likelihood_noise"].items():
            for task, entry in found["tasks"].items():
                dense = f"{cell(entry['seed_sd_dense'])} / {cell(entry['item_sd_dense'])}"
                kept = f"{cell(entry['seed_sd_kept'])} / {cell(entry['item_sd_kept'])}"
                print(f"{model} {task} standard deviation over seeds / items: dense {dense}, kept {kept}")
    print(f"{'site':13} {'task':12} {'model':15} {'dense':>6}  critical sparsity % [95 %]      flags")
    for row in sorted(result.rows(), key=lambda row: (done.index(row["site"]), row["task"] != "average", row["task"])):
        bound = ">=" if row["element_censored"] else "  "
        span = f"[{cell(row['element_crossing_low'])}, {cell(row['element_crossing_high'])}]"
        place = f"{row['site']:13} {row['task']:12} {row['model']:15}"
        critical = f"{bound}{cell(row['element_crossing'])} {span}"
        print(f"{place} {row['dense_score']:6.3f}  {critical:30} {row['flags']}")
    for verdict in result.verdicts:
        print(verdict)
    print(f"{len(done)} sites, {processes.world} process(es), {seconds:.0f} s, computed points of this call included")


def cell(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
