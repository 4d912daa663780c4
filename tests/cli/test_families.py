"""Every command on a tiny random checkpoint of every family, by what it answers."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dllm_sparse as ds
from dllm_sparse.bench.floors import Rates
from dllm_sparse.report.schema import DriftReport
from tests.cli.conftest import Cli
from tests.evaluation.conftest import task_folder  # noqa: F401 (fixture)
from tests.families import FAMILIES
from tests.helpers import conforms, write_toy_tokenizer

GEN, PROMPT = 8, 5
SIZES = ("--gen-length", GEN, "--block-length", 4)
SWEEP = ("--limit", 2, "--mc-num", 2, "--resamples", 100, "--grid", "0.6", "--json")
FORWARDS = {
    "bidirectional": {"full", "cached"},
    "causal": {"prefill", "decode"},
    "block_causal": {"prefill", "block", "store"},
}


class Tried(NamedTuple):
    """A family's checkpoint, and the model it holds."""

    name: str
    folder: Path
    lm: ds.LanguageModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family, each with the same tokenizer of 256 pieces."""
    root = tmp_path_factory.mktemp("families")
    for name, write in FAMILIES.items():
        write(root / name)
        write_toy_tokenizer(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="module", params=list(FAMILIES))
def tried(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tried:
    """One family after the other."""
    folder = folders[request.param]
    return Tried(request.param, folder, ds.load(str(folder), device="cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and the machine's rates are the same for every family and tested elsewhere: left out, as on a machine
    that is known and without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("dllm_sparse.bench.machine.measured_rates", lambda *_: Rates(1e10, 1e11, "made up"))


def test_generate(cli: Cli, tried: Tried, tmp_path: Path) -> None:
    lm, prompts = tried.lm, ("--prompt", "abc", "--prompt", "a fox")
    answer = cli("generate", "--model", tried.folder, *prompts, *SIZES, "--p", 0.7, "--json", "--out", tmp_path)
    assert answer.code == 0, answer.stderr
    assert json.loads((tmp_path / "generate.json").read_text()) == answer.json
    assert answer.json["schema"] == "dllm-sparse/generate@1"
    (batch,) = answer.json["batches"]
    assert [row[:PROMPT][-length:] for row, length in zip(batch["ids"], (3, 5), strict=True)] == [
        [0, 1, 2],
        [0, 26, 5, 14, 23],
    ]
    rows = [row[PROMPT:] for row in batch["ids"]]
    assert [len(row) for row in rows] == [GEN] * 2
    assert all(lm.mask_token_id not in row for row in rows)
    ends = {lm.config.eos_token_id, *lm.config.stop_token_ids}
    kept = [row[: next((at for at, token in enumerate(row) if token in ends), GEN)] for row in rows]
    assert lm.tokenizer is not None
    assert answer.json["texts"] == [lm.tokenizer.decode(row, skip_special_tokens=True) for row in kept]
    assert batch["generated_tokens"] == sum(map(len, kept))
    # Uniform noise: an encoder forward and 1 to 6 steps for each of two canvases.
    least = 4 if lm.noise == "uniform" else GEN
    assert least <= batch["forward_passes"] <= 2 * GEN
    assert set(batch["sparsity"]) == {"input", "intermediate", "mean", "hook_mean"}
    assert all(0 < value < 1 for value in batch["sparsity"].values())
    lines = (tmp_path / "sparsity.csv").read_text().splitlines()[1:]
    assert {int(line.split(",")[1]) for line in lines} == set(range(lm.config.layers))


def test_models_says_of_a_family_what_its_checkpoint_is(cli: Cli, tried: Tried) -> None:
    lm, rows = tried.lm, cli("models", "--json").json["families"]
    native = [row for row in rows if row["engine"] == "native" and row["name"] == lm.family]
    (row,) = native or [row for row in rows if f"{row['model_type']}_text" == lm.family]
    assert (row["engine"], row["kind"], row["attention"]) == (lm.engine, lm.kind, lm.config.attention)
    assert (row["noise"], row["logit_shift"]) == (lm.noise, lm.config.logit_shift)
    assert (row["mask_token_id"] is None) == (lm.mask_token_id is None)


def test_drift_report(cli: Cli, tried: Tried, tmp_path: Path) -> None:
    lm = tried.lm
    answer = cli("drift-report", "--model", tried.folder, *SIZES, "--limit", 1, "--json", "--out", tmp_path)
    assert answer.code == 0, answer.stderr
    report = answer.json
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "steps.csv"]
    assert conforms(report, DriftReport)
    (variant,) = report["variants"]
    curves = {(curve["site"], curve["layer"]): curve for curve in variant["curves"] if curve["tokens"] == "response"}
    layers = [None, *range(lm.config.layers)]
    assert set(curves) == {(site, layer) for site in ("input", "intermediate") for layer in layers}
    for curve in curves.values():
        assert 0 < curve["density_overall"] < 1
        assert 0 < curve["jaccard_overall"]["micro"] <= 1
        assert all(0 <= count <= GEN for count in curve["count"])  # 0 while a prompt is read
    (canvas,) = variant["canvases"]
    assert len(canvas["tokens"]) == GEN
    assert all(token["step"] < len(variant["steps"]) for token in canvas["tokens"])
    assert lm.noise == "uniform" or min(token["step"] for token in canvas["tokens"]) >= 0
    assert all(0 < variant["measured_sparsity"][site] < 1 for site in ("input", "intermediate", "mean"))


def test_critical_sparsity(cli: Cli, tried: Tried, task_folder: Path) -> None:  # noqa: F811
    """By likelihoods and by generated text."""
    tasks = f"{task_folder}/choice.yaml,{task_folder}/written.yaml"
    answer = cli("critical-sparsity", "--model", tried.folder, "--tasks", tasks, *SWEEP)
    assert answer.code == 0, answer.stderr
    assert answer.json["schema"] == "dllm-sparse/critical-sparsity@1"
    found = answer.json["results"]["all_inputs"]
    for task in ("choice", "written"):
        assert found["tasks"][task]["items"] == 2
        points = found["tasks"][task]["points"]
        assert [point["p"] for point in points] == [1.0, 0.6]
        exact_zeros = 0.01 if tried.lm.noise == "uniform" else 0.0  # GELU gives some
        assert points[0]["element"] <= exact_zeros < points[1]["element"] < 1
        assert all(0 <= point["score"] <= 1 for point in points)


def test_compare_with_a_model_of_the_other_kind(
    cli: Cli,
    tried: Tried,
    folders: dict[str, Path],
    task_folder: Path,  # noqa: F811
) -> None:
    kinds = ("autoregressive", "diffusion") if tried.lm.kind == "autoregressive" else ("diffusion", "autoregressive")
    other = "llama" if tried.lm.kind == "diffusion" else "llada"
    pair = (f"--{kinds[0]}", tried.folder, f"--{kinds[1]}", folders[other])
    answer = cli("compare", *pair, "--tasks", task_folder / "choice.yaml", *SWEEP)
    assert answer.code == 0, answer.stderr
    assert answer.json["schema"] == "dllm-sparse/compare@1"
    assert set(answer.json["results"]) == {tried.name, other}
    assert {answer.json["config"]["models"][name]["kind"] for name in (tried.name, other)} == set(kinds)
    main, task = answer.json["differences"]
    assert [main["main"], task["task"]] == [True, "choice"]
    for difference in (main, task):
        assert {difference["first"], difference["second"]} == {tried.name, other}
        assert difference["value"] is None or math.isfinite(difference["value"])
        assert tried.name in difference["verdict"]


@pytest.mark.parametrize(("name", "kind"), [("llada", "autoregressive"), ("llama", "diffusion")])
def test_models_given_as_the_other_kind_are_refused(cli: Cli, folders: dict[str, Path], name: str, kind: str) -> None:
    answer = cli("compare", f"--{kind}", folders[name], "--tasks", "tiny-cloze", *SWEEP)
    assert (answer.code, answer.stdout) == (2, "")
    assert f"is not {kind} but " in answer.stderr
    assert "models of any kind go into --model" in answer.stderr


def test_bench_engine(cli: Cli, tried: Tried) -> None:
    lm = tried.lm
    cache = ("--cache", "dual") if (lm.noise, lm.config.attention) == ("mask", "bidirectional") else ()
    sizes = (*SIZES, "--prompt-length", 6, "--repeats", 1)
    answer = cli("bench", "engine", "--model", tried.folder, *sizes, *cache, "--json")
    assert answer.code == 0, answer.stderr
    (row,) = answer.json["rows"]
    assert (row["kind"], row["parameters"]) == (lm.kind, lm.config.parameters)
    assert row["ms_per_forward"]["median"] > 0
    if lm.engine == "transformers":
        assert (row["steps"], row["components_ms_per_forward"]) == ([], None)
        return
    assert {step["forward"] for step in row["steps"]} == FORWARDS[lm.config.attention]
    assert sum(step["per_generation"] for step in row["steps"]) == row["forwards"]
    for step in row["steps"]:
        assert step["share_of_floor"] == pytest.approx(step["floor_ms"] / step["ms"]["median"])
        assert (step["active_experts"] is None) == (lm.config.moe is None)
        if lm.config.moe is not None:
            assert lm.config.moe.experts_per_token <= step["active_experts"]["measured"] <= lm.config.experts


def test_bench_sparse(cli: Cli, tried: Tried) -> None:
    sizes = (*SIZES, "--prompt-length", 6, "--repeats", 1)
    answer = cli("bench", "sparse", "--model", tried.folder, *sizes, "--p", 0.5)
    assert answer.code == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert re.fullmatch(rf"{tried.folder}, eager, dense: [\d.]+ \[.*\] ms a forward", lines[0])
    (sparse,) = [line for line in lines if line.startswith("eager, p = 0.5: ")]
    assert re.search(r"ms a forward, sparsity input 0\.\d+, intermediate 0\.\d+, mean 0\.\d+", sparse)
    forwards = FORWARDS[tried.lm.config.attention] - {"cached"} if tried.lm.engine == "native" else set()
    assert {line.split()[0] for line in lines if line.startswith("  ") and "union" not in line} == forwards


def test_shared_masks_and_reuse_are_for_dense_ffns(cli: Cli, tried: Tried, tmp_path: Path) -> None:
    """Experts see other tokens at every step: what they cannot follow is refused before anything runs."""
    drift = ("drift-report", "--model", tried.folder, *SIZES, "--limit", 1)
    if not tried.lm.config.experts:
        answer = cli(*drift, "--scope", "sequence", "--reuse", 2, "--json", "--out", tmp_path)
        assert conforms(answer.json, DriftReport)
        assert [variant["scope"] for variant in answer.json["variants"]] == ["token", "sequence"]
        assert {row["refresh_every"] for row in answer.json["reuse"]} >= {1, 2}
        assert all(row["ffn_work"] <= 1 and row["kl"] >= -1e-6 for row in answer.json["reuse"])
        return
    published = ("--model", tried.folder, "--model", "tiny-ar", "--as-published", "--tasks", "tiny-cloze")
    for call in ((*drift, "--scope", "sequence"), (*drift, "--reuse", 2), ("compare", *published, *SWEEP)):
        answer = cli(*call, "--out", tmp_path / "out")
        assert (answer.code, answer.stdout) == (2, "")
        assert "has experts" in answer.stderr
        assert not (tmp_path / "out").exists()


def test_a_task_that_asks_for_greedy_decoding(cli: Cli, tried: Tried, task_folder: Path) -> None:  # noqa: F811
    call = ("critical-sparsity", "--model", tried.folder, "--tasks", task_folder / "greedy.yaml", *SWEEP)
    answer = cli(*call)
    if tried.lm.noise == "uniform":
        assert (answer.code, answer.stdout) == (2, "")
        assert "the task asks what greedy decoding gives" in answer.stderr
    else:
        assert answer.json["results"]["all_inputs"]["tasks"]["greedy"]["items"] == 2
