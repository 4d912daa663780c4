"""Configurations take what their fields say, and name what they do not take."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pytest

from dllm_sparse.fields import check_fields, check_ranges, listed, plain, plain_arguments
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
    ranged: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, ranged=("ranged",))
        check_ranges(self, whole=(1, 9), ranged=(0, 1))


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
        ({"places": np.arange(3.0)}, "expected a list, each a whole number"),
        ({"whole": np.float32(1.5)}, "whole is 1.5; expected a whole number"),
        ({"whole": np.bool_(True)}, "whole is True; expected a whole number"),
        ({"number": np.float32("inf")}, "number is inf; expected a finite number"),
        ({"ranged": float("nan")}, "ranged is nan; allowed: 0 to 1"),
        ({"ranged": "x"}, "ranged is 'x'; expected a finite number"),
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


def test_what_comes_from_numpy_becomes_pythons_own() -> None:
    made = Facts(
        whole=np.int64(2),  # type: ignore[arg-type]
        number=np.float32(0.5),  # type: ignore[arg-type]
        maybe=np.int32(3),  # type: ignore[arg-type]
        switch=np.bool_(False),  # type: ignore[arg-type]
        choice=np.str_("b"),  # type: ignore[arg-type]
        places=(np.int64(1), 2),  # type: ignore[arg-type]
    )
    expected = {"whole": 2, "number": 0.5, "maybe": 3.0, "switch": False, "choice": "b", "places": [1, 2]}
    assert json.loads(json.dumps(asdict(made))) == {**expected, "name": "x", "ranged": 0.5}
    assert made.places == (1, 2)
    assert Facts(places=np.arange(2)).places == [0, 1]  # type: ignore[arg-type]


def test_arguments_are_made_plain_and_all_else_is_left() -> None:
    @plain_arguments
    def given(*arguments: object, **options: object) -> tuple[Any, ...]:
        return (*arguments, options)

    thing = object()
    first, second, third, options = given(np.int8(3), [thing, (np.float64(0.5),)], np.sqrt, many=np.eye(2))
    assert (type(first), first, second, third) == (int, 3, [thing, (0.5,)], np.sqrt)
    assert options == {"many": [[1.0, 0.0], [0.0, 1.0]]}
    assert plain("text") == "text"


def test_a_text_alone_is_one() -> None:
    assert listed("ab") == ["ab"]
    assert listed(["ab", "c"]) == ["ab", "c"]
