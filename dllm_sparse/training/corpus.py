"""Reading a corpus: JSON lines with a `text` field, plain or compressed; cleaning; the held-out split by document."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dllm_sparse.types import DllmSparseError

_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)]*(?=\s|$)")
_TOKENISED = re.compile(r" [.,;] | @")
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".gz": gzip.open}


class CorpusError(DllmSparseError):
    """A corpus that cannot be read; carries file and line number."""


def read_corpus(path: Path) -> Iterator[str]:
    """Yields the `text` of each line of a .jsonl, .jsonl.xz or .jsonl.gz file; raises CorpusError."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text(line, f"{path}:{number}")
    except (OSError, lzma.LZMAError, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read the corpus {path}: {error}") from error


def _text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(f'{where}: expected one JSON object with a "text" string, like {{"text": "..."}}') from error
    if not isinstance(text, str):
        raise CorpusError(f'{where}: "text" must be a string, not {type(text).__name__}')
    return text


def clean(text: str) -> str:
    """The text up to its last complete sentence; sampled text mostly stops in the middle of one."""
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def distinct_share(text: str) -> float:
    """Distinct 4-grams of words over all of them, in [0, 1]; 1 for texts of fewer than 4 words."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(4)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def wanted_texts(path: Path, min_distinct: float, min_characters: int) -> Iterator[str]:
    """The cleaned documents worth training on.

    Left out: those that repeat themselves (distinct 4-grams below `min_distinct`), texts in pre-tokenised
    typography (" , "), and what is shorter than `min_characters` once cut at its last sentence.
    """
    for text in read_corpus(path):
        if _TOKENISED.search(text) or distinct_share(text) < min_distinct:
            continue
        text = clean(text)
        if len(text) >= min_characters:
            yield text


def is_held_out(text: str, per_mille: int) -> bool:
    """Whether a document, or a problem's prompt, is held out; depends on its content alone: copies stay together."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 1000 < per_mille
