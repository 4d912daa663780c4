"""What the tests of captured steps share: devices, prompts, one decoding by the plain path and as graphs."""

from __future__ import annotations

import pytest
import torch

import dllm_sparse as ds

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]

PROMPTS = (["Once upon a time"], ["Once upon a time, there", "A dog", "The king went to the"])


def both(lm: ds.LanguageModel, prompts: list[str], **options: object) -> tuple[ds.Generation, ds.Generation]:
    plain, graphed = (
        ds.generate(lm, prompts, sampler=ds.SamplerConfig(execution=name, **options)) for name in ("eager", "graph")
    )
    return plain, graphed
