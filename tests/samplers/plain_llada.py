"""LLaDA's sampler restated without short cuts, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.samplers.schedule import transfer_counts
from tests.samplers.tiny import EOS, EOT, MASK


def plain_llada(lm: ds.LanguageModel, prompt: Tensor, mask: Tensor, config: ds.SamplerConfig) -> tuple[Tensor, Tensor]:
    """LLaDA's sampler as its paper and code state it: whole sequences, whole softmaxes, no short cuts.

    Returns ids [B, L] and the step that committed each generated position.
    """
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.cat((prompt, torch.full((len(prompt), config.gen_length), MASK)), dim=1)
    mask = torch.cat((mask, torch.ones(len(prompt), config.gen_length, dtype=torch.int64)), dim=1)
    given_at_start = x != MASK
    when = torch.full_like(x, -1)
    for block in range(config.blocks):
        end = prompt.shape[1] + (block + 1) * config.block_length
        inside = x[:, end - config.block_length : end] == MASK
        quotas = [transfer_counts(int(row.sum()), config.steps_per_block) for row in inside]
        for step in range(config.steps_per_block):
            masked = x == MASK
            logits = lm.logits(x, mask)
            if config.cfg_scale > 0:
                free = lm.logits(x.masked_fill(given_at_start, MASK), mask)
                logits = free + (config.cfg_scale + 1) * (logits - free)
            if config.logits_eos_inf:
                logits[..., EOS] = -torch.inf
            noisy = logits
            if config.temperature > 0:
                uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
                noisy = logits.double().exp() / (-uniform.log()) ** config.temperature
            tokens = noisy.argmax(-1)
            if config.confidence_eos_eot_inf:
                logits[..., EOT] = -torch.inf
                if config.temperature == 0:
                    logits[..., EOS] = -torch.inf
            confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
            if config.remasking == "random":
                confidence = torch.rand(x.shape, generator=generator)
            confidence[:, end:] = -torch.inf
            confidence[~masked] = -torch.inf
            for row, quota in enumerate(quotas):
                chosen = confidence[row].topk(quota[step]).indices
                x[row, chosen] = tokens[row, chosen]
                when[row, chosen] = block * config.steps_per_block + step
    return x, when[:, prompt.shape[1] :]
