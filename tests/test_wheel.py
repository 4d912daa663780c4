"""The wheel holds everything and works far from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    done = run(*build, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel: Path) -> None:
    """Every file of the package: modules, weights, tokenizers, tasks, recipes, `py.typed`."""
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dllm_sparse/")}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dllm_sparse").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert there == expected
    assert "dllm_sparse/py.typed" in there
    assert {"dllm_sparse/models/bundled/tiny-diffusion/model.safetensors", "dllm_sparse/sparsity/rules.py"} <= there


def test_it_works_far_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(target), str(wheel))
    done = run(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = run(
        sys.executable, "-c", "import dllm_sparse; print(dllm_sparse.__file__)", cwd=tmp_path, PYTHONPATH=str(target)
    )
    assert Path(where.stdout.strip()) == target / "dllm_sparse" / "__init__.py"
    call = "-m dllm_sparse generate --p 0.8 --gen-length 4 --block-length 4 --json --prompt"
    done = run(sys.executable, *call.split(), "Once upon a time", cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["texts"]) == 1
    script = run(str(target / "bin" / "dllm-sparse"), "--version", cwd=tmp_path, PYTHONPATH=str(target))
    assert script.stdout.startswith("dllm-sparse 0.")
