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
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dllm_sparse as ds
from dllm_sparse.evaluation.fingerprints import git_revision, versions
from dllm_sparse.files import write_json
from dllm_sparse.report.law_pictures import draw_beside
from dllm_sparse.report.law_points import POINTS_FILE, LawPoint, Measurement, measure_run, read_points
from dllm_sparse.report.law_text import sentences
from dllm_sparse.training.data import Prepared, load_prepared, prepare, prepared_for
from dllm_sparse.training.recipe import DataRecipe, Mix, ModelRecipe, OptimiserRecipe, Recipe
from dllm_sparse.training.snapshots import log_spaced
from dllm_sparse.types import Kind

SNAPSHOTS = 14
WARM_UPS = (0.03, 0.06, 0.1)  # share of a run's tokens left out of the fit; the first was chosen before the runs
HEAD = 32
SMALL, LARGE = (160, 6), (256, 9)
SHAPES = ((128, 9), (224, 3), (288, 2), (384, 1))  # with SMALL five ratios of width to depth at 1.7 to 2.2M parameters


@dataclass(frozen=True, slots=True)
class Run:
    """One model to train: its objective, activation and shape."""

    kind: Kind
    activation: str
    width: int
    layers: int

    @property
    def name(self) -> str:
        return f"{'ar' if self.kind == 'autoregressive' else 'diffusion'}-{self.activation}-{self.width}x{self.layers}"


def all_runs(shapes_of: tuple[Kind, ...]) -> list[Run]:
    """The eight law runs, large ones first (they take longest), then the shapes."""
    kinds: tuple[Kind, ...] = ("diffusion", "autoregressive")
    runs = [Run(k, a, *size) for size in (LARGE, SMALL) for k in kinds for a in ("relu", "silu")]
    return runs + [Run(kind, "relu", *shape) for kind in shapes_of for shape in SHAPES]


def recipe_of(run: Run, asked: argparse.Namespace) -> Recipe:
    """One micro-batch a step, constant rate behind the warmup (the stable stage of the paper's schedule)."""
    scale = 4 if asked.toy else 1
    width = run.width // scale // 8 * 8 if asked.toy else run.width
    model: dict[str, Any] = {"width": width, "layers": min(run.layers, 3) if asked.toy else run.layers}
    length, rows = (48, 8) if asked.toy else (256, 128)
    return Recipe(
        name=run.name,
        seed=asked.seed,
        steps=asked.steps,
        model=ModelRecipe(
            **model,
            heads=max(width // HEAD, 1),
            ffn_width=3 * width,
            max_positions=max(length, 64),
            activation=run.activation,  # type: ignore[arg-type]
        ),
        data=data_recipe(asked),
        optimiser=OptimiserRecipe(
            peak_rate=2e-3 if run.width <= 224 else 1.5e-3, warmup_steps=max(asked.steps // 40, 1), final_fraction=1.0
        ),
        mix=(Mix(source="stream", length=length, rows=rows),),
        checkpoint_every=max(asked.steps // 6, 1),
        evaluate_every=max(asked.steps // 6, 1),
    )


def data_recipe(asked: argparse.Namespace) -> DataRecipe:
    """What the corpus becomes; all runs share it."""
    small = {"vocab_size": 420, "held_out_per_mille": 100, "min_characters": 60}
    return DataRecipe(**small, skill_problems=100) if asked.toy else DataRecipe(vocab_size=4096, skill_problems=1000)


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
            found = json.loads(stored.read_text(encoding="utf-8"))["points"]
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


def fit_and_keep(points: list[LawPoint], facts: dict[str, Any], asked: argparse.Namespace) -> None:
    """Fits whatever is measured and keeps small files."""
    if not points:
        print("nothing is measured yet")
        return
    top_p = [replace(p, activation_ratio=p.top_p_ratio) for p in points if p.top_p_ratio is not None]
    asked.keep.mkdir(parents=True, exist_ok=True)
    fitted: dict[str, Any] = {}
    for name, chosen in (("cett", points), ("top_p", top_p)):
        with tempfile.TemporaryDirectory() as folder:
            # The published laws are of CETT-PPL-1 %; beside top-p they would compare two measures.
            report = ds.activation_laws(chosen, skip_warmup=WARM_UPS[0], published=name == "cett", out=folder)
            for path in report.files:
                if path.suffix == ".png":
                    keep_picture(path, asked.keep / f"{name}_{path.name}")
                elif path.suffix == ".csv":
                    shutil.copy(path, asked.keep / f"{name}_{path.name}")
        fitted[name] = {
            "sentences": sentences(report.value),
            "laws": [without_curves(run) for run in report.value["runs"]],
            "scale": report.value["scale"],
            "width_depth": report.value["width_depth"],
            "by_warm_up_left_out": {str(skip): limits(chosen, skip) for skip in WARM_UPS},
        }
        if name == "cett" and asked.figure is not None:
            draw_beside(asked.figure, pictured(report.value), dpi=110)
        print("\n".join([name, *fitted[name]["sentences"]]))
    write_json(asked.keep / "lab.json", {**facts, "fits": fitted})


def limits(points: list[LawPoint], skip: float) -> dict[str, Any]:
    """Limit and exponent of every run with more of its beginning left out: do they move?"""
    keys = ("best", "limit", "limit_low", "limit_high", "alpha", "trend_p_value", "rejected", "determined", "open")
    rows = ds.activation_laws(points, samples=0, skip_warmup=skip).rows()
    return {row["run"]: {key: row[key] for key in keys} for row in rows}


def pictured(value: dict[str, Any]) -> dict[str, Any]:
    """The large ReLU models and the published ReLU laws alone."""
    names = [Run(kind, "relu", *LARGE).name for kind in ("diffusion", "autoregressive")]  # type: ignore[arg-type]
    curves = [curve for curve in value["published"]["curves"] if curve["form"] == "relu"]
    runs = [run for run in value["runs"] if run["run"] in names]
    return {**value, "runs": runs, "published": {**value["published"], "curves": curves}}


def keep_picture(source: Path, target: Path) -> None:
    """A copy in 64 colours, a third of the size: these files live in the repository."""
    from PIL import Image  # matplotlib needs it, so a picture implies it

    Image.open(source).convert("RGB").quantize(64).save(target, optimize=True)


def without_curves(run: dict[str, Any]) -> dict[str, Any]:
    """A fit without its drawn curve: the parameters say the same."""
    forms = {name: {k: v for k, v in form.items() if k != "curve"} for name, form in run["forms"].items()}
    return {**run, "forms": forms}


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
