"""The CPU's sparse product against torch's dense one, and what it buys an autoregressive model end to end.

    python benchmarks/cpu_sparse.py [--model FOLDER] [--shape llama-3.2-1b] [--out FILE]

Products: one to four tokens, 1 and 2 threads, fp32 and bf16, random masks, four copies of every weight taken in turn
(a copy is larger than the caches). Inputs are skipped, and wanted outputs picked (what a masked gate allows). The dense
product is timed on both storage orders of the weight; ratios of medians are given to PyTorch's own order and to the
faster of the two, and ratios of the 20 % quantiles, which other work on the machine disturbs least. Selection (exact
top-p) is timed apart. Generation: all variants take turns on the same prompt; seconds of decoding after a warm-up.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dllm_sparse as ds
from dllm_sparse.bench.machine import machine
from dllm_sparse.bench.timing import Timing, time_calls
from dllm_sparse.files import write_json
from dllm_sparse.generation import encode
from dllm_sparse.kernels.cpu import sparse_matvec, wanted_outputs
from dllm_sparse.kernels.dispatch import cpu_pays
from dllm_sparse.models.loading import random_model

CPU = torch.device("cpu")
COPIES = 4
DENSITIES = (1.0, 0.9, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SHAPES = ((4096, 12288), (12288, 4096), (576, 3072), (1536, 576))
PROMPT = "The lighthouse keeper's daughter had never seen the sea freeze, but that winter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an autoregressive checkpoint for the end-to-end part")
    parser.add_argument("--shape", help="a public shape with random weights for the end-to-end part")
    parser.add_argument("--tokens", type=int, default=64, help="decoded end to end")
    parser.add_argument("--rounds", type=int, default=5, help="of the end-to-end part")
    parser.add_argument("--repeats", type=int, default=15, help="of every product")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(CPU), "copies": COPIES, "products": [], "generation": []}
    for threads, dtype in itertools.product(args.threads, (torch.float32, torch.bfloat16)):
        with using_threads(threads):
            for (inputs, outputs), tokens in itertools.product(SHAPES if args.repeats else (), (1, 2, 4)):
                result["products"].append(product_row(inputs, outputs, tokens, dtype, args.repeats))
                print_product(result["products"][-1])
            if args.model or args.shape:
                result["generation"].append(generation_row(args, dtype))
                print_generation(result["generation"][-1])
        if args.out:
            write_json(args.out, result)


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def product_row(inputs: int, outputs: int, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Milliseconds of every variant, and the ratios of medians to the dense product."""
    generator = torch.Generator().manual_seed(0)
    by_output = [torch.randn(outputs, inputs, generator=generator).to(dtype) for _ in range(COPIES)]
    by_input = [weight.t().contiguous() for weight in by_output]
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    masked = {density: x * exact_mask(tokens, inputs, density, generator) for density in DENSITIES}
    variants: dict[str, Callable[[], object]] = {
        "dense": rotating(lambda copy: F.linear(x, by_output[copy])),
        "dense_by_input": rotating(lambda copy: F.linear(x, by_input[copy].t())),
        "selection": lambda: x * ds.top_p_mask(x, 0.5),
    }
    for density, values in masked.items():
        variants[f"sparse_{density}"] = rotating(lambda copy, values=values: sparse_matvec(values, by_input[copy]))
        wanted = exact_mask(tokens, outputs, density, generator)
        variants[f"picking_{density}"] = rotating(
            lambda copy, wanted=wanted: wanted_outputs(x, by_output[copy], wanted)
        )
    timings = time_calls(variants, CPU, repeats=repeats, warm_up=2)
    dense, other = timings["dense"].median, timings["dense_by_input"].median
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": inputs,
        "outputs": outputs,
        "tokens": tokens,
        "ms": {name: timing.to_dict() for name, timing in timings.items()},
        "speedup": {density: dense / timings[f"sparse_{density}"].median for density in DENSITIES},
        "speedup_of_picking": {density: dense / timings[f"picking_{density}"].median for density in DENSITIES},
        "speedup_of_low_quantiles": {
            density: timings["dense"].low / timings[f"sparse_{density}"].low for density in DENSITIES
        },
        "speedup_over_faster_order": {
            density: min(dense, other) / timings[f"sparse_{density}"].median for density in DENSITIES
        },
        "auto_skips": {
            density: cpu_pays(
                int(values.count_nonzero()) / inputs, tokens, inputs * outputs, dtype, torch.get_num_threads()
            )
            for density, values in masked.items()
        },
    }


