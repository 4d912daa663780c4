"""`dllm-sparse doctor`: what it tells, what it keeps to itself, and that a broken installation fails by name."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sparse.doctor import environment, kernel_checks, model_checks, self_test
from dllm_sparse.kernels import reference
from dllm_sparse.models import resolve
from dllm_sparse.models.recorded import SUMS, write_sums
from dllm_sparse.sparsity.config import SparsityConfig
from tests.cli.conftest import Cli

CPU = [torch.device("cpu")]


def test_everything_passes_here(cli: Cli) -> None:
    answer = cli("doctor", "--json")
    assert (answer.code, answer.stderr) == (0, "")
    value = answer.json
    assert value["schema"] == "dllm-sparse/doctor@1"
    assert value["passed"] is True
    names = [check["name"] for check in value["checks"] if check["device"] == "cpu"]
    assert names == [check.name for check in self_test.CHECKS]
    assert {check["outcome"] for check in value["checks"]} <= {"passed", "skipped"}
    assert sum(check["seconds"] for check in value["checks"]) < 60 * torch.get_num_threads() * len(self_test.devices())


def test_the_text_keeps_names_to_itself(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "alice" / "triton"))
    answer = cli("doctor", "--no-self-test")
    assert answer.code == 0
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("dllm-sparse   0.")
    assert lines[-1] == "self-test     not run (--no-self-test)"
    assert any("~/triton (not there yet)" in line for line in lines)
    assert "HF_TOKEN=set" in answer.stdout
    for private in ("hf_secret", "alice", platform.node()):
        assert private not in answer.stdout


def test_backends_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(environment, "triton_installed", lambda: False)
    rows = {row["name"]: row for row in environment.backends()}
    assert [name for name, row in rows.items() if row["available"]] == ["reference", "cpu"]
    assert "sees no GPU (CUDA_VISIBLE_DEVICES='')" in rows["triton"]["reason"]
    assert "not installed" in rows["interpreter"]["reason"]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(self_test, "CHECKS", [check for check in self_test.CHECKS if check.name in names])
    monkeypatch.setattr(self_test, "devices", lambda: CPU)


def flip_the_last_weight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The bundled models are now a copy with one wrong weight, whose file is returned."""
    folder = Path(shutil.copytree(resolve.BUNDLED_FOLDER, tmp_path / "bundled"))
    weights = folder / "tiny-ar" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x40  # the exponent
    weights.write_bytes(content)
    monkeypatch.setattr(resolve, "BUNDLED_FOLDER", folder)
    return weights


def test_one_flipped_bit_of_the_weights_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = flip_the_last_weight(monkeypatch, tmp_path)
    only(monkeypatch, "bundled files", "golden logits")
    answer = cli("doctor", "-q")
    assert answer.code == 1
    assert answer.stdout.splitlines()[-1].startswith("self-test     2 failed in")
    assert f"bundled files on cpu: CheckpointError: {weights} is damaged" in answer.stderr
    refused = cli("generate", "--model", "tiny-ar", "--prompt", "Once")
    assert (refused.code, refused.stdout) == (1, "")
    assert f"{weights} is damaged" in refused.stderr
    assert refused.stderr.endswith("was recorded; reinstall dllm-sparse\n")


def test_wrong_weights_with_the_right_checksum_are_found(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = flip_the_last_weight(monkeypatch, tmp_path)
    write_sums(weights.parent, weights.parent.glob("*.[js]*"))
    only(monkeypatch, "bundled files", "golden logits")
    answer = cli("doctor", "-q")
    assert answer.code == 1
    assert answer.stdout.splitlines()[-1].startswith("self-test     1 passed, 1 failed in")
    assert "golden logits on cpu: Wrong: largest error" in answer.stderr


def test_a_bundled_file_without_a_sum_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = flip_the_last_weight(monkeypatch, tmp_path)
    (weights.parent / SUMS).unlink()
    only(monkeypatch, "bundled files")
    assert f"Wrong: {weights} has no line in SHA256SUMS" in cli("doctor", "-q").stderr


def slightly(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *given: product(*given) * 1.001


def always_new(*given: Any) -> torch.Tensor:
    return torch.rand(3)


BREAKS = {
    "p=1 is dense": (model_checks, "SparsityConfig", lambda p, sites: SparsityConfig(p=0.999, sites=sites)),
    "masks": (kernel_checks, "top_p_mask", lambda v, p: (reference.select(v, p) != 0).roll(1, -1)),
    "sparse products": (kernel_checks, "sparse_matvec", slightly(kernel_checks.sparse_matvec)),
    "captured steps": (model_checks, "_tokens", always_new),
    "determinism": (model_checks, "_tokens", always_new),
    "interpreted kernels": (kernel_checks.sys, "executable", shutil.which("false")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_part_fails_by_name(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, name)
    assert cli("doctor", "-q", "--no-self-test").code == 0
    monkeypatch.setattr(*BREAKS[name])
    monkeypatch.setattr(kernel_checks, "interpreter_loops", lambda: True)
    answer = cli("doctor", "--json")
    assert answer.code == 1
    assert f"{name} on cpu: Wrong: " in answer.stderr
    (check,) = answer.json["checks"]
    assert (check["name"], check["outcome"]) == (name, "failed")
    assert answer.json["passed"] is False


@pytest.mark.parametrize(
    ("what", "reason"), [("triton_installed", "triton is not installed"), ("interpreter_loops", "cannot loop")]
)
def test_what_cannot_run_is_skipped_with_its_reason(
    what: str, reason: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "interpreted kernels")
    monkeypatch.setattr(kernel_checks, what, lambda: False)
    answer = cli("doctor", "-q")
    assert answer.code == 0
    assert reason in answer.stdout
    assert answer.stdout.splitlines()[-1].startswith("self-test     1 skipped in")
