"""Rows with nothing left to decide leave the batch: fewer rows are fed, and nothing else changes for anybody."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.engine.flags import Flags
from tests.helpers import Recorder, left_padded, random_ids, tiny_lm
from tests.samplers.tiny import run

LENGTHS = (7, 4, 1, 6, 3, 9)
PROMPTS = [random_ids(1, length, seed=length, vocabulary=35)[0] for length in LENGTHS]
EXECUTIONS = ("eager", "graph")


def fed_rows(lm: ds.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of rows of every forward from now on, of either execution."""
    fed: list[int] = []
    embed = torch.nn.functional.embedding

    def spy(ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        fed.append(len(ids))
        return embed(ids, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "embedding", spy)
    return fed


def ending(lm: ds.LanguageModel, length: int = 4, **values: Any) -> dict[str, Any]:
    """Options under which the rows of PROMPTS end in as many different blocks of `length` tokens as some id allows."""
    ids, mask = left_padded(PROMPTS)
    rows = run(lm, ids, mask, **values).ids[:, ids.shape[1] :].tolist()
    ends = {token: {row.index(token) // length for row in rows if token in row} for token in range(36)}
    return {**values, "eos_token_id": max(ends, key=lambda token: len(ends[token])), "stop_at_eos": True}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("cache", "rule"),
    [
        ("none", {"steps": 12}),
        ("dual", {"steps": 12}),
        ("none", {"threshold": 0.3}),
        ("prefix", {"threshold": 0.3}),
        ("dual", {"threshold": 0.3}),
        ("dual", {"factor": 1.5}),
    ],
)
def test_diffusion_rows_leave_and_every_row_is_decoded_as_alone(
    execution: str, cache: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = left_padded(PROMPTS)
    smallest = len(PROMPTS)
    for seed in range(2):
        lm = tiny_lm(seed=seed)
        values = ending(lm, gen_length=24, block_length=4, cache=cache, **rule)
        fed = fed_rows(lm, monkeypatch)
        batch = run(lm, ids, mask, execution=execution, **values)
        assert len(fed) == batch.forward_passes
        smallest = min(smallest, *fed)
        assert execution == "eager" or set(fed) <= {1, 2, 4, 6}
        watched = run(lm, ids, mask, observers=[ds.Observer()], **values)
        assert torch.equal(batch.ids, watched.ids)
        assert torch.equal(batch.commit_step, watched.commit_step)
        assert batch.forward_passes == watched.forward_passes
        assert set(fed[batch.forward_passes :]) == {len(PROMPTS)}
        for row, prompt in enumerate(PROMPTS):
            alone = run(lm, prompt[None], None, **values)
            assert torch.equal(batch.ids[row, ids.shape[1] :], alone.ids[0, len(prompt) :])
    assert smallest < len(PROMPTS)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_autoregressive_rows_leave_when_they_end(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = left_padded(PROMPTS)
    sizes = set()
    for seed in range(2):
        lm = tiny_lm("autoregressive", seed=seed)
        values = ending(lm, length=1, gen_length=24)
        fed = fed_rows(lm, monkeypatch)
        batch = run(lm, ids, mask, execution=execution, **values)
        sizes |= set(fed)
        late = int(execution == "graph" and batch.forward_passes < 24)  # the host reads who ended one step later
        assert len(fed) == batch.forward_passes + late
        watched = run(lm, ids, mask, observers=[ds.Observer()], **values)
        assert torch.equal(batch.ids, watched.ids)
        assert torch.equal(batch.commit_step, watched.commit_step)
        assert batch.forward_passes == watched.forward_passes
        for row, prompt in enumerate(PROMPTS):
            alone = run(lm, prompt[None], None, **values).ids[0, len(prompt) :]
            assert torch.equal(batch.ids[row, ids.shape[1] :][: len(alone)], alone)
    assert len(sizes) > 2  # or the test shows nothing
    assert execution == "eager" or sizes <= {1, 2, 4, 6}


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"cfg_scale": 1.5},
        {"remasking": "random"},
        {"remasking": "maskgit_plus", "temperature": 0.8},
        {"remasking": "entropy", "alg_temp": 0.5, "threshold": None},
        {"remasking": "origin", "temperature": 0.8, "threshold": None},
    ],
)
def test_rows_that_left_change_nobodys_random_numbers_or_guidance(kind: str, options: dict[str, Any]) -> None:
    lm = tiny_lm(kind, seed=1)
    ids, mask = left_padded(PROMPTS)
    values = ending(lm, **{"gen_length": 24, "block_length": 4, "cache": "dual", "threshold": 0.3, **options})
    batch, watched = run(lm, ids, mask, **values), run(lm, ids, mask, observers=[ds.Observer()], **values)
    assert torch.equal(batch.ids, watched.ids)
    assert torch.equal(batch.commit_step, watched.commit_step)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.3}])
