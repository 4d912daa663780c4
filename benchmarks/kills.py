"""Kills `critical-sparsity`, `drift-report` and `train` at random moments, resumes them, and compares the results.

    python benchmarks/kills.py [--kills 200] [--commands drift-report train] [--fresh 0.1] [--out FILE]

Each command runs once undisturbed. Then, in new folders, it is killed after a random share of that time, by SIGINT and
SIGKILL in turn, and started again until it ends by itself; every second start is killed at most, so that moments late
in a run are met, too. After every kill: what was finished before is still there and whole. After every end: the
results equal the undisturbed ones. A SIGINT must end with exit code 130 and without a traceback.

A run is a fork of this process, which has imported everything, so that kills meet the work and not the imports; a
`--fresh` share of the starts is a new interpreter. The models are the bundled twin and a toy recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = """
name = "toy"
seed = 7
steps = 48
checkpoint_every = 6
evaluate_every = 12
[model]
width = 32
layers = 2
heads = 2
ffn_width = 96
max_positions = 64
[data]
vocab_size = 420
held_out_per_mille = 100
min_characters = 60
skill_problems = 300
[optimiser]
peak_rate = 5e-3
warmup_steps = 5
[[mix]]
source = "documents"
length = 48
rows = 8
"""
_WAIT = 300  # seconds after which a run counts as hanging
Finished = dict[str, str]
"""What a run has finished, by name, as a hash of its content."""


@dataclass(frozen=True)
class Case:
    """A command: its arguments, what it has finished in a folder, and what counts as its result."""

    arguments: list[str]
    finished: Callable[[Path], Finished]
    result: Callable[[Path], Finished]


def cases(work: Path) -> dict[str, Case]:
    """The three commands at toy size."""
    from dllm_sparse.evaluation.texts import bundled_texts

    (work / "toy.toml").write_text(RECIPE)
    (work / "corpus.jsonl").write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in bundled_texts()))
    sweep = "--tasks tiny-cloze,tiny-skills --limit 3 --mc-num 2 --grid 0.9,0.6 --resamples 100 --gen-length 32"
    decode = "--limit 6 --batch-size 1 --gen-length 6 --block-length 3 --scope sequence"
    train = ["train", str(work / "toy.toml"), "--corpus", str(work / "corpus.jsonl"), "--snapshots", "3"]
    return {
        "critical-sparsity": Case(
            ["critical-sparsity", *sweep.split(), "--sites", "input,intermediate"],
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


def lost(before: Finished, after: Finished, out: Path, result: Callable[[Path], Finished]) -> list[str]:
    """What was finished and is gone or changed. Batches go when their report is there; a checkpoint may be newer."""
    gone = [name for name, value in before.items() if name != "checkpoint" and after.get(name) != value]
    if before.get("checkpoint", "") > after.get("checkpoint", ""):
        gone.append("checkpoint")
    return [] if (out / "report.json").exists() and all(name.startswith("batches/") for name in gone) else gone


class Run:
    """One start of a command, in a fork or in an interpreter of its own; its words go to a file."""

    def __init__(self, arguments: list[str], log: Path, *, fresh: bool) -> None:
        self.log, self.started = log, time.monotonic()
        log.write_text("")
        self.fresh = self._spawn(arguments) if fresh else None
        self.pid = self.fresh.pid if self.fresh else self._fork(arguments)

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as words:
            return subprocess.Popen(
                [sys.executable, "-m", "dllm_sparse", *arguments], stdin=subprocess.DEVNULL, stdout=words, stderr=words
            )

    def _fork(self, arguments: list[str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the command's own boundary is reached
        try:
            words = os.open(self.log, os.O_WRONLY | os.O_TRUNC)
            os.dup2(words, 1)
            os.dup2(words, 2)
            from dllm_sparse.cli.app import app
            from dllm_sparse.cli.errors import run

            def start() -> object:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return app(arguments, prog_name="dllm-sparse")

            code = run(start)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: the signal that ended it), or None after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                if self.fresh:
                    self.fresh.returncode = os.waitstatus_to_exitcode(status)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.002)

    def kill(self, how: signal.Signals) -> int:
        """Sends the signal and waits; a run that does not end is a failure of its own."""
        os.kill(self.pid, how)
        code = self.wait(_WAIT)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(_WAIT)
            raise SystemExit(f"{how.name} did not end the run; see {self.log}")
        return code


def torment(name: str, case: Case, work: Path, kills: int, fresh: float, rng: random.Random) -> dict[str, Any]:
    """Kills one command `kills` times; raises AssertionError for what was lost or came out different."""
    log, whole = work / f"{name}.log", work / name / "whole"
    times = []
    for out in (whole, work / name / "again"):
        run = Run([*case.arguments, "--out", str(out)], log, fresh=False)
        assert run.wait(_WAIT) == 0, log.read_text()
        times.append(time.monotonic() - run.started)
    expected = case.result(whole)
    assert expected == case.result(work / name / "again"), f"{name} differs from run to run"
    told: Counter[str] = Counter()
    kept, folder = 0, 0
    out, killable = work / name / "0", True
    while told["kills"] < kills:
        alone = rng.random() < fresh
        run = Run([*case.arguments, "--out", str(out)], log, fresh=alone)
        told["starts"] += 1
        code = run.wait(rng.uniform(0, times[1]) + (_WARM if alone else 0) if killable else _WAIT)
        if code is None:
            assert killable, f"{name} hangs; see {log}"
            before = case.finished(out)
            how = (signal.SIGINT, signal.SIGKILL)[told["kills"] % 2]
            code = run.kill(how)
            told["kills"] += 1
            told[how.name] += 1
            told["kills in a new interpreter"] += alone
            gone = lost(before, case.finished(out), out, case.result)
            assert not gone, f"{name} lost {gone} in {out}"
            kept += sum(bool(value) for value in before.values())
            if how is signal.SIGINT and code != 0:
                assert alone or (code == 130 and "Traceback" not in log.read_text()), (
                    f"SIGINT ended with {code}: {log.read_text()}"
                )
            killable = rng.random() < 0.7
        if code == 0:
            assert case.result(out) == expected, f"{name} in {out} differs from the undisturbed run"
            told["results compared"] += 1
            told["temporary files left"] += sum(file.name.startswith(".") for file in out.rglob("*"))
            shutil.rmtree(out)
            folder += 1
            out, killable = work / name / str(folder), True
        elif not told["kills"]:
            raise AssertionError(log.read_text())
    return {**told, "finished parts seen before kills": kept, "lost": 0, "differing results": 0, "seconds": times[1]}


_WARM = 4.0  # seconds a new interpreter imports before it works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--commands", nargs="+", default=["critical-sparsity", "drift-report", "train"])
    parser.add_argument("--fresh", type=float, default=0.1, help="share of starts in a new interpreter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    prepare(args.commands)
    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    rows = {}
    for number, name in enumerate(args.commands):
        share = args.kills // len(args.commands) + (number < args.kills % len(args.commands))
        rows[name] = torment(name, cases(work)[name], work, share, args.fresh, rng)
        print(name, rows[name], flush=True)
    shutil.rmtree(work)
    if args.out:
        import torch

        from dllm_sparse.bench.machine import machine
        from dllm_sparse.files import write_json

        write_json(args.out, {"machine": machine(torch.device("cpu")), "seed": args.seed, "commands": rows})


def prepare(commands: list[str]) -> None:
    """Imports what the forks will need, on one thread: a fork has the memory of its parent and none of its threads."""
    import torch

    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401
    import transformers  # noqa: F401

    import dllm_sparse.cli.app
    import dllm_sparse.report.drift
    import dllm_sparse.report.laws

    if "critical-sparsity" in commands:
        import lm_eval.tasks  # noqa: F401

        import dllm_sparse.report.critical
    if "train" in commands:
        import accelerate  # noqa: F401

        import dllm_sparse.training.loop  # noqa: F401


if __name__ == "__main__":
    main()
