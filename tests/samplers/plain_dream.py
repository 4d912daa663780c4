"""Dream's sampler and Fast-dLLM's cached one for shifted logits restated, slow and obvious on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

import dllm_sparse as ds

MASK = 39
"""The mask token of `tests.helpers.tiny_lm`."""


def shifted(logits: Tensor) -> Tensor:
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


def sample(logits: Tensor, config: ds.SamplerConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and confidences of rows [N, V], token by token."""
    tokens, sure = [], []
    noise = torch.empty(logits.shape).exponential_(generator=generator) if config.temperature > 0 else None
    for number, row in enumerate(logits):
        row = row / config.temperature if config.temperature > 0 else row
        odds = row.softmax(-1)
        if config.top_p is not None:
            kept, mass = [], 0.0
            for token in odds.argsort(descending=True).tolist():
                if mass > config.top_p:
                    break
                kept.append(token)
                mass += float(odds[token])
            row = torch.full_like(row, -torch.inf).index_put((torch.tensor(kept),), row[kept])
        if config.top_k is not None:
            row = row.masked_fill(row < row.sort(descending=True).values[config.top_k - 1], -torch.inf)
        odds = row.softmax(-1)
        token = int((odds if noise is None else odds / noise[number]).argmax())
        best = odds.sort(descending=True).values
        measures = {"topk_margin": best[0] - best[1], "entropy": (odds * (odds + 1e-10).log()).sum()}
        tokens.append(token)
        sure.append(float(measures.get(config.remasking, odds[token])))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(sure)


def plain_dream(lm: ds.LanguageModel, prompt: Tensor, mask: Tensor, config: ds.SamplerConfig) -> Tensor:
    """Dream's sampler as its code states it: the whole canvas at every time, ids [B, L] at the end."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.steps or config.gen_length
    x = torch.cat((prompt, torch.full((len(prompt), config.gen_length), MASK)), dim=1)
    mask = torch.cat((mask, torch.ones(len(prompt), config.gen_length, dtype=torch.int64)), dim=1)
    times = torch.linspace(1, config.eps, steps + 1)
    for index in range(steps):
        share = 1 - times[index + 1] / times[index] if index < steps - 1 else torch.tensor(1.0)
        logits, masked = shifted(lm.logits(x, mask)), x == MASK
        if config.remasking == "origin":
            chosen = masked.clone()
            chosen[masked] = torch.rand(int(masked.sum()), generator=generator) < share
            x[chosen] = sample(logits[chosen], config, generator)[0]
            continue
        tokens, sure = torch.full_like(x, MASK), torch.full(x.shape, -torch.inf)
        tokens[masked], sure[masked] = sample(logits[masked], config, generator)
        count = int(masked.sum() / len(x) * share)
        if config.alg_temp > 0 and count:
            weights = (sure / config.alg_temp).softmax(-1)
            sure = torch.where(masked, weights / torch.empty(x.shape).exponential_(generator=generator), -torch.inf)
        for row in range(len(x)):
            chosen_places = sure[row].topk(count).indices
            x[row, chosen_places] = tokens[row, chosen_places]
    return x


def plain_budget(lm: ds.LanguageModel, prompt: Tensor, config: ds.SamplerConfig) -> tuple[Tensor, int]:
    """Fast-dLLM's threshold for Dream without a cache, one row: by a step no more may be committed than was planned
    until its end, and of those only the sure ones and the surest. Returns ids and forwards."""
    assert config.threshold is not None
    assert config.steps is not None
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.cat((prompt, torch.full((1, config.gen_length), MASK)), dim=1)
    share, extra = divmod(int((x == MASK).sum()), config.steps)
    committed = forwards = 0
    while committed < share * config.steps + extra:
        done = min(forwards + 1, config.steps)
        allowed = share * done + min(extra, done) - committed
        places = (x[0] == MASK).nonzero().flatten()
        tokens, sure = sample(shifted(lm.logits(x))[0, places], config, generator)
        best = sure.argsort(descending=True).tolist()[:allowed]
        chosen = [at for number, at in enumerate(best) if number == 0 or sure[at] >= config.threshold]
        x[0, places[chosen]] = tokens[chosen]
        committed, forwards = committed + len(chosen), forwards + 1
    return x, forwards


def plain_fast_dllm(lm: ds.LanguageModel, prompt: Tensor, config: ds.SamplerConfig) -> tuple[Tensor, int]:
    """Blocks with caches for shifted logits: the full forward commits the first position, cached ones the others.

    Kept keys and values are restated without a cache: a cached forward attends to a stale canvas, so the transformer's
    own cache is used, but every window, shift and choice is written out. Returns ids and forwards.
    """
    x = torch.cat((prompt, torch.full((1, config.gen_length), MASK)), dim=1)
    generator = torch.Generator().manual_seed(config.seed)
    forwards, length = 0, config.block_length
    for begin in range(prompt.shape[1], x.shape[1], length):
        end = begin + length
        cache = lm.transformer.new_cache(1, x.shape[1])
        x[0, begin] = sample(shifted(lm.transformer(x, cache=cache))[0], config, generator)[0][begin]
        forwards += 1
        stop = end if config.cache == "dual" else x.shape[1]
        times = torch.linspace(1, config.eps, config.steps_per_block + 1)
        for index in range(1, config.steps_per_block):
            masked = x[0, begin:stop] == MASK
            if not bool(masked[:length].any()):
                break
            if config.threshold is None:
                masked[length:] = False
            logits = shifted(lm.transformer(x[:, begin:stop], start=begin, cache=cache))[0]
            forwards += 1
            tokens, sure = torch.zeros(len(masked), dtype=torch.int64), torch.full(masked.shape, -torch.inf)
            tokens[masked], sure[masked] = sample(logits[masked], config, generator)
            tokens, sure, masked = tokens[:length], sure[:length], masked[:length]
            if config.threshold is not None:
                chosen = (sure >= config.threshold) | (sure == sure.max())
            elif config.by_timesteps:
                last = index == config.steps_per_block - 1
                count = int(masked.sum() * (1 if last else 1 - times[index + 1] / times[index]))
                chosen = torch.zeros_like(masked).index_fill(0, sure.topk(count).indices, True)
            else:
                share, extra = divmod(length - 1, config.steps_per_block - 1)
                chosen = torch.zeros_like(masked).index_fill(0, sure.topk(share + (index <= extra)).indices, True)
            x[0, begin:end] = torch.where(chosen, tokens, x[0, begin:end])
    return x, forwards
