"""Reads `docs/results.md`: the field patterns of every section, and the fields of a value to compare them with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Documented(NamedTuple):
    """Field patterns of one section, with braces expanded; optional ones (†) need not occur in every result."""

    needed: set[str]
    optional: set[str]

    def unknown(self, found: set[str]) -> set[str]:
        """Fields that no pattern covers. A null or empty container is covered by any pattern below it."""
        patterns = [_regex(part) for pattern in self.needed | self.optional for part in (pattern, *_above(pattern))]
        return {field for field in found if not any(pattern.fullmatch(field) for pattern in patterns)}

    def stale(self, found: set[str]) -> set[str]:
        """Needed patterns that cover no field."""
        return {pattern for pattern in self.needed if not any(_regex(pattern).fullmatch(field) for field in found)}


def sections() -> dict[str, Documented]:
    """Every `###` section of results.md that has a table, and the table of a curve as `curve`."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = {
        title.strip(): _documented(body)
        for title, body in re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    }
    head, _, curve = text.partition("\nA *curve*:\n")
    own = head[head.rindex("### critical-sparsity.json") :]
    return {**found, "critical-sparsity.json": _documented(own), "curve": _documented(curve.partition("\n###")[0])}


def _documented(body: str) -> Documented:
    needed: set[str] = set()
    optional: set[str] = set()
    for row in re.findall(r"^\| (`.+)$", body, re.M):
        cells = row.split(" | ")
        names = {name for code in re.findall(r"`([^`]+)`", cells[0]) for name in _expanded(code)}
        (optional if "†" in cells[-1] else needed).update(names)
    return Documented(needed, optional)


def _expanded(pattern: str) -> Iterator[str]:
    """`a.{b,c}` as `a.b` and `a.c`."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    for choice in found[1].split(","):
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _above(pattern: str) -> Iterator[str]:
    """The containers a pattern lies in: `a`, `a[]` and `a[].b` of `a[].b.c`."""
    for place in re.finditer(r"\[\]|\.", pattern):
        yield pattern[: place.start()]
        yield pattern[: place.end()].removesuffix(".")


def _regex(pattern: str) -> re.Pattern[str]:
    """A list, and what ends in `.*`, may be null."""
    below, items = pattern.endswith(".*"), pattern.endswith("[]")
    escaped = re.sub(r"<[^>]*>", ".+?", re.escape(pattern.removesuffix(".*").removesuffix("[]")))
    return re.compile(escaped + (r"((\[\]|\.).*)?" if below else r"(\[\])?" if items else ""))


def fields(value: Any, path: str = "") -> Iterator[str]:
    """Paths to every leaf; an empty or null container is a leaf by its own name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fields(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value or [None]:
            yield from fields(inner, f"{path}[]")
    else:
        yield path
