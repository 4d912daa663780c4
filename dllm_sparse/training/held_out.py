"""Test items from what training never saw: held-out documents and held-out problems.

Writes the data of the bundled tasks; what the tasks measure is said beside them, in `evaluation/tasks`.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dllm_sparse.files import write_text
from dllm_sparse.training import corpus, skills
from dllm_sparse.training.recipe import Recipe
from dllm_sparse.types import DllmSparseError

_RUN = re.compile(r"\S+")
_WORD = re.compile(r" [a-z]{3,}(?=[ ,.])")
CONTEXT_WORDS = (24, 48)  # of a cloze item's context
CLOZE_WORDS = 6  # of each of its continuations
PREFIX_TOKENS = (24, 64)  # to the left of an infill item's gap
SUFFIX_TOKENS = 16  # and to its right


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


class Cut(NamedTuple):
    """A document cut between two words: its number, the text before and the CLOZE_WORDS words behind."""

    document: int
    context: str
    continuation: str

    def key(self, tokenizer: Tokenizer) -> tuple[str, int]:
        """What true and wrong continuations share: the word before the cut, and the length in tokens."""
        return self.context.split()[-1], _count(tokenizer, f" {self.continuation}")


def cloze_items(texts: Sequence[str], tokenizer: Tokenizer, seed: int, number: int) -> list[dict[str, Any]]:
    """The beginning of a document and four runs of words: the true one and three from other documents.

    The wrong ones follow the same word there and have as many tokens, so neither grammar at the cut nor length decides.
    """
    rng = random.Random(seed)
    cuts = [_cuts(number, text) for number, text in enumerate(texts)]
    alike: dict[tuple[str, int], list[Cut]] = defaultdict(list)
    for cut in itertools.chain.from_iterable(cuts):
        alike[cut.key(tokenizer)].append(cut)
    items: list[dict[str, Any]] = []
    for candidates in rng.sample(cuts, len(cuts)):
        item = _cloze_item(candidates, alike, tokenizer, rng)
        if item is not None and len(items) < number:
            items.append(item)
    return _enough(items, number, "cloze")


def _cloze_item(
    candidates: Sequence[Cut], alike: Mapping[tuple[str, int], list[Cut]], tokenizer: Tokenizer, rng: random.Random
) -> dict[str, Any] | None:
    """An item at a random cut of one document, or None where no cut has three rivals."""
    for cut in rng.sample(candidates, len(candidates)):
        # One rival a document, so that three wrong answers are three independent ones.
        rivals = {other.document: other.continuation for other in alike[cut.key(tokenizer)]}
        wrong = sorted({text for number, text in rivals.items() if number != cut.document} - {cut.continuation})
        if len(wrong) >= 3:
            choices = [cut.continuation, *rng.sample(wrong, 3)]
            order = rng.sample(range(4), 4)
            return {"context": cut.context, "choices": [choices[i] for i in order], "label": order.index(0)}
    return None


def _cuts(number: int, text: str) -> list[Cut]:
    """All cuts behind CONTEXT_WORDS words whose continuation stays on the line."""
    words = list(_RUN.finditer(text))
    found = []
    for place in range(CONTEXT_WORDS[0], min(CONTEXT_WORDS[1], len(words) - CLOZE_WORDS) + 1):
        context, end = text[: words[place - 1].end()], words[place + CLOZE_WORDS - 1].end()
        if "\n" not in text[words[place - 1].start() : end]:
            found.append(Cut(number, context, text[words[place].start() : end]))
    return found


def infill_items(texts: Sequence[str], tokenizer: Tokenizer, seed: int, number: int) -> list[dict[str, Any]]:
    """A gap of one token: `prefix` ends before it, `target` is the word behind a space, `suffix` follows."""
    rng = random.Random(seed)
    items: list[dict[str, Any]] = []
    for text in rng.sample(list(texts), len(texts)):
        places = list(_WORD.finditer(text))
        rng.shuffle(places)
        item = next((found for place in places if (found := _gap(text, place, tokenizer)) is not None), None)
        if item is not None:
            items.append(item)
        if len(items) == number:
            break
    return _enough(items, number, "infill")


def _gap(text: str, place: re.Match[str], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The item with this word as its gap, if the word is one token and both sides are long enough."""
    prefix, target, rest = text[: place.start()], place.group(), text[place.end() :]
    if not PREFIX_TOKENS[0] <= _count(tokenizer, prefix) <= PREFIX_TOKENS[1] or _count(tokenizer, target) != 1:
        return None
    right = tokenizer.encode(rest, add_special_tokens=False)
    if len(right.ids) < SUFFIX_TOKENS:
        return None
    suffix = rest[: right.offsets[SUFFIX_TOKENS - 1][1]]
    return {"prefix": prefix, "target": target.strip(), "suffix": suffix}


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _enough(items: list[dict[str, Any]], number: int, task: str) -> list[dict[str, Any]]:
    if len(items) < number:
        raise DllmSparseError(f"the held-out documents give {len(items)} {task} items, not {number}; hold out more")
    return items


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
