"""The names, arguments and defaults a user may rely on."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import pytest

import dllm_sparse as ds
from tests.helpers import tiny_lm

REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "load": {"name": REQUIRED, "device": "auto", "dtype": "auto", "revision": None},
    "generate": {
        "lm": REQUIRED,
        "prompts": None,
        "prompt_ids": None,
        "attention_mask": None,
        "sampler": None,
        "sparsity": None,
        "observers": (),
    },
    "log_likelihood": {
        "lm": REQUIRED,
        "prompt_ids": REQUIRED,
        "target_ids": REQUIRED,
        "mc_num": 128,
        "batch_size": 16,
        "cfg_scale": 0.0,
        "seed": 0,
    },
    "sparsify": {"lm": REQUIRED, "config": REQUIRED, "observers": ()},
    "drift_report": {"lm": REQUIRED, "prompts": None, "sampler": None, "sparsity": None, "out": None},
    "critical_sparsity": {
        "lm": REQUIRED,
        "tasks": ("tiny-cloze",),
        "sites": "all_inputs",
        "grid": None,
        "retain": 0.99,
        "limit": None,
        "out": None,
    },
    "compare": {"diffusion": None, "autoregressive": None, "retain": 0.99, "out": None},
    "top_p_mask": {"v": REQUIRED, "p": REQUIRED, "ties": "keep"},
    "jaccard": {"mask_a": REQUIRED, "mask_b": REQUIRED, "average": "micro"},
    "effective_rank": {"x": REQUIRED, "normalised": False},
    "cett_threshold": {
        "gate_weight": REQUIRED,
        "up_weight": REQUIRED,
        "down_weight": REQUIRED,
        "x": REQUIRED,
        "cett": 0.2,
        "activation": "silu",
    },
    "fit_activation_law": {"tokens_billions": REQUIRED, "activation_ratio": REQUIRED, "form": "silu"},
}
SAMPLER = {
    "gen_length": 128,
    "steps": None,
    "block_length": 32,
    "temperature": 0.0,
    "cfg_scale": 0.0,
    "remasking": "low_confidence",
    "cache": "none",
    "threshold": None,
    "factor": None,
    "logits_eos_inf": False,
    "confidence_eos_eot_inf": False,
    "confidence_dtype": "model",
    "eos_token_id": None,
    "eot_token_id": None,
    "stop_at_eos": False,
    "seed": 0,
}
SPARSITY = {
    "p": 0.8,
    "rule": "top_p",
    "sites": "all_inputs",
    "scope": "token",
    "group_size": 32,
    "score": "magnitude",
    "schedule": None,
    "refresh_every": 1,
    "backend": "auto",
}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_functions(name: str) -> None:
    found = {key: parameter.default for key, parameter in inspect.signature(getattr(ds, name)).parameters.items()}
    expected = SIGNATURES[name]
    assert {key: found.get(key, "absent") for key in expected} == expected
    if name != "compare":
        assert list(found)[: len(expected)] == list(expected)  # also by position


@pytest.mark.parametrize(("kind", "expected"), [(ds.SamplerConfig, SAMPLER), (ds.SparsityConfig, SPARSITY)])
def test_configurations(kind: Any, expected: dict[str, Any]) -> None:
    values = dataclasses.asdict(kind())
    assert {key: values.get(key, "absent") for key in expected} == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), next(iter(expected)), 1)


def test_every_public_name_is_there_and_listed() -> None:
    assert set(ds.__all__) <= set(dir(ds))
    for name in ds.__all__:
        assert getattr(ds, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ds.nothing  # noqa: B018


def test_models_and_results() -> None:
    lm = tiny_lm()
    for name in ("kind", "config", "tokenizer", "mask_token_id", "logits"):
        assert hasattr(lm, name)
    out = ds.generate(lm, prompt_ids=[[1, 2]], sampler=ds.SamplerConfig(gen_length=4, block_length=4))
    for name in ("texts", "ids", "forward_passes", "tokens_per_second", "sparsity", "to_dict"):
        assert hasattr(out, name)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, dllm_sparse; dllm_sparse.Step, dllm_sparse.SamplerConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
