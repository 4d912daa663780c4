"""The lab: activation laws of small autoregressive and masked-diffusion models, ReLU and SiLU, two sizes, five shapes.

    python benchmarks/lab.py --corpus corpus.jsonl.xz --work lab --keep results/lab
    python benchmarks/lab.py --data prepared --work lab --keep results/lab --workers 4 --seconds 540
    python benchmarks/lab.py --corpus small.jsonl --work lab --keep lab/kept --toy --device cpu
    python benchmarks/lab.py --fit-only --keep benchmarks/results/lab --figure assets/laws-lab.png

Every run trains with log-spaced snapshots at a constant rate, then measures CETT-PPL-1 % (one CETT, searched on the
last five together) and top-p on held-out documents. Runs are processes of their own, several at a time on one device.
The same command resumes: training from its last checkpoint, finished measurements from their file. Under KEEP: points
and fits as CSV, pictures, lab.json. Weights stay under WORK. --fit-only fits the kept points anew, without a GPU.

Measured on one NVIDIA H200, four runs at a time: 361 s for the command, of which 295 s for training and measuring all
twelve runs. --fit-only takes under two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab_fits import fit_and_keep
from lab_runs import Run, all_runs, recipe_of

from dllm_sparse.evaluation.fingerprints import git_revision, versions
from dllm_sparse.files import read_sealed
from dllm_sparse.report.law_points import POINTS_FILE, LawPoint, Measurement, measure_run, read_points
from dllm_sparse.training.data import Prepared, load_prepared, prepare, prepared_for
from dllm_sparse.training.snapshots import log_spaced

SNAPSHOTS = 14


def prepared_data(asked: argparse.Namespace) -> Prepared:
    """The prepared corpus, made once."""
    recipe = recipe_of(all_runs(())[0], asked)
    folder: Path = asked.data or asked.work / "data"
    if not prepared_for(recipe, folder):
        if asked.corpus is None:
            raise SystemExit(f"{folder} is not prepared for this lab; give --corpus FILE")
        prepare(asked.corpus, recipe, folder, print)
    return load_prepared(folder)


def held_out_texts(prepared: Prepared, asked: argparse.Namespace) -> list[str]:
    """Held-out documents as text, enough for the measuring windows."""
    documents = prepared.sets["held_out"]
    ends = [*documents.starts[1:].tolist(), len(documents.tokens)]
    spans = zip(documents.starts.tolist(), ends, strict=True)
    rows = [documents.tokens[start:end].tolist() for start, end in list(spans)[: 20 * asked.windows]]
    return [prepared.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def train_and_measure(run: Run, asked: argparse.Namespace) -> list[LawPoint]:
    """One run from its last checkpoint to its points; what is finished is not done again."""
    from dllm_sparse.training.loop import Trainer

    prepared, folder = prepared_data(asked), asked.work / run.name
    recipe = recipe_of(run, asked)
    steps = log_spaced(recipe.steps, SNAPSHOTS, first=max(recipe.steps // 40, 1))
    done = folder / "snapshots" / f"step-{recipe.steps:08d}" / "training.json"
    if not done.exists():
        gpu = asked.device != "cpu"
        trainer = Trainer(
            recipe, run.kind, prepared, folder, cpu=not gpu, compiled=gpu and not asked.no_compile, snapshots=steps
        )
        trainer.run(lambda now: print(f"{run.name} {now.step}/{now.steps} loss {now.loss:.3f}", flush=True))
    how = Measurement(windows=asked.windows, length=48 if asked.toy else 256, tolerance=0.02 if asked.toy else 1e-3)
    device = "cuda" if asked.device != "cpu" else "cpu"
    return measure_run(folder, held_out_texts(prepared, asked), how, device, print)


def work_through(runs: list[Run], asked: argparse.Namespace) -> None:
    """Runs processes until all runs are measured or the time is up; a stopped run resumes from its checkpoint."""
    begun, waiting = time.perf_counter(), list(runs)
    going: dict[subprocess.Popen[bytes], Run] = {}
    while waiting or going:
        while waiting and len(going) < asked.workers:
            run = waiting.pop(0)
            log = (asked.work / f"{run.name}.log").open("ab")
            command = [sys.executable, __file__, *sys.argv[1:], "--one", run.name]
            going[subprocess.Popen(command, stdout=log, stderr=log)] = run
        time.sleep(0.5)
        for process in [process for process in going if process.poll() is not None]:
            run = going.pop(process)
            took = time.perf_counter() - begun
            print(
                f"{took:6.0f} s  {run.name} {'done' if process.returncode == 0 else 'FAILED, see its log'}", flush=True
            )
        if asked.seconds is not None and time.perf_counter() - begun > asked.seconds:
            for process in going:
                process.terminate()
            for process in going:
                process.wait()
            print(f"time is up: {len(waiting) + len(going)} runs unfinished; the same command resumes", flush=True)
            return


def measured(runs: list[Run], asked: argparse.Namespace) -> list[LawPoint]:
    """The points of all finished runs under WORK."""
    points: list[LawPoint] = []
    for run in runs:
        stored = asked.work / run.name / POINTS_FILE
        if stored.exists():
            found = read_sealed(stored, "a file of measured points")["points"]
            points += [replace(LawPoint(**row), run=run.name) for row in found]
    return points


def run_facts(runs: list[Run], points: list[LawPoint], asked: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What was run, where and for how long."""
    losses = {point.run: point.loss for point in points}
    return {
        "steps": asked.steps,
        "tokens_per_step": recipe_of(runs[0], asked).tokens_per_step,
        "windows": asked.windows,
        "device": device_name(asked),
        "seconds_of_this_call": seconds,
        "runs": {run.name: run.name in losses for run in runs},
        "held_out_loss": losses,
        "versions": versions(),
        "git_revision": git_revision(),
    }


