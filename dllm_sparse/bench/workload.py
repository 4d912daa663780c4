"""What `bench engine` generates, and from which prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.types import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWorkload:
    """What is generated how often: `batch` random prompts of `prompt_length` tokens, after one run to warm up."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    sparsity: SparsityConfig | None = None
    batch: int = 1
    prompt_length: int = 128
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_length", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {name: getattr(self, name) for name in ("batch", "prompt_length", "repeats")}
        sparsity = self.sparsity.to_dict() if self.sparsity is not None else None
        return {**values, "sampler": self.sampler.to_dict(), "sparsity": sparsity}


def random_prompts(lm: LanguageModel, workload: EngineWorkload) -> Tensor:
    """Ids [batch, prompt_length] of ordinary tokens: never a mask, an end or a padding."""
    config = lm.config
    special = {config.mask_token_id, config.bos_token_id, config.eos_token_id, config.eot_token_id}
    special |= {config.pad_token_id, *config.stop_token_ids}
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 1 << 15)) if token not in special])
    generator = torch.Generator().manual_seed(workload.sampler.seed)
    places = torch.randint(len(ordinary), (workload.batch, workload.prompt_length), generator=generator)
    return ordinary[places]
