"""From a corpus to rows of tokens: prepared once, then every micro-batch is a pure function of (seed, step).

The twins read the same prepared folder, so they see the same rows in the same order; a resumed run needs no
iterator state. Shapes: B rows, L positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer

from dllm_sparse.files import file_sha256, read_sealed, write_bytes, write_sealed, write_text
from dllm_sparse.training import corpus, skills
from dllm_sparse.training.recipe import Mix, Recipe
from dllm_sparse.training.tokenizer import special_ids, train_tokenizer
from dllm_sparse.types import DamagedFile, DllmSparseError, UsageError

_META, _WHAT = "meta.json", "a description of prepared data"
SOURCES = ("train", "held_out", "skills", "held_out_skills")


class Rows(NamedTuple):
    """A micro-batch: ids [B, L] and what each position counts in the loss, [B, L]; 0 marks a given prompt."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


class Documents(NamedTuple):
    """Token documents end to end: BOS text EOS BOS text EOS ...; `prompts` counts the given tokens of each."""

    tokens: NDArray[np.uint16]
    starts: NDArray[np.int64]
    prompts: NDArray[np.int64]

    def bounds(self, picks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start and length, BOS and EOS included, of the documents numbered `picks`."""
        starts = self.starts[picks]
        following = np.minimum(picks + 1, len(self.starts) - 1)
        ends = np.where(picks + 1 < len(self.starts), self.starts[following], len(self.tokens))
        return starts, ends - starts


class Prepared(NamedTuple):
    """A prepared folder: the tokenizer and the four sets of documents named in SOURCES."""

    tokenizer: Tokenizer
    special: dict[str, int]  # ids of bos, eos, pad and mask
    sets: dict[str, Documents]


def prepare(path: Path, recipe: Recipe, folder: Path, report: Callable[[str], None] = lambda _: None) -> Prepared:
    """Cleans, splits and tokenises a corpus into `folder`; meta.json is written last and marks it complete."""
    settings = recipe.data
    report("reading the corpus")
    texts = list(corpus.wanted_texts(path, settings.min_distinct, settings.min_characters))
    held_out = [text for text in texts if corpus.is_held_out(text, settings.held_out_per_mille)]
    train = [text for text in texts if not corpus.is_held_out(text, settings.held_out_per_mille)]
    if not train or not held_out:
        raise DllmSparseError(f"{path}: {len(train)} documents to train on and {len(held_out)} held out; need both")
    report(f"training the tokenizer on {len(train)} documents")
    sample = itertools.islice(
        skills.problems(recipe.seed, held_out=False, per_mille=settings.skill_held_out_per_mille), 2000
    )
    tokenizer = train_tokenizer([*train, *(p.prompt + p.answer for p in sample)], settings.vocab_size)
    report("tokenising")
    sets = {"train": _encode(tokenizer, train), "held_out": _encode(tokenizer, held_out)}
    sets |= {name: _encode_skills(tokenizer, recipe, name == "held_out_skills") for name in SOURCES[2:]}
    files = [write_text(folder / "tokenizer.json", tokenizer.to_str())]
    tensors = {f"{name}.{key}": value for name, part in sets.items() for key, value in part._asdict().items()}
    files.append(write_bytes(folder / "tokens.safetensors", save(tensors)))
    counts = {name: {"documents": len(part.starts), "tokens": len(part.tokens)} for name, part in sets.items()}
    sums = {file.name: file_sha256(file) for file in files}
    write_sealed(folder / _META, {"digest": recipe.digest("data", "seed"), "counts": counts, "sha256": sums})
    return Prepared(tokenizer, special_ids(tokenizer), sets)


def prepared_for(recipe: Recipe, folder: Path) -> bool:
    """Whether `folder` is complete; raises UsageError if other data settings or another seed made it."""
    meta = folder / _META
    if not meta.exists():
        return False
    if read_sealed(meta, _WHAT)["digest"] != recipe.digest("data", "seed"):
        raise UsageError(f"{folder} was prepared with another [data] section or seed; give another --data folder")
    return True


def load_prepared(folder: Path) -> Prepared:
    """Reads what `prepare` wrote; raises DamagedFile where a file has changed since."""
    for name, digest in read_sealed(folder / _META, _WHAT)["sha256"].items():
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise DamagedFile(folder, "prepared data", f"{name} is missing, or its checksum is another")
    tensors = load_file(folder / "tokens.safetensors")
    sets = {name: Documents(*(tensors[f"{name}.{key}"] for key in Documents._fields)) for name in SOURCES}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Prepared(tokenizer, special_ids(tokenizer), sets)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Documents:
    """BOS text EOS for each text; only BOS is given."""
    eos = special_ids(tokenizer)["eos"]
    pieces = [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(list(texts))]
    return _pack(pieces, [1] * len(pieces))


def _encode_skills(tokenizer: Tokenizer, recipe: Recipe, held_out: bool) -> Documents:
    """BOS prompt answer EOS; prompt and answer are encoded apart, as a generation meets them."""
    settings = recipe.data
    number = settings.skill_problems if not held_out else max(1, settings.skill_problems // 100)
    stream = skills.problems(recipe.seed, held_out=held_out, per_mille=settings.skill_held_out_per_mille)
    chosen = list(itertools.islice(stream, number))
    prompts = tokenizer.encode_batch([problem.prompt for problem in chosen])
    answers = tokenizer.encode_batch([problem.answer for problem in chosen], add_special_tokens=False)
    eos = special_ids(tokenizer)["eos"]
    pieces = [[*p.ids, *a.ids, eos] for p, a in zip(prompts, answers, strict=True)]
    return _pack(pieces, [len(prompt.ids) for prompt in prompts])


def _pack(pieces: Sequence[Sequence[int]], prompts: Sequence[int]) -> Documents:
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    tokens = np.fromiter(itertools.chain.from_iterable(pieces), np.uint16, int(lengths.sum()))
    return Documents(tokens, np.cumsum(lengths) - lengths, np.array(prompts, np.int64))


@lru_cache(maxsize=32)
def _order(seed: int, entry: int, epoch: int, items: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, entry, epoch)).permutation(items)


def rows_at(documents: Documents, mix: Mix, seed: int, entry: int, step: int, eos: int) -> Rows:
    """The rows of mix entry number `entry` at `step`: each epoch visits every item once, in an order of its own."""
    streamed = mix.source == "stream"
    items = (len(documents.tokens) - 1) // mix.length if streamed else len(documents.starts)
    if items < 1:
        raise DllmSparseError(
            f"{len(documents.tokens)} tokens do not fill one row of {mix.length}; use a shorter length"
        )
    numbers = np.arange(step * mix.rows, (step + 1) * mix.rows)
    picks = np.array([_order(seed, entry, int(n // items), items)[n % items] for n in numbers])
    if streamed:
        shift = np.array(
            [np.random.default_rng((seed, entry, int(n // items), 1)).integers(mix.length) for n in numbers]
        )
        starts = np.minimum(picks * mix.length + shift, len(documents.tokens) - mix.length)
        return _gather(documents.tokens, starts, np.full(mix.rows, mix.length), np.zeros(mix.rows, np.int64), mix, eos)
    return _gather(documents.tokens, *documents.bounds(picks), documents.prompts[picks], mix, eos)


def _gather(
    tokens: NDArray[np.uint16],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    prompts: NDArray[np.int64],
    mix: Mix,
    eos: int,
) -> Rows:
    """Rows of `mix.length` from `starts`, filled with EOS past `lengths`; prompts count 0, filling `fill_weight`."""
    columns = np.arange(mix.length)[None]
    inside = columns < lengths[:, None]
    ids = tokens[np.minimum(starts[:, None] + columns, len(tokens) - 1)].astype(np.int64)
    weights = np.where(inside, 1.0, mix.fill_weight).astype(np.float32)
    weights[columns < prompts[:, None]] = 0.0
    return Rows(np.where(inside, ids, eos), weights)
