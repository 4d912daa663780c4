"""The bundled twins compared: diffusion against autoregressive, all five sites, three tasks, one rule, one average.

    python benchmarks/twins_comparison.py --out results/twins
    accelerate launch --num_processes 2 benchmarks/twins_comparison.py --out results/twins
    python benchmarks/twins_comparison.py --out results/twins-small --limit 24 --mc-num 16 --published ""

Finished points are kept under OUT/points: the same command resumes. Several processes (GPUs) give the same numbers as
one. The settings of the published comparison are run beside the corrected ones, with copies and items of their own:
the differences they make are large, and masks over whole sequences are slow.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import dllm_sparse as ds
from dllm_sparse.evaluation.processes import Processes, join, leave
from dllm_sparse.files import write_json
from dllm_sparse.report.compare import Comparison
from dllm_sparse.report.workload import Workload

SITES = ("all_inputs", "intermediate", "input", "up", "gate")
GRID = (0.97, 0.93, 0.88, 0.82, 0.75, 0.65, 0.5)


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
    parser.add_argument("--grid", default=",".join(map(str, GRID)), help="values of p; '' for a search")
    parser.add_argument("--mc-num", type=int, default=64)
    parser.add_argument("--estimator", default="distinct", help="monte_carlo, distinct or pseudo")
    parser.add_argument("--noise-seeds", type=int, default=4)
    parser.add_argument("--published", default="all_inputs,intermediate", help="sites to rerun as published, or ''")
    parser.add_argument("--published-mc-num", type=int, default=32)
    parser.add_argument("--published-limit", type=int, help="first N items for the published settings")
    parser.add_argument("--limit", type=int, help="first N items of each task")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
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
    grid = [float(p) for p in asked.grid.split(",") if p]
    settings: dict[str, Any] = {
        "grid": grid or None,
        "search": not grid,
        "points": asked.out / "points",
        "processes": processes,
        "watcher": Log(speaks=processes.first),
        **models,
    }

    def workload(copies: int, limit: int | None) -> Workload:
        scoring = ds.ScoringOptions(mc_num=copies, estimator=asked.estimator)
        return Workload.load(asked.tasks.split(","), limit=limit, scoring=scoring)

    sites = asked.sites.split(",")
    tasks = workload(asked.mc_num, asked.limit)
    result = ds.compare(tasks=tasks, sites=sites, out=asked.out, **settings)
    seconds = time.perf_counter() - started
    if processes.first:
        write_json(asked.out / "summary.json", slim(result.to_dict()))
        report(result, seconds, processes)
    if asked.noise_seeds:
        seeds = asked.noise_seeds
        noise = ds.compare(tasks=tasks, sites=sites[:1], noise_seeds=seeds, out=asked.out / "noise", **settings)
        if processes.first:
            write_json(asked.out / "noise.json", noise.to_dict()["likelihood_noise"])
            report_noise(noise)
    if asked.published:
        limit = asked.published_limit or asked.limit
        tasks, sites = workload(asked.published_mc_num, limit), asked.published.split(",")
        published = ds.compare(tasks=tasks, sites=sites, published=True, out=asked.out / "as-published", **settings)
        if processes.first:
            write_json(asked.out / "as-published.json", slim(published.to_dict()))
            report_published(published)
    if processes.first:
        print(f"everything: {time.perf_counter() - started:.0f} s")
    leave()


def slim(value: dict[str, Any]) -> dict[str, Any]:
    """The result without the layers and token classes of every point."""
    copy: dict[str, Any] = json.loads(json.dumps(value))
    for sites in copy["results"].values():
        for site in sites.values():
            for task in site["tasks"].values():
                for point in task["points"]:
                    point["ffn_speedup_bound"] = {
                        group: found["ffn_speedup_bound"] for group, found in point.pop("exploitable").items()
                    }
    return copy


def report_published(published: Comparison) -> None:
    """Every setting's critical sparsity and its distance from the corrected one."""
    for model, sites in published.value["as_published"].items():
        for site, found in sites.items():
            for name, entry in found.items():
                span = f"{cell(entry['crossing'])} [{cell(entry['low'])}, {cell(entry['high'])}]"
                print(f"{model} {site} {name} ({entry['average']}): {span}, confound {cell(entry['confound'])}")


def report_noise(noise: Comparison) -> None:
    """Standard deviations over seeds and over items, in points."""
    for model, found in noise.value["likelihood_noise"].items():
        for task, entry in found["tasks"].items():
            dense = f"{cell(entry['seed_sd_dense'])} / {cell(entry['item_sd_dense'])}"
            kept = f"{cell(entry['seed_sd_kept'])} / {cell(entry['item_sd_kept'])}"
            print(f"{model} {task} p={found['p']}: deviation over seeds / items: dense {dense}, kept {kept}")


def report(result: Comparison, seconds: float, processes: Processes) -> None:
    """A short table of the main result."""
    print(f"{'site':13} {'task':12} {'model':15} {'dense':>6}  critical sparsity % [95 %]      flags")
    for row in sorted(result.rows(), key=lambda row: (SITES.index(row["site"]), row["task"] != "average", row["task"])):
        bound = ">=" if row["element_censored"] else "  "
        span = f"[{cell(row['element_crossing_low'])}, {cell(row['element_crossing_high'])}]"
        place = f"{row['site']:13} {row['task']:12} {row['model']:15}"
        critical = f"{bound}{cell(row['element_crossing'])} {span}"
        print(f"{place} {row['dense_score']:6.3f}  {critical:30} {row['flags']}")
    for verdict in result.verdicts:
        print(verdict)
    place = f"{processes.world} process(es)"
    print(f"{place}, {seconds:.0f} s: {result.computed} points computed, {result.reused} taken from the store")


def cell(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    main()