def exact_mask(tokens: int, inputs: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """A random mask of which every row keeps the same number of entries."""
    order = torch.rand(tokens, inputs, generator=generator).argsort(-1)
    return order < round(density * inputs)


def rotating(run: Callable[[int], object]) -> Callable[[], object]:
    """Calls with the copies 0, 1, 2, ... in turn."""
    copies = itertools.cycle(range(COPIES))
    return lambda: run(next(copies))


def generation_row(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds per decoded token of dense, masked and skipping generation of one prompt; same tokens where masked."""
    sampler = ds.SamplerConfig(gen_length=args.tokens)
    variants: dict[str, ds.SparsityConfig | None] = {"dense": None}
    for p in (0.5, 0.8):
        for backend in ("reference", "cpu", "auto"):
            variants[f"p={p} {backend}"] = ds.SparsityConfig(p=p, backend=backend)
    # Its own model for dense: storing weights by input for the others must not change it.
    models = {name: opened(args, dtype) for name in ("dense", "sparse")}
    prompt = prompt_ids(models["dense"])
    times: dict[str, list[float]] = {name: [] for name in variants}
    facts: dict[str, dict[str, Any]] = {}
    for turn in range(args.rounds + 1):
        for name, sparsity in variants.items():
            lm = models["dense" if sparsity is None else "sparse"]
            out = ds.generate(lm, prompt_ids=prompt, sampler=sampler, sparsity=sparsity)
            facts[name] = {
                "backend": out.sparsity_report.get("backend"),
                "density": 1 - out.sparsity["mean"] if out.sparsity else 1.0,
                "ids": out.ids[0].tolist(),
            }
            if turn:
                times[name].append(out.seconds * 1e3 / args.tokens)
    timings = {name: Timing.of(values) for name, values in times.items()}
    return {
        "model": Path(models["dense"].name).name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "ms_per_token": {name: timing.to_dict() for name, timing in timings.items()},
        "speedup": {name: timings["dense"].median / timing.median for name, timing in timings.items()},
        "density": {name: fact["density"] for name, fact in facts.items()},
        "backend": {name: fact["backend"] for name, fact in facts.items()},
        "same_tokens_as_masked": {
            name: fact["ids"] == facts[f"{name.split()[0]} reference"]["ids"]
            for name, fact in facts.items()
            if name != "dense"
        },
    }


def opened(args: argparse.Namespace, dtype: torch.dtype) -> ds.LanguageModel:
    if args.shape:
        return random_model(args.shape, device="cpu", dtype=dtype)
    return ds.load(args.model, device="cpu", dtype=dtype)


def prompt_ids(lm: ds.LanguageModel) -> torch.Tensor:
    """The prompt, or as many arbitrary ids where there is no tokenizer."""
    return torch.arange(100, 116)[None] if lm.tokenizer is None else encode(lm, [PROMPT])[0]


def print_product(row: dict[str, Any]) -> None:
    speedups = "  ".join(
        f"{density}: {row['speedup'][density]:.2f}/{row['speedup_over_faster_order'][density]:.2f}"
        f"{'*' if row['auto_skips'][density] else ''}"
        for density in DENSITIES
    )
    print(
        f"{row['threads']} threads {row['dtype']} {row['inputs']}x{row['outputs']} T={row['tokens']}: "
        f"dense {row['ms']['dense']['median']:.2f} ms, by input {row['ms']['dense_by_input']['median']:.2f}, "
        f"selection {row['ms']['selection']['median']:.3f}; {speedups}",
        flush=True,
    )


def print_generation(row: dict[str, Any]) -> None:
    for name, timing in row["ms_per_token"].items():
        print(
            f"{row['threads']} threads {row['dtype']} {row['model']} {name}: {timing['median']:.1f} ms a token, "
            f"{row['speedup'][name]:.2f}x dense, density {row['density'][name]:.2f}, {row['backend'][name]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
