"""`dllm-sparse bench engine`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Cli

SMALL = ("--prompt-length", 4, "--gen-length", 8, "--block-length", 4, "--repeats", 1)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares every test the half second of measuring the machine."""
    from dllm_sparse.bench.floors import Rates

    monkeypatch.setattr("dllm_sparse.bench.machine.measured_rates", lambda *_: Rates(1e10, 1e11, "made up"))


def test_json_and_files(cli: Cli, toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    answer = cli("bench", "engine", "--model", toy, *SMALL, "--batch", 1, "--batch", 2, "--json", "--out", tmp_path)
    assert (answer.code, answer.stderr) == (0, "")
    assert answer.json["schema"] == "dllm-sparse/bench-engine@1"
    assert [row["batch"] for row in answer.json["rows"]] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.csv", "engine.json", "roofline.png"]
    lines = (tmp_path / "engine.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].count(",") == lines[1].count(",")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_answer_says_how_tokens_are_counted(cli: Cli, toy_ar: Path) -> None:
    answer = cli("bench", "engine", "--model", toy_ar, *SMALL)
    assert answer.code == 0
    assert "prefill" in answer.stdout
    assert "tokens/s counts generated tokens before the first end-of-text" in answer.stdout
    assert "made up" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny-ar", "--shape", "llada-8b"), "give one of them"),
        (("--shape", "llada-9b"), "unknown shape 'llada-9b'"),
        (("--execution", "steam"), "'steam' is not one of"),
        (("--batch", 0), "batch is 0"),
        (("--model", "tiny-diffusion", "--block-length", 3), "block_length 3 does not divide"),
    ],
)
def test_what_cannot_run_is_a_usage_error(cli: Cli, arguments: tuple[object, ...], message: str) -> None:
    answer = cli("bench", "engine", *arguments)
    assert (answer.code, answer.stdout) == (2, "")
    assert message in answer.stderr


def test_sparse_compares_with_dense_in_the_same_run(cli: Cli, toy: Path, tmp_path: Path) -> None:
    sizes = ("--gen-length", 8, "--block-length", 4, "--prompt-length", 4, "--repeats", 1, "--cache", "dual")
    answer = cli("bench", "sparse", "--model", toy, *sizes, "--p", 0.5, "--out", tmp_path, "--json")
    dense, sparse = json.loads(answer.stdout)["rows"]
    assert json.loads((tmp_path / "sparse.json").read_text()) == json.loads(answer.stdout)
    assert dense["sparsity"] is None
    assert 0.3 < sparse["measured_sparsity"]["mean"] < 1
    assert [step["forward"] for step in dense["steps"]] == [step["forward"] for step in sparse["steps"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_gpu_benchmarks_say_that_there_is_no_gpu(cli: Cli, command: str) -> None:
    answer = cli("bench", command)
    assert (answer.code, answer.stdout) == (1, "")
    assert "CUDA" in answer.stderr
