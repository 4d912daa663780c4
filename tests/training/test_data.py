"""Corpus, split, tokenizer, skills and the order of rows."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.training import corpus, held_out
from dllm_sparse.training.data import Prepared, load_prepared, prepared_for, rows_at
from dllm_sparse.training.examples import draw_example
from dllm_sparse.training.recipe import Mix, Recipe, load_recipe
from dllm_sparse.types import UsageError


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "fine"}\n{"txt": "not"}\n'))
    with pytest.raises(corpus.CorpusError, match=r"corpus\.jsonl\.xz:2: expected one JSON object"):
        list(corpus.read_corpus(path))


def test_a_truncated_archive_is_an_error_not_a_short_corpus(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "fine"}\n' * 500)[:-20])
    with pytest.raises(corpus.CorpusError, match="cannot read"):
        list(corpus.read_corpus(path))


def test_cleaning() -> None:
    assert corpus.clean(' He said "no." Then he ') == 'He said "no."'
    assert corpus.clean("no end") == ""
    assert corpus.distinct_share("a b c d " * 10) < 0.2
    assert corpus.distinct_share("one two three") == 1.0


def test_held_out_documents_are_never_trained_on(prepared: Prepared) -> None:
    train, held = ({tuple(piece) for piece in documents(prepared, name)} for name in ("train", "held_out"))
    assert train
    assert held
    assert not train & held


def documents(prepared: Prepared, name: str) -> list[np.ndarray]:
    part = prepared.sets[name]
    return np.split(part.tokens, part.starts[1:])


def test_held_out_problems_are_never_trained_on(prepared: Prepared) -> None:
    decode = prepared.tokenizer.decode
    train, held = ({decode(piece) for piece in documents(prepared, name)} for name in ("skills", "held_out_skills"))
    assert not train & held
    items = held_out.skill_items(7, 60, 100)
    assert not {item["prompt"] + " " + item["answer"] for item in items} & train


def test_skill_answers() -> None:
    for problem in held_out.skill_items(3, 120, 100):
        given, answer = problem["prompt"].split(": ")[1].removesuffix(" =").split(), problem["answer"].split()
        expected = {
            "copy": lambda g=given: g,
            "reverse": lambda g=given: g[::-1],
            "sort": lambda g=given: sorted(g),
            "add": lambda g=given: [str(int(g[0]) + int(g[2]))],
            "count": lambda g=given: [str(n) for n in range(int(g[0]), int(g[2]) + 1)],
            "largest": lambda g=given: [max(g, key=int)],
        }[problem["skill"]]
        assert answer == expected()


@given(text=st.text(max_size=80))
def test_tokenizer_round_trip(prepared: Prepared, text: str) -> None:
    ids = prepared.tokenizer.encode(text).ids
    assert ids[0] == prepared.special["bos"]
    if not any(special in text for special in ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")):
        assert prepared.tokenizer.decode(ids) == text


def test_digits_are_single_tokens(prepared: Prepared) -> None:
    assert prepared.tokenizer.encode("1984", add_special_tokens=False).tokens == ["1", "9", "8", "4"]


def test_an_epoch_visits_every_document_once(prepared: Prepared, recipe: Recipe) -> None:
    part = prepared.sets["held_out"]
    mix = Mix(source="documents", length=8, rows=len(part.starts))
    first, second = (rows_at(part, mix, recipe.seed, 0, step, prepared.special["eos"]).ids for step in (0, 1))
    whole = sorted(
        piece[:8].tolist() + [prepared.special["eos"]] * (8 - len(piece)) for piece in documents(prepared, "held_out")
    )
    assert sorted(first.tolist()) == sorted(second.tolist()) == whole
    assert first.tolist() != second.tolist()


def test_skill_rows_are_prompt_answer_and_filling(prepared: Prepared) -> None:
    eos, part = prepared.special["eos"], prepared.sets["skills"]
    mix = Mix(source="skills", length=40, rows=16, fill_weight=0.25)
    ids, weights = rows_at(part, mix, 0, 0, 0, eos)
    for row, weight in zip(ids, weights, strict=True):
        text = prepared.tokenizer.decode(row[weight == 0.0])
        assert text.endswith("=")
        assert (row[weight == 0.25] == eos).all()
        assert row[weight == 1.0][-1] == eos


def test_twins_see_the_same_rows(prepared: Prepared, recipe: Recipe) -> None:
    for entry, mix in enumerate(recipe.mix):
        diffusion, causal = (draw_example(recipe, k, prepared, entry, mix, 5) for k in ("diffusion", "autoregressive"))
        assert (diffusion.targets == causal.inputs).all()
        again = draw_example(recipe, "diffusion", prepared, entry, mix, 5)
        assert (again.inputs == diffusion.inputs).all()


def test_prepared_data_of_another_recipe_are_refused(data_folder: Path, recipe: Recipe) -> None:
    assert prepared_for(recipe, data_folder)
    assert load_prepared(data_folder).tokenizer.get_vocab_size() == recipe.data.vocab_size
    with pytest.raises(UsageError, match="another"):
        prepared_for(replace(recipe, seed=8), data_folder)


def test_recipes(tmp_path: Path, recipe_file: Path) -> None:
    shipped = load_recipe("tiny-twins")
    assert shipped.model.ffn_width == 3 * shipped.model.width
    relu = load_recipe(recipe_file, model_activation="relu", model_width=64, steps=10)
    assert (relu.model.activation, relu.model.width, relu.steps, relu.optimiser.warmup_steps) == ("relu", 64, 10, 1)
    bad = tmp_path / "bad.toml"
    bad.write_text(recipe_file.read_text() + "\ntypo = 1\n")
    with pytest.raises(UsageError, match=r"\[\[mix\]\]: unknown key 'typo'"):
        load_recipe(bad)
    with pytest.raises(UsageError, match="tiny-twins"):
        load_recipe("tiny-twinz")


def test_shipped_cloze_items_are_well_formed() -> None:
    folder = Path(held_out.__file__).parent.parent / "evaluation" / "tasks" / "bundled" / "data"
    items = [json.loads(line) for line in (folder / "cloze.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(items) >= 1000
    assert all(len(set(item["choices"])) == 4 and 0 <= item["label"] < 4 for item in items)
    labels = np.bincount([item["label"] for item in items], minlength=4) / len(items)
    assert (np.abs(labels - 0.25) < 0.05).all()
