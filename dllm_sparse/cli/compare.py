"""`dllm-sparse compare`: diffusion against autoregressive (or any two models) in one harness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli import sweep_options as sweep
from dllm_sparse.cli.opening import open_model, say_fallback
from dllm_sparse.cli.output import Output

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.report.compare import Comparison

_HEADERS = ["site", "task", "model", "dense", "critical sparsity", "grid max", "exploitable"]
_MODEL = "Model"


def compare(
    diffusion: Annotated[
        str | None, typer.Option(help="A diffusion model. Default: tiny-diffusion.", rich_help_panel=_MODEL)
    ] = None,
    autoregressive: Annotated[
        str | None, typer.Option(help="An autoregressive model. Default: tiny-ar.", rich_help_panel=_MODEL)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Any model; repeatable.", rich_help_panel=_MODEL)
    ] = None,
    tasks: sweep.TasksOpt = None,
    sites: sweep.SweepSitesOpt = ["all_inputs"],  # noqa: B006 (typer copies it)
    grid: sweep.GridOpt = None,
    search: sweep.SearchOpt = False,
    retain: sweep.RetainOpt = 0.99,
    as_published: Annotated[
        bool,
        typer.Option("--as-published", help="Also the paper's confounded settings.", rich_help_panel="Sweep"),
    ] = False,
    noise_seeds: Annotated[
        int,
        typer.Option(help="Measure likelihood noise over so many seeds (2 or more).", rich_help_panel="Likelihood"),
    ] = 0,
    limit: opt.LimitOpt = None,
    average: sweep.AverageOpt = "element",
    resamples: sweep.ResamplesOpt = 1000,
    rule: opt.RuleOpt = "top_p",
    scope: opt.ScopeOpt = "token",
    backend: opt.BackendOpt = "auto",
    mc_num: sweep.McNumOpt = 128,
    mc_batch: sweep.McBatchOpt = None,
    cfg_scale: sweep.LikelihoodCfgOpt = 0.0,
    estimator: sweep.EstimatorOpt = "monte_carlo",
    batch_tokens: sweep.BatchTokensOpt = None,
    gen_length: sweep.TaskGenLengthOpt = None,
    steps: opt.StepsOpt = None,
    block_length: opt.BlockLengthOpt = None,
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    engine: opt.EngineOpt = "auto",
    confirm_run_unsafe_code: sweep.UnsafeOpt = False,
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Compare critical sparsities of models on the same tasks, rule and average, with verdicts an interval supports.

    Example: dllm-sparse compare --tasks tiny-cloze,tiny-infill --search --limit 100 --mc-num 16 --out comparison
    """
    from dllm_sparse.evaluation.options import ScoringOptions
    from dllm_sparse.evaluation.processes import join, leave
    from dllm_sparse.report.compare import compare as run
    from dllm_sparse.report.workload import Workload
    from dllm_sparse.sparsity.config import SparsityConfig

    base = SparsityConfig(rule=rule, scope=scope, backend=backend)
    scoring = ScoringOptions(
        mc_num=mc_num,
        mc_batch=mc_batch,
        cfg_scale=cfg_scale,
        estimator=estimator,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    if not model:  # one kind alone is compared with the bundled model of the other
        diffusion, autoregressive = diffusion or "tiny-diffusion", autoregressive or "tiny-ar"
    knobs = sweep.parse_grid(grid)
    sampler = sweep.task_sampler(gen_length, steps, block_length, seed)
    processes, own_device = join(device)
    output = Output(as_json=as_json, quiet=quiet or not processes.first)
    workload = Workload.load(
        sweep.split_list(tasks) or ["tiny-cloze"],
        limit=limit,
        scoring=scoring,
        sampler=sampler,
        allow_code=confirm_run_unsafe_code,
    )

    def opened(name: str) -> LanguageModel:
        return open_model(output, name, own_device, dtype, None, engine)

    one, other = (opened(name) if name else None for name in (diffusion, autoregressive))
    more = [opened(name) for name in model or ()]
    models = [lm for lm in (one, other, *more) if lm is not None]
    for lm in models:
        sweep.check_sampler(lm, sampler, block_length)
    say_fallback(output, backend, *models)
    with sweep.SweepProgress(output, first=processes.first) as progress:
        result = run(
            one,
            other,
            workload,
            sites=sweep.split_list(sites),
            retain=retain,
            out=out,
            models=more,
            grid=knobs,
            search=search,
            published=as_published,
            noise_seeds=noise_seeds,
            sparsity=base,
            average=average,
            resamples=resamples,
            processes=processes,
            watcher=progress,
        )
    if processes.first:
        _answer(output, result, average)
    leave()


def _answer(output: Output, result: Comparison, average: str) -> None:
    if output.as_json:
        output.json(result.to_dict())
        return
    ordered = sorted(result.rows(), key=lambda row: (row["site"], row["task"] != "average", row["task"]))
    rows = [
        [
            row["site"],
            row["task"],
            row["model"],
            f"{row['dense_score']:.4g}",
            sweep.estimate(row, average, "crossing"),
            sweep.percent(row[f"{average}_grid_max"]),
            sweep.exploitable(row, average),
        ]
        for row in ordered
    ]
    table = [*sweep.plain_table(_HEADERS, rows), *sweep.notes(ordered)]
    for line in [*table, "", *result.verdicts, *_published_lines(result)]:
        output.answer(line)
    output.say(f"sparsity in % of entries ({average} average), 95 % intervals over items; {result.seconds:.0f} s")
    output.say(f"{result.computed} points computed, {result.reused} taken from the store")
    output.paths(result.files)


def _published_lines(result: Comparison) -> list[str]:
    """How far each published setting moves a diffusion model's critical sparsity."""
    lines = []
    for model, sites in result.value.get("as_published", {}).items():
        for site, settings in sites.items():
            parts = [
                f"{name} {sweep.percent(entry['crossing'])} ({sweep.percent(entry['confound'])})"
                for name, entry in settings.items()
            ]
            lines.append(f"{model}, {site}, critical sparsity by setting (confound in points): {'; '.join(parts)}")
    return lines
