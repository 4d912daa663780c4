"""One forward's worth of scoring work, ready to run, and the forward itself.

A batch is made once and run at every point of a sweep. Its composition depends on the requests alone, never on the
number of processes: that is what makes results bit-identical however they are spread.
Shapes: R rows, T positions of a row, N scored positions (flat indices into R * T), G shared prefixes of P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel, rotary_positions, token_classes
from dllm_sparse.samplers.confidence import guide
from dllm_sparse.samplers.uniform_likelihood import denoised
from dllm_sparse.types import Step, StepContext


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one request before padding: r copies of T positions, scored where log p(truth) counts."""

    owner: int
    ids: Tensor  # [r, T]
    truth: Tensor  # [T] the token each position must predict
    scored: Tensor  # [r, T] bool
    weights: Tensor  # [r] float32, of every scored position of a row
    prompt: int = 0  # leading tokens a guidance copy masks
    prefix: int = -1  # index of the shared prefix these rows continue

    def __getitem__(self, part: slice) -> Rows:
        """Some of the rows."""
        return replace(self, ids=self.ids[part], scored=self.scored[part], weights=self.weights[part])


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Contexts shared by several rows, left-padded: computed once, their keys and values handed to every row."""

    ids: Tensor  # [G, P]
    mask: Tensor  # [G, P] 0 on padding
    of_row: Tensor  # [R]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward. `mask` is None where no row is padded."""

    owners: Tensor  # [R] on the CPU
    ids: Tensor  # [R, T]
    mask: Tensor | None  # [R, T] 0 on right padding
    index: Tensor  # [N]
    tokens: Tensor  # [N]
    weights: Tensor  # [N]
    prompts: Tensor  # [R]
    prefixes: Prefixes | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with everything a forward reads on `device`."""
        names = ("ids", "index", "tokens", "weights", "prompts")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        mask = None if self.mask is None else self.mask.to(device)
        prefixes = self.prefixes
        if prefixes is not None:
            prefixes = Prefixes(prefixes.ids.to(device), prefixes.mask.to(device), prefixes.of_row.to(device))
        return replace(self, mask=mask, prefixes=prefixes, **moved)


def pack(parts: Sequence[Rows], prefixes: Sequence[tuple[int, ...]] = ()) -> Batch:
    """Pads rows on the right to one length (prefixes on the left) and flattens what is scored."""
    counts = torch.tensor([len(part.ids) for part in parts])
    lengths = torch.tensor([len(part.truth) for part in parts]).repeat_interleave(counts)
    rows, width = len(lengths), int(lengths.max())
    ids = torch.zeros(rows, width, dtype=torch.int64)
    truth, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    start = 0
    for part in parts:
        block = slice(start, start + len(part.ids)), slice(0, len(part.truth))
        ids[block], truth[block], scored[block] = part.ids, part.truth, part.scored
        start += len(part.ids)
    index = scored.flatten().nonzero()[:, 0]
    real = (torch.arange(width) < lengths[:, None]).long()
    return Batch(
        owners=torch.tensor([part.owner for part in parts]).repeat_interleave(counts),
        ids=ids,
        mask=None if bool(real.all()) else real,
        index=index,
        tokens=truth.flatten()[index],
        weights=torch.cat([part.weights for part in parts])[index // width],
        prompts=torch.tensor([part.prompt for part in parts]).repeat_interleave(counts),
        prefixes=_pack_prefixes(parts, counts, prefixes) if prefixes else None,
    )


def _pack_prefixes(parts: Sequence[Rows], counts: Tensor, prefixes: Sequence[tuple[int, ...]]) -> Prefixes:
    width = max(len(prefix) for prefix in prefixes)
    ids = torch.tensor([[0] * (width - len(prefix)) + list(prefix) for prefix in prefixes])
    mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
    return Prefixes(ids, mask, torch.tensor([part.prefix for part in parts]).repeat_interleave(counts))


@torch.inference_mode()
def score(lm: LanguageModel, batch: Batch, cfg_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weighted log-likelihood [R] float64, and whether every scored token was the most likely one [R] bool.

    No reduction depends on the order of atomic additions: equal inputs give equal bits. Stays on the model's device.
    """
    if lm.noise == "uniform":
        assert batch.prefixes is not None
        unwritten = torch.zeros(batch.ids.numel(), dtype=torch.bool, device=lm.device)
        unwritten[batch.index] = True
        logits = denoised(lm, batch.prefixes.ids[0], batch.ids, unwritten.view(batch.ids.shape), batch.index)
    elif batch.prefixes is not None:
        logits = _continued(lm, batch, batch.prefixes)
    elif cfg_scale > 0:
        logits = _guided(lm, batch, cfg_scale)
    else:
        logits = _plain(lm, batch.ids, batch.mask, batch.index, guided=False)
    wide = logits.float()
    likelihood = wide.gather(-1, batch.tokens[:, None])[:, 0] - wide.logsumexp(-1)
    per_position = torch.zeros(batch.ids.numel(), dtype=torch.float64, device=logits.device)
    per_position[batch.index] = likelihood.double() * batch.weights
    missed = torch.zeros_like(per_position, dtype=torch.bool)
    missed[batch.index] = wide.argmax(-1) != batch.tokens
    return per_position.view(batch.ids.shape).sum(-1), ~missed.view(batch.ids.shape).any(-1)


