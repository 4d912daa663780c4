"""How a check ends other than well."""

from __future__ import annotations


class Wrong(Exception):
    """A check met a difference; the message says which."""


class NotHere(Exception):
    """A check cannot run on this machine; the message says why."""


def within(what: str, found: float, bound: float) -> str:
    """`what` with the found error, for a report; raises Wrong where it exceeds the bound (or is NaN)."""
    said = f"{what} {found:.1e} (at most {bound:.0e})"
    if not found <= bound:
        raise Wrong(said)
    return said
