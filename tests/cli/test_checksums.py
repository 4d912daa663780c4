"""A damaged file of a checkpoint on the command line: exit code 1 and its name, whatever recorded its checksum."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from dllm_sparse.evaluation import adapter
from dllm_sparse.evaluation.processes import Processes
from tests.cli.conftest import Cli
from tests.cli.test_bad_files import SHORT
from tests.recorded import LAYOUTS, files_of, flipped, regions

CALL = ("--prompt", "abc", *SHORT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_byte_of_every_file(cli: Cli, toy: Path, tmp_path: Path, layout: str) -> None:
    folder = LAYOUTS[layout](toy, tmp_path / "model")
    for file in files_of(folder):
        for place in list(regions(file).values())[-3:]:
            with flipped(file, place):
                answer = cli("generate", "--model", folder, *CALL)
            assert (answer.code, answer.stdout) == (1, "")
            assert answer.stderr.startswith(f"error: {file} is damaged: ")
            assert answer.stderr.count("\n") == 1
    answer = cli("generate", "--model", folder, *CALL)
    assert (answer.code, "checksum" in answer.stderr) == (0, False)


@pytest.mark.parametrize("call", [("generate", *CALL), ("bench", "engine", *SHORT, "--repeats", "1")])
def test_a_checkpoint_without_checksums_is_said_in_one_line(cli: Cli, toy: Path, call: tuple[str, ...]) -> None:
    answer = cli(*call, "--model", toy)
    assert answer.code == 0, answer.stderr
    assert answer.stderr.count(f"{toy}: no checksum is known of model.safetensors, config.json and 3 more; ") == 1
    assert "sha256sum *.json *.safetensors >> SHA256SUMS)\n" in answer.stderr
    assert "checksum" not in answer.stdout
    for quiet in ("--json", "--quiet"):
        answer = cli(*call, "--model", toy, quiet)
        assert answer.stderr == ""
        assert quiet == "--quiet" or json.loads(answer.stdout)


def test_one_process_speaks_for_all(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="no checksum is known"):
        adapter.DllmSparseLM(str(toy))
    other = Processes.alone()
    other.rank, other.world = 1, 2
    monkeypatch.setattr(adapter, "join", lambda device: (other, "cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.DllmSparseLM(str(toy))
