"""`dllm-sparse bench sparse | kernels | tune`: what skipping buys, end to end and in one layer; tiles for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.bench import BenchModelOpt, ShapeOpt, load_measured, text_range
from dllm_sparse.cli.opening import say_fallback
from dllm_sparse.cli.output import Output

TokensOpt = Annotated[list[int] | None, typer.Option(help="Tokens of one forward; several times for several.")]


def sparse(
    model: BenchModelOpt = None,
    shape: ShapeOpt = None,
    p: Annotated[list[float] | None, typer.Option(help="Kept L1 mass; several times for several. [0.5, 0.8]")] = None,
    where: Annotated[
        Literal["everywhere", "faster"], typer.Option(help="What is masked; faster: dense where skipping does not pay.")
    ] = "faster",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    prompt_length: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed generations.")] = 3,
    gen_length: opt.GenLengthOpt = 128,
    block_length: opt.BlockLengthOpt = None,
    cache: opt.CacheOpt = "none",
    seed: opt.SeedOpt = 0,
    device: opt.DeviceOpt = "auto",
    dtype: opt.DtypeOpt = "auto",
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Time generation dense and at each p in the same run: speed-up per kind of forward, beside what skipping what
    no token kept could give at most.

    Example: dllm-sparse bench sparse --shape llama-3.1-8b --prompt-length 512 --p 0.5 --p 0.8
    """
    from dllm_sparse.bench.engine import bench_engine
    from dllm_sparse.bench.machine import rates
    from dllm_sparse.bench.prediction import beside_dense
    from dllm_sparse.bench.workload import EngineWorkload
    from dllm_sparse.cli.blocks import block_length_or_default, fit
    from dllm_sparse.files import check_folder
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.sparsity.config import SparsityConfig

    output = Output(as_json=as_json, quiet=quiet)
    blocks = block_length_or_default(block_length)
    sampler = SamplerConfig(gen_length=gen_length, block_length=blocks, cache=cache, seed=seed)
    configs = [SparsityConfig(p=value, where=where) for value in p or (0.5, 0.8)]
    check_folder(out)
    lm = load_measured(output, model, shape, device, dtype, None)
    fit(lm, sampler, block_length)
    speed = rates(lm.device, lm.dtype)
    rows = []
    for sparsity in (None, *configs):
        output.say("dense" if sparsity is None else f"p = {sparsity.p}")
        workload = EngineWorkload(
            sampler=sampler, sparsity=sparsity, batch=batch, prompt_length=prompt_length, repeats=repeats
        )
        rows.append(bench_engine(lm, workload, speed))
    if any(row["execution"] == "eager" for row in rows[1:]):
        say_fallback(output, "auto", lm)
    for row in rows[1:]:
        row["beside_dense"] = beside_dense(rows[0], row)
    _answer(output, "sparse", {"schema": "dllm-sparse/bench-sparse@2", "rows": rows}, out)
    if not as_json:
        _dense_lines(output, rows[0])
        for row in rows[1:]:
            _sparse_lines(output, row)


def _dense_lines(output: Output, row: dict[str, Any]) -> None:
    output.answer(f"{row['model']}, {row['execution']}, dense: {text_range(row['ms_per_forward'])} ms a forward")
    for step in row["steps"]:
        output.answer(f"  {step['forward']:<10}{text_range(step['ms']):>26} ms")


def _sparse_lines(output: Output, row: dict[str, Any]) -> None:
    sites = ", ".join(f"{site} {value:.2f}" for site, value in row["measured_sparsity"].items())
    whole = text_range(row["ms_per_forward"])
    output.answer(f"{row['execution']}, p = {row['sparsity']['p']}: {whole} ms a forward, sparsity {sites}")
    if row["beside_dense"]:
        output.answer(f"  {'forward':<10}{'tokens':>7}{'ms':>9}{'predicted':>11}{'measured':>10}  union density")
    for step in row["beside_dense"]:
        predicted = "-" if step["predicted_speed_up"] is None else f"{step['predicted_speed_up']:.2f}x"
        unions = ", ".join(f"{site} {value:.2f}" for site, value in (step["union_density"] or {}).items())
        output.answer(
            f"  {step['forward']:<10}{step['tokens']:>7.0f}{step['ms']:>9.2f}{predicted:>11}"
            f"{step['measured_speed_up']:>9.2f}x  {unions}"
        )


