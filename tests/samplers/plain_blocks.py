"""Block diffusion restated without a cache, row by row: LLaDA2's and SDAR's procedure, slow and obvious on purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.schedule import transfer_counts


def recompute(
    logits: Callable[[Tensor], Tensor], prompt: Tensor, config: SamplerConfig, size: int, mask: int, eos: int
) -> tuple[Tensor, int]:
    """Every step recomputes the whole prefix, as LLaDA2's own `generate` does; greedy, quota or threshold, editing.

    `logits` takes ids [L] to [L, V]. Returns the ids [P + gen_length] and the forwards a cache of finished blocks
    needs: one for whole blocks of the prompt, one a step, one for every finished block but the last whose tokens its
    last forward did not see.
    """
    whole = -(-(len(prompt) + config.gen_length) // size)
    x = torch.cat((prompt, torch.full((whole * size - len(prompt),), mask)))
    per_block = config.steps // -(-config.gen_length // size) if config.steps else size
    quotas = [max(count, config.minimal_topk) for count in transfer_counts(size, per_block) if count]
    forwards = int(len(prompt) >= size)
    for block in range(len(prompt) // size, whole):
        begin, end = block * size, (block + 1) * size
        step = posts = 0
        changed = True
        while True:
            masked = x[begin:end] == mask
            if not masked.any():
                posts += 1
                if config.editing_threshold is None or posts > config.max_post_steps:
                    break
            odds = logits(x[:end])[begin:end].softmax(-1)
            forwards += 1
            sure, tokens = odds.max(-1)
            write = torch.zeros_like(masked)
            if masked.any():
                confidence = sure.masked_fill(~masked, -1.0)
                high = confidence > (2.0 if config.threshold is None else config.threshold)
                if high.sum() >= quotas[step]:
                    write = high
                else:
                    write[confidence.topk(min(quotas[step], int(masked.sum()))).indices] = True
                step += 1
            edits = torch.zeros_like(masked)
            if config.editing_threshold is not None:
                ours = torch.arange(begin, end) >= len(prompt)
                edits = ours & ~masked & (sure > config.editing_threshold) & (tokens != x[begin:end])
            x[begin:end] = torch.where(write | edits, tokens, x[begin:end])
            changed = bool((write | edits).any())
            if not masked.any() and not edits.any():
                break
        if config.stop_at_eos and bool((x[len(prompt) :] == eos).any()):
            x[end:] = eos
            break
        forwards += int(changed and block + 1 < whole)
    return x[: len(prompt) + config.gen_length], forwards
