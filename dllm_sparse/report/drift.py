"""`drift_report`: measures how active sets move while a model decodes, and writes it for people and for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.analysis.prompts import DEFAULT_COUNT, bundled_prompts
from dllm_sparse.fields import plain_arguments
from dllm_sparse.files import write_text
from dllm_sparse.report.drift_page import drift_page
from dllm_sparse.report.result_folder import check_results
from dllm_sparse.report.schema import DRIFT_SCHEMA, DriftReport, ReuseValues
from dllm_sparse.report.steps_csv import write_steps
from dllm_sparse.report.summary import QUESTIONS, summarise
from dllm_sparse.types import UsageError

if TYPE_CHECKING:
    from dllm_sparse.analysis.recorded_batches import RecordedBatches
    from dllm_sparse.analysis.recording import Prompts
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.sparsity.config import SparsityConfig
    from dllm_sparse.types import Observers

FILES = ("report.html", "report.json", "steps.csv", "similarity.png", "layers.png", "unions.png")
"""What a report's folder may hold."""


@plain_arguments
def drift_report(
    lm: LanguageModel,
    prompts: str | Prompts | None = None,
    sampler: SamplerConfig | None = None,
    sparsity: SparsityConfig | None = None,
    out: str | Path | None = None,
    *,
    apply: bool = True,
    batch_size: int = 8,
    chat: bool = False,
    reuse: int = 0,
    snapshot_every: int = 0,
    deltas: Sequence[int] = (),
    observers: Observers = (),
    say: Callable[[str], None] = lambda _: None,
) -> DriftReport:
    """Decodes the prompts under top-p masks, records how the masks move, and returns the report.

    With `apply=False` the model decodes dense and only the masks it would have got are recorded: how far the masks
    move by themselves, without what masking does to the values.

    `prompts` are texts (or one), or rows of token ids for a model without a tokenizer; None takes bundled ones. A scope
    other than "token" is reported beside the per-token rule at the same p. `reuse=K` also measures reuse across steps:
    masks refreshed every 1, 2, 4, .. K steps, and whole FFN outputs kept. `snapshot_every=k` with `deltas` compares
    the masks of every k-th step with those `delta` steps later.

    With `out`, the folder gets report.json, steps.csv, report.html and, if matplotlib is there, PNG pictures. Until
    then it keeps every batch recorded so far: the same call resumes after whatever ended it, and `say` is told so.
    Interrupted by Ctrl-C, it reports and writes what is complete, then raises KeyboardInterrupt.
    Raises UsageError for impossible options, NonFiniteActivations for NaN or Inf.
    """
    from dllm_sparse.analysis.recording import checked
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.samplers.loops import fitted
    from dllm_sparse.sparsity.checks import check_masks
    from dllm_sparse.sparsity.config import SparsityConfig

    started = time.perf_counter()
    texts = checked(bundled_prompts(DEFAULT_COUNT) if prompts is None else prompts)
    sampler, sparsity = fitted(lm, sampler or SamplerConfig()), sparsity or SparsityConfig()
    check_masks(lm, _rules(sparsity))
    if reuse and lm.config.experts:
        raise UsageError(f"{lm.name} has experts, which see other tokens at every step: reuse is for dense FFNs")
    options = {
        "apply": apply,
        "batch_size": batch_size,
        "chat": chat,
        "snapshot_every": snapshot_every,
        "deltas": tuple(deltas),
    }
    config = options | {"deltas": list(deltas), "reuse": reuse, "sampler": sampler.to_dict()}
    report = _empty_report(lm, config)
    check_results(out, "report.json")
    kept = None if out is None else _kept(lm, texts, sampler, options, Path(out))
    _measure(report, lm, texts, sampler, sparsity, options, observers, kept, say)
    if reuse and report["complete"]:
        try:
            report["reuse"] = _reuse(lm, texts, sampler, sparsity, reuse, batch_size, chat, observers)
        except KeyboardInterrupt:
            report["complete"] = False
    report["summary"] = summarise(report)
    report["seconds"] = round(time.perf_counter() - started, 2)
    if out is not None:
        write_report(report, Path(out))
    if not report["complete"]:
        raise KeyboardInterrupt
    if kept is not None:
        for rule in _rules(sparsity):
            kept(rule).clear()
    return report


