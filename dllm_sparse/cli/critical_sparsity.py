"""`dllm-sparse critical-sparsity`: how much can be switched off before a task score drops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli import sweep_options as sweep
from dllm_sparse.cli.opening import open_model, say_fallback
from dllm_sparse.cli.output import Output

if TYPE_CHECKING:
    from dllm_sparse.report.critical import CriticalReport

_HEADERS = ["site", "task", "items", "dense", "critical (element)", "grid max", "exploitable", "hook mean"]


def critical_sparsity(
    model: opt.ModelOpt = "tiny-diffusion",
    tasks: sweep.TasksOpt = None,
    sites: sweep.SweepSitesOpt = ["all_inputs"],  # noqa: B006 (typer copies it)
    grid: sweep.GridOpt = None,
    search: sweep.SearchOpt = False,
    retain: sweep.RetainOpt = 0.99,
    protocol: Annotated[
        str | None,
        typer.Option(help="A published evaluation: paper-llada or paper-ar.", rich_help_panel="Sweep"),
    ] = None,
    limit: opt.LimitOpt = None,
    average: sweep.AverageOpt = "element",
    resamples: sweep.ResamplesOpt = 1000,
    rule: opt.RuleOpt = "top_p",
    scope: opt.ScopeOpt = "token",
    group_size: opt.GroupSizeOpt = 32,
    score: opt.ScoreOpt = "magnitude",
    layers: Annotated[
        str | None,
        typer.Option(help="Only these layers, comma-separated; default all.", rich_help_panel="Sparsity"),
    ] = None,
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
    revision: opt.RevisionOpt = None,
    engine: opt.EngineOpt = "auto",
    confirm_run_unsafe_code: sweep.UnsafeOpt = False,
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Find the largest sparsity that keeps 99 % of the dense score, with an interval, per site and task.

    Points are stored under --out as they finish: the same command resumes.
    Example: dllm-sparse critical-sparsity --tasks tiny-cloze --search --limit 100 --mc-num 16 --out critical
    """
    from dllm_sparse.evaluation.options import ScoringOptions
    from dllm_sparse.evaluation.processes import join, leave
    from dllm_sparse.report.critical import critical_sparsity as run
    from dllm_sparse.report.workload import Workload
    from dllm_sparse.sparsity.config import SparsityConfig

    chosen = sweep.parse_layers(layers)
    base = SparsityConfig(rule=rule, scope=scope, group_size=group_size, score=score, layers=chosen, backend=backend)
    scoring = ScoringOptions(
        mc_num=mc_num,
        mc_batch=mc_batch,
        cfg_scale=cfg_scale,
        estimator=estimator,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    names = sweep.split_list(tasks) or ([] if protocol else ["tiny-cloze"])
    knobs = sweep.parse_grid(grid)
    sampler = sweep.task_sampler(gen_length, steps, block_length, seed)
    processes, own_device = join(device)
    output = Output(as_json=as_json, quiet=quiet or not processes.first)
    # Tasks first: missing data are said before a large model is loaded.
    workload = Workload.load(
        names,
        limit=limit,
        scoring=scoring,
        sampler=sampler,
        published=protocol,
        allow_code=confirm_run_unsafe_code,
    )
    lm = open_model(output, model, own_device, dtype, revision, engine)
    sweep.check_sampler(lm, sampler, block_length)
    say_fallback(output, backend, lm)
    with sweep.SweepProgress(output, first=processes.first) as progress:
        report = run(
            lm,
            workload,
            sites=sweep.split_list(sites),
            grid=knobs,
            retain=retain,
            out=out,
            search=search,
            sparsity=base,
            average=average,
            resamples=resamples,
            processes=processes,
            watcher=progress,
        )
    if processes.first:
        _answer(output, report)
    leave()


def _answer(output: Output, report: CriticalReport) -> None:
    if output.as_json:
        output.json(report.to_dict())
        return
    rows = [
        [
            row["site"],
            row["task"],
            str(row["items"]),
            f"{row['dense_score']:.4g}",
            sweep.estimate(row, "element", "crossing"),
            sweep.percent(row["element_grid_max"]),
            sweep.exploitable(row, "element"),
            sweep.value(row, "hook_mean", "crossing"),
        ]
        for row in report.rows()
    ]
    for line in [*sweep.plain_table(_HEADERS, rows), *sweep.notes(report.rows())]:
        output.answer(line)
    output.say(f"sparsity in % of entries, 95 % intervals over items; {report.seconds:.0f} s")
    output.say(f"{report.computed} points computed, {report.reused} taken from the store")
    output.paths(report.files)
