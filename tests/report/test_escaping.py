"""Whatever a model, a task or a file is called and writes: parsed as a browser would, a page stays the page it is.

A page is made twice, with harmless words and with attacks in their place. Parsed, the two must be the same elements
with the same attributes, in which the attacks stand exactly where the words stood: nothing escaped, nothing was lost.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dllm_sparse as ds
from dllm_sparse.report.drift_page import drift_page
from dllm_sparse.report.html import Section, bullets, columns, controls, figure, page, paragraph, select, table
from dllm_sparse.report.pictures_page import Part, pictures_page
from dllm_sparse.report.sweep_page import sweep_page
from tests.evaluation.conftest import ar, diffusion, llada_folder, llama_folder, task_folder  # noqa: F401 (fixtures)
from tests.report.conftest import ATTACKS

WORD = "qqwordqq"
MORE = (
    "</title><svg onload=x>",
    "\"'><img src=x onerror=x>",
    "' autofocus onfocus=x '",
    "--><script>x</script>",
    "]]><a href='javascript:x'>",
    "{{constructor}}",
    "<style>*{display:none}",
    "\u2028</SCRIPT ><script>",
    "<!--<script>",
    "&quot;&#60;&lt",
)
TEXT = st.sampled_from((*ATTACKS, *MORE)) | st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1)


class Events(HTMLParser):
    """What a page is made of: elements with their attributes, and texts; JSON blocks as the data they hold."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Any] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append([tag, *map(list, attrs)])

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:60]}")

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html"

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data[:60]}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data[:60]}")

    def handle_data(self, data: str) -> None:
        element = self.found[-1] if self.found and isinstance(self.found[-1], list) else []
        is_json = ["type", "application/json"] in element
        self.found.append({"text": json.loads(data) if is_json else data})


def put(value: Any, words: dict[str, str]) -> Any:
    """The value with other words in all its texts, keys included."""
    if isinstance(value, str):
        for old, new in words.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {put(key, words): put(entry, words) for key, entry in value.items()}
    return [put(entry, words) for entry in value] if isinstance(value, list | tuple) else value


def every_part(word: str) -> str:
    """A page of everything the helpers can make."""
    parts = [
        paragraph(word),
        bullets([word]),
        table([word], [[word, word]], word),
        figure(f"id-{word}", word),
        columns(paragraph(word)),
        controls(select(f"s-{word}", word, [(word, word)])),
    ]
    return page(word, word, [Section(f"s-{word}", word, "".join(parts))], {"data": {word: [word]}}, ("page.js",))


@given(TEXT)
def test_every_helper(attack: str) -> None:
    assert Events(every_part(attack)).found == put(Events(every_part(WORD)).found, {WORD: attack})


@given(TEXT)
def test_the_page_of_pictures(attack: str) -> None:
    def made(word: str) -> str:
        return pictures_page(word, word, [Part(word, [word], headers=[word], rows=[[word, word]])])

    assert Events(made(attack)).found == put(Events(made(WORD)).found, {WORD: attack})


def test_the_page_of_a_drift_report(report: Any) -> None:
    """The model's name, prompts and every generated token attack."""
    texts = {attack: "w" * len(attack) for attack in (*ATTACKS, "</title><script>window.attacked=1</script>")}
    attacked, plain = Events(drift_page(report)).found, Events(drift_page(put(report, texts))).found
    assert json.dumps(report).count("window.attacked") > 20
    assert [event[:1] if isinstance(event, list) else type(event) for event in attacked] == [
        event[:1] if isinstance(event, list) else type(event) for event in plain
    ]
    names = [[name for name, _ in event[1:]] for event in attacked if isinstance(event, list)]
    assert names == [[name for name, _ in event[1:]] for event in plain if isinstance(event, list)]
    data = [event["text"] for event in attacked if isinstance(event, dict) and not isinstance(event["text"], str)]
    assert put(data, texts) == [e["text"] for e in plain if isinstance(e, dict) and not isinstance(e["text"], str)]


@pytest.fixture(scope="module")
def compared(
    diffusion: ds.LanguageModel,  # noqa: F811
    ar: ds.LanguageModel,  # noqa: F811
    task_folder: Path,  # noqa: F811
) -> Any:
    """A comparison of two models on one task, with the published settings and the likelihood noise."""
    tasks = [str(task_folder / "choice.yaml")]
    options: dict[str, Any] = {"grid": [0.6], "resamples": 100, "limit": 2, "published": True, "noise_seeds": 2}
    return ds.compare(diffusion, ar, tasks=tasks, sites=["all_inputs"], **options)


@pytest.mark.parametrize("attack", [*ATTACKS, *MORE])
def test_the_page_of_a_sweep(compared: Any, attack: str) -> None:
    """Tasks and models are named by the attack."""
    names = {"choice": f"choice {WORD}", **{name: f"{WORD} {name}" for name in {r["model"] for r in compared.rows()}}}
    value, rows = (put(part, names) for part in (compared.value, compared.rows()))
    assert json.dumps(rows).count(WORD) >= 4
    plain = Events(sweep_page("compare", value, rows)).found
    attacked = Events(sweep_page("compare", *(put(part, {WORD: attack}) for part in (value, rows)))).found
    assert attacked == put(plain, {WORD: attack})