def kernels(
    shape: Annotated[str, typer.Option(help="Public checkpoint whose FFN is measured.")] = "llada-8b",
    tokens: TokensOpt = None,
    density: Annotated[list[float] | None, typer.Option(help="Union density; several times for several.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed graph replays.")] = 15,
    device: opt.DeviceOpt = "auto",
    out: opt.OutOpt = None,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Time one FFN layer, cuBLAS against the sparse kernels, over tokens and density; needs a CUDA GPU.

    Example: dllm-sparse bench kernels --tokens 1 --tokens 8 --density 0.5 --out bench
    """
    import torch

    from dllm_sparse.bench.kernels import bench_ffn
    from dllm_sparse.bench.machine import rates
    from dllm_sparse.bench.tuning import gpu
    from dllm_sparse.files import check_folder
    from dllm_sparse.models.shapes import shape_config

    output = Output(as_json=as_json, quiet=quiet)
    config, target = shape_config(shape), gpu(device)
    check_folder(out)
    speed = rates(target, torch.bfloat16)
    rows = []
    for count in tokens or (1, 2, 4, 8, 16, 32, 64):
        for share in density or (0.3, 0.5, 0.8, 1.0):
            output.say(f"{count} tokens, density {share}")
            rows.append(bench_ffn(config, count, share, speed, target, repeats))
    _answer(output, "kernels", {"schema": rows[0]["schema"], "shape": shape, "rows": rows}, out)
    if not as_json:
        output.answer(f"{shape}, one FFN layer, microseconds: dense (cuBLAS), sparse, selection of both sites")
        for row in rows:
            us = row["microseconds"]
            dense = min(us["dense"]["median"], us["dense_by_output"]["median"])
            output.answer(
                f"  T {row['tokens']:>3}  density {row['measured_density']:.2f}  {dense:7.1f} "
                f"{us['sparse']['median']:7.1f} "
                f"{us['selection']['median']:6.1f}  {row['speed_up']:.2f}x  {row['share_of_floor']:.0%} of the floor"
            )


def tune(
    shape: Annotated[str, typer.Option(help="Public checkpoint whose layers are tuned.")] = "llada-8b",
    tokens: TokensOpt = None,
    device: opt.DeviceOpt = "auto",
    quiet: opt.QuietOpt = False,
) -> None:
    """Time tiles of the streaming products on this GPU and keep the fastest in ~/.cache/dllm-sparse."""
    import torch

    from dllm_sparse.bench.tuning import candidates, compile_tiles, gpu, problems
    from dllm_sparse.bench.tuning import tune as time_tiles
    from dllm_sparse.kernels.tuning import padded_tokens, save_tiles
    from dllm_sparse.models.shapes import shape_config

    output = Output(as_json=False, quiet=quiet)
    config, target = shape_config(shape), gpu(device)
    properties = torch.cuda.get_device_properties(target)
    padded = sorted({padded_tokens(count) for count in tokens or (16, 32, 64)})
    found = [*problems(config, padded, listed=False), *problems(config, padded, listed=True)]
    output.say("compiling")
    compile_tiles([(one, tile) for one in found for tile in candidates(one, properties.multi_processor_count)])
    tiles = {}
    for problem in found:
        best, tile = time_tiles(problem, target)[0]
        tiles[problem.key] = tile
        output.answer(f"{problem.key}: {best:.1f} us with {tuple(tile)}")
    output.answer(str(save_tiles(properties.name, tiles)))


def _answer(output: Output, name: str, value: dict[str, Any], out: Path | None) -> None:
    from dllm_sparse.files import write_json
    from dllm_sparse.report.roofline import write_break_even

    if output.as_json:
        output.json(value)
    if out is not None:
        files = [write_json(out / f"{name}.json", value)]
        picture = write_break_even(out / "break-even.png", value) if name == "kernels" else None
        if not output.as_json:
            output.paths([*files, picture] if picture else files)
