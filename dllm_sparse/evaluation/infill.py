"""Masked-token accuracy given both sides of a gap: what only a bidirectional model can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dllm_sparse.models.language_model import LanguageModel, token_classes
from dllm_sparse.types import Step, StepContext, UsageError

_ROWS = 32  # of a forward


@torch.inference_mode()
def infill_hits(lm: LanguageModel, items: Sequence[Mapping[str, str]], *, two_sided: bool = True) -> Tensor:
    """Whether the most likely token of each gap is the hidden one, [N] bool; one mask in the gap, one forward an item.

    Items hold `prefix`, `target` (a word of one token) and `suffix`, as those of tiny-infill do. Without `two_sided`
    the text ends at the gap. Raises UsageError for an autoregressive model, which cannot see past a gap.
    """
    mask_id = lm.mask_token_id
    if mask_id is None or lm.tokenizer is None:
        raise UsageError(f"{lm.name} has no mask token: gaps inside a text are for masked diffusion models only")
    hits = []
    for start in range(0, len(items), _ROWS):
        rows, gaps, targets = [], [], []
        for item in items[start : start + _ROWS]:
            left = lm.token_ids(item["prefix"])
            right = lm.token_ids(item["suffix"], add_special_tokens=False) if two_sided else []
            rows.append([*left, mask_id, *right])
            gaps.append(len(left))
            targets.append(lm.token_ids(f" {item['target']}", add_special_tokens=False)[0])
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        places = torch.arange(len(rows)) * width + torch.tensor(gaps)
        ids, mask, places = ids.to(lm.device), mask.to(lm.device), places.to(lm.device)
        context = StepContext(Step(0, 1), token_classes(ids, mask, mask_id))
        found = lm.predictions(ids, places, attention_mask=mask, context=context).argmax(-1).cpu()
        hits.append(found == torch.tensor(targets))
    return torch.cat(hits)
