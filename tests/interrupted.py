"""Three commands that resume, at toy size: how they are called, what they have finished, what they result in.

`benchmarks/kills.py` kills them at random moments; the tests here take their disk away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.training.toy import DOCUMENTS, toy_recipe

Finished = dict[str, str]
"""What a run has finished, by name, as a hash of its content."""


@dataclass(frozen=True)
class Case:
    """A command: its arguments, what it has finished in a folder, and what counts as its result."""

    arguments: list[str]
    finished: Callable[[Path], Finished]
    result: Callable[[Path], Finished]

    def call(self, out: Path) -> list[str]:
        """The arguments, with the folder to write to."""
        return [*self.arguments, "--out", str(out)]

    def lost(self, before: Finished, out: Path) -> list[str]:
        """What was finished and is gone or changed: batches may, once their report is there; a checkpoint, if newer."""
        after = self.finished(out)
        gone = [name for name, value in before.items() if name != "checkpoint" and after.get(name) != value]
        if before.get("checkpoint", "") > after.get("checkpoint", ""):
            gone.append("checkpoint")
        return [] if (out / "report.json").exists() and all(name.startswith("batches/") for name in gone) else gone


def cases(work: Path, *, small: bool = False) -> dict[str, Case]:
    """The three commands, or shorter ones; what they read is written to `work`."""
    from dllm_sparse.evaluation.texts import bundled_texts

    steps, every, texts = (16, 4, bundled_texts()[:200]) if small else (48, 6, bundled_texts())
    recipe = toy_recipe(DOCUMENTS, steps=steps, checkpoint_every=every, evaluate_every=2 * every)
    (work / "toy.toml").write_text(recipe.replace("skill_problems = 300", "skill_problems = 30") if small else recipe)
    (work / "corpus.jsonl").write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts))
    sweep = "--tasks tiny-cloze,tiny-skills --limit 3 --mc-num 2 --grid 0.9,0.6 --resamples 100 --gen-length 32"
    decode = "--limit 6 --batch-size 1 --gen-length 6 --block-length 3 --scope sequence"
    if small:
        sweep = "--tasks tiny-cloze --limit 2 --mc-num 1 --grid 0.6 --resamples 100"
        decode = "--limit 2 --batch-size 1 --gen-length 2 --block-length 2"
    train = ["train", str(work / "toy.toml"), "--corpus", str(work / "corpus.jsonl"), "--snapshots", "3"]
    return {
        "critical-sparsity": Case(
            ["critical-sparsity", *sweep.split(), "--sites", "input" if small else "input,intermediate"],
            lambda out: hashes(out, "points/*.json"),
            lambda out: hashes(out, "critical-sparsity.*", "points.csv"),
        ),
        "drift-report": Case(
            ["drift-report", *decode.split()], lambda out: hashes(out, "batches/*.json"), drift_result
        ),
        "train": Case(train, checkpoints, trained),
    }


def hashes(out: Path, *patterns: str) -> Finished:
    """SHA-256 of the visible files that match; JSON must parse."""
    found = {}
    for file in sorted(file for pattern in patterns for file in out.glob(pattern) if not file.name.startswith(".")):
        try:
            content = file.read_bytes()
        except FileNotFoundError:  # a finished report has just removed its batches
            continue
        if file.suffix == ".json":
            json.loads(content)
        found[str(file.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def drift_result(out: Path) -> Finished:
    """The report without its date and duration, and the table."""
    report = json.loads((out / "report.json").read_text())
    same = {key: value for key, value in report.items() if key not in ("date", "seconds")}
    return {"report.json": hashlib.sha256(json.dumps(same).encode()).hexdigest(), **hashes(out, "steps.csv")}


def checkpoints(out: Path) -> Finished:
    """The newest checkpoint (older ones are replaced) and the snapshots."""
    newest = sorted((out / "checkpoints").glob("step-*"))[-1:]
    kept = [file.parent for file in sorted((out / "snapshots").glob("step-*/training.json"))]
    return {"checkpoint": newest[0].name if newest else ""} | {
        f"snapshots/{folder.name}": str(hashes(folder, "*")) for folder in kept
    }


def trained(out: Path) -> Finished:
    """Weights, last checkpoint, and the log without its times."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    plain = [{key: entry[key] for key in ("step", "loss", "losses", "rate")} for entry in log]
    files = hashes(out, "model/*", "checkpoints/step-*/*.safetensors", "snapshots/step-*/*.safetensors")
    return {"log": hashlib.sha256(json.dumps(plain).encode()).hexdigest(), **files}


def temporary_files(out: Path) -> list[Path]:
    """What an interrupted write may leave behind, and nobody reads."""
    return [file for file in out.rglob("*") if file.name.startswith(".")]
