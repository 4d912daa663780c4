"""Tile shapes of the streaming product: measured ones shipped per GPU, a rule for everything else."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from dllm_sparse.files import write_json

SHIPPED = Path(__file__).parent / "tuned"


class Tile(NamedTuple):
    """columns and rows of W a program holds at a time, warps, pipeline depth, and into how many shares K is cut."""

    columns: int
    rows: int
    warps: int
    stages: int
    splits: int


class Problem(NamedTuple):
    """A product [tokens, k] @ [k, n]; tokens is rounded up to the padded 16, 32 or 64."""

    tokens: int
    k: int
    n: int
    gated: bool
    listed: bool

    @property
    def key(self) -> str:
        """The name of this problem in a tuning file."""
        kind = ("gated" if self.gated else "plain") + ("-listed" if self.listed else "")
        return f"{kind}-t{self.tokens}-k{self.k}-n{self.n}"


def padded_tokens(tokens: int) -> int:
    """What the tensor cores see: the next of 16, 32 and 64."""
    return max(16, 1 << (tokens - 1).bit_length())


def default_tile(problem: Problem, processors: int) -> Tile:
    """A rule that was within a few percent of the best tile on an H200: 64 columns, about two programs a processor."""
    columns = 64 if problem.n % 64 == 0 else 32
    rows = 64 if problem.tokens > 16 or (problem.gated and not problem.listed) else 128
    stages = 6 if problem.listed else 4  # half of them hold indices only
    shares = max(round(2 * processors / -(-problem.n // columns)), 1)
    return Tile(columns, rows, 4, stages, min(shares, max(problem.k // (2 * rows), 1)))


def user_file(gpu: str) -> Path:
    """Where `bench tune` keeps what it measured on this machine."""
    return Path.home() / ".cache" / "dllm-sparse" / "tuned" / f"{file_name(gpu)}.json"


def file_name(gpu: str) -> str:
    """A GPU's name as a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in gpu)


@cache
def _tiles(gpu: str) -> dict[str, Tile]:
    return _read(SHIPPED / f"{file_name(gpu)}.json") | _read(user_file(gpu))


def _read(path: Path) -> dict[str, Tile]:
    """The tiles of a file that could run; an unreadable file costs speed, never a result."""
    try:
        tiles = {key: Tile(*values) for key, values in json.loads(path.read_text())["tiles"].items()}
        return {key: tile for key, tile in tiles.items() if _launches(tile)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _launches(tile: Tile) -> bool:
    powers = all(isinstance(v, int) and v > 0 and v & (v - 1) == 0 for v in (tile.columns, tile.rows, tile.warps))
    return powers and 16 <= tile.columns <= 128 and tile.rows >= 16 and tile.stages >= 1 and tile.splits >= 1


def tile_for(problem: Problem, device: torch.device) -> Tile:
    """The measured tile of a problem on this GPU, or the rule's."""
    properties = torch.cuda.get_device_properties(device)
    return _tiles(properties.name).get(problem.key) or default_tile(problem, properties.multi_processor_count)


def save_tiles(gpu: str, tiles: dict[str, Tile]) -> Path:
    """Merges measured tiles into the user's file, atomically; returns where."""
    path = user_file(gpu)
    known = {key: list(tile) for key, tile in _read(path).items()}
    write_json(path, {"gpu": gpu, "tiles": {**known, **{key: list(tile) for key, tile in tiles.items()}}})
    _tiles.cache_clear()
    return path
