"""Drift of a mixture of experts: a token's active set is the (expert, channel) pairs it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.analysis.counts_file import load_counts, save_counts
from dllm_sparse.analysis.recorder import MaskRecorder
from dllm_sparse.analysis.tallies import Column
from dllm_sparse.models.config import MoEConfig
from dllm_sparse.types import ROUTED, Site
from tests.helpers import Recorder, random_ids, tiny_lm

MOE = MoEConfig(experts=5, experts_per_token=2, expert_width=12, shared_experts=1, dense_layers=1)
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4, steps=8, cache="dual")
PROMPTS = random_ids(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def recorded() -> tuple[MaskRecorder, Recorder]:
    """The recorder under test, and copies of everything it was offered."""
    lm = tiny_lm(moe=MOE)
    fast, slow = MaskRecorder("diffusion", SAMPLER), Recorder()
    options = {"sampler": SAMPLER, "sparsity": ds.SparsityConfig(p=0.7), "observers": (fast, slow)}
    ds.generate(lm, prompt_ids=PROMPTS, attention_mask=MASK, **options)  # type: ignore[arg-type]
    return fast, slow


def active_sets(slow: Recorder, name: str) -> dict[tuple[int, int, int], set[tuple[int, int]]]:
    """(expert, channel) pairs kept by (step, row, canvas position) in layer 1's routed experts."""
    found: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
    for site, _, keep, context in slow.masks:
        if site.layer == 1 and site.name == name and site.expert >= 0:
            assert context.part is not None
            whole = context.part.whole
            for row, mask in zip(context.part.tokens.tolist(), keep[0], strict=True):
                b, t = divmod(row, whole.token_class.shape[1])
                pairs = {(site.expert, channel) for channel in mask.nonzero().flatten().tolist()}
                found.setdefault((context.step.index, b, whole.start + t), set()).update(pairs)
    return found


@pytest.mark.parametrize("name", ["input", "intermediate"])
def test_jaccards_are_those_of_sets_of_experts_and_channels(recorded: tuple[MaskRecorder, Recorder], name: str) -> None:
    fast, slow = recorded
    sets, padding = active_sets(slow, name), (MASK == 0)
    tally = fast.counts().sites[Site(1, name, ROUTED)]  # type: ignore[arg-type]
    assert tally.width == 5 * (16 if name == "input" else 12)
    for step in range(8):
        for row in range(2):
            here = {p: s for (at, b, p), s in sets.items() if (at, b) == (step, row)}
            here = {p: s for p, s in here.items() if not (p < 5 and padding[row, p])}
            before = {p: sets[step - 1, row, p] for p in here if (step - 1, row, p) in sets}
            columns = tally.steps[row, step].sum(0)
            assert columns[Column.TOKENS] == len(here)
            assert columns[Column.KEPT] == sum(map(len, here.values()))
            assert columns[Column.PAIRS] == len(before)
            assert columns[Column.INTERSECTION] == sum(len(here[p] & old) for p, old in before.items())
            assert columns[Column.UNION] == sum(len(here[p] | old) for p, old in before.items())


def test_dense_layers_and_shared_experts_stand_beside_the_routed_ones(
    recorded: tuple[MaskRecorder, Recorder], tmp_path: object
) -> None:
    counts = recorded[0].counts()
    assert {site[::2] for site in counts.sites} == {(0, -1), (1, ROUTED), (1, -1)}
    assert {t.width for s, t in counts.sites.items() if s.name == "intermediate"} == {24, 60, 12}
    again = load_counts(save_counts(counts, tmp_path / "counts.safetensors"))  # type: ignore[operator]
    assert again.sites.keys() == counts.sites.keys()
    assert all(torch.equal(again.sites[site].steps, tally.steps) for site, tally in counts.sites.items())


def test_a_report_measures_sparsity_over_what_was_computed() -> None:
    lm = tiny_lm(moe=MOE)
    sparsity = ds.SparsityConfig(p=0.7)
    report = ds.drift_report(lm, PROMPTS.tolist(), SAMPLER, sparsity)
    out = ds.generate(lm, prompt_ids=PROMPTS, sampler=SAMPLER, sparsity=sparsity)
    measured = report["variants"][0]["measured_sparsity"]
    for name, value in measured.items():
        assert value == pytest.approx(out.sparsity[name], abs=1e-9)


def test_experts_of_one_layer_are_offered_with_their_tokens() -> None:
    lm, slow = tiny_lm(moe=MOE), Recorder()
    ids = random_ids(2, 6)
    with ds.sparsify(lm, ds.SparsityConfig(p=0.6), observers=(slow,)):
        lm.logits(ids)
    parts = [context.part for site, _, _, context in slow.masks if site.name == "input" and site.expert >= 0]
    tokens: Tensor = torch.cat([part.tokens for part in parts if part is not None])
    assert torch.equal(torch.bincount(tokens), torch.full((12,), 2))
    assert {(part.pairs, part.experts) for part in parts if part is not None} == {(24, 5)}
