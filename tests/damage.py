"""What can happen to a file: bytes changed, lost, put in, the end cut off, or another content altogether."""

from __future__ import annotations

from hypothesis import strategies as st

OTHER = (
    *(b"", b"\n", b"{}", b"[]", b"null", b"0", b'"text"', b"{", b"\xff\xfe", b"\x00" * 9, b"NaN", b"1e999"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\x1b[2J", "\ufeff{}".encode(), b"<html>", b"PK\x03\x04"),
)
"""Contents no file of ours has."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content after one or two accidents."""
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(["change", "cut", "remove", "insert", "repeat", "other"]))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        end = at + draw(st.integers(1, 40))
        if how == "change":
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "remove":
            content = content[:at] + content[end:]
        elif how == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
        elif how == "repeat":
            content = content[:end] + content[at:]
        else:
            content = draw(st.sampled_from(OTHER))
    return content
