"""Which process does what, and what is said where a launcher started more of them than there are GPUs."""

from __future__ import annotations

import pytest
import torch

from dllm_sparse.evaluation.processes import Processes, join
from dllm_sparse.types import UsageError


def test_a_process_alone_does_every_job() -> None:
    group = Processes.alone()
    assert list(group.mine(3)) == [0, 1, 2]
    assert group.collect([(2, "c"), (0, "a"), (1, "b")]) == ["a", "b", "c"]
    assert join("auto")[1] == "auto"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused_before_they_meet(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 processes were started for 1 GPU\(s\); start 1, or use --device cpu"):
        join(device)
