"""Configurations take what their fields say, and name what they do not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from dllm_sparse.fields import check_fields, check_ranges
from dllm_sparse.types import UsageError


@dataclass(frozen=True)
class Facts:
    """One field of each kind."""

    whole: int = 1
    number: float = 0.5
    maybe: float | None = None
    switch: bool = True
    name: str = "x"
    choice: Literal["a", "b"] = "a"
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, whole=(1, 9))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"whole": 1.0}, "whole is 1.0; expected a whole number"),
        ({"whole": True}, "whole is True; expected a whole number"),
        ({"whole": 1 << 63}, "expected a whole number"),
        ({"whole": 0}, "whole is 0; allowed: 1 to 9"),
        ({"whole": 10}, "whole is 10; allowed: 1 to 9"),
        ({"number": float("nan")}, "number is nan; expected a finite number"),
        ({"number": 10**400}, "number is 1000.*; expected a finite number"),
        ({"maybe": "x"}, "maybe is 'x'; expected a finite number"),
        ({"switch": 1}, "switch is 1; expected true or false"),
        ({"name": None}, "name is None; expected a text"),
        ({"choice": "c"}, "choice is 'c'; allowed: a, b"),
        ({"choice": ["a"]}, r"choice is \['a'\]; allowed: a, b"),
        ({"places": (1, "2")}, "places is .*; expected a list, each a whole number"),
        ({"places": "12"}, "expected a list"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Facts(**given)


def test_an_integer_becomes_the_float_it_stands_for() -> None:
    made = Facts(number=10**30, maybe=2, places=[1, 2])  # type: ignore[arg-type]
    assert (made.number, made.maybe) == (1e30, 2.0)
    assert isinstance(made.number, float)
    assert isinstance(made.maybe, float)
    assert not isinstance(made.whole, float)
