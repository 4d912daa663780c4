"""`dllm-sparse layers`: effective rank and tolerance of every layer, and of every expert of a mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dllm_sparse.cli import loss_options as loss
from dllm_sparse.cli import options as opt
from dllm_sparse.cli.opening import open_model, say_fallback
from dllm_sparse.cli.output import Output
from dllm_sparse.cli.sweep_options import percent, plain_table

if TYPE_CHECKING:
    from dllm_sparse.report.layers import LayerReport

_HEADERS = ["layer", "rank/width input", "gate", "up", "intermediate", "critical input", "intermediate", "alone"]
_LAYERS = "Layers"


def layers(
    model: opt.ModelOpt = "tiny-diffusion",
    text: loss.TextOpt = None,
    windows: loss.WindowsOpt = 32,
    length: loss.LengthOpt = 128,
    sites: opt.SitesOpt = "all_inputs",
    retain: Annotated[float, typer.Option(help="Share to keep of 1 / perplexity.", rich_help_panel=_LAYERS)] = 0.99,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity/--no-sensitivity",
            help="Every layer alone, and p spread over layers: several forwards a layer.",
            rich_help_panel=_LAYERS,
        ),
    ] = True,
    published_rank: Annotated[
        bool,
        typer.Option("--published-rank", help="Also the paper's batch-dependent rank.", rich_help_panel=_LAYERS),
    ] = False,
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="How far an allocation moves p.", rich_help_panel=_LAYERS)
    ] = 0.5,
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    revision: opt.RevisionOpt = None,
    engine: opt.EngineOpt = "auto",
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Effective rank, critical sparsity and tolerance layer by layer; experts one by one.

    Scored by held-out perplexity. Points are stored under --out as they finish: the same command resumes.
    Example: dllm-sparse layers --model smollm2-135m --text wiki.test.tokens --out layers
    """
    from dllm_sparse.evaluation.texts import texts_of
    from dllm_sparse.report.layers import layer_report

    output = Output(as_json=as_json, quiet=quiet)
    texts = texts_of(text)
    lm = open_model(output, model, device, dtype, revision, engine)
    say_fallback(output, "auto", lm)
    report = layer_report(
        lm,
        texts,
        sites=sites,
        retain=retain,
        windows=windows,
        length=length,
        sensitivity=sensitivity,
        published_rank=published_rank,
        strength=strength,
        seed=seed,
        out=out,
        say=output.say,
    )
    _answer(output, report)


def _answer(output: Output, report: LayerReport) -> None:
    from dllm_sparse.report.layer_files import summary

    if output.as_json:
        output.json(report.to_dict())
        return
    rows = [
        [
            str(row["layer"]),
            *(percent(row[f"normalised_rank_{site}"]) for site in ("input", "gate", "up", "intermediate")),
            *(percent(row[f"critical_{site}"]) for site in ("input", "intermediate")),
            (">= " if row["alone_censored"] else "") + percent(row["critical_alone"]),
        ]
        for row in report.rows()
    ]
    for line in plain_table(_HEADERS, rows):
        output.answer(line)
    for sentence in summary(report.value):
        output.answer(sentence)
    output.paths(report.files)
