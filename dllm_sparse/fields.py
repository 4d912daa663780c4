"""Configurations check the names and types of their own fields: TOML, JSON or a command line may hold anything."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dllm_sparse.types import UsageError

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


def check_names(kind: type, values: Mapping[str, Any], what: str) -> None:
    """Raises UsageError for the first of the names that is no field of a dataclass; `what` says what it would be."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"{what} {unknown[0]!r}; allowed: {', '.join(sorted(known))}")


def check_fields(config: object) -> None:
    """Raises UsageError for the first field of a dataclass whose value is not of the annotated type.

    True is no number, numbers are finite and whole ones fit 64 bits, a list may stand for a tuple. An integer may stand
    for a float and becomes one, however large. What is annotated otherwise (functions, dataclasses) is left alone.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(kind, value):
            raise UsageError(f"{name} is {repr(value)[:80]}; {_expected(kind)}")
        if isinstance(value, int) and not isinstance(value, bool) and float in (kind, *get_args(kind)):
            object.__setattr__(config, name, float(value))


def _fits(kind: Any, value: object) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(one, value) for one in get_args(kind))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(get_args(kind)[0], entry) for entry in value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 1 << 63
    if kind is float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and bool(abs(value) <= sys.float_info.max)  # type: ignore[arg-type]
    return isinstance(value, kind) if kind in (bool, str, NoneType) else True


def _expected(kind: Any) -> str:
    return f"allowed: {', '.join(get_args(kind))}" if get_origin(kind) is Literal else f"expected {_words(kind)}"


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    return _EXPECTED.get(kind) or " or ".join(_words(one) for one in get_args(kind) if one is not NoneType)


def check_ranges(config: object, **ranges: tuple[float, float]) -> None:
    """Raises UsageError for the first of the named fields outside (least, most), ends included."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if not least <= value <= most:
            raise UsageError(f"{name} is {value}; allowed: {least:g} to {most:g}")
