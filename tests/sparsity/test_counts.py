"""Counts against a brute-force recount of the same masks."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.sparsity.counts import SparsityCounts
from dllm_sparse.sparsity.gains import ffn_gain

SITES = (ds.Site(0, "input"), ds.Site(0, "intermediate"), ds.Site(1, "input"), ds.Site(1, "intermediate"))
WIDTHS = {"input": 5, "intermediate": 8}


def random_calls(seed: int, number: int = 12) -> list[tuple[ds.Site, Tensor, Tensor]]:
    """Masks [B, T, n] of several shapes with random token classes, padding among them."""
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for index in range(number):
        site = SITES[index % len(SITES)]
        shape = tuple(torch.randint(1, 5, (2,), generator=generator).tolist())
        keep = torch.rand((*shape, WIDTHS[site.name]), generator=generator) < 0.4
        classes = torch.randint(0, len(ds.TokenClass), shape, generator=generator).to(torch.int8)
        classes[0, -1] = ds.TokenClass.DECODED  # at least one counted token
        calls.append((site, keep, classes))
    return calls


def counted(calls: list[tuple[ds.Site, Tensor, Tensor]]) -> SparsityCounts:
    counts = SparsityCounts()
    for call in calls:
        counts.add(*call)
    return counts


def test_every_figure_against_a_recount() -> None:
    calls = random_calls(0)
    zeros: dict[object, int] = defaultdict(int)
    entries: dict[object, int] = defaultdict(int)
    hooks, skipped, channels = [], defaultdict(int), defaultdict(int)
    for site, keep, classes in calls:
        call_zeros = call_entries = 0
        union = [False] * keep.shape[-1]
        for row, token in [(row, token) for row in range(keep.shape[0]) for token in range(keep.shape[1])]:
            kind = ds.TokenClass(int(classes[row, token]))
            if kind == ds.TokenClass.PADDING:
                continue
            bits = keep[row, token].tolist()
            union = [a or b for a, b in zip(union, bits, strict=True)]
            for key in ("mean", site.name, site, (kind.name.lower(), site.name)):
                zeros[key] += bits.count(False)
                entries[key] += len(bits)
            call_zeros, call_entries = call_zeros + bits.count(False), call_entries + len(bits)
        hooks.append(call_zeros / call_entries)
        for key in (site.name, (str(classes.numel()), site.name)):
            skipped[key] += union.count(False)
            channels[key] += len(union)
    report = counted(calls).to_dict()
    for name in ("input", "intermediate", "mean"):
        assert report["sparsity"][name] == pytest.approx(zeros[name] / entries[name], abs=1e-12)
    assert report["sparsity"]["hook_mean"] == pytest.approx(sum(hooks) / len(hooks), abs=1e-12)
    for name in ("input", "intermediate"):
        assert report["exploitable"][name] == pytest.approx(skipped[name] / channels[name], abs=1e-12)
    by_tokens = [(tokens, name) for tokens, sites in report["exploitable_by_tokens"].items() for name in sites]
    assert len({tokens for tokens, _ in by_tokens}) > 3
    assert set(by_tokens) == {key for key in channels if isinstance(key, tuple)}
    for tokens, name in by_tokens:
        found = report["exploitable_by_tokens"][tokens][name]
        assert found == pytest.approx(skipped[tokens, name] / channels[tokens, name], abs=1e-12)
    for tokens, sites in report["exploitable_by_tokens"].items():
        assert report["gain_by_tokens"][tokens] == ffn_gain(sites)
    assert [(row["layer"], row["site"]) for row in report["by_layer"]] == [site[:2] for site in SITES]
    for row in report["by_layer"]:
        site = ds.Site(row["layer"], row["site"])
        assert row["sparsity"] == pytest.approx(zeros[site] / entries[site], abs=1e-12)
    assert "padding" not in report["by_token_class"]
    for kind, sites in report["by_token_class"].items():
        for name, value in sites.items():
            assert value == pytest.approx(zeros[kind, name] / entries[kind, name], abs=1e-12)


def test_merging_equals_counting_everything_at_once() -> None:
    first, second = random_calls(1), random_calls(2, number=5)
    whole, merged = counted(first + second), counted(first)
    merged.merge(counted(second))
    assert merged.to_dict() == whole.to_dict()


def test_merging_leaves_the_other_side_alone() -> None:
    other = counted(random_calls(3))
    before = copy.deepcopy(other.to_dict())
    merged = SparsityCounts()
    merged.merge(other)
    assert merged.to_dict() == before
    for call in random_calls(4):
        merged.add(*call)
    assert other.to_dict() == before


def test_a_copy_on_a_device_is_a_copy() -> None:
    counts = counted(random_calls(6))
    before = copy.deepcopy(counts.to_dict())
    moved = counts.to("cpu")
    assert moved.to_dict() == before
    moved.add(*random_calls(7)[0])
    assert counts.to_dict() == before


def test_padding_alone_is_no_call() -> None:
    counts = counted(random_calls(5))
    before = copy.deepcopy(counts.to_dict())
    counts.add(SITES[0], torch.zeros(2, 3, 5, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int8))
    assert counts.to_dict() == before
    assert SparsityCounts().to_dict()["sparsity"] == {"mean": 0.0, "hook_mean": 0.0}


def test_experts_are_pooled_per_layer_and_listed_apart() -> None:
    counts = SparsityCounts()
    keep = torch.tensor([[[True, False, False, False]] * 3])
    classes = torch.full((1, 3), ds.TokenClass.PROMPT, dtype=torch.int8)
    counts.add(ds.Site(0, "input", 0), keep, classes)
    counts.add(ds.Site(0, "input", 2), ~keep[:, :1], classes[:, :1])
    counts.add(ds.Site(0, "input", 2), keep[:, :1], classes[:, :1])
    report = counts.to_dict()
    assert report["by_layer"] == [{"layer": 0, "site": "input", "sparsity": 1 - 7 / 20}]  # token-weighted
    rows = [(row["expert"], row["tokens"], row["entries"], row["sparsity"]) for row in report["by_expert"]]
    assert rows == [(0, 3, 12, 0.75), (2, 2, 8, 0.5)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_counts_read_back_and_counts_on_a_gpu_mix() -> None:
    calls = random_calls(8)
    expected, mixed = counted(calls), counted(calls[:4])
    for site, keep, classes in calls[4:8]:
        mixed.add(site, keep.cuda(), classes.cuda())
    mixed.merge(counted(calls[8:]).to("cuda"))
    assert mixed.to_dict() == expected.to_dict()
