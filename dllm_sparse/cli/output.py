"""Where words go: the answer to stdout, everything else to stderr, all of it stripped of terminal escapes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from dllm_sparse.cli.terminal import UNSAFE, printable
from dllm_sparse.types import StdoutNotWritten


class Output:
    """The two streams of a command. `narrate` is False under --quiet and --json."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.narrate = not (quiet or as_json)
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)

    def answer(self, text: str) -> None:
        """A line of the answer, on stdout; never styled."""
        self._write(printable(text))

    def json(self, value: Any) -> None:
        """The one JSON object of --json."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        self._write(UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))

    def _write(self, line: str) -> None:
        try:
            sys.stdout.write(line + "\n")
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StdoutNotWritten(error) from error

    def say(self, text: str) -> None:
        """Narration on stderr, unless quiet."""
        if self.narrate:
            self.console.print(printable(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning on stderr, also when quiet."""
        self.console.print(f"warning: {printable(text)}", soft_wrap=True)

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
        with self.bars() as bar:
            task = bar.add_task(printable(title), total=total)
            yield lambda amount=1: bar.advance(task, amount)

    def bars(self, done: ProgressColumn | None = None, *, watched: bool = True) -> Progress:
        """Empty progress bars; `done` says how far each is. A title is shown as it is, never read as markup."""
        title = TextColumn("{task.description}", markup=False)
        columns = (title, BarColumn(), done or MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, console=self.console, disable=not (self.live and watched), transient=True)
