"""The lm-eval model against lm-eval's own `hf` model, and through lm-eval's command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (registers `hf`)
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from dllm_sparse.evaluation.adapter import DllmSparseLM
from dllm_sparse.types import UsageError

pytestmark = [
    # lm-eval and transformers warn about their own deprecations while `hf` is built.
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NAMES = ("choice", "greedy", "rolling", "written")


def evaluated(model: str | DllmSparseLM, arguments: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)
    loaded = [str(folder / f"{name}.yaml") for name in NAMES]
    found: dict[str, Any] = simple_evaluate(
        model, arguments, tasks=loaded, task_manager=manager, bootstrap_iters=0, device="cpu", batch_size=4
    )
    return found


@pytest.fixture(scope="module")
def ours(llama_folder: Path, task_folder: Path) -> dict[str, Any]:
    return evaluated("dllm-sparse", {"pretrained": str(llama_folder)}, task_folder)


@pytest.fixture(scope="module")
def theirs(llama_folder: Path, task_folder: Path) -> dict[str, Any]:
    return evaluated("hf", {"pretrained": str(llama_folder), "dtype": "float32"}, task_folder)


def test_scores_equal_lm_evals_own_model(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in NAMES:
        expected = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        got = {key: ours["results"][name][key] for key in expected}
        assert got == pytest.approx(expected, rel=1e-5), name


def test_every_answer_equals_lm_evals_own(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in NAMES:
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for left, right in zip(mine["resps"], other["resps"], strict=True):
                if name == "written":
                    assert left == right
                elif name == "rolling":
                    assert left[0] == pytest.approx(right[0], abs=1e-3)  # a sum over a hundred tokens
                else:
                    assert left[0][0] == pytest.approx(right[0][0], abs=1e-4)
                    assert left[0][1] == right[0][1]


def test_sparsity_is_measured_and_reported(llada_folder: Path, task_folder: Path) -> None:
    arguments = {"pretrained": str(llada_folder), "p": 0.8, "sites": "all_inputs", "mc_num": 4}
    found = evaluated("dllm-sparse", arguments, task_folder)
    measured = found["config"]["measured"]
    assert 0 < measured["sparsity"]["mean"] < 1
    assert measured["exploitable"]["8"]["ffn_speedup_bound"] >= 1
    assert found["config"]["sparsity"]["p"] == 0.8


def test_unknown_arguments_are_named(llama_folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown model argument 'sitez'"):
        DllmSparseLM(str(llama_folder), device="cpu", sitez="input")


@pytest.mark.slow
def test_the_command_line_of_lm_eval(llada_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """lm-eval's program with the model registered; slow because lm-eval reads its index of 14,000 tasks first."""
    command = [sys.executable, "-m", "dllm_sparse.evaluation", "--model", "dllm-sparse", "--device", "cpu"]
    arguments = f"pretrained={llada_folder},p=0.8,sites=all_inputs,mc_num=4"
    command += ["--model_args", arguments, "--tasks", str(task_folder / "choice.yaml"), "--output_path", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert 0 <= results["results"]["choice"]["acc,none"] <= 1
    assert results["config"]["model"] == "dllm-sparse"
