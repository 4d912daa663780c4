"""Options of the commands that score by held-out loss. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TEXT = "Text"

TextOpt = Annotated[
    Path | None,
    typer.Option(
        "--text", help="Held-out text: .jsonl with `text`, or plain. Default: bundled passages.", rich_help_panel=_TEXT
    ),
]
WindowsOpt = Annotated[int, typer.Option("--windows", min=2, help="Windows of text.", rich_help_panel=_TEXT)]
LengthOpt = Annotated[int, typer.Option("--length", min=2, help="Tokens of a window.", rich_help_panel=_TEXT)]
