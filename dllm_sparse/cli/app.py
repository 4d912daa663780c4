"""The typer app: one function per command file, imported here, heavy imports inside the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dllm_sparse import __version__
from dllm_sparse.cli.bench import bench, engine
from dllm_sparse.cli.bench_sparse import kernels, sparse, tune
from dllm_sparse.cli.cett import cett
from dllm_sparse.cli.compare import compare
from dllm_sparse.cli.critical_sparsity import critical_sparsity
from dllm_sparse.cli.doctor import doctor
from dllm_sparse.cli.drift_report import drift_report
from dllm_sparse.cli.generate import generate
from dllm_sparse.cli.laws import laws
from dllm_sparse.cli.layers import layers
from dllm_sparse.cli.memory import names_memory_options
from dllm_sparse.cli.models import models
from dllm_sparse.cli.train import train

app = typer.Typer(
    name="dllm-sparse",
    help="Activation sparsity in diffusion language models: measure it, watch it move, use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dllm-sparse {__version__}")
        raise typer.Exit


VersionOpt = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")]


@app.callback()
def root(
    version: VersionOpt = False,
) -> None:
    """Activation sparsity in diffusion language models: measure it, watch it move, use it."""


_COMMANDS: dict[typer.Typer, tuple[Callable[..., None], ...]] = {
    app: (generate, drift_report, critical_sparsity, compare, models, train, laws, layers, cett, doctor),
    bench: (engine, sparse, kernels, tune),
}
for group, commands in _COMMANDS.items():
    for command in commands:
        group.command()(names_memory_options(command))
app.add_typer(bench, name="bench")
