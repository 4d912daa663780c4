import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.counts_file import load_counts
from dllm_sparse.analysis.recorder import MaskRecorder
from dllm_sparse.analysis.tallies import Column, MaskCounts
from dllm_sparse.types import ROUTED, UsageError
from tests.analysis.brute_force import StoringRecorder
from tests.models.random_hf import random_denoiser

GOLDEN = Path(__file__).parents[1] / "golden"
PADDED = ([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PLAIN = ([[5, 6, 7, 8], [3, 30, 4, 40]], None)
CASES = {
    "uncached": ("llada-tiny", PLAIN, {}),
    "padded": ("llada-tiny", PADDED, {}),
    "guided and padded": ("llada-tiny", PADDED, {"cfg_scale": 0.5}),
    "prefix cache": ("llada-tiny", PLAIN, {"cache": "prefix"}),
    "dual cache": ("llada-tiny", PLAIN, {"cache": "dual"}),
    "threshold": ("llada-tiny", PLAIN, {"threshold": 0.02, "steps": 2}),
    "uniform noise, padded": ("denoiser", PADDED, {"gen_length": 16, "block_length": 8}),
    "autoregressive": ("llama-tiny", PLAIN, {}),
    "autoregressive, padded": ("llama-tiny", PADDED, {"stop_at_eos": True}),
}


@pytest.fixture(scope="module")
def models():
    golden = {name: ds.load(str(GOLDEN / name), device="cpu") for name in ("llada-tiny", "llama-tiny")}
    return {**golden, "denoiser": ds.wrap(random_denoiser())}


def recorded(lm, prompts, options, recorder_options=None):
    sampler = ds.SamplerConfig(**{"gen_length": 8, "block_length": 4, "steps": 8} | options)
    fast, slow = MaskRecorder(lm.kind, sampler, **recorder_options or {}), StoringRecorder(lm.kind, sampler)
    ids, mask = prompts
    sparsity = ds.SparsityConfig(p=0.7)
    ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler, sparsity=sparsity, observers=(fast, slow))
    return fast.counts(), slow


@pytest.fixture(scope="module", params=CASES)
def case(request, models):
    name, prompts, options = CASES[request.param]
    return recorded(models[name], prompts, options)


def test_counts_equal_those_of_a_recorder_that_stores_every_mask(case):
    counts, slow = case
    expected = slow.steps_table()
    seen = 0
    for site, tally in counts.sites.items():
        if site.expert == ROUTED:
            continue  # against explicit sets in test_mixtures.py
        for place in torch.nonzero(tally.steps[..., Column.TOKENS]).tolist():
            assert tally.steps[tuple(place)].tolist() == expected[site, *place], (site, place)
            seen += 1
    assert seen == len(expected) > 0
    assert len(counts.blocks) == len(slow.steps)


def test_unions_equal_those_of_a_recorder_that_stores_every_mask(case):
    counts, slow = case
    seen = dict.fromkeys(counts.sites, 0)
    for (site, row, step), expected in slow.unions_table().items():
        found = counts.sites[site].unions[row, step]
        assert found[: len(expected) - 1].tolist() == [list(pair) for pair in expected[:-1]]
        assert found[-1].tolist() == list(expected[-1])
        seen[site] += sum(map(sum, expected))
    for site, total in seen.items():
        if site.expert >= -1:  # routed layers against explicit sets in test_mixtures.py
            assert int(counts.sites[site].unions.sum()) == total, "a union that nobody stored masks for"


@pytest.mark.parametrize("case", ["padded", "dual cache", "autoregressive"])
def test_snapshots_compare_with_masks_delta_steps_older(models, case):
    name, prompts, options = CASES[case]
    every, deltas = 2, (1, 4, 6)
    counts, slow = recorded(models[name], prompts, options, {"snapshot_every": every, "deltas": deltas})
    expected = slow.lag_table(every, deltas)
    found = 0
    for site, tally in counts.sites.items():
        for row, step, place, kind in torch.nonzero(tally.snapshots[..., 0]).tolist():
            assert tally.snapshots[row, step, place, kind].tolist() == expected[site, row, step, deltas[place], kind]
            found += 1
    assert found == len(expected) > 0


def test_the_canvas_pools_the_layers_of_each_generated_position(models):
    counts, slow = recorded(models["llada-tiny"], PADDED, {})
    expected = torch.zeros_like(counts.canvas["intermediate"])
    for (site, step), masks in slow.masks.items():
        for (row, position), keep in masks.items():
            earlier = slow.before(site, step, row, position)
            if site.name == "intermediate" and position >= 5 and earlier:
                old = slow.masks[site, step - 1][earlier]
                expected[row, step, position - 5] += torch.tensor([int((keep & old).sum()), int((keep | old).sum())])
    assert torch.equal(counts.canvas["intermediate"], expected)


def test_the_movement_histogram_holds_every_pair_once(models):
    counts, _ = recorded(models["llada-tiny"], PADDED, {})
    for tally in counts.sites.values():
        assert torch.equal(tally.changes.sum(-1).long(), tally.steps[..., Column.PAIRS].sum(0))


def test_a_recorder_may_watch_several_generations(models):
    lm, sampler = models["llada-tiny"], ds.SamplerConfig(gen_length=8, block_length=4)
    together = MaskRecorder(lm.kind, sampler)
    joined = MaskCounts(lm.kind)
    for ids in ([[5, 6, 7, 8]], [[3, 30, 4]]):
        alone = MaskRecorder(lm.kind, sampler)
        ds.generate(lm, prompt_ids=ids, sampler=sampler, sparsity=ds.SparsityConfig(), observers=(together, alone))
        joined.merge(alone.counts())
    assert_equal(together.counts(), joined)
    assert joined.prompts == 2


def test_merging_two_processes_equals_one(models, tmp_path):
    sampler, rows = ds.SamplerConfig(gen_length=8, block_length=4), PLAIN[0]
    command = [
        sys.executable,
        "-c",
        _RECORD,
        str(GOLDEN / "llada-tiny"),
        json.dumps(rows[:1]),
        str(tmp_path / "0.counts"),
    ]
    other = subprocess.Popen([*command, str(tmp_path / "0.counts")])
    recorders = {"second": rows[1:], "all": rows}
    for name, prompts in recorders.items():
        recorders[name] = MaskRecorder("diffusion", sampler)
        for row in prompts:
            run = {"prompt_ids": [row], "sampler": sampler, "sparsity": ds.SparsityConfig(p=0.7)}
            ds.generate(models["llada-tiny"], **run, observers=(recorders[name],))
    assert other.wait(timeout=60) == 0
    merged = load_counts(tmp_path / "0.counts")
    merged.merge(recorders["second"].counts())
    assert_equal(merged, recorders["all"].counts())


_RECORD = """
import json, sys
from pathlib import Path
import dllm_sparse as ds
from dllm_sparse.analysis.counts_file import save_counts
from dllm_sparse.analysis.recorder import MaskRecorder
lm = ds.load(sys.argv[1], device="cpu")
sampler = ds.SamplerConfig(gen_length=8, block_length=4)
recorder = MaskRecorder(lm.kind, sampler)
ds.generate(
    lm, prompt_ids=json.loads(sys.argv[2]), sampler=sampler, sparsity=ds.SparsityConfig(p=0.7), observers=(recorder,)
)
save_counts(recorder.counts(), Path(sys.argv[3]))
"""


def test_runs_that_recorded_different_things_do_not_merge(models):
    counts, _ = recorded(models["llada-tiny"], PLAIN, {})
    other, _ = recorded(models["llama-tiny"], PLAIN, {})
    with pytest.raises(UsageError, match="cannot be merged"):
        counts.merge(other)


def test_what_is_asked_for_is_known_before_anything_is_recorded():
    empty = MaskRecorder("diffusion", ds.SamplerConfig(), snapshot_every=2, deltas=(2, 4)).counts()
    assert (empty.kind, empty.deltas, empty.snapshot_every, empty.prompts) == ("diffusion", (2, 4), 2, 0)


@pytest.mark.parametrize("options", [{"snapshot_every": 2}, {"deltas": (2,)}, {"snapshot_every": 2, "deltas": (0,)}])
def test_half_a_snapshot_request_is_refused(options):
    with pytest.raises(UsageError, match="snapshot_every"):
        MaskRecorder("diffusion", ds.SamplerConfig(), **options)


def test_memory_does_not_grow_with_the_steps(models):
    """The masks a site remembers are three canvases, whatever the steps (integer counts are kept per step)."""
    sizes = []
    for steps in (2, 8):
        sampler = ds.SamplerConfig(gen_length=8, block_length=4, steps=steps)
        recorder = MaskRecorder("diffusion", sampler)
        run = {"prompt_ids": PLAIN[0], "sampler": sampler, "sparsity": ds.SparsityConfig()}
        ds.generate(models["llada-tiny"], **run, observers=(recorder,))
        sizes.append(sum(m.keep.nbytes + m.values.nbytes + m.reference.nbytes for m in recorder._memory.values()))
    assert sizes[0] == sizes[1] == 2 * 12 * (64 + 112) * (1 + 4 + 1) * 2


def assert_equal(ours, theirs):
    assert ours.sites.keys() == theirs.sites.keys()
    assert ours.blocks == theirs.blocks
    for site, tally in ours.sites.items():
        for name in ("steps", "unions", "changes", "snapshots"):
            assert torch.equal(getattr(tally, name), getattr(theirs.sites[site], name)), (site, name)
    for name, canvas in ours.canvas.items():
        assert torch.equal(canvas, theirs.canvas[name])
