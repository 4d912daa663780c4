"""`generate --watch`: the canvas on a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import dllm_sparse as ds
from dllm_sparse.cli.watch import CanvasView
from tests.cli.conftest import Cli

SHORT = ("--gen-length", "8", "--block-length", "4", "--steps", "4")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4, steps=4)


def test_watch_draws_the_canvas_on_stderr(cli: Cli, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ("generate", "--model", toy, "--prompt", "abc", *SHORT)
    plain = cli(*call)
    assert cli(*call, "--watch").stdout == plain.stdout  # no terminal: nothing moves
    monkeypatch.setenv("FORCE_COLOR", "1")
    watched = cli(*call, "--watch")
    assert watched.stdout == plain.stdout
    assert "step 4/4, block 2" in watched.stderr
    assert "\x1b[" in watched.stderr
    assert "░" in watched.stderr
    for hostile in ("\x1b[2J", "\x9b", "\x07", "\x1b]0;"):
        assert hostile not in watched.stderr


def test_the_canvas_view(toy_lm: ds.LanguageModel) -> None:
    """Masks are blocks, what was just committed is bold, older tokens carry the colour of their step."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", record=True, width=60)
    drawn: list[Any] = []

    class Watching(CanvasView):
        def render(self, ids: list[int], step: ds.Step) -> Any:
            drawn.append((ids, step, super().render(ids, step)))
            return drawn[-1][2]

    with Watching(console, toy_lm) as view:
        out = ds.generate(toy_lm, ["abc", "a longer one"], sampler=SAMPLER, observers=[view])
    assert [step.index for _, step, _ in drawn] == [0, 1, 2, 3]
    for ids, step, text in drawn:
        canvas, caption = text.plain.split("\n")
        assert canvas.count("░") == ids.count(250) == 8 - 2 * (step.index + 1)
        assert caption == f"step {step.index + 1}/4, block {step.block + 1}"
        assert sum("bold" in str(span.style) for span in text.spans) == 2
    last = drawn[-1][2]
    assert last.plain.split("\n")[0] == CONTROL.sub("", toy_lm.tokenizer.decode(out.ids[0, -8:].tolist()))  # type: ignore[union-attr]
    colours = {str(span.style) for span in last.spans if " on " in str(span.style)}
    assert len(colours) == 3
    assert "step 4/4, block 2" in console.export_text()