def _plain(lm: LanguageModel, ids: Tensor, mask: Tensor | None, index: Tensor, *, guided: bool) -> Tensor:
    context = StepContext(Step(0, 1), token_classes(ids, mask, lm.mask_token_id), guided=guided)
    # Right padding needs no mask under causal attention: nothing real comes after it.
    seen = None if lm.config.causal else mask
    return lm.predictions(ids, index, attention_mask=seen, context=context)


def _guided(lm: LanguageModel, batch: Batch, cfg_scale: float) -> Tensor:
    """Logits pushed away from those of a copy whose prompt is masked (LLaDA's classifier-free guidance)."""
    assert lm.mask_token_id is not None
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    free = batch.ids.masked_fill(places < batch.prompts[:, None], lm.mask_token_id)
    mask = None if batch.mask is None else batch.mask.repeat(2, 1)
    index = torch.cat((batch.index, batch.index + batch.ids.numel()))
    return guide(_plain(lm, torch.cat((batch.ids, free)), mask, index, guided=True), cfg_scale)


def _continued(lm: LanguageModel, batch: Batch, prefixes: Prefixes) -> Tensor:
    """Logits of rows behind shared prefixes: each prefix runs once, its keys and values are copied to its rows."""
    groups, width = prefixes.ids.shape
    tokens = batch.ids.shape[1]
    shared = lm.transformer.new_cache(groups, width)
    none = torch.empty(0, dtype=torch.int64, device=lm.device)
    context = StepContext(Step(0, 1), token_classes(prefixes.ids, prefixes.mask, lm.mask_token_id))
    options: dict[str, Any] = {"positions": rotary_positions(prefixes.mask), "rows": none}
    lm.transformer(prefixes.ids, attention_mask=prefixes.mask, cache=shared, context=context, **options)
    cache = shared.spread(prefixes.of_row, width + tokens)
    mask = prefixes.mask[prefixes.of_row]
    positions = mask.sum(-1, keepdim=True) + torch.arange(tokens, device=lm.device)
    # Right padding stands behind every causal query, but inside a block everything is seen.
    real = torch.ones_like(batch.ids) if batch.mask is None or lm.config.causal else batch.mask
    mask = torch.cat((mask, real), dim=1)
    context = StepContext(Step(0, 1), token_classes(batch.ids, batch.mask, lm.mask_token_id), start=width)
    return lm.transformer(  # type: ignore[no-any-return]
        batch.ids,
        start=width,
        attention_mask=mask,
        positions=positions,
        cache=cache,
        rows=batch.index,
        context=context,
    )
