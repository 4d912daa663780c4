"""`critical-sparsity` and `compare` at the command line: answers, files, bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dllm_sparse.cli import sweep_options
from tests.cli.conftest import Cli
from tests.evaluation.conftest import checkpoint, diffusion, llada_folder, llama_folder, task_folder  # noqa: F401

COMMON = ("--mc-num", "2", "--resamples", "100", "--device", "cpu", "--grid", "0.9,0.6")


def test_one_model_prints_a_table_and_writes_files(
    cli: Cli,
    llada_folder: Path,  # noqa: F811
    task_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    task = task_folder / "choice.yaml"
    answer = cli("critical-sparsity", "--model", llada_folder, "--tasks", task, *COMMON, "--out", tmp_path)
    assert answer.code == 0, answer.stderr
    assert "critical (element)" in answer.stdout
    table = answer.stdout.partition(str(tmp_path))[0].splitlines()
    assert max(map(len, table)) <= 100
    assert "exploitable" in table[0]
    assert any(line.startswith("exploitable: % of FFN weight bytes and FLOPs") for line in table)
    assert any(line.startswith("beware of choice: ") for line in table)
    assert "choice all_inputs p=0.9" in answer.stderr
    assert answer.stderr.count("backend auto falls back to cpu") == 1
    for name in ("critical-sparsity.json", "critical-sparsity.csv", "points.csv", "curves.png", "run.json"):
        assert (tmp_path / name).stat().st_size > 0
        assert str(tmp_path / name) in answer.stdout
    page = (tmp_path / "critical-sparsity.html").read_text()
    assert "sparsity: rule top_p" in page  # the swept p and sites are not among the settings
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    with (tmp_path / "critical-sparsity.csv").open() as file:
        doubts = {row["flags"] for row in csv.DictReader(file)}
    assert doubts != {""}
    assert any(f"Beware: {doubt}" in page for doubt in doubts)
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["p"]) for row in rows] == [1.0, 0.9, 0.6]
    assert all(0 <= float(row["sparsity_element"]) < 1 for row in rows)


def test_json_is_one_object(cli: Cli, llada_folder: Path, task_folder: Path) -> None:  # noqa: F811
    task = task_folder / "choice.yaml"
    answer = cli("critical-sparsity", "--model", llada_folder, "--tasks", task, *COMMON, "--json")
    assert answer.json["schema"] == "dllm-sparse/critical-sparsity@1"
    assert answer.json["config"]["versions"]["dllm_sparse"]
    assert answer.stderr == ""


def test_compare_ends_with_a_verdict(
    cli: Cli,
    llada_folder: Path,  # noqa: F811
    llama_folder: Path,  # noqa: F811
    task_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    task = task_folder / "choice.yaml"
    models = ("--diffusion", llada_folder, "--autoregressive", llama_folder)
    answer = cli("compare", *models, "--tasks", task, *COMMON, "--as-published", "--out", tmp_path)
    assert answer.code == 0, answer.stderr
    assert "all_inputs: Not " in answer.stdout
    table = answer.stdout.partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 100
    assert "exploitable" in table[0]
    share = re.compile(r"(\d+|-)/(\d+|-)/(\d+|-)$")
    assert all(share.search(line) for line in table[2:6])
    assert answer.stderr.count("backend auto falls back to cpu") == 1  # for two models
    assert "gate input dense" in answer.stdout
    value = json.loads((tmp_path / "compare.json").read_text())
    assert set(value["results"]) == {"llada", "llama"}
    assert "As published" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "no/such.yaml"), "no task file"),
        (("--grid", "a,b"), "--grid is"),
        (("--grid", ""), "--grid is ''; expected numbers such as 0.95,0.9,0.8"),
        (("--grid", "1.5"), "p is 1.5"),
        (("--mc-num", "0"), "mc_num 0"),
        (("--protocol", "paper"), "unknown protocol"),
        (("--sites", "nowhere"), "site 'nowhere' is unknown"),
        (("--gen-length", "10", "--block-length", "4"), "try block_length"),
    ],
)
def test_bad_options_exit_with_2(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    answer = cli("critical-sparsity", "--limit", "1", "--device", "cpu", *arguments)
    assert answer.code == 2
    assert message in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize(
    ("model", "tensor"),
    [("llada-tiny", "model.transformer.blocks.1.ff_out.weight"), ("llama-tiny", "model.layers.1.mlp.down_proj.weight")],
)
def test_logits_that_are_not_finite_name_their_place(
    cli: Cli,
    model: str,
    tensor: str,
    task_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The last layer's output overflows: behind everything that is masked."""
    folder = checkpoint(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][:] = 3e38
    save_file(tensors, folder / "model.safetensors")
    for task in ("choice", "written"):
        answer = cli("critical-sparsity", "--model", folder, "--tasks", task_folder / f"{task}.yaml", *COMMON)
        assert (answer.code, answer.stdout) == (1, "")
        assert answer.stderr.endswith("error: NaN or Inf in the logits at step 0, behind the last layer's FFN\n")


def test_missing_data_are_named(cli: Cli, tmp_path: Path) -> None:
    answer = cli("critical-sparsity", "--tasks", f"wikitext2-local={tmp_path}/none.txt", "--device", "cpu")
    assert answer.code == 1
    assert "no file" in answer.stderr
    assert "none.txt" in answer.stderr


def test_programs_of_a_model_need_consent(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text('{"prompt": "def f():", "test": "", "entry_point": "f"}\n')
    answer = cli("critical-sparsity", "--tasks", f"humaneval-local={tmp_path}/h.jsonl", "--device", "cpu")
    assert answer.code == 2
    assert "--confirm-run-unsafe-code" in answer.stderr


def test_chosen_layers_alone(cli: Cli, llada_folder: Path, task_folder: Path) -> None:  # noqa: F811
    task = task_folder / "choice.yaml"
    call = ("critical-sparsity", "--model", llada_folder, "--tasks", task, *COMMON)
    value = cli(*call, "--layers", "1", "--json").json
    assert value["config"]["sparsity"]["layers"] == [1]
    assert cli(*call, "--layers", "99").code == 2
    answer = cli(*call, "--layers", "first")
    assert answer.code == 2
    assert "layer numbers such as 0,3,5" in answer.stderr


def test_a_critical_sparsity_that_is_undefined_is_not_called_a_bound() -> None:
    row = {"element_crossing": None, "element_crossing_low": None, "element_crossing_high": None}
    assert sweep_options.estimate({**row, "element_censored": True}, "element", "crossing") == "-"
    row = {"element_crossing": 0.5, "element_crossing_low": 0.25, "element_crossing_high": 0.75}
    assert sweep_options.estimate({**row, "element_censored": True}, "element", "crossing") == ">= 50.0 [25.0, 75.0]"
