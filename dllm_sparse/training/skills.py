"""Exact skills: prompt and answer lines whose answer is a function of the prompt, so a score needs no judge.

Problems whose prompt hashes into the held-out share are never trained on; test items come from that share alone.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dllm_sparse.training.corpus import is_held_out


class Problem(NamedTuple):
    """`prompt` ends with "="; `answer` begins with a space, so prompt + answer reads as one line."""

    skill: str
    prompt: str
    answer: str


def _letters(rng: random.Random) -> list[str]:
    return rng.sample(string.ascii_lowercase, rng.randint(3, 7))


def _line(skill: str, given: list[str], answer: list[str]) -> Problem:
    return Problem(skill, f"{skill}: {' '.join(given)} =", f" {' '.join(answer)}")


def copy(rng: random.Random) -> Problem:
    """3 to 7 different letters, unchanged."""
    letters = _letters(rng)
    return _line("copy", letters, letters)


def reverse(rng: random.Random) -> Problem:
    """3 to 7 different letters, last to first."""
    letters = _letters(rng)
    return _line("reverse", letters, letters[::-1])


def sort(rng: random.Random) -> Problem:
    """3 to 7 different letters, in alphabetical order."""
    letters = _letters(rng)
    return _line("sort", letters, sorted(letters))


def add(rng: random.Random) -> Problem:
    """Two numbers of two digits."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return _line("add", [str(a), "+", str(b)], [str(a + b)])


def count(rng: random.Random) -> Problem:
    """Count upwards by one from a number below 900: 3 to 6 numbers, both ends included."""
    first, length = rng.randint(1, 899), rng.randint(3, 6)
    return _line("count", [str(first), "to", str(first + length - 1)], [str(first + i) for i in range(length)])


def largest(rng: random.Random) -> Problem:
    """The largest of three different numbers of two digits."""
    numbers = rng.sample(range(10, 100), 3)
    return _line("largest", [str(n) for n in numbers], [str(max(numbers))])


SKILLS: tuple[Callable[[random.Random], Problem], ...] = (copy, reverse, sort, add, count, largest)


def problems(seed: int, *, held_out: bool, per_mille: int) -> Iterator[Problem]:
    """An endless stream that cycles through the skills, all of it inside (or all outside) the held-out share."""
    rng = random.Random(seed)
    while True:
        for skill in SKILLS:
            problem = skill(rng)
            while is_held_out(problem.prompt, per_mille) != held_out:
                problem = skill(rng)
            yield problem


def held_out_problems(seed: int, number: int, per_mille: int) -> list[Problem]:
    """`number` different held-out problems, the skills in equal parts."""
    found: dict[str, Problem] = {}
    for problem in problems(seed, held_out=True, per_mille=per_mille):
        wanted = sum(p.skill == problem.skill for p in found.values()) < -(-number // len(SKILLS))
        if wanted:
            found.setdefault(problem.prompt, problem)
        if len(found) >= number:
            return list(found.values())
    raise AssertionError("the stream of problems is endless")
