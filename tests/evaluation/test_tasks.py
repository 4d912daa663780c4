"""The bundled tasks load through lm-eval without a network and ask what they say they ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.evaluation.infill import infill_hits
from dllm_sparse.evaluation.tasks_loading import BUNDLED_TASKS, load_tasks
from dllm_sparse.types import UsageError

FOLDER = BUNDLED_TASKS / "bundled"
SIZES = {"tiny-cloze": 1000, "tiny-infill": 1000, "tiny-skills": 720}


def items(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", SIZES)
def test_tasks_load_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks([name])
    assert task.items == SIZES[name]
    assert task.chance == (0.25 if name == "tiny-cloze" else 0.0)


def test_lm_eval_finds_the_folder() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(SIZES) <= set(manager.all_tasks)


def test_requests() -> None:
    cloze, infill, skills = load_tasks(["tiny-cloze", "tiny-infill", "tiny-skills"], limit=1)
    first = items("cloze")[0]
    assert [request.arguments for request in cloze.requests] == [(first["context"], f" {c}") for c in first["choices"]]
    first = items("infill")[0]
    assert infill.requests[0].arguments == (first["prefix"], f" {first['target']}")
    assert skills.requests[0].arguments[0] == items("skills")[0]["prompt"]
    answer = items("skills")[0]["answer"]
    assert skills.values([f" {answer}"]).numerator.item() == 1
    assert skills.values([f" {answer} x"]).numerator.item() == 0


def test_infill_targets_are_one_token() -> None:
    tokenizer = ds.load("tiny-diffusion", device="cpu").tokenizer
    assert tokenizer is not None
    for item in items("infill"):
        prefix = tokenizer(item["prefix"])["input_ids"]
        assert len(tokenizer(f"{item['prefix']} {item['target']}")["input_ids"]) == len(prefix) + 1


def test_both_sides_of_a_gap_help() -> None:
    lm = ds.load("tiny-diffusion", device="cpu")
    chosen = items("infill")[:24]
    both, left = infill_hits(lm, chosen), infill_hits(lm, chosen, two_sided=False)
    assert both.sum() > left.sum() > 0
    assert torch.equal(both, torch.cat([infill_hits(lm, [item]) for item in chosen]))
    with pytest.raises(UsageError, match="diffusion models only"):
        infill_hits(ds.load("tiny-ar", device="cpu"), chosen)