def write_report(report: DriftReport, folder: Path) -> list[Path]:
    """Writes report.json, steps.csv, report.html and the PNGs, each atomically; returns their paths."""
    from dllm_sparse.report.drift_plots import write_plots

    compact = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return [
        write_text(folder / "report.json", compact + "\n"),
        write_steps(folder / "steps.csv", report),
        write_text(folder / "report.html", drift_page(report)),
        *write_plots(folder, report),
    ]


def _measure(
    report: DriftReport,
    lm: LanguageModel,
    prompts: Prompts,
    sampler: SamplerConfig,
    sparsity: SparsityConfig,
    options: dict[str, Any],
    observers: Observers,
    kept: Callable[[SparsityConfig], RecordedBatches] | None,
    say: Callable[[str], None],
) -> None:
    """Records every rule; an interruption ends with what is complete."""
    from dllm_sparse.analysis.recording import record
    from dllm_sparse.report.drift_values import prompt_text, variant_values

    for rule in _rules(sparsity):
        try:
            store = kept(rule) if kept else None
            recording = record(lm, prompts, sampler, rule, **options, observers=observers, kept=store)
        except KeyboardInterrupt:
            if not report["variants"]:
                raise
            report["complete"] = False
            return
        if store and recording.resumed:
            say(f"{recording.resumed} batches of {options['batch_size']} prompts taken from {store.folder}")
        report["variants"].append(variant_values(lm, rule, recording, prompts))
        report["prompts"] = [prompt_text(lm, prompt) for prompt in prompts[: len(recording.ids)]]
        report["complete"] = recording.complete
        if not recording.complete:
            return


def _rules(sparsity: SparsityConfig) -> list[SparsityConfig]:
    """The rule asked for, and the per-token one beside it."""
    return [sparsity] if sparsity.scope == "token" else [replace(sparsity, scope="token"), sparsity]


def _kept(
    lm: LanguageModel, prompts: Prompts, sampler: SamplerConfig, options: dict[str, Any], out: Path
) -> Callable[[SparsityConfig], RecordedBatches]:
    """Where the batches of each rule are kept: under all that a recording depends on."""
    from dllm_sparse.analysis.recorded_batches import RecordedBatches
    from dllm_sparse.evaluation.fingerprints import code_fingerprint, key_of, model_fingerprint, versions

    identity = {
        "model": model_fingerprint(lm),
        "prompts": [prompt if isinstance(prompt, str) else list(map(int, prompt)) for prompt in prompts],
        "sampler": sampler.to_dict(),
        "options": options,
        "code_sha256": code_fingerprint(),
        "versions": versions(),
    }
    return lambda rule: RecordedBatches(out / "batches", key_of({**identity, "sparsity": rule.to_dict()}))


def _reuse(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: SamplerConfig,
    sparsity: SparsityConfig,
    longest: int,
    batch_size: int,
    chat: bool,
    observers: Observers,
) -> list[ReuseValues]:
    from dllm_sparse.analysis.recording import batches
    from dllm_sparse.analysis.reuse import measure_reuse
    from dllm_sparse.report.drift_values import reuse_values

    refresh = [1 << power for power in range(longest.bit_length())]
    found = batches(lm, prompts, batch_size, chat=chat)
    rows = measure_reuse(lm, list(found), sampler, sparsity, refresh, observers=observers)
    return [reuse_values(row) for row in rows]


def _empty_report(lm: LanguageModel, config: dict[str, Any]) -> DriftReport:
    from dllm_sparse.evaluation.fingerprints import git_revision, versions

    return {
        "schema": DRIFT_SCHEMA,
        "question": QUESTIONS[lm.kind],
        "summary": [],
        "model": {
            "name": lm.name,
            "kind": lm.kind,
            "revision": lm.revision,
            "parameters": lm.config.parameters,
            "layers": lm.config.layers,
            "width": lm.config.width,
            "ffn_width": lm.config.ffn_width,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "experts": lm.config.experts,
        },
        "config": config,
        "prompts": [],
        "complete": True,
        "variants": [],
        "reuse": [],
        "versions": versions(),
        "git_revision": git_revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
    }
