"""Readers of the bundled tasks' items, which lie in `data/` beside this file; lm-eval finds them through `!function`.

All items come from documents and problems that training never saw; `dllm_sparse.training.held_out` makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

_DATA = Path(__file__).parent / "data"


def cloze(**_: Any) -> dict[str, Dataset]:
    """Split `test`: context, choices (4), label."""
    return _split("cloze")


def infill(**_: Any) -> dict[str, Dataset]:
    """Split `test`: prefix, target (one token of the bundled tokenizer), suffix."""
    return _split("infill")


def skills(**_: Any) -> dict[str, Dataset]:
    """Split `test`: skill, prompt, answer."""
    return _split("skills")


def _split(name: str) -> dict[str, Dataset]:
    lines = (_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
