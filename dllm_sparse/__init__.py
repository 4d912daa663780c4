"""Activation sparsity in diffusion language models: measure it, watch it move, use it.

The public names are imported on first use, so that `import dllm_sparse` and `dllm-sparse --help` never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dllm_sparse.analysis.cett import CettResult, cett_threshold
    from dllm_sparse.analysis.laws import LawFit, fit_activation_law
    from dllm_sparse.analysis.masks import jaccard
    from dllm_sparse.analysis.rank import effective_rank
    from dllm_sparse.evaluation.options import ScoringOptions
    from dllm_sparse.generation import Generation, generate
    from dllm_sparse.models.hf import wrap
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.models.loading import load
    from dllm_sparse.report.cett import CettReport, cett_report
    from dllm_sparse.report.compare import Comparison, compare
    from dllm_sparse.report.critical import CriticalReport, critical_sparsity
    from dllm_sparse.report.drift import drift_report
    from dllm_sparse.report.laws import LawsReport, activation_laws
    from dllm_sparse.report.layers import LayerReport, layer_report
    from dllm_sparse.samplers.config import SamplerConfig
    from dllm_sparse.samplers.likelihood import log_likelihood
    from dllm_sparse.sparsity.config import SparsityConfig
    from dllm_sparse.sparsity.rules import top_p_mask
    from dllm_sparse.sparsity.sparsifier import Sparsifier, sparsify
    from dllm_sparse.types import (
        BackendUnavailable,
        CheckpointError,
        DllmSparseError,
        ModelNotFound,
        NonFiniteActivations,
        Observer,
        PromptFileError,
        Site,
        Step,
        StepContext,
        StepResult,
        TokenClass,
        UnsupportedArchitecture,
        UsageError,
    )

_HOMES = {
    "Generation": "generation",
    "Comparison": "report.compare",
    "CriticalReport": "report.critical",
    "ScoringOptions": "evaluation.options",
    "compare": "report.compare",
    "CettReport": "report.cett",
    "cett_report": "report.cett",
    "LawsReport": "report.laws",
    "activation_laws": "report.laws",
    "LayerReport": "report.layers",
    "layer_report": "report.layers",
    "critical_sparsity": "report.critical",
    "drift_report": "report.drift",
    "generate": "generation",
    "CettResult": "analysis.cett",
    "cett_threshold": "analysis.cett",
    "LawFit": "analysis.laws",
    "fit_activation_law": "analysis.laws",
    "jaccard": "analysis.masks",
    "effective_rank": "analysis.rank",
    "LanguageModel": "models.language_model",
    "load": "models.loading",
    "wrap": "models.hf",
    "SamplerConfig": "samplers.config",
    "log_likelihood": "samplers.likelihood",
    "SparsityConfig": "sparsity.config",
    "top_p_mask": "sparsity.rules",
    "Sparsifier": "sparsity.sparsifier",
    "sparsify": "sparsity.sparsifier",
    "Observer": "types",
    "Site": "types",
    "Step": "types",
    "StepContext": "types",
    "StepResult": "types",
    "TokenClass": "types",
    "BackendUnavailable": "types",
    "CheckpointError": "types",
    "DllmSparseError": "types",
    "ModelNotFound": "types",
    "NonFiniteActivations": "types",
    "PromptFileError": "types",
    "UnsupportedArchitecture": "types",
    "UsageError": "types",
}

__all__ = [
    "BackendUnavailable",
    "CettReport",
    "CettResult",
    "CheckpointError",
    "Comparison",
    "CriticalReport",
    "DllmSparseError",
    "Generation",
    "LanguageModel",
    "LawFit",
    "LawsReport",
    "LayerReport",
    "ModelNotFound",
    "NonFiniteActivations",
    "Observer",
    "PromptFileError",
    "SamplerConfig",
    "ScoringOptions",
    "Site",
    "Sparsifier",
    "SparsityConfig",
    "Step",
    "StepContext",
    "StepResult",
    "TokenClass",
    "UnsupportedArchitecture",
    "UsageError",
    "__version__",
    "activation_laws",
    "cett_report",
    "cett_threshold",
    "compare",
    "critical_sparsity",
    "drift_report",
    "effective_rank",
    "fit_activation_law",
    "generate",
    "jaccard",
    "layer_report",
    "load",
    "log_likelihood",
    "sparsify",
    "top_p_mask",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dllm_sparse' has no attribute {name!r}")
    value = getattr(import_module(f"dllm_sparse.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
