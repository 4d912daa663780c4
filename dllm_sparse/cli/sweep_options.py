"""Options `critical-sparsity` and `compare` share, and their progress on stderr. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dllm_sparse.cli.blocks import block_length_or_default, fit
from dllm_sparse.cli.output import Output
from dllm_sparse.cli.terminal import printable
from dllm_sparse.types import UsageError

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig

_SWEEP = "Sweep"
_LIKELIHOOD = "Likelihood"

TasksOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="Task names, YAML paths, or NAME=FILE for tasks over your own file; comma-separated or repeated.",
        rich_help_panel=_SWEEP,
    ),
]
SweepSitesOpt = Annotated[
    list[str],
    typer.Option(
        "--sites",
        help="input, up, gate, intermediate, all_inputs, all_linear; all: the first 5.",
        rich_help_panel=_SWEEP,
    ),
]
GridOpt = Annotated[
    str | None,
    typer.Option("--grid", help="Values of p, comma-separated. Default: the paper's 26.", rich_help_panel=_SWEEP),
]
SearchOpt = Annotated[
    bool,
    typer.Option(
        "--search",
        help="Bracket the crossing to +-1 point in at most 8 evaluations; refines --grid if given.",
        rich_help_panel=_SWEEP,
    ),
]
RetainOpt = Annotated[float, typer.Option(help="Share of the dense score to keep.", rich_help_panel=_SWEEP)]
AverageOpt = Annotated[
    Literal["element", "hook_mean"],
    typer.Option(help="Which average of sparsity a search and the verdicts use.", rich_help_panel=_SWEEP),
]
ResamplesOpt = Annotated[int, typer.Option(help="Bootstrap resamples over items.", rich_help_panel=_SWEEP)]
UnsafeOpt = Annotated[
    bool,
    typer.Option("--confirm-run-unsafe-code", help="Allow tasks that run model-written code.", rich_help_panel=_SWEEP),
]
McNumOpt = Annotated[int, typer.Option(help="Masked copies per likelihood (diffusion).", rich_help_panel=_LIKELIHOOD)]
McBatchOpt = Annotated[
    int | None,
    typer.Option(help="Copies stratified together; default all. LLaDA's scripts: 8.", rich_help_panel=_LIKELIHOOD),
]
LikelihoodCfgOpt = Annotated[
    float, typer.Option("--cfg-scale", help="Guidance in likelihoods.", rich_help_panel=_LIKELIHOOD)
]
EstimatorOpt = Annotated[
    Literal["monte_carlo", "distinct", "pseudo"],
    typer.Option(
        help="Official Monte-Carlo bound; the same from copies without repeats (less noise); pseudo-likelihood.",
        rich_help_panel=_LIKELIHOOD,
    ),
]
BatchTokensOpt = Annotated[int | None, typer.Option(help="Most tokens of one forward.", rich_help_panel=_LIKELIHOOD)]
TaskGenLengthOpt = Annotated[
    int | None,
    typer.Option("--gen-length", help="Tokens to generate; default: as each task asks.", rich_help_panel="Decoding"),
]


def split_list(values: list[str] | None) -> list[str]:
    """Comma-separated and repeated values as one list."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def parse_grid(text: str | None) -> list[float] | None:
    """`0.9,0.8` -> [0.9, 0.8]; raises UsageError."""
    if text is None:
        return None
    try:
        grid = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        grid = []
    if not grid:
        raise UsageError(f"--grid is {text!r}; expected numbers such as 0.95,0.9,0.8")
    return grid


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`0,3` -> (0, 3); raises UsageError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"--layers is {text!r}; expected layer numbers such as 0,3,5") from error


def task_sampler(
    gen_length: int | None, steps: int | None, block_length: int | None, seed: int
) -> SamplerConfig | None:
    """The decoding of generation tasks, or None to let each task decide its length; raises UsageError."""
    from dllm_sparse.samplers.config import SamplerConfig

    if gen_length is None:
        if steps is not None or block_length is not None:
            raise UsageError("--steps and --block-length split a length: give --gen-length, too, or leave them out")
        return None
    blocks = block_length_or_default(block_length)
    return SamplerConfig(gen_length=gen_length, steps=steps, block_length=blocks, seed=seed)


def check_sampler(lm: LanguageModel, sampler: SamplerConfig | None, block_length: int | None) -> None:
    """Raises UsageError for what this model cannot decode, before anything is scored."""
    if sampler is not None:
        fit(lm, sampler, block_length)


class SweepProgress:
    """Bars over points and over the items of the current one, with the time left; a line a point off a terminal."""

    def __init__(self, output: Output, *, first: bool = True) -> None:
        from rich.progress import TaskProgressColumn

        self._output, self._first = output, first
        self._bars = output.bars(TaskProgressColumn(), watched=first)
        self._points = self._bars.add_task("points", total=None)
        self._items = self._bars.add_task("items", total=1.0)
        self._title = ""

    def __enter__(self) -> SweepProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def planned(self, points: int) -> None:
        """Sets the number of points."""
        self._bars.update(self._points, total=points)

    def started(self, title: str) -> None:
        """Shows the point that begins."""
        self._title = printable(title)
        self._bars.reset(self._items, description=self._title, total=1.0)

    def advanced(self, share: float) -> None:
        """Moves the bar of the current point."""
        self._bars.update(self._items, completed=share)

    def finished(self, *, reused: bool) -> None:
        """Counts a point; says so in a line where no bar is shown."""
        self._bars.advance(self._points)
        if self._first and not self._output.live:
            self._output.say(f"{self._title}{' (stored)' if reused else ''}")


def percent(value: float | None) -> str:
    """A share as a percentage, `-` where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f}"


def value(row: dict[str, Any], average: str, reading: str) -> str:
    """`41.2`, with `>=` where nothing measured fell below the line."""
    found = percent(row[f"{average}_{reading}"])
    return f">= {found}" if found != "-" and row[f"{average}_censored"] else found


def estimate(row: dict[str, Any], average: str, reading: str) -> str:
    """`41.2 [38.0, 44.1]`: a value with its interval."""
    if (found := value(row, average, reading)) == "-":
        return found
    low, high = row[f"{average}_{reading}_low"], row[f"{average}_{reading}_high"]
    return f"{found} [{percent(low)}, {percent(high)}]"


def exploitable(row: dict[str, Any], average: str = "") -> str:
    """`44/12/3`: percents of the FFN's weights that 1, 8 and 32 tokens of a pass need not read; `-` where none had so
    many. Of a sweep's row at the grid maximum of an `average`."""
    prefix = f"{average}_exploitable_T" if average else "exploitable_T"
    shares = (share for name, share in row.items() if name.startswith(prefix))
    return "/".join("-" if share is None else f"{100 * share:.0f}" for share in shares)


EXPLOITABLE = "exploitable: % of FFN weight bytes and FLOPs that 1/8/32 tokens of a pass can skip"
"""What the column of that name holds."""


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines below a table: how to read it, and what to beware of. Doubts are about dense scores, alike at every site.

    An average's doubts are those of its tasks.
    """
    several = len({row["model"] for row in rows}) > 1
    doubts = dict.fromkeys(
        f"beware of {row['task']}{' by ' + row['model'] if several else ''}: {row['flags']}"
        for row in rows
        if row["flags"] and row["task"] != "average"
    )
    return [f"{EXPLOITABLE} at the grid max", *doubts]


def plain_table(headers: list[str], rows: list[list[str]]) -> list[str]:
    """Aligned columns for a terminal or a file."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headers, ["-" * width for width in widths], *rows]
    ]
