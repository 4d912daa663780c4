"""The command line: the only place that knows typer and rich."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `dllm-sparse`: runs the app inside the error boundary and exits with its code."""
    from dllm_sparse.cli.app import app
    from dllm_sparse.cli.errors import run

    sys.exit(run(app))
