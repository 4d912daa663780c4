"""`layers` and `cett` at the command line: answers, files, resuming, experts, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import dllm_sparse as ds
from dllm_sparse.report.layers import correlations, layer_report
from tests.cli.conftest import Cli, cli  # noqa: F401 (fixture)
from tests.helpers import write_toy_tokenizer
from tests.models.random_hf import saved_model

LETTERS = "the quick brown fox jumps over a lazy dog and runs away from it again and again until night falls "
SMALL = ("--windows", "6", "--length", "24", "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LETTERS * 20)
    return path


def test_layers_writes_its_files_and_resumes(cli: Cli, toy: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    call = ("layers", "--model", toy, "--text", text, *SMALL, "--retain", "0.9", "--out", out)
    answer = cli(*call)
    assert answer.code == 0, answer.stderr
    assert "One p for all layers" in answer.stdout
    assert "data-free" in answer.stdout
    for name in ("layers.json", "layers.csv", "layers.png", "layers.html", "run.json"):
        assert (out / name).stat().st_size > 0
        assert str(out / name) in answer.stdout
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1"]
    for row in rows:
        assert 0 < float(row["normalised_rank_intermediate"]) <= 1
        assert 0 <= float(row["critical_alone"]) < 1
    value = json.loads((out / "layers.json").read_text())
    assert set(value["allocations"]) == {"weights", "weights_reversed", "sensitivity"}
    for entry in value["allocations"].values():
        assert entry["added"] == pytest.approx(entry["critical"] - value["uniform"]["critical"])
    assert cli(*call).code == 0
    run = json.loads((out / "run.json").read_text())
    assert run["points_computed"] == 0
    assert run["points_reused"] > 5
    assert json.loads((out / "layers.json").read_text()) == value


def test_layers_of_a_mixture(cli: Cli, text: Path, tmp_path: Path) -> None:  # noqa: F811
    folder, out = tmp_path / "olmoe", tmp_path / "out"
    saved_model("olmoe", folder, vocab_size=256)
    write_toy_tokenizer(folder)
    answer = cli(
        "layers", "--model", folder, "--text", text, *SMALL, "--retain", "0.9", "--no-sensitivity", "--out", out
    )
    assert answer.code == 0, answer.stderr
    assert "6 packed experts" in answer.stderr
    assert "Experts at the critical point" in answer.stdout
    assert (out / "experts.png").stat().st_size > 0
    with (out / "experts.csv").open() as file:
        rows = list(csv.DictReader(file))
    tokens = {
        layer: sum(int(row["tokens"]) for row in rows if (row["layer"], row["site"]) == (layer, "input"))
        for layer in ("0", "1")
    }
    assert tokens == {"0": 2 * 6 * 24, "1": 2 * 6 * 24}  # two experts a token
    experts = json.loads((out / "layers.json").read_text())["experts"]
    assert experts["per_layer"] == 6
    assert experts["by_p"][0]["p"] == 1.0
    assert {layer["site"] for layer in experts["layers"]} == {"input", "intermediate"}


def test_correlations_need_layers_enough(toy: Path) -> None:
    lm = ds.load(str(toy), device="cpu")
    report = layer_report(lm, [LETTERS * 20], windows=4, length=24, retain=0.9, sensitivity=False)
    assert correlations(report.value) == {}
    rows = [{**row, "layer": 2 + row["layer"]} for row in report.value["ranks"]] + report.value["ranks"]
    uniform = report.value["uniform"]["by_layer"]
    more = [{**row, "layer": row["layer"] + 2, "sparsity": row["sparsity"] + 0.01} for row in uniform]
    stretched = {**report.value, "ranks": rows, "uniform": {**report.value["uniform"], "by_layer": [*uniform, *more]}}
    assert set(correlations(stretched)) == {"input", "intermediate"}


@pytest.mark.parametrize("kind", ["toy", "toy_ar"])
def test_cett_searches_and_compares_rules(
    cli: Cli,  # noqa: F811
    text: Path,
    tmp_path: Path,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(kind)
    call = ("cett", "--model", model, "--text", text, *SMALL, "--increase", "0.05", "--tolerance", "0.02", "--rules")
    answer = cli(*call, "--out", tmp_path / "out")
    assert answer.code == 0, answer.stderr
    assert answer.stdout.startswith("CETT-PPL-5%: CETT 0.")
    for name in ("cett.json", "cett.csv", "rules.csv", "rules.png", "cett.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    value = json.loads((tmp_path / "out" / "cett.json").read_text())
    (entry,) = value["models"]
    assert {point["rule"] for point in entry["rules"]} >= {"cett", "top_p", "top_k", "top_k_gate", "fat_eps", "zero"}
    assert entry["sparsity"] + entry["activation"] == pytest.approx(1)
    with (tmp_path / "out" / "cett.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["cett"]) == value["cett"]
    assert float(row["exploitable_T1"]) == pytest.approx(entry["sparsity"] / 3)  # the down projection, of three
    assert entry["exploitable"]["8"]["ffn_flops_saved"] == float(row["exploitable_T8"]) < float(row["exploitable_T1"])
    cell = "/".join(f"{100 * float(row[name]):.0f}" for name in ("exploitable_T1", "exploitable_T8"))
    assert f"  {cell}/" in answer.stdout
    assert row["affordable_cett"] == str(entry["affordable"]["cett"] or "")


def test_one_cett_for_two_models(cli: Cli, toy: Path, text: Path) -> None:  # noqa: F811
    answer = cli("cett", "--model", toy, "--model", toy, "--text", text, *SMALL, "--tolerance", "0.05", "--json")
    first, second = answer.json["models"]
    assert first["cett"] == second["cett"] == answer.json["cett"]
    assert first["sparsity"] == second["sparsity"]


@pytest.mark.parametrize(
    ("content", "words"), [('{"text": 3}', "line 1: expected a string"), ("{", "line 1: expected a JSON object")]
)
def test_bad_text_files(cli: Cli, toy: Path, tmp_path: Path, content: str, words: str) -> None:  # noqa: F811
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    for command in ("layers", "cett"):
        answer = cli(command, "--model", toy, "--text", path)
        assert answer.code == 2
        assert words in answer.stderr


def test_a_text_alone_is_one() -> None:
    """Its characters would be other tokens."""
    lm, options = ds.load("tiny-diffusion", device="cpu"), {"windows": 2, "length": 8, "tolerance": 1.0}
    alone, held = (ds.cett_report([lm], texts, **options).value["models"] for texts in (LETTERS, [LETTERS]))  # type: ignore[arg-type]
    assert alone == held
    options = {"windows": 2, "length": 8, "retain": 0.9, "sensitivity": False}
    losses = [layer_report(lm, texts, **options).value["dense_loss"] for texts in (LETTERS, [LETTERS])]  # type: ignore[arg-type]
    assert losses[0] == losses[1]
