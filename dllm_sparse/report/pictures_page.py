"""A page of sentences, tables and pictures, for reports without interactive charts. One file, loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparse.report.html import Section, bullets, page, table, text


@dataclass(frozen=True, slots=True)
class Part:
    """A titled part: sentences, a picture (a PNG file with what it shows), a table."""

    title: str
    sentences: Sequence[str] = ()
    picture: tuple[Path, str] | None = None
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()


def pictures_page(title: str, subtitle: str, parts: Sequence[Part]) -> str:
    """The whole page as one string of HTML; pictures are embedded."""
    sections = [Section(f"part{number}", part.title, _body(part)) for number, part in enumerate(parts)]
    return page(title, subtitle, sections, {}, scripts=("page.js", "plain.js"))


def _body(part: Part) -> str:
    body = bullets(part.sentences) if part.sentences else ""
    if part.picture is not None:
        path, caption = part.picture
        data = base64.b64encode(path.read_bytes()).decode()
        source = f'src="data:image/png;base64,{data}"'
        body += f'<figure><img {source} alt="{text(caption)}" style="max-width:100%">'
        body += f"<figcaption>{text(caption)}</figcaption></figure>"
    return body + (table(part.headers, part.rows) if part.rows else "")


def shown(value: Any, digits: int = 4) -> str:
    """A number for a cell; `-` for None and NaN."""
    if value is None or value != value:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
