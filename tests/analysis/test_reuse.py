import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.comparisons import relative_change
from dllm_sparse.analysis.reuse import measure_reuse
from dllm_sparse.analysis.token_reuse import TokenReuse
from dllm_sparse.sparsity.sparsifier import overriding, sparsify
from dllm_sparse.types import Observer, Step, StepContext, TokenClass, UsageError

IDS = torch.tensor([[5, 6, 7, 8], [3, 30, 4, 40]])
PADDED = (torch.tensor([[0, 5, 6], [9, 8, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]]))
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4)


def rows_of(lm, sparsity, **options):
    rows = measure_reuse(lm, [(IDS, None), PADDED], SAMPLER, sparsity, **options)
    return {row.variant: row for row in rows}


def test_without_a_mask_and_without_a_tolerance_nothing_differs(llada):
    rows = rows_of(llada, ds.SparsityConfig(p=1.0), refresh=(1,), taus=(0.0,))
    for row in rows.values():
        assert (row.kl, row.token_agreement, row.position_agreement) == (0, 1, 1)
        assert (row.tokens_equal, row.exact_match) == (1, 1)
    assert rows["masks every 1 steps"].ffn_work > 0.99


class Trajectory(Observer):
    """Collects the canvas before every step and what the step committed."""

    def __init__(self):
        self.before, self.committed, self.masked, self._ids = [], [], [], None

    def on_start(self, ids, token_class):
        self._ids = ids.clone()

    def on_step(self, step, result):
        self.before.append(self._ids)
        self.committed.append(result.committed)
        self._ids = result.ids.clone()


def test_fidelity_is_measured_on_the_dense_trajectory(llada):
    sparsity = ds.SparsityConfig(p=0.6)
    dense = Trajectory()
    ds.generate(llada, prompt_ids=IDS, sampler=SAMPLER, observers=(dense,))
    divergences, same = [], []
    for step, (ids, committed) in enumerate(zip(dense.before, dense.committed, strict=True)):
        with sparsify(llada, sparsity):
            masked = llada.logits(ids)
        exact, end = llada.logits(ids), 4 + 4 * (step // 4 + 1)
        kl = torch.nn.functional.kl_div(
            masked.log_softmax(-1), exact.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        divergences.append(kl[:, :end][ids[:, :end] == llada.mask_token_id])
        same.append((masked.argmax(-1) == exact.argmax(-1))[committed])
    row = measure_reuse(llada, [(IDS, None)], SAMPLER, sparsity, refresh=(1,), taus=())[0]
    assert row.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert row.token_agreement == pytest.approx(float(torch.cat(same).double().mean()))


def test_final_agreement_is_that_of_free_decoding(llada):
    sparsity = ds.SparsityConfig(p=0.6, refresh_every=2)
    dense = ds.generate(llada, prompt_ids=IDS, sampler=SAMPLER).ids[:, 4:]
    free = ds.generate(llada, prompt_ids=IDS, sampler=SAMPLER, sparsity=sparsity)
    row = measure_reuse(llada, [(IDS, None)], SAMPLER, sparsity, refresh=(2,), taus=())[0]
    same = free.ids[:, 4:] == dense
    assert row.tokens_equal == pytest.approx(float(same.double().mean()))
    assert row.exact_match == pytest.approx(float(same.all(-1).double().mean()))
    assert row.selections == 0.5
    assert list(row.kl_by_age) == [0, 1]


def test_older_masks_and_larger_tolerances_save_more_and_cost_more(llada):
    rows = rows_of(llada, ds.SparsityConfig(p=0.7), refresh=(1, 4), taus=(0.01, 0.5))
    assert rows["masks every 4 steps"].kl > rows["masks every 1 steps"].kl
    small, large = rows["FFN outputs, tau 0.01"], rows["FFN outputs, tau 0.5"]
    assert small.kl < large.kl
    assert large.ffn_work < small.ffn_work < 1


def test_caches_and_guidance_are_left_out_of_the_comparison(llada):
    sampler = ds.SamplerConfig(gen_length=8, block_length=4, cache="dual", cfg_scale=1.0)
    options = {"refresh": (1,), "taus": (0.1,)}
    with_cache = measure_reuse(llada, [(IDS, None)], sampler, ds.SparsityConfig(p=0.7), **options)
    assert with_cache == measure_reuse(llada, [(IDS, None)], SAMPLER, ds.SparsityConfig(p=0.7), **options)


def test_an_autoregressive_model_reuses_masks_only(llama):
    rows = rows_of(llama, ds.SparsityConfig(p=1.0), refresh=(1,))
    assert list(rows) == ["masks every 1 steps"]
    row = rows["masks every 1 steps"]
    assert (row.kl, row.token_agreement, row.exact_match) == (0, 1, 1)
    assert row.position_agreement is None
    masked = rows_of(llama, ds.SparsityConfig(p=0.6), refresh=(1, 4))
    assert masked["masks every 4 steps"].kl_by_age[3] > 0


def test_the_model_is_left_as_it_was(llada):
    rows_of(llada, ds.SparsityConfig(p=0.7), refresh=(1,), taus=(0.1,))
    assert all(ffn.override is None for ffn in llada.transformer.ffns)
    with overriding(llada, TokenReuse(0.1)), pytest.raises(UsageError, match="already sparsified"):
        rows_of(llada, ds.SparsityConfig(p=0.7), refresh=(1,), taus=())


def test_only_tokens_that_moved_are_computed(llada):
    ffn, tau = llada.transformer.ffns[0], 0.1
    reuse = TokenReuse(tau)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 6, 64, generator=generator)
    classes = torch.full((1, 6), TokenClass.MASKED, dtype=torch.int8)
    classes[0, 0] = TokenClass.PADDING
    reuse(ffn, first, StepContext(Step(0, 2), classes))
    second = first * torch.tensor([2, 1, 1.05, 1.2, 1, 0.5]).view(1, 6, 1)
    out = reuse(ffn, second, StepContext(Step(1, 2), classes))
    moved = relative_change(second, first)[0] > tau
    assert moved.tolist() == [True, False, False, True, False, True]
    expected = torch.where(moved[:, None], ffn(second), ffn(first))
    assert torch.allclose(out, expected, atol=1e-5)
    assert reuse.tokens.sum(0).tolist() == [12, 9]
    assert reuse.work() == 7 / 10  # padding does not count


def test_small_moves_add_up_until_the_output_is_computed_anew(llada):
    ffn, reuse = llada.transformer.ffns[0], TokenReuse(0.1)
    x = torch.ones(1, 1, 64)
    classes = torch.full((1, 1), TokenClass.DECODED, dtype=torch.int8)
    for step in range(4):
        reuse(ffn, x * (1 + 0.06 * step), StepContext(Step(step, 4), classes))
    assert reuse.tokens[TokenClass.DECODED].tolist() == [4, 2]  # at the start, and after two moves of 6 %