def test_both_executions_count_the_same_masks(kind: str, rule: dict[str, float]) -> None:
    lm, sparsity = tiny_lm(kind, seed=1), ds.SparsityConfig(p=0.7)
    ids, mask = left_padded(PROMPTS)
    values = ending(lm, gen_length=24, block_length=4, cache="dual", sparsity=sparsity, **rule)
    plain, graphed = (run(lm, ids, mask, execution=execution, **values) for execution in EXECUTIONS)
    assert torch.equal(plain.ids, graphed.ids)
    assert (plain.commit_step == -1).any()
    for key in ("sparsity", "by_token_class", "exploitable"):
        for name, value in plain.sparsity_report[key].items():  # sums per number of rows fed: the last bit may differ
            assert graphed.sparsity_report[key][name] == pytest.approx(value, abs=1e-12)


def test_reused_masks_keep_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(seed=1)
    ids, mask = left_padded(PROMPTS)
    fed = fed_rows(lm, monkeypatch)
    run(lm, ids, mask, gen_length=16, block_length=4, threshold=0.3, sparsity=ds.SparsityConfig(p=0.7, refresh_every=2))
    assert set(fed) == {len(PROMPTS)}


def test_observers_that_need_no_row_in_particular_see_the_whole_canvas() -> None:
    class Careless(Recorder):
        needs_every_row = False

    lm = tiny_lm(seed=1)
    ids, mask = left_padded(PROMPTS)
    values = ending(lm, gen_length=24, block_length=4, cache="dual", threshold=0.3)
    careless, strict = Careless(), Recorder()
    run(lm, ids, mask, observers=[careless], sparsity=ds.SparsityConfig(p=0.7), **values)
    run(lm, ids, mask, observers=[strict], sparsity=ds.SparsityConfig(p=0.7), **values)
    for (step, mine), (other, theirs) in zip(careless.steps, strict.steps, strict=True):
        assert step == other
        assert torch.equal(mine.ids, theirs.ids)
        assert torch.equal(mine.committed, theirs.committed)
        torch.testing.assert_close(mine.confidence, theirs.confidence)
    assert {keep.shape[0] for _, _, keep, _ in careless.masks} > {keep.shape[0] for _, _, keep, _ in strict.masks}


def test_ended_rows_are_padding_to_those_who_see_them() -> None:
    lm, seen = tiny_lm(seed=1), Recorder()
    ids, mask = left_padded(PROMPTS)
    values = ending(lm, gen_length=24, block_length=4)
    out = run(lm, ids, mask, observers=[seen], sparsity=ds.SparsityConfig(p=1.0), **values)
    assert (out.commit_step == -1).any()
    for _, _, _, context in seen.masks:
        begin = ids.shape[1] + 4 * context.step.block
        ended = (out.ids[:, ids.shape[1] : begin] == values["eos_token_id"]).any(-1)
        assert torch.equal((context.token_class == ds.TokenClass.PADDING).all(-1), ended)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_generations_of_one_model_at_the_same_time_do_not_mix(kind: str) -> None:
    lm = tiny_lm(kind, seed=2)
    values = {"gen_length": 16, "block_length": 4, "cache": "dual", "threshold": 0.3, "execution": "graph"}
    prompts = [random_ids(2, length, seed=number) for number, length in enumerate((5, 5, 5, 5, 6))]
    expected = [run(lm, prompt, None, **values).ids for prompt in prompts]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = run(lm, prompts[number], None, **values).ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(prompts)
    for number, ids in found.items():
        assert torch.equal(ids, expected[number])


def test_flags_are_read_as_they_were_posted() -> None:
    source = torch.tensor([False, False])
    flags = Flags(source)
    flags.post()
    source[0] = True
    flags.post()
    assert flags.read() == [False, False]
    source[1] = True
    assert flags.read() == [True, False]
    flags.post()
    assert flags.forget() == 1
    flags.post()
    assert flags.read() == [True, True]
