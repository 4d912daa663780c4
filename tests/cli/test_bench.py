"""`dllm-sparse bench engine`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sparse.types import UsageError
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


def test_without_a_subcommand_the_engine_is_measured(cli: Cli, toy_ar: Path) -> None:
    answer = cli("bench", "--model", toy_ar, *SMALL, "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["schema"] == "dllm-sparse/bench-engine@1"
    listed = cli("bench", "--help")
    assert listed.code == 0
    assert all(name in listed.stdout for name in ("engine", "sparse", "kernels", "tune"))
    unknown = cli("bench", "speed")
    assert unknown.code == 2
    assert "No such command 'speed'" in unknown.stderr


def test_bench_alone_runs_the_engine_on_a_bundled_model(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_measured(*options: Any) -> None:
        asked.extend(options[1:3])
        raise UsageError("far enough")

    monkeypatch.setattr("dllm_sparse.cli.bench.load_measured", load_measured)
    assert cli("bench").code == 2
    assert asked == [None, None]


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
    found = {step["forward"]: step for step in sparse["beside_dense"]}
    assert list(found) == [step["forward"] for step in dense["steps"]] == ["full", "cached"]
    assert (found["full"]["tokens"], found["cached"]["tokens"]) == (12, 4)
    for site in ("input", "intermediate"):  # the more tokens, the more channels some of them keeps
        assert found["cached"]["union_density"][site] < found["full"]["union_density"][site] <= 1
    assert found["cached"]["predicted_speed_up"] > 1
    assert found["cached"]["measured_speed_up"] == found["cached"]["dense_ms"] / found["cached"]["ms"]


def test_sparse_prints_prediction_beside_measurement(cli: Cli, toy_ar: Path) -> None:
    answer = cli("bench", "sparse", "--model", toy_ar, *SMALL, "--p", 0.5)
    assert answer.code == 0
    header, prefill, decode = answer.stdout.splitlines()[-3:]
    assert header.split() == ["forward", "tokens", "ms", "predicted", "measured", "union", "density"]
    assert (prefill.split()[:2], decode.split()[:2]) == (["prefill", "4"], ["decode", "1"])
    assert all(line.split()[column].endswith("x") for line in (prefill, decode) for column in (3, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_gpu_benchmarks_say_that_there_is_no_gpu(cli: Cli, command: str) -> None:
    answer = cli("bench", command)
    assert (answer.code, answer.stdout) == (1, "")
    assert "CUDA" in answer.stderr
