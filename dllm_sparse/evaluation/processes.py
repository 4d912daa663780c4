"""Several processes, one result: who does which job, and how everybody gets all answers in job order.

Jobs are dealt round-robin and gathered by number, so any number of processes computes the same jobs with the same
contents, and sums run in the same order. Started with `accelerate launch` (or torchrun); alone, nothing is set up.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dllm_sparse.types import UsageError

T = TypeVar("T")


class Processes:
    """The group this process belongs to. Without torch.distributed it is a group of one."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.world = dist.get_world_size() if joined else 1

    @classmethod
    def alone(cls) -> Processes:
        """A group of one, also inside a larger one."""
        group = cls.__new__(cls)
        group.rank, group.world = 0, 1
        return group

    @property
    def first(self) -> bool:
        """True in the process that writes files and talks to the user."""
        return self.rank == 0

    def mine(self, jobs: int) -> range:
        """Numbers of the jobs this process does."""
        return range(self.rank, jobs, self.world)

    def collect(self, answers: Iterable[tuple[int, T]]) -> list[T]:
        """Everybody's (job number, answer) pairs, as answers in job order, in every process."""
        own = list(answers)
        everyone: list[Any] = [own]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, own)
        return [answer for _, answer in sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0])]

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for everybody."""
        if self.world > 1:
            dist.barrier()


def join(device: str) -> tuple[Processes, str]:
    """Joins the group a launcher announced (WORLD_SIZE), and says which device is this process's own.

    `auto` and `cuda` become this process's GPU when there are several processes; the backend is NCCL on GPUs and Gloo
    on CPUs, chosen by accelerate. Raises UsageError where there are fewer GPUs than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if not on_cpu and here > gpus:
            raise UsageError(f"{here} processes were started for {gpus} GPU(s); start {gpus}, or use --device cpu")
        state = PartialState(cpu=on_cpu)
        if device in ("auto", "cuda"):
            device = str(state.device)
    return Processes(), device


def leave() -> None:
    """Dissolves the group, if there is one, so that the program ends quietly."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
