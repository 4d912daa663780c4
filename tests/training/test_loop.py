"""The loop: losses fall, a resumed run is the uninterrupted one to the bit, kill -9 costs at most one interval."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dllm_sparse as ds
from dllm_sparse.training.checkpoints import latest_checkpoint
from dllm_sparse.training.data import Prepared
from dllm_sparse.training.log import read_log
from dllm_sparse.training.loop import Progress, Trainer
from dllm_sparse.training.optimiser import learning_rate
from dllm_sparse.training.recipe import Recipe, load_recipe
from dllm_sparse.types import Kind, UsageError
from tests.docs.tables import fields, sections

KINDS: tuple[Kind, ...] = ("diffusion", "autoregressive")
PROGRAM = "import typer; from dllm_sparse.cli.train import train; typer.run(train)"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def options(data: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--device", "cpu", "-q"]


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, recipe: Recipe, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> Trainer:
    trainer = Trainer(recipe, request.param, prepared, tmp_path_factory.mktemp(request.param), cpu=True)
    trainer.run()
    return trainer


def test_the_loss_falls(run: Trainer) -> None:
    log = read_log(run.folder / "log.jsonl")
    assert [entry["step"] for entry in log] == [20, 40]
    assert log[1]["loss"] < log[0]["loss"] - 0.3
    assert log[1]["held_out_loss"] < log[0]["held_out_loss"]
    assert not sections()["log.jsonl"].unknown({field for entry in log for field in fields(entry)})


def test_resuming_is_bit_exact(run: Trainer, recipe: Recipe, prepared: Prepared, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 40:
            raise KeyboardInterrupt

    first = Trainer(recipe, run.kind, prepared, tmp_path, cpu=True)
    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt)
    second = Trainer(recipe, run.kind, prepared, tmp_path, cpu=True)
    assert second.step == 20
    second.run()
    for name, value in run.transformer.state_dict().items():
        assert torch.equal(value, second.transformer.state_dict()[name]), name
    names = ("step", "loss", "losses", "held_out_loss")
    both = ([[entry[name] for name in names] for entry in read_log(t.folder / "log.jsonl")] for t in (run, second))
    assert next(both) == next(both)


def test_a_log_entry_averages_over_the_steps_before_a_resume(
    recipe_file: Path, prepared: Prepared, tmp_path: Path
) -> None:
    """Checkpoints between two entries of the log: the losses of the steps before them are not forgotten."""
    between = replace(load_recipe(recipe_file, steps=12), checkpoint_every=5, evaluate_every=12)
    whole = Trainer(between, "diffusion", prepared, tmp_path / "whole", cpu=True)
    whole.run()
    stopped = Trainer(between, "diffusion", prepared, tmp_path / "stopped", cpu=True)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    resumed = Trainer(between, "diffusion", prepared, tmp_path / "stopped", cpu=True)
    assert resumed.step == 10
    resumed.run()
    logs = [read_log(trainer.folder / "log.jsonl") for trainer in (whole, resumed)]
    assert [[entry["losses"] for entry in log] for log in logs] == 2 * [[entry["losses"] for entry in logs[0]]]


def test_the_trained_model_loads(run: Trainer) -> None:
    paths = run.finish()
    assert all(path.exists() for path in paths)
    notes: list[str] = []
    lm = ds.load(str(run.folder / "model"), device="cpu", report=notes.append)
    assert (lm.kind, notes) == (run.kind, [])  # every file has its checksum
    ids = torch.tensor([[0, 50, 60]])
    expected = run.transformer.to(torch.bfloat16).float()(ids).detach()
    assert torch.equal(lm.logits(ids), expected)
    run.transformer.float()


def test_another_recipe_does_not_resume(run: Trainer, recipe_file: Path, prepared: Prepared) -> None:
    other = load_recipe(recipe_file, steps=41)
    with pytest.raises(UsageError, match="another recipe"):
        Trainer(other, run.kind, prepared, run.folder, cpu=True)
    assert read_log(run.folder / "log.jsonl")


def test_kill_loses_at_most_one_interval(
    recipe_file: Path, data_folder: Path, prepared: Prepared, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(recipe_file), "--steps", "100000"]
    process = subprocess.Popen([*command, *options(data_folder, tmp_path)], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 60
        while len(read_log(tmp_path / "log.jsonl")) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = read_log(tmp_path / "log.jsonl")[-1]["step"]
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    resumed = Trainer(load_recipe(recipe_file, steps=100000), "diffusion", prepared, tmp_path, cpu=True)
    assert resumed.step == int(found.name.removeprefix("step-")) >= reached - 20
    assert all(torch.isfinite(value).all() for value in load_file(found / "model.safetensors").values())
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] <= resumed.step


def test_two_processes_train_the_same_model(
    recipe: Recipe, recipe_file: Path, prepared: Prepared, data_folder: Path, tmp_path: Path
) -> None:
    """Each process takes every second row; the averaged gradient is that of the whole batch, up to rounding."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    command = [*launcher, str(recipe_file), *options(data_folder, tmp_path / "two")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "two" / name) for name in ("model", "loss.png", "log.jsonl")]
    alone = Trainer(recipe, "diffusion", prepared, tmp_path / "one", cpu=True)
    alone.run()
    trained = load_file(tmp_path / "two" / "checkpoints" / "step-00000040" / "model.safetensors")
    assert all(torch.allclose(value, trained[name], atol=1e-5) for name, value in alone.transformer.named_parameters())


def test_learning_rate(recipe: Recipe) -> None:
    rates = [learning_rate(step, 100, recipe.optimiser) for step in range(100)]
    peak = recipe.optimiser.peak_rate
    assert max(rates) == pytest.approx(peak, rel=1e-3)
    assert rates[0] == pytest.approx(peak / 5)
    assert rates[-1] == pytest.approx(peak * 0.02, rel=0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
