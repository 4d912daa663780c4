"""Text that is safe to show: what a terminal might act on is taken out. Model output, names and files can hold it."""

from __future__ import annotations

import re

UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""C0 except tab and newline, DEL and C1, where escape sequences begin; and lone surrogates, which no stream encodes."""


def printable(text: str) -> str:
    """The text without the characters of UNSAFE."""
    return UNSAFE.sub("", text)
