"""Sweeps end to end on tiny checkpoints: results, resumption after kill -9, several processes, stale points."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dllm_sparse as ds
from dllm_sparse.evaluation.critical import SEARCH_EVALUATIONS
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.store import PointStore
from dllm_sparse.types import DllmSparseError, UsageError

GRID = [0.95, 0.9, 0.8, 0.6, 0.4]
SCORING = ScoringOptions(mc_num=4)


def run(lm: ds.LanguageModel, folder: Path, out: Path | None = None, **options: Any) -> ds.CriticalReport:
    chosen = {"grid": GRID, "scoring": SCORING, "resamples": 100, **options}
    return ds.critical_sparsity(lm, [str(folder / "choice.yaml")], out=out, **chosen)


def arguments(lm_folder: Path, folder: Path, out: Path) -> list[str]:
    tasks = str(folder / "choice.yaml")
    grid = ",".join(map(str, GRID))
    options = ["--mc-num", "4", "--resamples", "100", "--device", "cpu", "--out", str(out), "--quiet"]
    return ["critical-sparsity", "--model", str(lm_folder), "--tasks", tasks, "--grid", grid, *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def points(out: Path) -> dict[str, float]:
    """Finished points and when they were written; a kill may leave a temporary file (.*) behind."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "points").glob("[!.]*.json")}


def test_a_sweep_writes_its_files_and_repeats_exactly(
    diffusion: ds.LanguageModel, task_folder: Path, tmp_path: Path
) -> None:
    first = run(diffusion, task_folder, tmp_path / "a", sites="all")
    assert {path.name for path in first.files} >= {"critical-sparsity.json", "critical-sparsity.csv", "points.csv"}
    assert set(first.sites) == {"input", "up", "gate", "intermediate", "all_inputs"}
    point = first.value["results"]["all_inputs"]["tasks"]["choice"]["points"][2]
    assert 0 < point["element"] < 1
    assert 0 < point["hook_mean"] < 1
    assert set(point["exploitable"]) >= {"1", "8"}
    for found in point["exploitable"].values():
        saved = (2 * found["sites"]["input"] + found["sites"]["intermediate"]) / 3
        assert found["ffn_bytes_saved"] == found["ffn_flops_saved"] == pytest.approx(saved)
        assert found["ffn_speedup_bound"] == pytest.approx(1 / (1 - saved))
    second = run(diffusion, task_folder, None, sites="all")
    assert second.value == first.value
    assert (first.computed, first.reused) == (second.computed, second.reused) == (5 * (1 + len(GRID)), 0)
    third = run(diffusion, task_folder, tmp_path / "a", sites="up")
    assert (third.computed, third.reused) == (0, 1 + len(GRID))


def test_exploitable_sparsity_stands_beside_the_grid_maximum(
    ar: ds.LanguageModel, task_folder: Path, tmp_path: Path
) -> None:
    """Of each task its own, of their average the mean; in the summary and, for every point, in points.csv."""
    tasks = [str(task_folder / f"{name}.yaml") for name in ("choice", "greedy")]
    # So little is asked that the sparsest point passes.
    report = ds.critical_sparsity(ar, tasks, grid=[0.9, 0.4], retain=0.01, scoring=SCORING, resamples=100, out=tmp_path)
    rows, result = {row["task"]: row for row in report.rows()}, report.value["results"]["all_inputs"]
    curves = {**result["tasks"], "average": result["average"]}
    saved = {task: [point["exploitable"]["1"]["ffn_bytes_saved"] for point in curves[task]["points"]] for task in rows}
    for task in ("choice", "average"):
        sparsest = max(curves[task]["points"], key=lambda point: point["element"])
        assert rows[task]["element_grid_max"] == sparsest["element"]
        assert rows[task]["element_exploitable_T1"] == max(saved[task]) > 0.1
    assert (rows["greedy"]["dense_score"], rows["greedy"]["element_exploitable_T1"]) == (0, None)  # nothing to keep
    means = [sum(pair) / 2 for pair in zip(saved["choice"], saved["greedy"], strict=True)]
    assert saved["average"] == pytest.approx(means)
    with (tmp_path / "points.csv").open() as file:
        written = [(row["task"], float(row["ffn_flops_saved_T1"])) for row in csv.DictReader(file)]
    assert written == [(task, share) for task in ("choice", "greedy") for share in saved[task]]


def test_a_rule_that_zeroes_everything_is_a_result_too(ar: ds.LanguageModel, task_folder: Path) -> None:
    report = run(ar, task_folder, grid=[1e9], sparsity=ds.SparsityConfig(rule="threshold"))
    last = report.value["results"]["all_inputs"]["tasks"]["choice"]["points"][1]
    assert (last["element"], last["exploitable"]["1"]["ffn_speedup_bound"]) == (1.0, None)


def test_search_spends_at_most_eight_evaluations(ar: ds.LanguageModel, task_folder: Path) -> None:
    report = run(ar, task_folder, grid=None, search=True)
    assert len(report.sites["all_inputs"].points["choice"]) <= SEARCH_EVALUATIONS


def test_dense_point_is_the_dense_score_at_every_site(ar: ds.LanguageModel, task_folder: Path) -> None:
    report = run(ar, task_folder, sites=["gate", "all_inputs"], grid=[0.5])
    scores = [report.sites[site].points["choice"][0]["score"] for site in ("gate", "all_inputs")]
    assert scores[0] == scores[1]


