"""What a terminal shows while a canvas is decoded: the tokens, coloured by the step that committed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_sparse.cli.terminal import printable
from dllm_sparse.types import Observer, Step, StepResult

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparse.models.language_model import LanguageModel

# From early (blue) to late (yellow): cividis at nine points, readable with any colour vision.
_COLOURS = ("#00326e", "#2d446d", "#4b566d", "#666970", "#7d7c78", "#979077", "#b3a76d", "#d1c05c", "#f1da3a")
_MASK = "░"


class StepProgress(Observer):
    """Advances a progress bar by one per step."""

    def __init__(self, advance: Callable[[int], Any]) -> None:
        self._advance = advance

    def on_step(self, step: Step, result: StepResult) -> None:
        """One step done."""
        self._advance(1)


class CanvasView(Observer):
    """Draws the first row of the canvas after every step, on stderr."""

    def __init__(self, console: Console, lm: LanguageModel) -> None:
        self._live = Live(console=console, refresh_per_second=20, transient=False)
        self._lm = lm
        self._prompt_length = 0
        self._committed_at: dict[int, int] = {}

    def __enter__(self) -> CanvasView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        """Remembers where the prompt ends."""
        from dllm_sparse.types import TokenClass

        self._committed_at.clear()
        classes = token_class[0].tolist()
        given = [at for at, kind in enumerate(classes) if kind in (TokenClass.PROMPT, TokenClass.PADDING)]
        self._prompt_length = given[-1] + 1 if given else 0

    def on_step(self, step: Step, result: StepResult) -> None:
        """Redraws the canvas."""
        for position in result.committed[0].nonzero().flatten().tolist():
            self._committed_at[position] = step.index
        self._live.update(self.render(result.ids[0].tolist(), step), refresh=True)

    def render(self, ids: list[int], step: Step) -> Text:
        """The generated part as styled text; masks are blocks, tokens carry the colour of their step."""
        text = Text()
        for position in range(self._prompt_length, len(ids)):
            at = self._committed_at.get(position)
            if at is None:
                text.append(_MASK, style="dim")
                continue
            # Editing may write tokens after the last planned step, where the fraction stays at 1.
            colour = _COLOURS[round(replace(step, index=at).fraction * (len(_COLOURS) - 1))]
            style = f"{_ink(colour)} on {colour}" if at < step.index else f"bold reverse {colour}"
            text.append(self._piece(ids[position]), style=style)
        text.append(f"\nstep {step.index + 1}/{max(step.total, step.index + 1)}, block {step.block + 1}", style="dim")
        return text

    def _piece(self, token: int) -> str:
        if self._lm.tokenizer is None:
            return f"{token} "
        return printable(str(self._lm.tokenizer.decode([token]))).replace("\n", "⏎")


def _ink(colour: str) -> str:
    """White on dark, black on light."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else "black"
