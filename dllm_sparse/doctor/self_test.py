"""The self-test: every check runs the real thing and compares it with something known. Well under a minute in all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from dllm_sparse.doctor import kernel_checks, model_checks
from dllm_sparse.doctor.environment import shortened
from dllm_sparse.doctor.verdicts import NotHere


class Check(NamedTuple):
    """`run` takes a device, returns what it compared, raises NotHere where it cannot run, anything else on failure."""

    name: str
    run: Callable[[torch.device], str]
    once: bool = False


CHECKS = (
    Check("bundled files", model_checks.bundled_files, once=True),
    Check("golden logits", model_checks.golden_logits),
    Check("p=1 is dense", model_checks.identity),
    Check("masks", kernel_checks.masks),
    Check("sparse products", kernel_checks.sparse_products),
    Check("captured steps", model_checks.captured_steps),
    Check("determinism", model_checks.determinism),
    Check("interpreted kernels", kernel_checks.interpreted, once=True),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check found on one device."""

    name: str
    device: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def devices() -> list[torch.device]:
    """The CPU, and every GPU that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def self_test() -> Iterator[Outcome]:
    """Runs every check, those of a device on every device, and yields each outcome when it is known."""
    for device in devices():
        for check in CHECKS:
            if not check.once or device.type == "cpu":
                yield _run(check, device)


def _run(check: Check, device: torch.device) -> Outcome:
    started = time.perf_counter()
    outcome: Literal["passed", "failed", "skipped"] = "passed"
    try:
        detail = check.run(device)
    except NotHere as reason:
        outcome, detail = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 (whatever a broken installation raises is this check's finding)
        outcome, detail = "failed", f"{type(error).__name__}: {error}"
    return Outcome(check.name, str(device), outcome, shortened(detail), time.perf_counter() - started)
