"""Snapshots: log-spaced, loadable, kept beside the checkpoints, and measured by `laws` into points."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.models.recorded import SUMS
from dllm_sparse.models.snapshots import snapshots_of
from dllm_sparse.report.law_points import POINTS_FILE, Measurement, gather, measure_run
from dllm_sparse.training.data import Prepared
from dllm_sparse.training.loop import Trainer
from dllm_sparse.training.recipe import Recipe
from dllm_sparse.training.snapshots import log_spaced
from dllm_sparse.types import Kind, UsageError


def test_steps_are_spaced_evenly_in_log() -> None:
    steps = log_spaced(12000, 12)
    assert (len(steps), steps[0], steps[-1]) == (12, 120, 12000)
    ratios = np.diff(np.log(steps))
    assert ratios.max() / ratios.min() < 1.05
    assert log_spaced(10, 8) == tuple(sorted({*log_spaced(10, 8)}))  # as many as asked for, all different
    assert len(log_spaced(10, 8)) == 8
    with pytest.raises(UsageError, match="allowed: 2 to 10"):
        log_spaced(10, 11)


@pytest.fixture(scope="module", params=["diffusion", "autoregressive"])
def run(
    request: pytest.FixtureRequest, recipe: Recipe, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> Trainer:
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    trainer = Trainer(recipe, kind, prepared, folder, cpu=True, snapshots=log_spaced(recipe.steps, 6, first=4))
    trainer.run()
    return trainer


def test_snapshots_are_models_of_their_step(run: Trainer, recipe: Recipe) -> None:
    snapshots = snapshots_of(run.folder)
    assert [snapshot.step for snapshot in snapshots] == list(log_spaced(recipe.steps, 6, first=4))
    for snapshot in snapshots:
        assert snapshot.tokens == snapshot.step * recipe.tokens_per_step
        assert snapshot.facts["ffn_width"] == 96
    first, last = (ds.load(str(snapshots[place].path), device="cpu") for place in (0, -1))
    assert last.kind == run.kind
    weight = run.transformer.blocks[0].ffn.down_proj.weight.detach()
    assert torch.equal(last.transformer.ffns[0].down_proj.weight, weight.bfloat16().float())
    assert not torch.equal(first.transformer.ffns[0].down_proj.weight, last.transformer.ffns[0].down_proj.weight)
    assert len(list((run.folder / "checkpoints").glob("step-*"))) == 1


def test_a_run_is_measured_once(run: Trainer, corpus_file: Path) -> None:
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()[:200]]
    how = Measurement(windows=12, length=48, tolerance=0.02)
    said: list[str] = []
    points = measure_run(run.folder, texts, how, "cpu", said.append)
    assert len(points) == 6
    assert all(0 < point.activation_ratio < 1 for point in points)
    assert len({point.cett for point in points}) == 1  # one CETT, searched on the last five together
    assert points[-1].loss is not None
    assert points[0].loss is not None
    assert points[-1].loss < points[0].loss
    assert points[0].parameters == 2 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 32  # embeddings are left out
    assert points[0].width_depth == 16.0
    assert any("searching CETT on the last 5 of 6" in line for line in said)
    assert not any("checksum" in line for line in said)
    said.clear()
    assert measure_run(run.folder, texts, how, "cpu", said.append) == points
    assert said == []
    (run.folder / POINTS_FILE).unlink()
    assert gather([run.folder.parent], lambda folder: points if folder == run.folder else []) == points


def test_missing_checksums_of_a_run_are_said_in_one_line(run: Trainer, corpus_file: Path, tmp_path: Path) -> None:
    """Runs made before snapshots had SHA256SUMS."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "it's a run"))
    others = snapshots_of(folder)[1:]
    for snapshot in others[:3]:
        (snapshot.path / SUMS).unlink()
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()[:200]]
    said: list[str] = []
    measure_run(folder, texts, Measurement(windows=2, length=48, increase=1.0, tolerance=0.5), "cpu", said.append)
    (line,) = (line for line in said if "checksum" in line)
    assert line.startswith(f"{others[0].path}: no checksum is known of model.safetensors, config.json and 3 more; ")
    assert line.endswith(" (the same for 2 more of its snapshots)")


def test_a_folder_without_snapshots_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train --snapshots 12"):
        measure_run(tmp_path, ["text"])
    with pytest.raises(UsageError, match="neither a CSV file nor a folder"):
        gather([tmp_path], lambda folder: [])
