"""Whatever stands in a file a user gives: an answer, or an error in words that names the file. Never a traceback."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.damage import OTHER, damaged
from tests.evaluation.conftest import task_folder  # noqa: F401 (fixture)
from tests.helpers import call_cli, little_memory
from tests.training.toy import DOCUMENTS, SKILLS, STREAM, toy_recipe

SHORT = ("--gen-length", "2", "--block-length", "2")
PROMPTS = b'{"prompt": "abc"}\n{"prompt": "d\\u00e9 \\"e\\""}\n'
POINTS = b"run,tokens_billions,activation_ratio,parameters,width,layers\n" + b"".join(
    f"r{run},{2.0**step},{0.05 + 0.3 / 2**step},{run + 1}e6,{64 * run + 64},4\n".encode()
    for run in range(2)
    for step in range(7)
)
NUMBERS = st.sampled_from(["", "-1", "0", "1", "nan", "inf", "1e308", "-1e308", "1e-320", "x", "=1", "'=1", "0x10"])


FEW = settings(max_examples=max(settings.default.max_examples // 10, 5))
"""Each example is a whole run of a command."""


class Tried:
    """One call of the command line: its exit code and words."""

    def __init__(self, *call: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            self.code = call_cli(*(str(part) for part in call))
        self.stdout, self.stderr = out.getvalue(), err.getvalue()

    def is_clear(self, *names: object) -> bool:
        """An answer; or words that name one of these, and nothing on stdout. Returns whether it was an answer."""
        assert "Traceback" not in self.stderr
        assert "please report it" not in self.stderr, self.stderr
        if self.code == 0:
            return True
        assert self.code in (1, 2), self.stderr
        assert self.stdout == ""
        assert any(str(name) in self.stderr for name in names), self.stderr
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of one test after another are written."""
    return tmp_path_factory.mktemp("files")


@FEW
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".txt"]))
def test_prompts(folder: Path, toy: Path, data: st.DataObject, suffix: str) -> None:
    file = folder / f"prompts{suffix}"
    prompts = st.recursive(
        st.text() | st.sampled_from(["\ud800", "\0", "\u2028", "\x1b[2J"]) | st.none() | st.integers(),
        st.lists,
        max_leaves=3,
    )
    lines = st.lists(st.builds(lambda prompt: json.dumps({"prompt": prompt}).encode(), prompts)).map(b"\n".join)
    file.write_bytes(data.draw(damaged(PROMPTS) | lines))
    Tried("generate", "--model", toy, "--prompts", file, *SHORT).is_clear(file)


@FEW
@given(data=st.data())
def test_points_of_laws(folder: Path, data: st.DataObject) -> None:
    file = folder / "points.csv"
    rows = st.lists(st.tuples(st.sampled_from(["a", "b", "=a"]), NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS))
    head = POINTS.splitlines()[0].decode()
    drawn = rows.map(lambda found: "\n".join([head, *map(",".join, found)]).encode())
    file.write_bytes(data.draw(damaged(POINTS) | drawn))
    answer = Tried("laws", file, "--samples", "0", "--json")
    if answer.is_clear(file):
        value = json.loads(answer.stdout)
        assert all(run["best"] or run["problem"] for run in value["runs"])


TOML = st.sampled_from(
    ['"x"', "0", "-1", "true", "1.5", "nan", "inf", "-inf", "[]", "{}", "99999999999999999999", "1e9"]
)
RECIPE = toy_recipe(f"{DOCUMENTS}prefix_share = 0.5\n", STREAM, SKILLS, steps=2, checkpoint_every=2, evaluate_every=2)


@FEW
@given(data=st.data())
def test_recipes(folder: Path, data: st.DataObject) -> None:
    """Damaged, and with any value of any key: what is accepted is also trained, as long as it is small."""
    lines = RECIPE.splitlines()
    numbered = [number for number, line in enumerate(lines) if "=" in line]
    for number in data.draw(st.lists(st.sampled_from(numbered), max_size=2)):
        lines[number] = f"{lines[number].split('=')[0]}= {data.draw(TOML)}"
    content = "\n".join(lines).encode()
    file, out = folder / "recipe.toml", folder / "run"
    content = data.draw(st.just(content) | damaged(content))
    assume(not re.search(rb"[1-9]\d{4}", content) or b"\n" not in content)  # hours of work are no error
    file.write_bytes(content)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Text {n} of a few words. " * 9}) + "\n" for n in range(40)))
    shutil.rmtree(out, ignore_errors=True)
    call = ("train", file, "--corpus", corpus, "--out", out, "--no-compile", "--quiet")
    with little_memory(4 << 30):
        Tried(*call, "--steps", "1").is_clear(
            file, corpus, out, "data.vocab_size", "do not fill one row", "out of memory"
        )


CORPUS = b"".join(json.dumps({"text": f"Text {n}. " * 30}).encode() + b"\n" for n in range(3))


@FEW
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.xz"]))
def test_corpora(folder: Path, data: st.DataObject, suffix: str) -> None:
    import gzip
    import lzma

    packed = {".jsonl": CORPUS, ".jsonl.gz": gzip.compress(CORPUS, mtime=0), ".jsonl.xz": lzma.compress(CORPUS)}
    file, recipe = folder / f"some{suffix}", folder / "toy.toml"
    file.write_bytes(data.draw(damaged(packed[suffix])))
    recipe.write_text(RECIPE)
    out = folder / "run2"
    shutil.rmtree(out, ignore_errors=True)
    assert not Tried("train", recipe, "--corpus", file, "--out", out).is_clear(file, "data.vocab_size")


SWEEP = (
    "--limit",
    "1",
    "--mc-num",
    "1",
    "--grid",
    "0.5",
    "--resamples",
    "100",
    "--gen-length",
    "2",
    "--block-length",
    "2",
)


@FEW
@given(data=st.data(), name=st.sampled_from(["choice", "greedy", "rolling", "written"]))
def test_task_files(
    folder: Path,
    toy: Path,
    task_folder: Path,  # noqa: F811
    data: st.DataObject,
    name: str,
) -> None:
    """A damaged YAML, or a damaged file of documents behind it."""
    content = (task_folder / f"{name}.yaml").read_text().replace(str(task_folder), str(folder)).encode()
    documents = (task_folder / "docs.jsonl").read_bytes()
    broken = data.draw(st.booleans())
    task, docs = folder / f"{name}.yaml", folder / "docs.jsonl"
    task.write_bytes(data.draw(damaged(content)) if broken else content)
    docs.write_bytes(documents if broken else data.draw(damaged(documents)))
    Tried("critical-sparsity", "--model", toy, "--tasks", task, *SWEEP).is_clear(task, docs, name)


@FEW
@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]))
def test_tokenizer_files(folder: Path, toy_chat: Path, data: st.DataObject, name: str) -> None:
    copy = folder / "model"
    if not copy.exists():
        shutil.copytree(toy_chat, copy)
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(data.draw(damaged(content)))
    try:
        Tried("generate", "--model", copy, "--prompt", "abc", *SHORT).is_clear(copy)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("content", OTHER, ids=lambda content: repr(content[:12]))
def test_files_that_are_something_else(tmp_path: Path, toy: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    for call in (("generate", "--model", toy, *SHORT, "--prompts", file), ("laws", file), ("train", file)):
        if Tried(*call).is_clear(file, "context of 256"):
            assert call[0] == "generate"  # any text is a prompt
