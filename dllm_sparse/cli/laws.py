"""`dllm-sparse laws`: how the share of active neurons moves with training, and where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dllm_sparse.cli import loss_options as loss
from dllm_sparse.cli import options as opt
from dllm_sparse.cli.output import Output
from dllm_sparse.cli.sweep_options import plain_table

if TYPE_CHECKING:
    from dllm_sparse.report.laws import LawsReport

_FIT = "Fit"
_MEASURING = "Measuring snapshots"
_HEADERS = ["run", "points", "form", "limit A0", "95 %", "alpha", "rms residual", "weight", "lack of fit", "beware"]

FormOpt = Annotated[
    Literal["auto", "relu", "silu"],
    typer.Option(help="relu: falling, exp(-c D^a + b) + A0; silu: rising, A0 - c / D^a.", rich_help_panel=_FIT),
]


def laws(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="CSV files (tokens_billions, activation_ratio, run, ...) or folders of `train --snapshots`."
        ),
    ] = None,
    form: FormOpt = "auto",
    published: Annotated[
        bool, typer.Option("--published", help="Also the paper's own coefficients.", rich_help_panel=_FIT)
    ] = False,
    at: Annotated[
        float, typer.Option(min=1e-6, help="D in billions of tokens to evaluate the laws at.", rich_help_panel=_FIT)
    ] = 100.0,
    samples: Annotated[int, typer.Option(min=0, help="Bootstrap refits of every law.", rich_help_panel=_FIT)] = 200,
    extrapolate: Annotated[
        float, typer.Option(min=1, help="How many times the last D curves and bands reach.", rich_help_panel=_FIT)
    ] = 10.0,
    skip_warmup: Annotated[
        float, typer.Option(help="Drop points below this share of a run's last D.", rich_help_panel=_FIT)
    ] = 0.0,
    text: loss.TextOpt = None,
    windows: loss.WindowsOpt = 64,
    length: loss.LengthOpt = 128,
    increase: Annotated[
        float, typer.Option(help="Allowed rise of perplexity (CETT-PPL-1%: 0.01).", rich_help_panel=_MEASURING)
    ] = 0.01,
    p: opt.POpt = 0.9,
    device: opt.DeviceOpt = "auto",
    seed: opt.SeedOpt = 0,
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Fit the activation laws of Sparsing Law to measured points, or to the snapshots of training runs.

    Example: dllm-sparse train --snapshots 12 --corpus texts.jsonl --out run && dllm-sparse laws run --out laws
    """
    from dllm_sparse.report.law_points import Measurement, gather, measure_run
    from dllm_sparse.report.laws import activation_laws
    from dllm_sparse.report.result_folder import check_inputs, check_results

    output = Output(as_json=as_json, quiet=quiet)
    check_results(out, "laws.json")
    check_inputs(out, inputs or [], ("points.csv", "laws.csv"))

    def measure(run: Path) -> list[Any]:
        from dllm_sparse.evaluation.texts import texts_of

        how = Measurement(windows=windows, length=length, increase=increase, p=p)
        return measure_run(run, texts_of(text), how, device, output.say)

    report = activation_laws(
        gather(inputs or [], measure),
        form,
        samples=samples,
        extrapolate=extrapolate,
        published=published,
        skip_warmup=skip_warmup,
        seed=seed,
        out=out,
    )
    _answer(output, report, at, published)


def _answer(output: Output, report: LawsReport, at: float, published: bool) -> None:
    from dllm_sparse.report.law_text import sentences

    if output.as_json:
        output.json(report.to_dict())
        return
    if report.value["runs"]:
        for line in plain_table(_HEADERS, [_cells(row) for row in report.rows()]):
            output.answer(line)
    if published:
        for line in _published_lines(at):
            output.answer(line)
    for sentence in sentences(report.value):
        output.say(sentence)
    output.paths(report.files)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["best"] is None:
        return [row["run"], str(row["points"]), "-", *["-"] * 6, row["problem"]]
    ends = [None if row[end] is None else f"{row[end]:.4f}" for end in ("limit_low", "limit_high")]
    interval = f"[{ends[0] or 'open'}, {ends[1] or 'open'}]" if any(ends) else "-"
    trend = "-" if row["trend_p_value"] is None else f"{row['trend_p_value']:.3f}"
    return [
        row["run"],
        str(row["points"]),
        row["best"],
        f"{row['limit']:.4f}",
        interval,
        f"{row['alpha']:.3g}",
        f"{row['rms_residual']:.2g}",
        f"{row['akaike_weight']:.2f}",
        trend,
        "; ".join(words for words, said in _beware(row) if said),
    ]


def _beware(row: dict[str, Any]) -> list[tuple[str, bool]]:
    return [
        ("refused by the lack-of-fit test", bool(row["rejected"])),
        (f"limit not determined: {row['open']}", not row["determined"]),
    ]


def _published_lines(at: float) -> list[str]:
    """The paper's coefficients and what they say at D."""
    from dllm_sparse.analysis.law_forms import PUBLISHED, activation_law

    headers = ["published", "alpha", "b", "c", "limit A0", f"A at {at:g}B tokens"]
    rows = [
        [
            f"{form} {size}",
            f"{values['alpha']:.3g}",
            f"{values['b']:.3g}" if "b" in values else "-",
            f"{values['c']:.3g}",
            f"{values['A0']:.4f}",
            f"{float(activation_law(form, at, **values)[0]):.4f}",
        ]
        for form, sizes in PUBLISHED.items()
        for size, values in sizes.items()
    ]
    return plain_table(headers, rows)
