"""`dllm-sparse generate`: decode under step-aware sparsity and say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.opening import has_chat_template, open_model, say_fallback
from dllm_sparse.cli.output import Output
from dllm_sparse.cli.prompts import DEFAULT_PROMPT, gather_prompts

if TYPE_CHECKING:
    from dllm_sparse.generation import Generation
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.sparsity.config import SparsityConfig


def generate(
    model: opt.ModelOpt = "tiny-diffusion",
    prompt: opt.PromptOpt = None,
    prompts: opt.PromptsOpt = None,
    chat: opt.ChatOpt = None,
    p: Annotated[
        float | None,
        typer.Option(
            "--p", help="Knob of the rule: kept L1 mass for top_p. Default: dense.", rich_help_panel="Sparsity"
        ),
    ] = None,
    sites: opt.SitesOpt = "all_inputs",
    rule: opt.RuleOpt = "top_p",
    scope: opt.ScopeOpt = "token",
    group_size: opt.GroupSizeOpt = 32,
    score: opt.ScoreOpt = "magnitude",
    p_schedule: Annotated[
        str | None,
        typer.Option(help="p over the steps, as fraction:p points, e.g. 0:0.7,1:0.9.", rich_help_panel="Sparsity"),
    ] = None,
    refresh_every: opt.RefreshEveryOpt = 1,
    backend: opt.BackendOpt = "auto",
    gen_length: opt.GenLengthOpt = 128,
    steps: opt.StepsOpt = None,
    block_length: opt.BlockLengthOpt = None,
    temperature: opt.TemperatureOpt = 0.0,
    cfg_scale: opt.CfgScaleOpt = 0.0,
    remasking: opt.RemaskingOpt = "low_confidence",
    alg_temp: opt.AlgTempOpt = 0.0,
    top_p: opt.TopPOpt = None,
    top_k: opt.TopKOpt = None,
    eps: opt.EpsOpt = 1e-3,
    cache: opt.CacheOpt = "none",
    threshold: opt.ThresholdOpt = None,
    factor: opt.FactorOpt = None,
    minimal_topk: opt.MinimalTopKOpt = 1,
    editing_threshold: opt.EditingThresholdOpt = None,
    max_post_steps: opt.MaxPostStepsOpt = 16,
    logits_eos_inf: Annotated[bool, typer.Option(help="Never predict EOS.", rich_help_panel="Decoding")] = False,
    confidence_eos_eot_inf: Annotated[
        bool, typer.Option(help="Commit EOS and EoT last.", rich_help_panel="Decoding")
    ] = False,
    stop_at_eos: Annotated[bool, typer.Option(help="Stop when all rows ended.", rich_help_panel="Decoding")] = False,
    batch_size: opt.BatchSizeOpt = 8,
    execution: opt.ExecutionOpt = "auto",
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    revision: opt.RevisionOpt = None,
    engine: opt.EngineOpt = "auto",
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas while it unmasks.")] = False,
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Generate text, recomputing the top-p masks at every step.

    Example: dllm-sparse generate --p 0.8 --prompt "Once upon a time"
    """
    from dllm_sparse.cli.blocks import block_length_or_default, fit
    from dllm_sparse.cli.sparsity import parse_schedule
    from dllm_sparse.files import check_folder
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.sparsity.config import IDENTITY, SparsityConfig

    output = Output(as_json=as_json, quiet=quiet)
    sampler = SamplerConfig(
        gen_length=gen_length,
        steps=steps,
        block_length=block_length_or_default(block_length),
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        alg_temp=alg_temp,
        top_p=top_p,
        top_k=top_k,
        eps=eps,
        cache=cache,
        threshold=threshold,
        factor=factor,
        minimal_topk=minimal_topk,
        editing_threshold=editing_threshold,
        max_post_steps=max_post_steps,
        logits_eos_inf=logits_eos_inf,
        confidence_eos_eot_inf=confidence_eos_eot_inf,
        stop_at_eos=stop_at_eos,
        execution=execution,
        seed=seed,
    )
    schedule = parse_schedule(p_schedule)
    sparsity = SparsityConfig(
        p=IDENTITY[rule] if p is None else p,
        rule=rule,
        sites=sites,
        scope=scope,
        group_size=group_size,
        score=score,
        schedule=schedule,
        refresh_every=refresh_every,
        backend=backend,
    )
    texts = gather_prompts(prompt or [], prompts, piped=True)
    check_folder(out)  # fails now, not after an hour of decoding
    if not texts:
        texts = [DEFAULT_PROMPT]
        output.say(f'no prompt given; continuing "{DEFAULT_PROMPT}"')
    lm = open_model(output, model, device, dtype, revision, engine)
    sampler = fit(lm, sampler, block_length)
    chat = has_chat_template(lm) if chat is None else chat
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    _check(output, lm, batches, sampler, chat=chat)
    dense = p is None and schedule is None
    if dense and sparsity != SparsityConfig(p=IDENTITY[rule], rule=rule):
        output.warn("without --p or --p-schedule nothing is masked; the other sparsity options do nothing")
    config = {"model": model, "sampler": sampler.to_dict(), "sparsity": None if dense else sparsity.to_dict()}
    results: list[Generation] = []
    try:
        _run(output, lm, batches, sampler, None if dense else sparsity, results, chat=chat, watch=watch)
    except KeyboardInterrupt:
        # What is finished is kept; --json stays silent, because its one object would not be the whole answer.
        if results and not (as_json and out is None):
            output.as_json = False
            _answer(output, texts, results, config, out)
        raise
    _answer(output, texts, results, config, out)
    ran = dict.fromkeys(result.sparsity_report["backend"] for result in results if result.sparsity)
    if ran and [*ran] != ["triton"]:
        say_fallback(output, backend, lm, ran=[*ran])


