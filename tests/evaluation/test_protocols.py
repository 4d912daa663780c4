"""Published protocols: complete, tagged, and honest about missing data."""

from __future__ import annotations

import pytest

from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.protocols import PAPER_GRID, PROTOCOLS, protocol
from dllm_sparse.evaluation.tasks_loading import TaskDataMissing
from dllm_sparse.report.workload import Workload, protocol_settings
from dllm_sparse.types import UsageError


def test_tasks_and_grid_are_those_of_the_paper() -> None:
    assert len(PROTOCOLS["paper-llada"].tasks) == 10
    assert len(PROTOCOLS["paper-ar"].tasks) == 9
    assert len(PAPER_GRID) == 25  # and the dense run
    assert sorted(PAPER_GRID, reverse=True) == list(PAPER_GRID)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_published_number_says_how_far_it_can_be_trusted(name: str) -> None:
    value = protocol(name).to_dict()
    numbers = [*value["average"].values(), *(n for task in value["tasks"].values() for n in task.values())]
    assert numbers
    for number in numbers:
        assert 0 < number["percent"] < 100
        assert number["confidence"] in ("code", "official", "quote", "note")


def test_settings_follow_the_protocol() -> None:
    tasks = {task.name: task for task in protocol("paper-llada").tasks}
    hellaswag = protocol_settings(tasks["hellaswag"], ScoringOptions()).scoring
    assert (hellaswag.mc_num, hellaswag.group, hellaswag.cfg_scale) == (128, 8, 0.5)
    mmlu = protocol_settings(tasks["mmlu"], ScoringOptions()).scoring
    assert (mmlu.mc_num, mmlu.cfg_scale) == (1, 0.0)
    sampler = protocol_settings(tasks["humaneval"], ScoringOptions()).sampler
    assert sampler is not None
    assert (sampler.gen_length, sampler.steps, sampler.block_length) == (1024, 1024, 1024)


def test_a_selection_must_be_part_of_the_protocol() -> None:
    assert [task.name for task in protocol("paper-llada").selected(["piqa"])] == ["piqa"]
    assert len(protocol("paper-llada").selected([])) == 10
    with pytest.raises(UsageError, match="has no task 'boolq'"):
        protocol("paper-llada").selected(["boolq"])


@pytest.mark.slow
def test_missing_data_are_listed_all_at_once() -> None:
    """Slow: lm-eval's index of its own tasks is read."""
    with pytest.raises(TaskDataMissing, match=r"(?s)arc_easy.*sciq.*Needed: the hub"):
        Workload.load([], published="paper-ar")
