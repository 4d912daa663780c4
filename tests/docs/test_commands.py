"""Every command line in the documents parses, and every file they name is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dllm_sparse.cli.app import app
from tests.docs.tables import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "dllm_sparse").glob("models/bundled/*/README.md"))
SOURCES = [*DOCUMENTS, *CARDS, *sorted((ROOT / "dllm_sparse" / "cli").glob("*.py"))]


def command_lines(path: Path) -> Iterator[str]:
    """Calls in code spans, console blocks and the examples of help texts, up to what a shell would do with them."""
    text = re.sub(r"\n {4}(?=--)", " ", path.read_text(encoding="utf-8"))
    if path.suffix == ".py":
        yield from (found for found in re.findall(r"Example: (dllm-sparse [^\n]+)", text))
        return
    spans = re.findall(r"`(dllm-sparse [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    yield from (part.strip() for line in [*spans, *lines] for part in re.split(r"&&|\||;|>(?= )", line))


def calls() -> list[tuple[str, str]]:
    """(document, arguments) of each different call."""
    found = {
        (path.relative_to(ROOT).as_posix(), line)
        for path in SOURCES
        for whole in command_lines(path)
        for line in re.split(r" && ", whole)
        if line.startswith("dllm-sparse ")
    }
    return sorted(found)


def parse(arguments: list[str]) -> int:
    """The exit code of a call whose command does nothing: 0 where it parses."""
    command: Any = typer.main.get_command(app)
    _silence(command)
    for option in command.params:
        if option.name in ("install_completion", "show_completion"):
            option.callback = _leave  # as itself it writes into the home of whoever runs the tests
    with pytest.raises(SystemExit) as end:
        command(arguments, prog_name="dllm-sparse")
    return int(end.value.code or 0)


def _leave(context: Any, _option: Any, asked: bool) -> None:
    if asked:
        context.exit()


def _silence(command: Any) -> None:
    for inner in getattr(command, "commands", {}).values():
        _silence(inner)
    if not getattr(command, "commands", {}):
        command.callback = lambda **_: None


@pytest.mark.parametrize(("document", "line"), calls())
def test_command_lines_parse(document: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = parse(shlex.split(line, comments=True)[1:])
    assert code == 0, f"{document}: {line}: {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "line", ["generate --no-such-option 3", "no-such-command", "generate --cache triple", "bench no-such"]
)
def test_wrong_lines_are_noticed(line: str) -> None:
    assert parse(line.split()) == 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = {target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target}
    missing = {target for target in links if not (document.parent / target).exists()}
    named = set(re.findall(r"`((?:benchmarks|tests|dllm_sparse|assets|docs)/[\w./-]+)`", text))
    missing |= {name for name in named if not (ROOT / name).exists()}
    assert not missing


def test_the_readme_is_short_and_its_tree_is_true() -> None:
    """Every folder of the package has its line, and every line its folder or file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    tree = text.partition("```\ndllm_sparse/\n")[2].partition("```")[0]
    entries = dict(re.findall(r"^( *[\w./-]+) {2,}(\S.*)$", tree, re.M))
    inside = {name.strip().rstrip("/") for name in entries if name.startswith("  ")}
    there = {
        path.name
        for path in (ROOT / "dllm_sparse").iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert inside == there
    outside = {name.rstrip("/") for name in entries if not name.startswith(" ")}
    assert outside == {"assets", "benchmarks", "docs", "tests"}


def test_the_readme_sets_up_with_two_commands() -> None:
    """One runs the main job, one passes the tests; the gate runs both as they are written."""
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert ["dllm-sparse" in command for command in commands] == [True, False]
    assert commands[1].endswith("&& pytest")


def test_the_kernel_table_is_that_of_the_kept_results() -> None:
    """`python benchmarks/roofline_h200.py` writes both anew."""
    from benchmarks import roofline_h200 as roofline

    text = roofline.PAGE.read_text(encoding="utf-8")
    shown = text.partition(roofline.BEGIN)[2].partition(roofline.END)[0].strip()
    assert shown == roofline.table(roofline.read("kernels_h200.json"))
