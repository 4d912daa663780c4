"""The GPU kernels' indexing and masks in Triton's interpreter, in a process of its own: it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
BEFORE_3_9 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
OLD = BEFORE_3_9 and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.mark.skipif(OLD, reason="the interpreter of triton before 3.9 cannot loop to a loaded bound under numpy 2.4")
def test_kernels_agree_with_their_twins_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["products", "layers", "attention", "choice", "selection"]
