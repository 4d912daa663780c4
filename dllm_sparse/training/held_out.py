"""Test items from what training never saw: held-out documents and held-out problems.

Writes the data of the bundled tasks; what the tasks measure is said beside them, in `evaluation/tasks`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dllm_sparse.files import write_text
from dllm_sparse.training import corpus, skills
from dllm_sparse.training.recipe import Recipe
from dllm_sparse.types import DllmSparseError

_SENTENCE = re.compile(r"\S.*?[.!?][\"'\u201d\u2019)]*(?=\s|$)", re.DOTALL)
_WORD = re.compile(r" [a-z]{3,}(?=[ ,.])")
CONTEXT_TOKENS = (24, 64)  # of a cloze item's context and an infill item's prefix
SENTENCE_TOKENS = (8, 32)  # of a continuation
SUFFIX_TOKENS = 16  # to the right of an infill item's gap


def write_tasks(corpus_path: Path, recipe: Recipe, tokenizer: Tokenizer, folder: Path, items: int = 1000) -> list[Path]:
    """Writes cloze.jsonl, infill.jsonl and skills.jsonl into `folder`; the same recipe gives the same items."""
    settings = recipe.data
    texts = corpus.wanted_texts(corpus_path, settings.min_distinct, settings.min_characters)
    held = sorted({text for text in texts if corpus.is_held_out(text, settings.held_out_per_mille)})
    made = {
        "cloze": cloze_items(held, tokenizer, recipe.seed, items),
        "infill": infill_items(held, tokenizer, recipe.seed, items),
        "skills": skill_items(recipe.seed, 120 * len(skills.SKILLS), settings.skill_held_out_per_mille),
    }
    return [_write(folder / f"{name}.jsonl", rows) for name, rows in made.items()]


def skill_items(seed: int, number: int, per_mille: int) -> list[dict[str, Any]]:
    """Prompts ending in "=" and the answers expected behind them."""
    found = skills.held_out_problems(seed, number, per_mille)
    return [{"skill": p.skill, "prompt": p.prompt, "answer": p.answer.strip()} for p in found]


def cloze_items(texts: Sequence[str], tokenizer: Tokenizer, seed: int, number: int) -> list[dict[str, Any]]:
    """The beginning of a document and four sentences: the one that follows, and three from as far into other documents.

    Wrong sentences have about the true one's length in tokens, so length alone decides nothing.
    """
    rng = random.Random(seed)
    splits = [split for text in texts if (split := _split_sentence(text, tokenizer)) is not None]
    rng.shuffle(splits)
    lengths = [_count(tokenizer, sentence) for _, sentence in splits]
    items = []
    for (context, true), length in list(zip(splits, lengths, strict=True))[:number]:
        near = [s for (_, s), n in zip(splits, lengths, strict=True) if s != true and abs(n - length) <= 2]
        choices = [true, *rng.sample(near, 3)]
        order = rng.sample(range(4), 4)
        items.append({"context": context, "choices": [choices[i] for i in order], "label": order.index(0)})
    return _enough(items, number, "cloze")


def infill_items(texts: Sequence[str], tokenizer: Tokenizer, seed: int, number: int) -> list[dict[str, Any]]:
    """A gap of one token: `prefix` ends before it, `target` is " word", `suffix` begins right behind it."""
    rng = random.Random(seed)
    items = []
    for text in rng.sample(list(texts), len(texts)):
        places = list(_WORD.finditer(text))
        rng.shuffle(places)
        item = next((found for place in places if (found := _gap(text, place, tokenizer)) is not None), None)
        if item is not None:
            items.append(item)
        if len(items) == number:
            break
    return _enough(items, number, "infill")


def _split_sentence(text: str, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Context and the sentence after it: the first split with CONTEXT_TOKENS before and SENTENCE_TOKENS behind."""
    for match in _SENTENCE.finditer(text):
        context, sentence = text[: match.start()].rstrip(), match.group()
        length = _count(tokenizer, context)
        if length > CONTEXT_TOKENS[1]:
            return None
        fits = SENTENCE_TOKENS[0] <= _count(tokenizer, " " + sentence) <= SENTENCE_TOKENS[1]
        if length >= CONTEXT_TOKENS[0] and fits and "\n" not in sentence:
            return context, sentence
    return None


def _gap(text: str, place: re.Match[str], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The item with this word as its gap, if the word is one token and both sides are long enough."""
    prefix, target, rest = text[: place.start()], place.group(), text[place.end() :]
    if not CONTEXT_TOKENS[0] <= _count(tokenizer, prefix) <= CONTEXT_TOKENS[1] or _count(tokenizer, target) != 1:
        return None
    right = tokenizer.encode(rest, add_special_tokens=False)
    if len(right.ids) < SUFFIX_TOKENS:
        return None
    suffix = rest[: right.offsets[SUFFIX_TOKENS - 1][1]]
    whole = tokenizer.encode(prefix + target + suffix, add_special_tokens=False).ids
    return {"prefix": prefix, "target": target, "suffix": suffix} if len(whole) <= 128 else None


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _enough(items: list[dict[str, Any]], number: int, task: str) -> list[dict[str, Any]]:
    if len(items) < number:
        raise DllmSparseError(f"the held-out documents give {len(items)} {task} items, not {number}; hold out more")
    return items


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
