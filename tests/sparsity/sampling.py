"""A left-padded batch and a short generation of it, for tests of the sparsifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import dllm_sparse as ds
from tests.helpers import left_padded, random_ids

SITES = ("input", "up", "gate", "intermediate", "all_inputs", "all_linear")
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4, steps=4)
PROMPT, MASK = left_padded([random_ids(1, 5, seed=1)[0], random_ids(1, 3, seed=2)[0]])


def decode(lm: ds.LanguageModel, config: ds.SparsityConfig | None, observers: Any = ()) -> Tensor:
    return ds.generate(
        lm, prompt_ids=PROMPT, attention_mask=MASK, sampler=SAMPLER, sparsity=config, observers=observers
    ).ids
