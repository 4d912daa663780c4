"""`dllm-sparse cett`: the sparsity that costs one percent of perplexity, by static weight-aware thresholds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dllm_sparse.cli import loss_options as loss
from dllm_sparse.cli import options as opt
from dllm_sparse.cli.opening import open_model, say_fallback
from dllm_sparse.cli.output import Output
from dllm_sparse.cli.sweep_options import EXPLOITABLE, exploitable, percent, plain_table

if TYPE_CHECKING:
    from dllm_sparse.report.cett import CettReport

_SEARCH = "Search"
_HEADERS = ["model", "sparsity", "exploitable", "activation ratio", "perplexity / dense"]


def cett(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Alias, folder or hub id; several (checkpoints of one run) share one CETT.",
            rich_help_panel="Model",
        ),
    ] = None,
    text: loss.TextOpt = None,
    windows: loss.WindowsOpt = 64,
    length: loss.LengthOpt = 128,
    increase: Annotated[
        float, typer.Option(help="Allowed rise of perplexity; CETT-PPL-1%: 0.01.", rich_help_panel=_SEARCH)
    ] = 0.01,
    tolerance: Annotated[float, typer.Option(help="Of the CETT found.", rich_help_panel=_SEARCH)] = 1e-3,
    rules: Annotated[
        bool,
        typer.Option("--rules", help="Also top-p, top-k, FAT-eps and exact zeros, as curves.", rich_help_panel=_SEARCH),
    ] = False,
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    revision: opt.RevisionOpt = None,
    engine: opt.EngineOpt = "auto",
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Search CETT-PPL-p% (Sparsing Law) on held-out text; for diffusion models by the masked cross-entropy.

    Example: dllm-sparse cett --model tiny-ar --rules --out cett
    """
    from dllm_sparse.evaluation.texts import texts_of
    from dllm_sparse.report.cett import cett_report

    output = Output(as_json=as_json, quiet=quiet)
    texts = texts_of(text)
    models = [open_model(output, name, device, dtype, revision, engine) for name in model or ["tiny-diffusion"]]
    say_fallback(output, "auto", *models)
    report = cett_report(
        models,
        texts,
        increase=increase,
        compare_rules=rules,
        windows=windows,
        length=length,
        tolerance=tolerance,
        seed=seed,
        out=out,
        say=output.say,
    )
    _answer(output, report)


def _answer(output: Output, report: CettReport) -> None:
    from dllm_sparse.report.cett import RULE_NAMES, model_rows

    value = report.value
    if output.as_json:
        output.json(value)
        return
    share = 100 * value["config"]["increase"]
    output.answer(f"CETT-PPL-{share:g}%: CETT {value['cett']:.4f}")
    rows = [
        [
            row["model"],
            percent(row["sparsity"]),
            exploitable(row),
            percent(row["activation"]),
            f"{row['perplexity_ratio']:.4f}",
        ]
        for row in model_rows(value)
    ]
    for line in [*plain_table(_HEADERS, rows), EXPLOITABLE]:
        output.answer(line)
    for entry in value["models"]:
        for rule, sparsity in entry["affordable"].items():
            at = "at no cost" if rule == "zero" else f"at +{share:g} % perplexity"
            output.answer(f"{entry['model']}, {RULE_NAMES[rule]}: {percent(sparsity)} % {at}")
    output.paths(report.files)
