"""DATA ONLY: the evaluation protocols of arXiv 2509.00454 and what they found.

Confidence of every number: `code` read in the authors' released code; `official` LLaDA's own scripts and tables;
`quote` a public verbatim transcription of the paper's first version; `note` a third-party summary, not checked against
the paper. Percentages as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from dllm_sparse.types import UsageError

Confidence = Literal["code", "official", "quote", "note"]

PAPER_GRID = (
    0.995, 0.99, 0.985, 0.98, 0.975, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.90,
    0.85, 0.80, 0.75, 0.70, 0.65, 0.60, 0.50, 0.40, 0.30, 0.20, 0.10, 0.00,
)  # fmt: skip
"""The p grid of the autoregressive base models [code]; p = 1.00 is the dense run."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published number in percent and how far it can be trusted."""

    value: float
    confidence: Confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolTask:
    """One task's settings. `gen_length` is also steps and block length."""

    name: str
    shots: int | None = None
    metric: str | None = None
    mc_num: int | None = None
    mc_batch: int | None = None
    cfg_scale: float = 0.0
    gen_length: int | None = None
    dense: Published | None = None
    intermediate: Published | None = None
    all_inputs: Published | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A published evaluation: its model, tasks, and average critical sparsities."""

    name: str
    model: str
    tasks: tuple[ProtocolTask, ...]
    average: Mapping[str, Published] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready published figures, for results that are compared with them."""
        return {
            "name": self.name,
            "model": self.model,
            "note": self.note,
            "average": {site: _plain(number) for site, number in self.average.items()},
            "tasks": {
                task.name: {
                    key: _plain(number)
                    for key in ("dense", "intermediate", "all_inputs")
                    if (number := getattr(task, key)) is not None
                }
                for task in self.tasks
            },
        }

    def selected(self, names: Sequence[str]) -> list[ProtocolTask]:
        """Its tasks of these names in their order, all without a name; raises UsageError for one it has not."""
        known = {task.name: task for task in self.tasks}
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"protocol {self.name} has no task {unknown[0]!r}; it has {', '.join(known)}")
        return [known[name] for name in names] if names else list(self.tasks)


def _plain(number: Published) -> dict[str, Any]:
    return {"percent": number.value, "confidence": number.confidence}


def _likelihood(name: str, shots: int, cfg: float, mc: int, batch: int, **more: Any) -> ProtocolTask:
    return ProtocolTask(name=name, shots=shots, metric="acc", cfg_scale=cfg, mc_num=mc, mc_batch=batch, **more)


def _official(value: float) -> Published:
    return Published(value, "official")


def _note(value: float) -> Published:
    return Published(value, "note")


PAPER_LLADA = Protocol(
    name="paper-llada",
    model="llada-8b-base",
    note="Dense scores: LLaDA's EVAL.md with CFG where the task uses it. The published sparsities come from masks over "
    "whole sequences, a gate projection left dense and an unweighted mean over hooks; see --as-published.",
    average={"intermediate": _note(68.13), "all_inputs": _note(56.79)},
    tasks=(
        ProtocolTask(
            name="humaneval", gen_length=1024, dense=_official(35.4),
            intermediate=_note(81.25), all_inputs=_note(77.89),
        ),
        ProtocolTask(
            name="mbpp", gen_length=1024, dense=_official(40.0),
            intermediate=_note(66.67), all_inputs=_note(59.18),
        ),
        _likelihood("arc_challenge", 0, 0.5, 128, 8, dense=_official(47.9)),
        _likelihood(
            "hellaswag", 0, 0.5, 128, 8, dense=_official(72.5),
            intermediate=_note(71.21), all_inputs=_note(67.92),
        ),
        _likelihood("piqa", 0, 0.5, 128, 8, dense=_official(74.4)),
        _likelihood("gpqa_main_n_shot", 5, 0.5, 128, 8, dense=_official(26.1)),
        _likelihood("winogrande", 5, 0.0, 128, 8, dense=_official(74.8)),
        _likelihood(
            "mmlu", 5, 0.0, 1, 1, dense=_official(65.9), intermediate=_note(69.46), all_inputs=_note(62.72)
        ),
        _likelihood("cmmlu", 5, 0.0, 1, 1, dense=_official(69.9)),
        _likelihood("ceval-valid", 5, 0.0, 1, 1, dense=_official(70.5)),
    ),
)  # fmt: skip

PAPER_AR = Protocol(
    name="paper-ar",
    model="qwen2.5-7b",
    note="Zero-shot, accuracy (not length-normalised), bf16. Averages are those of Qwen2.5-7B, pretrained; the "
    "released code names the nine tasks, the paper's first version none.",
    average={
        "intermediate": Published(60.98, "quote"),
        "input": Published(47.89, "quote"),
        "gate": Published(37.25, "quote"),
        "up": Published(43.05, "quote"),
    },
    tasks=(
        *(
            ProtocolTask(name=name, metric="acc")
            for name in ("arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "piqa", "sciq")
        ),
        ProtocolTask(name="lambada_standard", metric="acc"),
        ProtocolTask(name="triviaqa", metric="exact_match", gen_length=1024),
    ),
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({"paper-llada": PAPER_LLADA, "paper-ar": PAPER_AR})


def protocol(name: str) -> Protocol:
    """A protocol by name; raises UsageError for unknown ones."""
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
