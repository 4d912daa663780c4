"""What the tests of captured steps share: devices, prompts, one decoding by the plain path and as graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def neither_growing_nor_waiting() -> Iterator[None]:
    """Fails where what runs inside waits for the GPU or leaves more of its memory taken or reserved."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
