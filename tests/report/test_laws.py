"""`laws`: synthetic runs from the published coefficients come back within their uncertainty; files; bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dllm_sparse.analysis.law_forms import PUBLISHED, Form, activation_law
from dllm_sparse.report.law_points import LawPoint, read_points
from dllm_sparse.report.law_text import sentences
from dllm_sparse.report.laws import PUBLISHED_PARAMETERS, activation_laws
from dllm_sparse.types import UsageError
from tests.cli.conftest import Cli, cli  # noqa: F401 (fixture)

TOKENS = np.geomspace(2, 300, 14)


def synthetic(form: Form, sizes: Sequence[str], noise: float = 3e-4, seed: int = 0) -> list[LawPoint]:
    rng, points = np.random.default_rng(seed), []
    for size in sizes:
        curve = activation_law(form, TOKENS, **PUBLISHED[form][size]) + rng.normal(0, noise, len(TOKENS))
        for d, a in zip(TOKENS.tolist(), curve.tolist(), strict=True):
            points.append(LawPoint(size, d, a, "autoregressive", form, PUBLISHED_PARAMETERS[size], 50.0))
    return points


def logarithmic(name: str, size: float | None = None) -> list[LawPoint]:
    """A run that grows by the logarithm: the silu form follows it and has no limit."""
    ratios = 0.1 + 0.03 * np.log(TOKENS) + np.random.default_rng(0).normal(0, 2e-3, len(TOKENS))
    pairs = zip(TOKENS.tolist(), ratios.tolist(), strict=True)
    return [LawPoint(name, d, a, "autoregressive", "silu", size, 50.0) for d, a in pairs]


@pytest.mark.parametrize("form", ["relu", "silu"])
def test_published_coefficients_come_back_within_their_stated_uncertainty(form: Form) -> None:
    sizes = ["0.2B", "0.4B", "0.8B"]
    report = activation_laws(synthetic(form, sizes), samples=60)
    for run, size in zip(report.value["runs"], sizes, strict=True):
        assert run["best"] == form
        fit = run["forms"][form]
        for name, true in PUBLISHED[form][size].items():
            assert abs(fit["parameters"][name] - true) <= 4 * fit["standard_errors"][name]
        low, high = fit["bootstrap"]["A0"]
        assert low < high
        wrong = run["forms"].get("silu" if form == "relu" else "relu")
        assert wrong is None or wrong["rejected"]
        curve = fit["curve"]
        assert curve["tokens_billions"][-1] == pytest.approx(3000)
        assert curve["bootstrap_high"][-1] - curve["bootstrap_low"][-1] > 0


def test_scale_and_shape_are_tested_where_the_runs_allow_it() -> None:
    shapes = [8.0, 32.0, 64.0, 128.0, 256.0]
    points = [
        LawPoint(f"shape {r}", d, 0.05 + 4e-4 * min(r, 114) - 0.04 / d, "diffusion", "silu", 1e6, r)
        for r in shapes
        for d in TOKENS[:6].tolist()
    ]
    value = activation_laws(points, "silu", samples=0).value
    (fit,) = value["width_depth"]
    assert fit["bottleneck"] == pytest.approx(114, rel=0.05)
    assert fit["values"]["width_depth"] == shapes
    assert value["scale"] == []  # one size only
    scale = activation_laws(synthetic("silu", ["0.1B", "0.8B"]), "silu", samples=0).value["scale"]
    assert [(test["kind"], test["activation"], test["runs"]) for test in scale] == [("autoregressive", "silu", 2)]
    assert scale[0]["per_decade"] == pytest.approx((0.383 - 0.409) / np.log10(7.60e8 / 1.08e8), abs=0.01)


def test_only_laws_that_hold_enter_the_scale_test_and_shapes_are_compared_with_their_like() -> None:
    small, large = synthetic("silu", ["0.1B"]), synthetic("silu", ["0.8B"])
    wide = [replace(point, width_depth=400.0) for point in large]
    assert activation_laws([*small, *wide], samples=0).value["scale"] == []
    report = activation_laws([*small, *logarithmic("log", 7.6e8)], samples=0)
    assert [row["determined"] for row in report.rows()] == [True, False]
    assert report.value["scale"] == []
    assert "does not fix its limit" in sentences(report.value)[1]


def test_a_limit_open_at_one_end_is_printed_so(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    """A rising run whose limit is bounded from below alone."""
    ratios = activation_law("silu", TOKENS, alpha=0.2, c=0.4, A0=0.8) + np.random.default_rng(1).normal(0, 0.02, 14)
    table = tmp_path / "points.csv"
    lines = [f"{d},{a}" for d, a in zip(TOKENS.tolist(), ratios.tolist(), strict=True)]
    table.write_text("\n".join(["tokens_billions,activation_ratio", *lines]))
    answer = cli("laws", table, "--samples", "0")
    assert answer.code == 0, answer.stderr
    assert ", open]" in answer.stdout
    assert "limit not determined: the interval of its limit is open" in answer.stdout


def test_a_run_that_cannot_be_fitted_is_reported_not_fatal() -> None:
    points = [*synthetic("silu", ["0.2B"]), LawPoint("short", 1.0, 0.3), LawPoint("short", 2.0, 0.3)]
    short, fitted = activation_laws(points, samples=0).rows()
    assert (short["run"], short["best"]) == ("short", None)
    assert "points cannot determine" in short["problem"]
    assert fitted["best"] == "silu"


def test_warm_up_points_are_dropped_on_request() -> None:
    points = [LawPoint("r", 0.5, 0.9), *synthetic("silu", ["0.2B"])]
    points = [LawPoint("r", point.tokens_billions, point.activation_ratio) for point in points]
    assert activation_laws(points, samples=0, skip_warmup=0.003).value["runs"][0]["points"] == 14


def test_the_command_writes_and_names_its_files(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    table = tmp_path / "points.csv"
    with table.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "tokens", "sparsity", "width", "layers"])
        for point in synthetic("silu", ["0.2B"]):
            writer.writerow(["mine", point.tokens_billions * 1e9, 1 - point.activation_ratio, 100, 4])
    answer = cli("laws", table, "--published", "--samples", "20", "--out", tmp_path / "out")
    assert answer.code == 0, answer.stderr
    assert "silu 1.2B" in answer.stdout
    assert "mine" in answer.stdout
    for name in ("laws.json", "laws.csv", "points.csv", "laws.png", "beside.png", "laws.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert str(tmp_path / "out" / name) in answer.stdout
    page = (tmp_path / "out" / "laws.html").read_text()
    assert "default-src 'none'" in page
    assert "data:image/png;base64," in page
    again = [point.activation_ratio for point in read_points(tmp_path / "out" / "points.csv")]
    assert again == pytest.approx([point.activation_ratio for point in synthetic("silu", ["0.2B"])])
    value = cli("laws", table, "--json", "--samples", "0").json
    assert value["schema"] == "dllm-sparse/laws@1"
    assert value["runs"][0]["width_depth"] == 25.0
    json.dumps(value, allow_nan=False)


def test_points_are_not_overwritten_by_their_own_results(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    table = tmp_path / "points.csv"
    table.write_text("run,tokens,activation_ratio,note\n" + "".join(f"a,{n},0.{9 - n},mine\n" for n in range(1, 9)))
    before = table.read_bytes()
    answer = cli("laws", table, "--samples", 0, "--out", tmp_path)
    assert answer.code == 2
    assert "points.csv would be overwritten" in answer.stderr
    assert table.read_bytes() == before
    assert not (tmp_path / "laws.json").exists()


def test_published_alone_prints_the_papers_values(cli: Cli) -> None:  # noqa: F811
    answer = cli("laws", "--published", "--at", "100")
    rows = {line.split("  ")[0]: line.split()[-1] for line in answer.stdout.splitlines()[2:]}
    assert rows["relu 0.1B"] == "0.0674"
    assert rows["silu 1.2B"] == "0.3757"
    assert "ten times larger moves the limit" in answer.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no point"),
        ("a,b\n1,2\n", "line 2: needs tokens_billions"),
        ("tokens_billions,activation_ratio\n1,0.2\n2,x\n", "line 3: activation_ratio is 'x'"),
    ],
)
def test_bad_files_are_named_with_their_line(cli: Cli, tmp_path: Path, content: str, words: str) -> None:  # noqa: F811
    table = tmp_path / "bad.csv"
    table.write_text(content)
    answer = cli("laws", table)
    assert answer.code == 2
    assert words in answer.stderr
    assert str(table) in answer.stderr


def test_nothing_to_fit_is_a_usage_error(cli: Cli) -> None:  # noqa: F811
    assert cli("laws").code == 2
    with pytest.raises(UsageError, match="extrapolate"):
        activation_laws(synthetic("silu", ["0.2B"]), extrapolate=0.5)
