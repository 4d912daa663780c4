"""A toy recipe over real text: the sentences of the bundled infill task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dllm_sparse.evaluation
from dllm_sparse.training.data import Prepared, load_prepared, prepare
from dllm_sparse.training.recipe import Recipe, load_recipe
from tests.training.toy import DOCUMENTS, SKILLS, STREAM, toy_recipe

ITEMS = Path(dllm_sparse.evaluation.__file__).parent / "tasks" / "bundled" / "data" / "infill.jsonl"
TOY = toy_recipe(f"{DOCUMENTS}prefix_share = 0.5\n", STREAM, SKILLS, steps=40, checkpoint_every=20, evaluate_every=20)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 short documents as JSON lines."""
    items = [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]
    texts = [f"{item['prefix']} {item['target']}{item['suffix']}." for item in items]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy recipe as a file."""
    path = tmp_path_factory.mktemp("recipe") / "toy.toml"
    path.write_text(TOY, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recipe(recipe_file: Path) -> Recipe:
    """The toy recipe."""
    return load_recipe(recipe_file)


@pytest.fixture(scope="session")
def data_folder(corpus_file: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared corpus."""
    folder = tmp_path_factory.mktemp("data")
    prepare(corpus_file, recipe, folder)
    return folder


@pytest.fixture(scope="session")
def prepared(data_folder: Path) -> Prepared:
    """The prepared corpus, read back."""
    return load_prepared(data_folder)
