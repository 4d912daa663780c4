"""Checks of the bundled models: their files, their logits, and what must not change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import torch

from dllm_sparse.doctor.verdicts import Wrong, within
from dllm_sparse.generation import generate
from dllm_sparse.models import resolve
from dllm_sparse.models.checksums import check_files
from dllm_sparse.models.families import BUNDLED
from dllm_sparse.models.loading import load
from dllm_sparse.models.recorded import SUMS
from dllm_sparse.samplers.config import Execution, SamplerConfig
from dllm_sparse.sparsity.config import Sites, SparsityConfig
from dllm_sparse.sparsity.sparsifier import sparsify

GOLDEN = Path(__file__).parent / "golden.json"
_LOGIT_BOUND = 1e-3
"""fp32 on a CPU is within 3e-5 of the fp64 values, which reach 20; TF32 or a wrong weight are far outside."""
_SPARSITY = SparsityConfig(p=0.8)
_PROMPT = ((3, 1205, 731, 402),)


def bundled_files(device: torch.device) -> str:
    """Every file of the bundled models against the SHA-256 it was packaged with."""
    checked = [check_files(resolve.BUNDLED_FOLDER / name) for name in BUNDLED]
    if unknown := [file for found in checked for file in found.unknown]:
        raise Wrong(f"{unknown[0]} has no line in {SUMS}; reinstall the package")
    return f"{sum(len(found.same) for found in checked)} files have the SHA-256 they were packaged with"


def golden_logits(device: torch.device) -> str:
    """Logits of both bundled models in fp32 against fp64 values of transformers' own classes."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    worst = 0.0
    for name, expected in golden.items():
        logits = load(name, device=device, dtype="float32").logits(torch.tensor([expected["ids"]]))[0].double().cpu()
        rows = logits[torch.tensor(expected["positions"])]
        found = rows.gather(-1, torch.tensor(expected["tokens"]))
        differences = (
            found - torch.tensor(expected["logits"], dtype=torch.float64),
            rows.logsumexp(-1) - torch.tensor(expected["log_sum_exp"], dtype=torch.float64),
        )
        worst = max(worst, *(float(difference.abs().nan_to_num(torch.inf).max()) for difference in differences))
    return within("largest error in fp32", worst, _LOGIT_BOUND)


def identity(device: torch.device) -> str:
    """p=1 at every site against the dense model, bit by bit."""
    for name in BUNDLED:
        lm = load(name, device=device, dtype="float32")
        ids = torch.arange(3, 27)[None]
        dense = lm.logits(ids)
        for sites in get_args(Sites):
            with sparsify(lm, SparsityConfig(p=1.0, sites=sites)):
                same = torch.equal(lm.logits(ids), dense)
            if not same:
                raise Wrong(f"{name} at {sites}: p=1 changes the logits")
    return f"bitwise, both models, {len(get_args(Sites))} choices of sites"


def captured_steps(device: torch.device) -> str:
    """Steps as graphs (on a CPU the same bodies, uncaptured) against the plain loop: the same tokens."""
    for name in BUNDLED:
        for sparsity in (None, _SPARSITY):
            plain, graphed = (_tokens(name, device, execution, sparsity) for execution in ("eager", "graph"))
            if not torch.equal(plain, graphed):
                raise Wrong(f"{name}: other tokens than the plain loop's ({'dense' if sparsity is None else 'p=0.8'})")
    return "the plain loop's tokens, dense and p=0.8" + (", as CUDA graphs" if device.type == "cuda" else "")


def determinism(device: torch.device) -> str:
    """The same generation twice, masked at every step, each from a model loaded anew."""
    for name in BUNDLED:
        first, second = (_tokens(name, device, "auto", _SPARSITY) for _ in range(2))
        if not torch.equal(first, second):
            raise Wrong(f"{name}: two runs of one seed wrote different tokens")
    return "two runs of one seed, the same tokens"


def _tokens(name: str, device: torch.device, execution: Execution, sparsity: SparsityConfig | None) -> torch.Tensor:
    lm = load(name, device=device, dtype="float32")
    sampler = SamplerConfig(gen_length=8, block_length=4, execution=execution)
    return generate(lm, prompt_ids=_PROMPT, sampler=sampler, sparsity=sparsity).ids
