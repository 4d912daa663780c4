"""Help and version are quick and load nothing heavy."""

from __future__ import annotations

import resource
import sys

import pytest

import dllm_sparse as ds
from tests.helpers import run_cli

HEAVY = ("torch", "transformers", "numpy", "scipy", "huggingface_hub", "datasets", "lm_eval", "matplotlib", "triton")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_help_and_version_in_half_a_second(arguments: tuple[str, ...]) -> None:
    """Processor time, best of three: the wall clock of a busy machine says nothing about the program."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_cli(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stderr) == (0, "")
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5


def test_every_help_page_without_heavy_imports() -> None:
    from dllm_sparse.cli.app import app

    commands = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]  # type: ignore[union-attr]
    assert {"generate", "models"} <= set(commands)
    calls = [["--help"], ["--version"], []] + [[command, "--help"] for command in commands]
    code = f"""
import sys
from dllm_sparse.cli.app import app
import dllm_sparse
for call in {calls!r}:
    try:
        app(call, prog_name="dllm-sparse")
    except SystemExit as end:
        assert end.code == (0 if call else 2), (call, end.code)
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"dllm-sparse {ds.__version__}" in done.stdout
