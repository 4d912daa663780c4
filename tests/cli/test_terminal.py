"""Nothing that is printed can act on a terminal, whoever wrote it: a model, a file, a task, a path."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from dllm_sparse.cli.errors import run
from dllm_sparse.cli.output import Output
from dllm_sparse.cli.sweep_options import SweepProgress
from dllm_sparse.cli.terminal import printable
from tests.cli.conftest import Cli

ATTACKS = (
    "\x1b]0;title\x07",  # the window's title
    "\x1b[2J\x1b[1;1H",  # the screen emptied
    "\x9b31m",  # the same introduced by one byte
    "\x1bP1000p\x1b\\",
    "back\x08\x08\rspace",
    "[bold red]markup[/bold red] [/] :smile: [link=x]",
    "\ud800 surrogate",
)
# What rich itself sends: colours, the cursor hidden and shown, lines erased and left upwards.
RICH = re.compile(r"\x1b\[(\d+(;\d+)*)?m|\x1b\[\?25[lh]|\x1b\[\d*[AK]|\r")
TEXT = st.text() | st.sampled_from(ATTACKS)


@pytest.fixture(params=["plain", "terminal"])
def output(request: pytest.FixtureRequest) -> Output:
    """Words that go to a file, and to what says it is a terminal."""
    made = Output()
    made.console = Console(
        file=io.StringIO(), force_terminal=request.param == "terminal", markup=False, emoji=False, width=200
    )
    return made


def shown(output: Output) -> str:
    """What reached the console, without what rich sends itself."""
    assert isinstance(output.console.file, io.StringIO)
    return RICH.sub("", output.console.file.getvalue())


def harmless(text: str) -> bool:
    return not re.search(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", text)


@given(TEXT)
@example("".join(ATTACKS))
def test_every_word_of_ours_is_harmless(text: str) -> None:
    output = Output()
    output.console = Console(file=io.StringIO(), width=200, markup=False, emoji=False)
    output.say(text)
    output.warn(text)
    assert harmless(shown(output))


def test_markup_and_emoji_names_are_shown_as_they_are(output: Output) -> None:
    output.say("[bold]a[/bold] [/] :smile:")
    assert shown(output) == "[bold]a[/bold] [/] :smile:\n"


@given(TEXT)
def test_answers_and_json_are_harmless(text: str) -> None:
    output, kept = Output(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", kept)
        output.answer(text)
        output.paths([Path(f"a{text}".replace("\0", ""))])
        output.json({text: [text]})
    assert harmless(kept.getvalue())
    assert json.loads(kept.getvalue().split("\n")[-2]) == {text: [text]}


@pytest.mark.parametrize("attack", ATTACKS)
def test_titles_of_bars_are_shown_as_they_are(output: Output, attack: str) -> None:
    with output.progress(attack, 2) as advance:
        advance()
    with SweepProgress(output) as bars:
        bars.planned(1)
        bars.started(f"task {attack}")
        bars.advanced(0.5)
        bars.finished(reused=True)
    printed = shown(output)
    assert harmless(printed)
    assert printable(f"task {attack}").split()[-1] in printed


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", [OSError, KeyError, RuntimeError])
@pytest.mark.parametrize("debug", ["", "1"])
def test_errors_are_harmless(
    attack: str,
    kind: Callable[[str], Exception],
    debug: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DLLM_SPARSE_DEBUG", debug)

    def fail() -> None:
        raise kind(attack)

    assert run(fail) == 1
    assert harmless(capsys.readouterr().err)


def test_names_of_files_tasks_and_models_are_harmless(
    cli: Cli, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    attack = "".join(ATTACKS[:5]).replace("/", "")
    file = tmp_path / f"{attack}.jsonl"
    file.write_text(f'{{"prompt": "{attack}"')
    task = tmp_path / f"{attack}.yaml"
    task.write_text(f'task: "{attack}\ndataset_path: [')
    for call in (
        ("generate", "--model", toy, "--prompts", file),
        ("generate", "--model", f"no{attack}", "--prompt", "a"),
        ("generate", "--model", toy, "--prompt", "a", "--device", attack),
        ("critical-sparsity", "--model", toy, "--tasks", task),
        ("train", f"{tmp_path}/{attack}.toml"),
        ("laws", file),
    ):
        answer = cli(*call)
        assert answer.code in (1, 2)
        assert answer.stdout == ""
        assert answer.stderr
        assert harmless(answer.stderr)
