"""Kills `critical-sparsity`, `drift-report` and `train` at random moments, resumes them, and compares the results.

    python -m benchmarks.kills [--kills 200] [--commands drift-report train] [--fresh 0.1] [--out FILE]

Each command runs once undisturbed. Then, in new folders, it is killed after a random share of that time, by SIGINT and
SIGKILL in turn, and started again until it ends by itself; every second start is killed at most, so that moments late
in a run are met, too. After every kill: what was finished before is still there and whole. After every end: the
results equal the undisturbed ones. A SIGINT must end with exit code 130 and without a traceback.

A run is a fork of this process, which has imported everything, so that kills meet the work and not the imports; a
`--fresh` share of the starts is a new interpreter. The models are the bundled twin and a toy recipe
(`tests/interrupted.py`). FILE keeps every command that is through: the same call does the others.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

from tests.interrupted import Case, cases, temporary_files

_WAIT = 300  # seconds after which a run counts as hanging
_WARM = 4.0  # seconds a new interpreter imports before it works


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
            sys.stdout = sys.stderr = words = self.log.open("w")  # its caller may have put others in their place
            for stream in (1, 2):
                os.dup2(words.fileno(), stream)
            from dllm_sparse.cli.app import app
            from dllm_sparse.cli.errors import run

            def start() -> object:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return app(arguments, prog_name="dllm-sparse")

            code = run(start)
        finally:
            sys.stdout.flush()
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
            raise AssertionError(f"{how.name} did not end the run; see {self.log}")
        return code


def torment(name: str, case: Case, work: Path, kills: int, fresh: float, rng: random.Random) -> dict[str, Any]:
    """Kills one command `kills` times; raises AssertionError for what was lost or came out different."""
    log, whole = work / f"{name}.log", work / name / "whole"
    times = []
    for out in (whole, work / name / "again"):
        run = Run(case.call(out), log, fresh=False)
        assert run.wait(_WAIT) == 0, log.read_text()
        times.append(time.monotonic() - run.started)
    expected = case.result(whole)
    assert expected == case.result(work / name / "again"), f"{name} differs from run to run"
    told: Counter[str] = Counter()
    out, killable = work / name / "0", True
    while told["kills"] < kills:
        alone = rng.random() < fresh
        run = Run(case.call(out), log, fresh=alone)
        told["starts"] += 1
        code = run.wait(rng.uniform(0, times[1]) + (_WARM if alone else 0) if killable else _WAIT)
        if code is None:
            assert killable, f"{name} hangs; see {log}"
            code = _kill(case, run, out, (signal.SIGINT, signal.SIGKILL)[told["kills"] % 2], told)
            killable = rng.random() < 0.7
        if code == 0:
            assert case.result(out) == expected, f"{name} in {out} differs from the undisturbed run"
            told["results compared"] += 1
            told["temporary files left"] += len(temporary_files(out))
            shutil.rmtree(out)
            out, killable = work / name / str(told["results compared"]), True
        elif not told["kills"]:
            raise AssertionError(log.read_text())
    return {**told, "lost": 0, "differing results": 0, "seconds": times[1]}


def _kill(case: Case, run: Run, out: Path, how: signal.Signals, told: Counter[str]) -> int:
    """One kill: what was finished before must be there after it. Returns the exit code."""
    before = case.finished(out)
    code = run.kill(how)
    gone = case.lost(before, out)
    assert not gone, f"lost {gone} in {out}"
    said = run.log.read_text()
    proper = code == 0 or (code == 130 and "Traceback" not in said)
    assert how is signal.SIGKILL or run.fresh or proper, f"SIGINT ended with {code}: {said}"
    told.update({"kills": 1, how.name: 1, "kills in a new interpreter": run.fresh is not None})
    told["finished parts seen before kills"] += sum(bool(value) for value in before.values())
    return code


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
    rows = json.loads(args.out.read_text())["commands"] if args.out and args.out.exists() else {}
    for number, name in enumerate(args.commands):
        if name not in rows:
            share = args.kills // len(args.commands) + (number < args.kills % len(args.commands))
            with tempfile.TemporaryDirectory(prefix="kills-") as folder:
                work = Path(folder)
                rows[name] = torment(name, cases(work)[name], work, share, args.fresh, random.Random(args.seed))
            keep(args.out, args.seed, rows)
        print(name, rows[name], flush=True)


def keep(out: Path | None, seed: int, rows: dict[str, Any]) -> None:
    """Writes what is through."""
    if out is None:
        return
    import torch

    from dllm_sparse.bench.machine import machine
    from dllm_sparse.files import write_json

    write_json(out, {"machine": machine(torch.device("cpu")), "seed": seed, "commands": rows})


if __name__ == "__main__":
    main()
