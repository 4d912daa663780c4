"""Checks of single values of a config.json; each error names the file, the field, the value and what was expected."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeGuard

from dllm_sparse.models.config import Activation
from dllm_sparse.types import CheckpointError

LARGEST = 1 << 24  # of any size or count: no model comes near, and products of two still fit an int64


def is_whole(value: object) -> TypeGuard[int]:
    """An integer; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_type(kind: Any, field: str, value: object, path: Path) -> None:
    """A value must be of the type its field has here; JSON's true is no number and "yes" no switch."""
    good, expected = True, ""
    if kind is bool:
        good, expected = isinstance(value, bool), "true or false"
    elif kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
        expected = "a positive number"
    elif kind in (int, int | None):
        good = is_whole(value) or (value is None and kind is not int)
        expected = "a positive integer" if kind is int else "an integer"
    elif kind is Activation:
        good, expected = isinstance(value, str), "a name"
    elif kind == tuple[int, ...]:
        good, expected = isinstance(value, tuple) and all(map(is_whole, value)), "integers"
    if not good:
        raise CheckpointError(f"{path}: {field} is {value!r}; expected {expected}")


def check_size(field: str, value: object, path: Path, *, least: int = 1) -> None:
    """A size or a count; `least` is 1 or 0."""
    if not is_whole(value) or not least <= value <= LARGEST:
        kind = "a positive integer" if least else "an integer from 0"
        raise CheckpointError(f"{path}: {field} is {value!r}; expected {kind} up to {LARGEST}")