def _run(
    output: Output,
    lm: LanguageModel,
    batches: list[list[str]],
    sampler: SamplerConfig,
    sparsity: SparsityConfig | None,
    results: list[Generation],
    *,
    chat: bool,
    watch: bool,
) -> None:
    """Decodes batch after batch; each finished one is appended to `results`."""
    from dllm_sparse.cli.watch import CanvasView, StepProgress
    from dllm_sparse.generation import generate as decode

    planned = (sampler.steps or sampler.gen_length) if lm.kind == "diffusion" else sampler.gen_length
    for batch in batches:
        if watch and output.live:
            with CanvasView(output.console, lm) as view:
                results.append(decode(lm, batch, sampler=sampler, sparsity=sparsity, observers=(view,), chat=chat))
        else:
            with output.progress("decoding", total=planned) as advance:
                observer = StepProgress(advance)
                results.append(decode(lm, batch, sampler=sampler, sparsity=sparsity, observers=(observer,), chat=chat))


def _check(output: Output, lm: LanguageModel, batches: list[list[str]], sampler: SamplerConfig, *, chat: bool) -> None:
    """Refuses what could not be decoded before anything is, and says which options this kind of model ignores."""
    from dllm_sparse.generation import encode
    from dllm_sparse.samplers.config import SamplerConfig as Defaults
    from dllm_sparse.samplers.loops import check_context

    for batch in batches:
        check_context(lm, encode(lm, batch, chat=chat)[0].shape[1], sampler)
    if lm.kind == "autoregressive":
        given, plain = sampler.to_dict(), Defaults().to_dict()
        used = {"gen_length", "temperature", "execution", "seed", "stop_at_eos", "eos_token_id"}
        if ignored := [name for name in given if name not in used and given[name] != plain[name]]:
            output.warn(f"only diffusion models use {', '.join(ignored)}; ignored")


def _answer(
    output: Output, prompts: list[str], results: list[Generation], config: dict[str, Any], out: Path | None
) -> None:
    from dllm_sparse.files import write_json

    generated = [text for result in results for text in result.texts]
    value = {
        "schema": "dllm-sparse/generate@1",
        "config": config,
        "prompts": prompts,
        "texts": generated,
        "batches": [result.to_dict() for result in results],
    }
    if output.as_json:
        output.json(value)
    else:
        for text in generated:
            output.answer(text)
    for result in results:
        _summarise(output, result)
    if out is not None:
        files = [write_json(out / "generate.json", value), _layer_table(out / "sparsity.csv", results)]
        if not output.as_json:
            output.paths(files)


def _layer_table(path: Path, results: list[Generation]) -> Path:
    """Measured sparsity per batch, layer and site, in long format (empty for a dense run)."""
    from dllm_sparse.files import write_csv

    columns = ("layer", "site", "sparsity")
    rows = [
        {"batch": number, **{name: row[name] for name in columns}}
        for number, result in enumerate(results)
        for row in result.sparsity_report.get("by_layer", ())
    ]
    return write_csv(path, rows, columns=("batch", *columns))


def _summarise(output: Output, result: Generation) -> None:
    output.say(
        f"{result.generated_tokens} tokens in {result.seconds:.1f} s: {result.tokens_per_second:.1f} tokens/s, "
        f"{result.forward_passes} forwards"
    )
    if result.sparsity:
        sites = ", ".join(f"{name} {value:.1%}" for name, value in result.sparsity.items() if name != "hook_mean")
        union = ", ".join(f"{name} {value:.1%}" for name, value in result.sparsity_report["exploitable"].items())
        output.say(f"measured sparsity per token: {sites}; shared by all tokens of a forward: {union}")
