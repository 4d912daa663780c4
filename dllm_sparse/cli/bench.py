"""`dllm-sparse bench`: how fast it is, and how far from the floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.output import Output
from dllm_sparse.types import UsageError

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel

_WORKLOAD = "Workload"


class _EngineFirst(TyperGroup):
    """`bench` followed by nothing or by an option is `bench engine`; only --help is the group's own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the default subcommand in front where none is named; a shell that completes still sees them all."""
        helped = self.get_help_option_names(ctx)
        if not ctx.resilient_parsing and (not args or (args[0].startswith("-") and args[0] not in helped)):
            args = ["engine", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(cls=_EngineFirst, help="Measure speed beside the floor of the hardware; by default the engine's.")

BenchModelOpt = Annotated[
    str | None,
    typer.Option("--model", help="Alias, folder or hub id; default tiny-diffusion.", rich_help_panel="Model"),
]
ShapeOpt = Annotated[
    str | None,
    typer.Option(help="Random weights of a public checkpoint's shape, e.g. llada-8b.", rich_help_panel="Model"),
]


@bench.callback()
def root() -> None:
    """Measure speed beside the floor of the hardware; without a subcommand the engine's."""


def engine(
    model: BenchModelOpt = None,
    shape: ShapeOpt = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows; several times for several. [1]", rich_help_panel=_WORKLOAD)
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of every prompt.", rich_help_panel=_WORKLOAD)] = 128,
    execution: opt.ExecutionOpt = "auto",
    repeats: Annotated[int, typer.Option(help="Timed generations.", rich_help_panel=_WORKLOAD)] = 5,
    gen_length: opt.GenLengthOpt = 128,
    steps: opt.StepsOpt = None,
    block_length: opt.BlockLengthOpt = None,
    cfg_scale: opt.CfgScaleOpt = 0.0,
    cache: opt.CacheOpt = "none",
    threshold: opt.ThresholdOpt = None,
    factor: opt.FactorOpt = None,
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    revision: opt.RevisionOpt = None,
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Time `generate`: ms per forward, tokens/s, share of the bandwidth or FLOP floor, memory, components.

    Example: dllm-sparse bench engine --shape llada-8b --cache dual --prompt-length 512 --batch 1 --batch 8
    """
    from dllm_sparse.bench.engine import bench_engine
    from dllm_sparse.bench.machine import rates
    from dllm_sparse.bench.workload import EngineWorkload
    from dllm_sparse.cli.blocks import block_length_or_default, fit
    from dllm_sparse.files import check_folder
    from dllm_sparse.samplers.config import SamplerConfig

    output = Output(as_json=as_json, quiet=quiet)
    sampler = SamplerConfig(
        gen_length=gen_length,
        steps=steps,
        block_length=block_length_or_default(block_length),
        cfg_scale=cfg_scale,
        cache=cache,
        threshold=threshold,
        factor=factor,
        execution=execution,
        seed=seed,
    )
    workloads = [
        EngineWorkload(sampler=sampler, batch=rows, prompt_length=prompt_length, repeats=repeats)
        for rows in batch or [1]
    ]
    check_folder(out)
    lm = load_measured(output, model, shape, device, dtype, revision)
    fit(lm, sampler, block_length)
    speed = rates(lm.device, lm.dtype)
    output.say(f"{speed.bandwidth / 1e9:,.1f} GB/s, {speed.flops / 1e12:,.2f} TFLOP/s ({speed.source})")
    rows = []
    for workload in workloads:
        output.say(f"batch {workload.batch}: {1 + 2 * repeats} generations of {gen_length} tokens")
        rows.append(bench_engine(lm, workload, speed))
    _answer(output, rows, out)


def load_measured(
    output: Output, model: str | None, shape: str | None, device: str, dtype: str, revision: str | None
) -> LanguageModel:
    """The model to measure, by name or as random weights of a shape; says what it is."""
    from dllm_sparse.models.loading import load, random_model

    if model is not None and shape is not None:
        raise UsageError("--model and --shape are two ways to say what to measure; give one of them")
    if shape is not None:
        lm = random_model(shape, device=device, dtype=dtype)
    else:
        name = model or "tiny-diffusion"
        lm = load(name, device=device, dtype=dtype, revision=revision, report=output.say)
    precision = str(lm.dtype).removeprefix("torch.")
    output.say(f"{lm.name}: {lm.config.parameters / 1e6:,.1f}M parameters, {precision} on {lm.device}")
    return lm


def _answer(output: Output, rows: list[dict[str, Any]], out: Path | None) -> None:
    from dllm_sparse.bench.engine import SCHEMA

    value = {"schema": SCHEMA, "rows": rows}
    if output.as_json:
        output.json(value)
    else:
        for row in rows:
            _table(output, row)
        output.answer(rows[0]["count_rule"])
    if out is not None:
        files = _write(out, value)
        if not output.as_json:
            output.paths(files)


def _table(output: Output, row: dict[str, Any]) -> None:
    """One workload for people."""
    output.answer(
        f"{row['model']}, batch {row['batch']}, prompt {row['prompt_length']}, {row['execution']}: "
        f"{text_range(row['ms_per_forward'])} ms a forward, {row['forwards']} forwards, "
        f"{text_range(row['tokens_per_second'], 1)} tokens/s, "
        f"{text_range(row['canvas_tokens_per_second'], 1)} canvas tokens/s, "
        f"peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if row["steps"]:
        output.answer(
            f"  {'forward':<10}{'count':>6}{'tokens':>8}{'ms [20 %, 80 %]':>28}{'floor ms':>10}{'share':>7}  bound"
        )
    for step in row["steps"]:
        output.answer(
            f"  {step['forward']:<10}{step['per_generation']:>6}{step['tokens']:>8.0f}{text_range(step['ms']):>28}"
            f"{step['floor_ms']:>10.2f}{step['share_of_floor']:>7.0%}  {step['bound']}"
        )
    for step in row["steps"]:
        if experts := step["active_experts"]:
            output.answer(
                f"  {step['forward']}: {experts['measured']:.1f} of {experts['of']} experts read per layer "
                f"(random routing: {experts['random_routing']:.1f})"
            )
    if row["components_ms_per_forward"]:
        parts = (f"{name} {value:.2f}" for name, value in row["components_ms_per_forward"].items())
        output.answer(f"  ms a forward by component: {', '.join(parts)}")


def text_range(timing: dict[str, float], digits: int = 2) -> str:
    """`median [20 %, 80 %]`."""
    return f"{timing['median']:.{digits}f} [{timing['low']:.{digits}f}, {timing['high']:.{digits}f}]"


def _write(out: Path, value: dict[str, Any]) -> list[Path]:
    from dllm_sparse.files import write_csv, write_json
    from dllm_sparse.report.roofline import write_roofline

    steps = [_step_row(row, step) for row in value["rows"] for step in row["steps"]]
    files = [write_json(out / "engine.json", value), write_csv(out / "engine.csv", steps)]
    stepped = [row for row in value["rows"] if row["steps"]]
    picture = write_roofline(out / "roofline.png", stepped) if stepped else None
    return [*files, picture] if picture else files


def _step_row(row: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """One kind of forward of one workload, for the CSV file."""
    ms, experts = step["ms"], step["active_experts"] or {}
    return {
        **{name: row[name] for name in ("model", "dtype", "execution", "batch", "prompt_length")},
        "forward": step["forward"],
        "count": step["per_generation"],
        "tokens": step["tokens"],
        "ms": ms["median"],
        "ms_q20": ms["low"],
        "ms_q80": ms["high"],
        "floor_ms": step["floor_ms"],
        "share_of_floor": step["share_of_floor"],
        "active_experts": experts.get("measured"),
        "random_routing_experts": experts.get("random_routing"),
    }
