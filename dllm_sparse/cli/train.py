"""`dllm-sparse train`: a small twin from a recipe; several GPUs by `accelerate launch -m dllm_sparse train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.output import Output
from dllm_sparse.types import Kind, UsageError

if TYPE_CHECKING:
    from dllm_sparse.training.data import Prepared
    from dllm_sparse.training.loop import Progress
    from dllm_sparse.training.recipe import Recipe

_RECIPE = "Recipe"
_RUN = "Run"

ObjectiveOpt = Annotated[Kind, typer.Option(help="Masked diffusion (LLaDA's) or next token.", rich_help_panel=_RECIPE)]
CorpusOpt = Annotated[
    Path | None,
    typer.Option(help='Lines of {"text": ...}: .jsonl, .jsonl.xz or .jsonl.gz.', rich_help_panel=_RUN),
]
DataOpt = Annotated[
    Path | None,
    typer.Option(
        help="Prepared data, made from --corpus if missing; twins share one. [OUT/data]", rich_help_panel=_RUN
    ),
]
RunOutOpt = Annotated[Path, typer.Option("--out", help="The run's folder; again to resume.", rich_help_panel=_RUN)]
StepsOpt = Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1, rich_help_panel=_RECIPE)]
SeedOpt = Annotated[int | None, typer.Option(help="Instead of the recipe's.", rich_help_panel=_RECIPE)]
ActivationOpt = Annotated[
    Literal["silu", "relu"] | None, typer.Option(help="Instead of the recipe's.", rich_help_panel=_RECIPE)
]
SizeOpt = Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1, rich_help_panel=_RECIPE)]
TrainDeviceOpt = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.", rich_help_panel=_RUN)]
SnapshotsOpt = Annotated[
    int,
    typer.Option(min=0, help="Keep so many models along the way, log-spaced, for `laws`.", rich_help_panel=_RUN),
]
CompileOpt = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile; default on a GPU.", rich_help_panel=_RUN),
]


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe by name, or a TOML file.")] = "tiny-twins",
    objective: ObjectiveOpt = "diffusion",
    corpus: CorpusOpt = None,
    data: DataOpt = None,
    out: RunOutOpt = Path("run"),
    steps: StepsOpt = None,
    seed: SeedOpt = None,
    activation: ActivationOpt = None,
    width: SizeOpt = None,
    layers: SizeOpt = None,
    heads: SizeOpt = None,
    ffn_width: SizeOpt = None,
    device: TrainDeviceOpt = "auto",
    compiled: CompileOpt = None,
    snapshots: SnapshotsOpt = 0,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Train a small diffusion or autoregressive model; the same command again continues after an interruption."""
    import torch

    from dllm_sparse.files import check_folder
    from dllm_sparse.training.loop import Trainer
    from dllm_sparse.training.recipe import load_recipe
    from dllm_sparse.training.snapshots import log_spaced

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch sees no CUDA GPU; use --device cpu")
    output = Output(as_json=as_json, quiet=quiet)
    check_folder(out)
    sizes = {"model_width": width, "model_layers": layers, "model_heads": heads, "model_ffn_width": ffn_width}
    chosen = load_recipe(recipe, steps=steps, seed=seed, model_activation=activation, **sizes)
    gpu = device != "cpu" and torch.cuda.is_available()
    prepared = _prepared(chosen, corpus, data or out / "data", output, cpu=not gpu)
    options = {"cpu": not gpu, "compiled": gpu if compiled is None else compiled}
    kept = log_spaced(chosen.steps, snapshots) if snapshots else ()
    trainer = Trainer(chosen, objective, prepared, out, snapshots=kept, **options)
    if trainer.step and trainer.main_process:
        output.say(f"resuming at step {trainer.step} of {chosen.steps}")
    with _display(output, chosen.steps, trainer.step) as report:
        trainer.run(report)
    files = trainer.finish()
    if trainer.main_process:
        output.json({"files": [str(path) for path in files]}) if as_json else output.paths(files)


def _prepared(recipe: Recipe, corpus: Path | None, folder: Path, output: Output, *, cpu: bool) -> Prepared:
    """The prepared data, made by one process while the others wait."""
    from accelerate import PartialState

    from dllm_sparse.training.data import load_prepared, prepare, prepared_for

    # The first state of a process is the one all others share, so it must know the device.
    with PartialState(cpu=cpu).local_main_process_first():
        if not prepared_for(recipe, folder):
            if corpus is None:
                raise UsageError(f'{folder} holds no prepared data yet; give --corpus FILE (lines of {{"text": ...}})')
            prepare(corpus, recipe, folder, output.say)
    return load_prepared(folder)


@contextmanager
def _display(output: Output, steps: int, done: int) -> Iterator[Callable[[Progress], None]]:
    """Loss, tokens a second and time left on stderr: a moving line on a terminal, a line an evaluation elsewhere."""
    with output.bars() as bar:
        task = bar.add_task("training", total=steps, completed=done)

        def report(progress: Progress) -> None:
            text = f"loss {progress.loss:.3f}  {progress.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=progress.step, description=text)
            if progress.held_out_loss is not None:
                held = f"held-out loss {progress.held_out_loss:.3f}"
                output.say(f"step {progress.step}/{steps}  {text}  {held}  {progress.seconds_left:.0f} s left")

        yield report