def device_name(asked: argparse.Namespace) -> str:
    import torch

    return torch.cuda.get_device_name() if asked.device != "cpu" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help='lines of {"text": ...}')
    parser.add_argument("--data", type=Path, help="prepared before; default WORK/data")
    parser.add_argument("--work", type=Path, default=Path("lab"), help="runs, checkpoints, snapshots, logs")
    parser.add_argument("--keep", type=Path, required=True, help="small results")
    parser.add_argument("--steps", type=int, default=2000, help="of 32,768 tokens")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, 256 tokens each")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time")
    parser.add_argument("--seconds", type=float, help="stop then; the same command resumes")
    parser.add_argument("--shapes", default="diffusion", help="kinds trained at five shapes: diffusion,autoregressive")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--toy", action="store_true", help="tiny models and rows: a dry run for a CPU")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--fit-only", action="store_true", help="fit KEEP/cett_points.csv; trains and measures nothing")
    parser.add_argument("--figure", type=Path, help="also draw the large ReLU models beside the published laws")
    parser.add_argument("--one", help="train and measure this run alone, in this process")
    asked = parser.parse_args()
    runs = all_runs(tuple(asked.shapes.split(",")) if asked.shapes else ())  # type: ignore[arg-type]
    if asked.fit_only:
        facts = json.loads((asked.keep / "lab.json").read_text(encoding="utf-8"))
        fit_and_keep(read_points(asked.keep / "cett_points.csv"), facts, asked)
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.one is not None:
        train_and_measure(next(run for run in runs if run.name == asked.one), asked)
        return
    started = time.perf_counter()
    prepared_data(asked)
    if asked.prepare_only:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1" if asked.device == "cpu" else "4")
    work_through(runs, asked)
    points = measured(runs, asked)
    fit_and_keep(points, run_facts(runs, points, asked, time.perf_counter() - started), asked)


if __name__ == "__main__":
    main()
