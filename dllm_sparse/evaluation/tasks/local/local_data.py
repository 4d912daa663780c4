"""Readers and scorers of the tasks over a user's own files; lm-eval finds them through `!function local_data.NAME`.

Every reader gets the task's metadata, in which `data_file` is the path given as --tasks NAME=FILE (or, under lm-eval
itself, --metadata data_file=FILE).
"""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

_TITLE = re.compile(r" = [^=].*[^=] = ?")  # level one; sub-headings have more signs
_PASSAGE_WORDS = (40, 160)
_PROGRAM_SECONDS = 10


def json_lines(data_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Split `test` of a .jsonl or .jsonl.gz file."""
    return {"test": Dataset.from_list([json.loads(line) for line in _lines(data_file) if line.strip()])}


def wikitext_articles(data_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """WikiText in its tokenised form, an item an article (field `page`, as lm-eval's own wikitext task has it)."""
    articles: list[list[str]] = []
    for line in _lines(data_file):
        if _TITLE.fullmatch(line.rstrip("\n")) or not articles:
            articles.append([])
        articles[-1].append(line)
    pages = ["".join(lines) for lines in articles]
    return {"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])}


def wikitext_passages(data_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """WikiText paragraphs of 40 to 160 words without a heading: short items, for a limit on the number of items."""
    low, high = _PASSAGE_WORDS
    kept = [line for line in _lines(data_file) if low <= len(line.split()) <= high and not line.startswith(" =")]
    return {"test": Dataset.from_list([{"page": line.strip()} for line in kept])}


def detokenised(doc: dict[str, Any]) -> str:
    """lm-eval's WikiText detokeniser."""
    return str(wikitext_detokenizer(doc)).strip()


def program_passes(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """1 where prompt + completion passes the item's tests. Runs the program in its own interpreter, 10 s at most."""
    answer = results[0][0] if isinstance(results[0], list) else results[0]
    program = f"{doc['prompt']}{answer}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8")
        try:
            ended = subprocess.run(
                [sys.executable, "-I", str(path)],
                cwd=folder,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_PROGRAM_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"pass@1": 0.0}
    return {"pass@1": float(ended.returncode == 0)}


def _lines(data_file: str | None) -> Iterator[str]:
    if data_file is None:
        raise FileNotFoundError("this task reads a file of yours: give it as NAME=FILE")
    content = Path(data_file).read_bytes()
    if data_file.endswith(".gz"):
        content = gzip.decompress(content)
    yield from io.StringIO(content.decode("utf-8"))
