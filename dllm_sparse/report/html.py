"""Self-contained HTML pages: one file that loads nothing from anywhere, for any report.

Everything that is not markup written here goes through `text` (in the page) or `json_block` (in data), so model output
is shown and never run. The content security policy names the page's own scripts by hash: even markup that slipped
through could neither run nor reach the network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

CHARTS = ("vendor/d3.min.js", "vendor/plot.min.js", "page.js")
"""The scripts every page with charts starts with; a report's own script comes behind them."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="dllm-sparse">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><div><h1>{title}</h1><p class="subtitle">{subtitle}</p></div>
<button type="button" id="theme" aria-label="Switch between light and dark">Light / dark</button></header>
<nav aria-label="Sections">{links}</nav>
<main id="content">
{body}
</main>
<noscript><p>The charts need JavaScript; all figures are in the JSON file beside this page.</p></noscript>
{data}
{scripts}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of a page; `body` is trusted markup made by the helpers below. Without a title: bare markup."""

    id: str
    title: str
    body: str


def page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    data: dict[str, Any],
    scripts: Sequence[str] = CHARTS,
    styles: Sequence[str] = (),
) -> str:
    """The whole page. `data` becomes one JSON block per key (the element's id).

    `scripts` and `styles` name files of the assets, in order; the general style comes first by itself.
    """
    sources = [asset(name) for name in scripts]
    return _PAGE.format(
        policy=_policy(sources),
        title=text(title),
        subtitle=text(subtitle),
        style="\n".join(asset(name) for name in ("page.css", *styles)),
        links="".join(f'<a href="#section-{text(s.id)}">{text(s.title)}</a>' for s in sections if s.title),
        body="\n".join(_section(section) for section in sections),
        data="\n".join(json_block(id, value) for id, value in data.items()),
        scripts="\n".join(f"<script>{source}</script>" for source in sources),
    )


def text(value: object) -> str:
    """Any value as text inside the page, also inside an attribute."""
    return escape(str(value), quote=True)


def paragraph(value: object, style: str = "") -> str:
    """A paragraph of escaped text."""
    return f'<p class="{text(style)}">{text(value)}</p>' if style else f"<p>{text(value)}</p>"


def bullets(values: Iterable[object]) -> str:
    """An unordered list of escaped texts."""
    return f"<ul>{''.join(f'<li>{text(value)}</li>' for value in values)}</ul>"


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], caption: object = "") -> str:
    """A table of escaped cells; the first of a row is its header. It scrolls by itself on narrow screens."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in headers)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    name = f"<caption>{text(caption)}</caption>" if caption else ""
    parts = f"{name}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{parts}</table></div>'


def figure(id: str, caption: object) -> str:
    """A place for a chart that a script draws into the element `id`; its numbers open below it as a table."""
    return (
        f'<figure><figcaption>{text(caption)}</figcaption><div class="chart" id="{text(id)}"></div>'
        f'<details class="numbers" data-for="{text(id)}"><summary>Numbers</summary></details></figure>'
    )


def columns(*parts: str) -> str:
    """Parts side by side where there is room, otherwise below one another."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def select(id: str, label: object, options: Sequence[tuple[object, object]]) -> str:
    """A labelled choice among (value, shown text) pairs."""
    choices = "".join(f'<option value="{text(value)}">{text(shown)}</option>' for value, shown in options)
    return f'<label>{text(label)} <select id="{text(id)}">{choices}</select></label>'


def controls(*parts: str) -> str:
    """A bar of choices that stays in sight while the page scrolls."""
    return f'<form class="controls" aria-label="What the charts show">{"".join(parts)}</form>'


def json_block(id: str, value: Any) -> str:
    """Data for scripts. Characters that could end the block or start markup are written as JSON escapes."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{text(id)}">{content}</script>'


def asset(name: str) -> str:
    """A file shipped beside this module: style, script or vendored library."""
    content = files("dllm_sparse.report").joinpath("assets", name).read_text(encoding="utf-8").strip()
    assert "</script" not in content.lower(), f"{name} would end its own script element"
    return content


def _section(section: Section) -> str:
    if not section.title:
        return section.body
    return f'<section id="section-{text(section.id)}"><h2>{text(section.title)}</h2>\n{section.body}\n</section>'


def _policy(sources: Iterable[str]) -> str:
    """Nothing may be fetched; only the page's own scripts run. Charts carry their own style elements."""
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources)
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
