"""Where words go: the answer to stdout, everything else to stderr. Model text is stripped of terminal escapes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# C0 except tab and newline, DEL and C1: what a terminal might act on.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Output:
    """The two streams of a command. `narrate` is False under --quiet and --json."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.narrate = not (quiet or as_json)
        self.console = Console(stderr=True, highlight=False)

    def answer(self, text: str) -> None:
        """A line of the answer, on stdout; never styled, control characters removed."""
        sys.stdout.write(printable(text) + "\n")

    def json(self, value: Any) -> None:
        """The one JSON object of --json."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")

    def say(self, text: str) -> None:
        """Narration on stderr, unless quiet."""
        if self.narrate:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning on stderr, also when quiet."""
        self.console.print(f"warning: {text}", markup=False, soft_wrap=True)

    def paths(self, files: list[Path]) -> None:
        """The files a command wrote, one a line."""
        for file in files:
            self.answer(str(file))

    @property
    def live(self) -> bool:
        """True where moving output makes sense: narration wanted and stderr a terminal."""
        return self.narrate and self.console.is_terminal

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Any]:
        """A progress bar on stderr; yields a function that advances it by one. Silent where nobody watches."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.live, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda amount=1: bar.advance(task, amount)


def printable(text: str) -> str:
    """Text without control characters a terminal could act on (escape sequences in a model's output)."""
    return _CONTROL.sub("", text)
