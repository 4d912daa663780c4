"""From scoring requests to batches: which rows each request needs and which of them share a forward.

Rows are ordered by length, so that padding is rare, and cut where a forward would exceed its budget of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dllm_sparse.evaluation.batches import Batch, Rows, pack
from dllm_sparse.evaluation.copies import drawn_masks, masks_and_weights
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.requests import Pair, blocks_of
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.uniform_likelihood import canvases, check_guidance, noised
from dllm_sparse.types import UsageError

# One forward's tokens: large enough to fill a GPU, small enough for a CPU's cache; and at most so many logits.
_CUDA_TOKENS, _CPU_TOKENS = 1 << 17, 1 << 12
_CUDA_LOGITS, _CPU_LOGITS = 1 << 30, 1 << 28

Family = tuple[tuple[int, ...], list[Rows]]
"""Rows that continue one prefix of ids."""


def token_budget(lm: LanguageModel, options: ScoringOptions) -> int:
    """Tokens of one forward for this device and vocabulary."""
    if options.batch_tokens is not None:
        return options.batch_tokens
    cuda = lm.device.type == "cuda"
    tokens, logits = (_CUDA_TOKENS, _CUDA_LOGITS) if cuda else (_CPU_TOKENS, _CPU_LOGITS)
    return max(min(tokens, logits // lm.config.vocab_size), 1)


def plan(lm: LanguageModel, pairs: Sequence[Pair], options: ScoringOptions, *, share_prompts: bool) -> list[Batch]:
    """Batches that score every pair; row owners are indices into `pairs`. Empty targets have no row.

    `share_prompts` computes an autoregressive prompt once for all its targets, and the finished blocks of a
    block-causal model once for all masked copies of the next. That is exact where every token has its own mask, and
    only there; bidirectional models have nothing to share, guided ones are not asked to.
    """
    budget = token_budget(lm, options)
    if lm.kind == "autoregressive":
        alone, shared = _causal_rows(pairs, share_prompts=share_prompts)
        return _packed(alone, budget) + list(_shared_batches(shared, budget))
    if lm.noise == "uniform":
        check_guidance(lm, options.cfg_scale)
        return [batch for owner, pair in _filled(pairs) for batch in _noise_batches(lm, owner, pair, options, budget)]
    assert lm.mask_token_id is not None
    block, guided = lm.config.block_length, options.cfg_scale > 0
    if block is not None and share_prompts and not guided:
        families = [
            family
            for owner, pair in _filled(pairs)
            for part in blocks_of(pair, block)
            for family in _block_families(owner, part, options, lm.mask_token_id, block, budget)
        ]
        alone = [rows for prefix, rows in families if not prefix]
        shared = [(prefix, [rows]) for prefix, rows in families if prefix]
        return _packed(alone, budget) + list(_shared_batches(shared, budget))
    parts = [
        replace(_diffusion_rows(owner, part, options, lm.mask_token_id), prompt=len(pair.prompt))
        for owner, pair in _filled(pairs)
        for part in ([pair] if block is None else blocks_of(pair, block))
    ]
    return _packed(parts, budget // (2 if guided else 1))


def _causal_rows(pairs: Sequence[Pair], *, share_prompts: bool) -> tuple[list[Rows], list[Family]]:
    """Rows on their own, and families of rows behind a prompt but its last token, so every row has one to feed."""
    families: dict[tuple[int, ...], list[tuple[int, Pair]]] = {}
    for owner, pair in _filled(pairs):
        families.setdefault(pair.prompt, []).append((owner, pair))
    alone: list[Rows] = []
    shared: list[Family] = []
    for prompt, family in families.items():
        if share_prompts and len(family) > 1 and len(prompt) > 1:
            rows = [_causal_row(owner, pair, behind=len(prompt) - 1) for owner, pair in family]
            shared.append((prompt[:-1], rows))
        else:
            alone += [_causal_row(owner, pair) for owner, pair in family]
    return alone, shared


def _block_families(
    owner: int, part: Pair, options: ScoringOptions, mask_id: int, block: int, budget: int
) -> Iterator[tuple[tuple[int, ...], Rows]]:
    """(finished blocks, masked copies of the block behind them), as many copies at once as a forward may attend to."""
    behind = len(part.prompt) // block * block
    masks, weights = masks_and_weights(part, options)
    rows = _masked_rows(owner, Pair(part.prompt[behind:], part.target), masks, weights, mask_id)
    most = max(budget // (behind + len(rows.truth)), 1)
    for start in range(0, len(rows.ids), most):
        yield part.prompt[:behind], rows[start : start + most]


def _filled(pairs: Sequence[Pair]) -> Iterator[tuple[int, Pair]]:
    return ((owner, pair) for owner, pair in enumerate(pairs) if pair.target)


def _packed(parts: Sequence[Rows], budget: int) -> list[Batch]:
    """Longest first, cut so that the padded size of a batch stays within the budget; at least one row each."""
    batches: list[Batch] = []
    chosen: list[Rows] = []
    room = 0
    for rows in sorted(parts, key=lambda rows: -len(rows.truth)):
        while len(rows.ids):
            if not chosen:
                room = max(budget // len(rows.truth), 1)
            taken = rows[:room]
            chosen.append(taken)
            room -= len(taken.ids)
            rows = rows[len(taken.ids) :]
            if not room:
                batches.append(pack(chosen))
                chosen = []
    return [*batches, pack(chosen)] if chosen else batches


def _diffusion_rows(owner: int, pair: Pair, options: ScoringOptions, mask_id: int) -> Rows:
    return _masked_rows(owner, pair, *masks_and_weights(pair, options), mask_id)


def _masked_rows(owner: int, pair: Pair, masks: Tensor, weights: Tensor, mask_id: int) -> Rows:
    whole = torch.tensor((*pair.prompt, *pair.target))
    scored = torch.nn.functional.pad(masks, (len(pair.prompt), 0))
    return Rows(owner, whole.masked_fill(scored, mask_id), whole, scored, weights, prompt=len(pair.prompt))


def _noise_batches(lm: LanguageModel, owner: int, pair: Pair, options: ScoringOptions, budget: int) -> Iterator[Batch]:
    """The copies of one request, canvas by canvas, each behind what was written before it."""
    if options.estimator != "monte_carlo":
        raise UsageError(f"estimator is {options.estimator!r}; copies with random tokens take monte_carlo only")
    generator = torch.Generator().manual_seed(pair.seed(options.seed))
    for before, written in canvases(lm, pair.prompt, pair.target):
        target = torch.tensor(written)
        masks, weights = drawn_masks(len(target), options, generator)
        copies = noised(target, masks, lm.config.vocab_size, generator)
        rows = Rows(owner, copies, target, masks, weights, prefix=0)
        room = max(budget // (len(before) + len(target)), 1)
        for start in range(0, len(copies), room):
            yield pack([rows[start : start + room]], [tuple(before)])


def _causal_row(owner: int, pair: Pair, behind: int = 0) -> Rows:
    """The row of a pair, its first `behind` prompt tokens left to a shared prefix; the last target is never fed."""
    whole = torch.tensor((*pair.prompt[behind:], *pair.target))
    scored = torch.arange(len(whole) - 1) >= len(pair.prompt) - behind - 1
    return Rows(owner, whole[None, :-1], whole[1:], scored[None], torch.ones(1))


def _shared_batches(families: Sequence[Family], budget: int) -> Iterator[Batch]:
    """Batches of whole families, longest prefix first."""
    part: list[Family] = []
    for family in sorted(families, key=lambda family: -len(family[0])):
        if part and _attended([*part, family]) > budget:
            yield _shared_batch(part)
            part = []
        part.append(family)
    if part:
        yield _shared_batch(part)


def _attended(families: Sequence[Family]) -> int:
    """Tokens of the largest buffer such a batch needs: keys of every row, prefix included."""
    members = [rows for _, family in families for rows in family]
    longest = max(len(rows.truth) for rows in members)
    return sum(len(rows.ids) for rows in members) * (len(families[0][0]) + longest)


def _shared_batch(families: Sequence[Family]) -> Batch:
    rows = [replace(rows, prefix=index) for index, (_, family) in enumerate(families) for rows in family]
    return pack(rows, [prefix for prefix, _ in families])
