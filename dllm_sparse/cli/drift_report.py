"""`dllm-sparse drift-report`: how the active sets move while a model decodes, as a page, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.opening import has_chat_template, open_model, say_fallback
from dllm_sparse.cli.output import Output

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.sparsity.config import SparsityConfig

_EXPERIMENTS = "Experiments"
_DELTAS = (4, 8, 16, 32)  # the published grid


def drift_report(
    model: opt.ModelOpt = "tiny-diffusion",
    prompt: opt.PromptOpt = None,
    prompts: opt.PromptsOpt = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts; of the bundled ones 8.")] = None,
    chat: opt.ChatOpt = None,
    p: opt.POpt = 0.8,
    sites: opt.SitesOpt = "all_inputs",
    rule: opt.RuleOpt = "top_p",
    scope: Annotated[
        Literal["token", "sequence", "group"],
        typer.Option(
            help="token; sequence (the published LLaDA code) or group are reported beside it.",
            rich_help_panel="Sparsity",
        ),
    ] = "token",
    group_size: opt.GroupSizeOpt = 32,
    score: opt.ScoreOpt = "magnitude",
    backend: opt.BackendOpt = "auto",
    apply: Annotated[
        bool,
        typer.Option(
            "--apply/--observe",
            help="Apply the masks, or only record those that dense decoding would get.",
            rich_help_panel="Sparsity",
        ),
    ] = True,
    reuse: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also measure reuse: masks kept for 1, 2, 4, .. K steps, FFN outputs kept. 0: not.",
            rich_help_panel=_EXPERIMENTS,
        ),
    ] = 0,
    snapshot_every: Annotated[
        int,
        typer.Option(min=0, help="Keep every k-th step's masks for --delta. 0: none.", rich_help_panel=_EXPERIMENTS),
    ] = 0,
    delta: Annotated[
        list[int] | None,
        typer.Option(
            help="Compare snapshots with masks this many steps later; repeatable.", rich_help_panel=_EXPERIMENTS
        ),
    ] = None,
    gen_length: opt.GenLengthOpt = 64,
    steps: opt.StepsOpt = None,
    block_length: opt.BlockLengthOpt = None,
    temperature: opt.TemperatureOpt = 0.0,
    cfg_scale: opt.CfgScaleOpt = 0.0,
    remasking: opt.RemaskingOpt = "low_confidence",
    cache: opt.CacheOpt = "none",
    threshold: opt.ThresholdOpt = None,
    factor: opt.FactorOpt = None,
    batch_size: opt.BatchSizeOpt = 8,
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    revision: opt.RevisionOpt = None,
    engine: opt.EngineOpt = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.", rich_help_panel="Output")] = Path(
        "drift-report"
    ),
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Record how the masks move from step to step, and write a report.

    Example: dllm-sparse drift-report --model llada-8b --p 0.8 --scope sequence --out report
    """
    from dllm_sparse.cli.blocks import block_length_or_default, fit
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.sparsity.config import SparsityConfig

    sampler = SamplerConfig(
        gen_length=gen_length,
        steps=steps,
        block_length=block_length_or_default(block_length),
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        cache=cache,
        threshold=threshold,
        factor=factor,
        seed=seed,
    )
    sparsity = SparsityConfig(
        p=p, rule=rule, sites=sites, scope=scope, group_size=group_size, score=score, backend=backend
    )
    deltas = tuple(delta or (_DELTAS if snapshot_every else ()))
    every = snapshot_every or min(deltas, default=0)
    experiments = {"reuse": reuse, "snapshot_every": every, "deltas": deltas}
    texts = _prompts(prompt or [], prompts, limit)
    output = Output(as_json=as_json, quiet=quiet)
    lm = open_model(output, model, device, dtype, revision, engine)
    sampler = fit(lm, sampler, block_length)
    if apply:
        say_fallback(output, backend, lm)
    chat = has_chat_template(lm) if chat is None else chat
    _run(
        output,
        lm,
        texts,
        sampler,
        sparsity,
        out,
        {"apply": apply, "chat": chat, "batch_size": batch_size, **experiments},
    )


def _prompts(given: list[str], file: Path | None, limit: int | None) -> list[str]:
    from dllm_sparse.analysis.prompts import DEFAULT_COUNT, bundled_prompts
    from dllm_sparse.cli.prompts import gather_prompts

    return gather_prompts(given, file)[:limit] or bundled_prompts(limit or DEFAULT_COUNT)


def _run(
    output: Output,
    lm: LanguageModel,
    prompts: list[str],
    sampler: SamplerConfig,
    sparsity: SparsityConfig,
    out: Path,
    options: dict[str, Any],
) -> None:
    """Measures, writes, and says what came out: the files on stdout, the summary on stderr."""
    from dllm_sparse.cli.watch import StepProgress
    from dllm_sparse.report.drift import FILES, drift_report

    steps = sampler.steps or sampler.gen_length
    batches = -(-len(prompts) // options["batch_size"])
    rules = 1 if sparsity.scope == "token" else 2
    try:
        with output.progress("recording", total=steps * batches * (rules + bool(options["reuse"]))) as advance:
            observers = (StepProgress(advance),)
            report = drift_report(lm, prompts, sampler, sparsity, out, observers=observers, say=output.say, **options)
    except KeyboardInterrupt:
        output.warn(f"interrupted; {out} keeps the prompts finished by then, and the same command resumes")
        raise
    if output.as_json:
        output.json(report)
        return
    for sentence in report["summary"]:
        output.say(sentence)
    output.paths([out / name for name in FILES if (out / name).exists()])
