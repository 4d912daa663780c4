"""Prompts for `helpers.tiny_lm`, its special tokens, and one call that decodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import dllm_sparse as ds
from tests.helpers import random_ids

MASK, EOS, EOT = 39, 38, 37
LENGTHS = (7, 4, 1)
PROMPTS = [random_ids(1, length, seed=length)[0] for length in LENGTHS]


def run(lm: ds.LanguageModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> ds.Generation:
    """Decodes under the sampler's `options`; `observers` and `sparsity` may be among them."""
    observers, sparsity = options.pop("observers", ()), options.pop("sparsity", None)
    sampler = ds.SamplerConfig(**options)
    return ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, sparsity=sparsity, observers=observers)