def test_a_changed_setting_reuses_nothing(ar: ds.LanguageModel, task_folder: Path, tmp_path: Path) -> None:
    run(ar, task_folder, tmp_path, grid=[0.9])
    before = points(tmp_path)
    run(ar, task_folder, tmp_path, grid=[0.9], limit=6)
    run(ar, task_folder, tmp_path, grid=[0.9], sparsity=ds.SparsityConfig(score="weighted"))
    ar.transformer.blocks[0].ffn.down_proj.weight[0, 0] += 1e-3
    try:
        run(ar, task_folder, tmp_path, grid=[0.9])
    finally:
        ar.transformer.blocks[0].ffn.down_proj.weight[0, 0] -= 1e-3
    assert len(points(tmp_path)) == 4 * len(before)


def test_damaged_points_are_not_ignored(tmp_path: Path) -> None:
    store = PointStore(tmp_path)
    store.put({"a": 1}, {"score": 1.0})
    (path,) = tmp_path.glob("*.json")
    path.write_text("{")
    with pytest.raises(DllmSparseError, match="not a stored point"):
        PointStore(tmp_path).get({"a": 1})


def test_kill_and_resume_equal_an_uninterrupted_run(
    ar: ds.LanguageModel, llama_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "dllm_sparse", *arguments(llama_folder, task_folder, tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(points(tmp_path / "killed")) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = points(tmp_path / "killed")
    assert len(survived) >= 2
    (tmp_path / "killed" / "critical-sparsity.json").unlink(missing_ok=True)
    whole = run(ar, task_folder, tmp_path / "whole")
    resumed = run(ar, task_folder, tmp_path / "killed")
    now = points(tmp_path / "killed")
    assert {name: now[name] for name in survived} == survived, "a finished point was computed again"
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["points_reused"] == len(survived)
    assert resumed.value == whole.value
    texts = [(tmp_path / name / "critical-sparsity.json").read_text() for name in ("killed", "whole")]
    assert texts[0] == texts[1]


def test_two_processes_equal_one_bit_for_bit(
    diffusion: ds.LanguageModel, llada_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    sweep = [*arguments(llada_folder, task_folder, tmp_path / "two"), "--grid", "0.8", "--batch-tokens", "256"]
    command = [*launcher, "-m", "dllm_sparse", *sweep]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    scoring = ScoringOptions(mc_num=4, batch_tokens=256)
    run(diffusion, task_folder, tmp_path / "one", scoring=scoring, grid=[0.8])
    texts = [(tmp_path / name / "critical-sparsity.json").read_text() for name in ("two", "one")]
    assert texts[0] == texts[1]


def test_compare_pairs_models_and_says_what_it_found(
    ar: ds.LanguageModel, diffusion: ds.LanguageModel, task_folder: Path, tmp_path: Path
) -> None:
    tasks = [str(task_folder / f"{name}.yaml") for name in ("choice", "greedy")]
    options: dict[str, Any] = {"grid": [0.9, 0.6], "scoring": SCORING, "resamples": 100}
    both = ds.compare(
        diffusion, ar, tasks, ["all_inputs", "up"], out=tmp_path, published=True, noise_seeds=2, **options
    )
    assert [entry["task"] for entry in both.value["differences"][:3]] == ["average", "choice", "greedy"]
    assert len(both.verdicts) == 2
    published = both.value["as_published"]["llada"]
    assert list(published["all_inputs"]) == [
        "corrected",
        "hook mean",
        "sequence scope",
        "gate input dense",
        "as published",
    ]
    assert published["all_inputs"]["corrected"]["confound"] == 0
    assert list(published["up"]) == ["corrected", "hook mean", "as published"]
    noise = both.value["likelihood_noise"]["llada"]["tasks"]["choice"]
    assert noise["seeds"] == 2
    assert noise["seed_sd_dense"] >= 0
    assert (tmp_path / "compare.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "everything"}, "site 'everything' is unknown"),
        ({"retain": 1.5}, "retain is 1.5"),
        ({"limit": 0}, "limit is 0"),
        ({"grid": []}, "the grid is empty; give values of p"),
        ({"resamples": 10}, "at least 100"),
        ({"grid": None, "sparsity": ds.SparsityConfig(rule="top_k")}, "no published grid"),
        ({"protocol": "paper"}, "unknown protocol"),
    ],
)
def test_usage_errors(ar: ds.LanguageModel, task_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(ar, task_folder, **options)


def test_compare_needs_two_different_models(ar: ds.LanguageModel) -> None:
    with pytest.raises(UsageError, match="two models"):
        ds.compare(autoregressive=ar)
    with pytest.raises(UsageError, match="given twice"):
        ds.compare(models=[ar, ar])


def test_a_name_alone_is_one_task_and_numpys_numbers_are_numbers(
    diffusion: ds.LanguageModel, ar: ds.LanguageModel, task_folder: Path, tmp_path: Path
) -> None:
    task = str(task_folder / "choice.yaml")
    options: dict[str, Any] = {"grid": np.array([0.9]), "limit": np.int64(2), "resamples": np.int64(100)}
    found = ds.critical_sparsity(ar, task, out=tmp_path, retain=np.float32(0.5), **options)  # type: ignore[arg-type]
    value = json.loads((tmp_path / "critical-sparsity.json").read_text())
    assert value["config"]["limit"] == 2
    assert list(value["config"]["tasks"]) == ["choice"]
    assert found.value["config"]["plan"]["grid"] == (0.9,)
    with pytest.raises(UsageError, match=r"no task file none\.yaml"):
        ds.compare(diffusion, ar, "none.yaml")
