"""Finds the fastest tile of the streaming product for each layer of a model on this GPU (`bench tune`)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from dllm_sparse.bench.timing import graphed, time_calls
from dllm_sparse.kernels.listing import Listed
from dllm_sparse.kernels.streaming import Scratch, processors, stream_matmul
from dllm_sparse.kernels.tuning import Problem, Tile, default_tile
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.types import BackendUnavailable

PLAIN = (
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 32, 4, 6),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
)
GATED = (
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 32, 4, 6),
    (64, 64, 8, 4),
    (32, 64, 4, 4),
    (32, 128, 4, 4),
    (128, 64, 8, 3),
)
LISTED = (
    (64, 128, 4, 6),
    (64, 128, 4, 8),
    (64, 128, 4, 4),
    (64, 64, 4, 6),
    (64, 64, 4, 8),
    (128, 64, 8, 6),
)
LISTED_GATED = (
    (64, 128, 4, 6),
    (64, 64, 4, 6),
    (64, 64, 4, 8),
    (64, 64, 4, 10),
    (64, 32, 4, 8),
    (32, 128, 4, 6),
    (64, 64, 8, 6),
)
"""Candidates (columns, rows, warps, stages); how K is split follows from the number of processors."""

_COPIES_BYTES = 1 << 30  # of weights to rotate through: many times the L2 cache


def gpu(name: str) -> torch.device:
    """The CUDA device to measure on; raises BackendUnavailable where there is none."""
    if not torch.cuda.is_available() or name == "cpu":
        raise BackendUnavailable("the GPU kernels need a CUDA device; there is none here")
    return torch.device("cuda" if name == "auto" else name)


def problems(config: TransformerConfig, tokens: Iterable[int], *, listed: bool) -> list[Problem]:
    """The products of one layer at each padded number of tokens; the listed ones are those of the FFN."""
    width, inner = config.width, config.ffn_width
    found = []
    for padded in tokens:
        if not listed:
            found.append(Problem(padded, width, sum(config.qkv_widths), False, False))
            found.append(Problem(padded, config.heads * config.head_dim, width, False, False))
        found.append(Problem(padded, width, inner, True, listed))
        found.append(Problem(padded, inner, width, False, listed))
    return found


def candidates(problem: Problem, processors: int) -> list[Tile]:
    """Tiles worth timing, the rule's own first."""
    shapes = (LISTED_GATED if problem.gated else LISTED) if problem.listed else (GATED if problem.gated else PLAIN)
    tiles = [default_tile(problem, processors)]
    for columns, rows, warps, stages in shapes:
        blocks = -(-problem.n // columns)
        for programs in (1, 1.5, 2, 3, 4, 6):
            splits = max(round(programs * processors / blocks), 1)
            tile = Tile(columns, rows, warps, stages, splits)
            if problem.n % columns == 0 and problem.k // splits >= 2 * rows and tile not in tiles:
                tiles.append(tile)
    return tiles


def compile_tiles(pairs: Sequence[tuple[Problem, Tile]]) -> None:
    """Compiles kernels into Triton's cache on disk, on all cores: one at a time takes a second each."""
    variants = {(problem._replace(k=512, n=512), tile._replace(splits=1)) for problem, tile in pairs}
    workers = min(len(os.sched_getaffinity(0)), 16, len(variants))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, variants))


def _compile(pair: tuple[Problem, Tile]) -> None:
    problem, tile = pair
    weights, x = _operands(problem, torch.device("cuda"), copies=1)
    stream_matmul(x, weights[0], Scratch(torch.device("cuda")), activation=_activation(problem), tile=tile)
    torch.cuda.synchronize()


def tune(problem: Problem, device: torch.device) -> list[tuple[float, Tile]]:
    """Microseconds of every candidate, fastest first: medians over CUDA graph replays with rotated weights."""
    scratch = Scratch(device)
    bytes_each = problem.k * problem.n * (4 if problem.gated else 2)
    weights, x = _operands(problem, device, copies=max(_COPIES_BYTES // bytes_each, 4))
    timed = []
    for tile in candidates(problem, processors(device)):

        def run(tile: Tile = tile) -> None:
            for weight in weights:
                stream_matmul(x, weight, scratch, activation=_activation(problem), tile=tile)

        timing = time_calls({"tile": graphed(run, device)}, device, repeats=7)["tile"]
        timed.append((timing.median * 1e3 / len(weights), tile))
    return sorted(timed)


def _activation(problem: Problem) -> str | None:
    return "silu" if problem.gated else None


def _operands(problem: Problem, device: torch.device, *, copies: int) -> tuple[list[Tensor], Tensor | Listed]:
    """Weights to rotate through, and the rows they meet; of a listed problem half of the channels are listed."""
    columns = problem.n * (2 if problem.gated else 1)
    weights = [
        torch.randn(problem.k, columns, device=device, dtype=torch.bfloat16) * problem.k**-0.5 for _ in range(copies)
    ]
    x = torch.randn(problem.tokens, problem.k, device=device, dtype=torch.bfloat16)
    if not problem.listed:
        return weights, x
    rows = (torch.rand(problem.k, device=device) < 0.5).nonzero().flatten()
    listed = torch.zeros(problem.k, dtype=torch.int32, device=device)
    listed[: len(rows)] = rows.int()
    return weights, Listed(x, listed, torch.tensor([len(rows)], dtype=torch.int32, device=device))
