"""Configurations check the names and types of their own fields: TOML, JSON or a command line may hold anything.

What comes from numpy becomes Python's own on the way in: results are JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from dllm_sparse.types import UsageError

P = ParamSpec("P")
R = TypeVar("R")
ListT = TypeVar("ListT", bound=Sequence[Any])

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


def check_names(kind: type, values: Mapping[str, Any], what: str) -> None:
    """Raises UsageError for the first of the names that is no field of a dataclass; `what` says what it would be."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"{what} {unknown[0]!r}; allowed: {', '.join(sorted(known))}")


def plain(value: Any) -> Any:
    """numpy's scalars and arrays as Python's numbers and lists, also inside a list or tuple; all else as it is."""
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    # By name: nothing here should cost the import of numpy.
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def plain_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are made `plain` first: those that end up in a report."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        return function(*plain(arguments), **{name: plain(value) for name, value in options.items()})

    return call


def listed(values: str | ListT) -> list[str] | ListT:
    """A text alone is one of what a list would hold; its characters are not meant."""
    return [values] if isinstance(values, str) else values


def check_fields(config: object, ranged: Sequence[str] = ()) -> None:
    """Raises UsageError for the first field of a dataclass whose value is not of the annotated type.

    True is no number, numbers are finite and whole ones fit 64 bits, a list may stand for a tuple. An integer may stand
    for a float and becomes one, however large; what comes from numpy becomes `plain`. What is annotated otherwise
    (functions, dataclasses) is left alone. NaN and Inf in the fields `ranged` are left to who knows their range.
    """
    for name, kind in get_type_hints(type(config)).items():
        given = getattr(config, name)
        value = plain(given)
        if not (_fits(kind, value) or (name in ranged and isinstance(value, float))):
            raise UsageError(f"{name} is {repr(value)[:80]}; {_expected(kind)}")
        if isinstance(value, int) and not isinstance(value, bool) and float in (kind, *get_args(kind)):
            value = float(value)
        if value is not given:
            object.__setattr__(config, name, value)


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
