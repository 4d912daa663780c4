"""Counts of captured forwards, by the kernel and by its twin, shared by the interpreter's and the GPU's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.sparsity.graph_rows import GraphRows
from dllm_sparse.types import TokenClass

WIDTHS = {"input": 40, "intermediate": 96}


def rows_of(tokens: int, device: str) -> GraphRows:
    """Some sites list, the union of some is known otherwise; what forwards leave is filled in."""
    rows = GraphRows(3, WIDTHS, tokens, torch.device(device), listing=True, dense=False)
    generator = torch.Generator().manual_seed(tokens)
    for name, high in (("kept", 40), ("union", 40), ("_from_list", 2), ("_exact", 2)):
        target = getattr(rows, name)
        target.copy_(torch.randint(0, high, target.shape, generator=generator))
    return rows


def check_counts(device: str) -> None:
    """One token, padding, padding alone, more tokens than a program holds at a time."""
    for tokens in (1, 5, 300):
        both = rows_of(tokens, device), rows_of(tokens, device)
        for low, high in ((1, len(TokenClass)), (0, len(TokenClass)), (0, 1)):
            classes = torch.randint(low, high, (tokens,), generator=torch.Generator().manual_seed(high)).to(device)
            both[0].add_at_once(classes)
            both[1].add_by_parts(classes)
        found, truth = (one.totals() for one in both)
        assert int(truth[-1]) == 2
        for one, other in zip(found, truth, strict=True):
            assert same(one, other)


def same(found: Tensor, truth: Tensor) -> bool:
    return torch.equal(found, truth) if truth.dtype == torch.int64 else torch.allclose(found, truth, atol=1e-12)
