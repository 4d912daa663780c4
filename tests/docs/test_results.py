"""`docs/results.md` against what the commands write: a field is in both or the suite fails."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from dllm_sparse.bench.floors import Rates
from dllm_sparse.report.schema import DriftReport
from tests.cli.conftest import Cli, cli  # noqa: F401 (fixture)
from tests.docs.tables import ROOT, Documented, fields, sections

DOCUMENTED = sections()
TEXT = "the quick brown fox jumps over a lazy dog and runs away from it again and again until night falls "
TINY_SWEEP = ("--tasks", "tiny-cloze", "--limit", 3, "--mc-num", 1, "--grid", "1,0.8,0.5", "--resamples", 100)
TINY_TEXT = ("--windows", 4, "--length", 24, "--device", "cpu")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the commands write everything but PNGs, quickly."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 10)
    return path


def agrees(documented: Documented, found: set[str]) -> None:
    assert not documented.unknown(found), f"fields without a word in docs/results.md: {documented.unknown(found)}"
    assert not documented.stale(found), f"docs/results.md names what is not there: {documented.stale(found)}"


def in_file(path: Path) -> set[str]:
    if path.suffix == ".csv":
        with path.open() as file:
            return set(next(csv.reader(file)))
    return set(fields(json.loads(path.read_text())))


def written(cli: Cli, *arguments: object) -> None:  # noqa: F811
    answer = cli(*arguments, "-q")
    assert answer.code == 0, answer.stderr


def of_type(kind: Any, path: str = "") -> Iterator[str]:
    """Paths to the leaves of a TypedDict."""
    if is_typeddict(kind):
        for name, inner in get_type_hints(kind).items():
            yield from of_type(inner, f"{path}.{name}" if path else name)
    elif get_origin(kind) is list:
        yield from of_type(get_args(kind)[0], f"{path}[]")
    elif get_origin(kind) is dict:
        yield from of_type(get_args(kind)[1], f"{path}.key")
    else:
        assert kind in (str, int, float, bool, Any) or get_origin(kind) is UnionType
        yield path


def test_drift_report_is_the_code_s_schema() -> None:
    agrees(DOCUMENTED["report.json"], set(of_type(DriftReport)))


def test_drift_steps(cli: Cli, toy: Path, tmp_path: Path) -> None:  # noqa: F811
    call = ("--p", 0.7, "--gen-length", 4, "--block-length", 4, "--limit", 1, "--out", tmp_path)
    written(cli, "drift-report", "--model", toy, *call)
    agrees(DOCUMENTED["steps.csv"], in_file(tmp_path / "steps.csv"))
    kept = set(fields(json.loads((tmp_path / "report.json").read_text())))
    assert not DOCUMENTED["report.json"].unknown(kept)


def test_generate(cli: Cli, toy: Path, tmp_path: Path) -> None:  # noqa: F811
    call = ("--p", 0.7, "--gen-length", 4, "--block-length", 4, "--prompt", "abc", "--out", tmp_path)
    written(cli, "generate", "--model", toy, *call)
    for name in ("generate.json", "sparsity.csv"):
        agrees(DOCUMENTED[name], in_file(tmp_path / name))


def test_critical_sparsity_and_compare(cli: Cli, toy: Path, toy_ar: Path, tmp_path: Path) -> None:  # noqa: F811
    call = ("--model", toy, "--model", toy_ar, *TINY_SWEEP, "--noise-seeds", 2, "--as-published")
    written(cli, "compare", *call, "--out", tmp_path)
    compared = json.loads((tmp_path / "compare.json").read_text())
    agrees(DOCUMENTED["compare.json"], set(fields(compared)))
    for model in compared["results"].values():
        (site,) = model.values()
        agrees(DOCUMENTED["curve"], set(fields(site["tasks"]["tiny-cloze"])))
        assert not DOCUMENTED["curve"].unknown(set(fields(site["average"])))
    alone = tmp_path / "alone"
    written(cli, "critical-sparsity", "--model", toy_ar, *TINY_SWEEP, "--out", alone)
    for name in ("critical-sparsity.json", "critical-sparsity.csv", "points.csv", "run.json"):
        agrees(DOCUMENTED[name], in_file(alone / name))
    agrees(DOCUMENTED["critical-sparsity.csv"], in_file(tmp_path / "compare.csv"))
    agrees(DOCUMENTED["points/<hash>.json"], in_file(next((tmp_path / "points").glob("*.json"))))


def test_layers(cli: Cli, toy: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    written(cli, "layers", "--model", toy, "--text", text, *TINY_TEXT, "--out", tmp_path)
    for name in ("layers.json", "layers.csv", "run.json"):
        agrees(DOCUMENTED[name], in_file(tmp_path / name))


def test_cett(cli: Cli, toy: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    written(cli, "cett", "--model", toy, "--text", text, *TINY_TEXT, "--rules", "--out", tmp_path)
    for name in ("cett.json", "cett.csv", "rules.csv"):
        agrees(DOCUMENTED[name], in_file(tmp_path / name))


def test_laws(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    points = tmp_path / "one.csv"
    lines = (ROOT / "benchmarks" / "results" / "lab" / "cett_points.csv").read_text().splitlines()
    points.write_text("\n".join([lines[0], *(line for line in lines if line.startswith("ar-relu-256x9"))]) + "\n")
    written(cli, "laws", points, "--samples", 5, "--published", "--out", tmp_path)
    agrees(DOCUMENTED["laws.json"], in_file(tmp_path / "laws.json"))
    agrees(DOCUMENTED["laws.csv"], in_file(tmp_path / "laws.csv"))
    agrees(DOCUMENTED["laws points.csv"], in_file(tmp_path / "points.csv"))


def test_bench(cli: Cli, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("dllm_sparse.bench.machine.measured_rates", lambda device, dtype: Rates(1e10, 1e11, "a guess"))
    call = ("--prompt-length", 4, "--gen-length", 4, "--block-length", 4, "--repeats", 1, "--out", tmp_path)
    written(cli, "bench", "engine", "--model", toy, *call)
    written(cli, "bench", "sparse", "--model", toy, *call, "--p", 0.5)
    documented = DOCUMENTED["engine.json, sparse.json"]
    agrees(documented, in_file(tmp_path / "sparse.json"))
    assert not documented.unknown(in_file(tmp_path / "engine.json"))
    agrees(DOCUMENTED["engine.csv"], in_file(tmp_path / "engine.csv"))


def test_kept_results_of_a_gpu_and_of_training() -> None:
    kept = ROOT / "benchmarks" / "results"
    agrees(DOCUMENTED["kernels.json"], in_file(kept / "kernels_h200.json"))
    lines = (kept / "twins-tiny-ar.log.jsonl").read_text().splitlines()
    agrees(DOCUMENTED["log.jsonl"], {field for line in lines for field in fields(json.loads(line))})


def test_answers_without_a_file(cli: Cli) -> None:  # noqa: F811
    agrees(DOCUMENTED["models"], set(fields(cli("models", "--json").json)))
    looked = cli("doctor", "--json", "--no-self-test").json
    documented, found = DOCUMENTED["doctor"], set(fields(looked))
    assert not documented.unknown(found)
    assert all(name.startswith("checks[]") for name in documented.stale(found))
