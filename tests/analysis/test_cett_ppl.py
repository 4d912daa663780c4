"""CETT-PPL-p% against its definition, the Pareto rules, in both engines and for both kinds of model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.cett import cett_at
from dllm_sparse.analysis.cett_ppl import CANDIDATES, Calibration, cett_config, cett_point, cett_ppl
from dllm_sparse.analysis.heldout import HeldOut, evaluate, held_out
from dllm_sparse.analysis.pareto import ParetoPoint, affordable, pareto
from dllm_sparse.types import UsageError
from tests.helpers import Recorder, own_words, random_ids, tiny_lm
from tests.models.random_hf import random_model

WINDOWS = random_ids(48, 24, seed=8)
KINDS = ["autoregressive", "diffusion"]


def prepared(kind: str, seed: int = 0, **facts: Any) -> tuple[ds.LanguageModel, HeldOut]:
    lm = tiny_lm(kind, seed=seed, **facts)
    return lm, own_words(lm, held_out(lm, WINDOWS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cett", [0.05, 0.2, 0.5])
def test_thresholds_are_the_largest_candidates_within_the_target(kind: str, cett: float) -> None:
    lm, data = prepared(kind)
    calibration = Calibration(lm, data)
    for layer, threshold in enumerate(calibration.thresholds(cett)):
        values, weight = calibration.values[layer], lm.transformer.ffns[layer].down_proj.weight
        norms = values.abs() * weight.norm(dim=0)
        step = (np.quantile(norms.flatten().numpy(), 0.99) - float(norms.min())) / (CANDIDATES - 1)
        assert cett_at(values, weight, threshold).cett <= cett * (1 + 1e-5)
        assert cett_at(values, weight, threshold + 1.01 * step).cett > cett * (1 - 1e-5)


def test_the_static_mask_drops_exactly_the_neurons_below_their_threshold() -> None:
    lm, data = prepared("diffusion")
    thresholds = Calibration(lm, data).thresholds(0.3)
    recorder = Recorder()
    with ds.sparsify(lm, cett_config(thresholds), observers=(recorder,)):
        lm.logits(WINDOWS)
    assert len(recorder.masks) == 2
    for site, values, keep, _ in recorder.masks:
        norms = values.abs() * lm.transformer.ffns[site.layer].column_norms("intermediate")
        assert torch.equal(keep, norms > np.float32(thresholds[site.layer]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_meets_its_line_from_both_sides(kind: str) -> None:
    lm, data = prepared(kind)
    found = cett_ppl([(lm, data)], increase=0.05, tolerance=1e-3)
    dense = evaluate(lm, data).loss
    assert found.dense == (dense,)
    assert found.evaluations == 10  # 2^-10 < 1e-3
    calibration = Calibration(lm, data)

    def ratio(cett: float) -> float:
        return math.exp(evaluate(lm, data, cett_config(calibration.thresholds(cett))).loss - dense)

    assert ratio(found.cett - 6e-4) < 1.05 <= ratio(found.cett + 6e-4)
    assert found.ratios[0] == pytest.approx(ratio(found.cett))


def test_several_checkpoints_share_one_cett() -> None:
    pairs = [prepared("autoregressive", seed) for seed in range(3)]
    joint = cett_ppl(pairs, increase=0.05)
    alone = [cett_ppl([pair], increase=0.05).cett for pair in pairs]
    assert min(alone) <= joint.cett <= max(alone)
    assert float(np.mean(joint.ratios)) == pytest.approx(1.05, abs=0.01)
    point = cett_point(*pairs[0], joint.cett)
    assert math.exp(point.loss - point.dense) == pytest.approx(joint.ratios[0])
    assert point.activation == pytest.approx(1 - np.mean(point.by_layer), abs=1e-9)


def test_both_engines_agree() -> None:
    from tests.helpers import GOLDEN

    windows, found = random_ids(16, 24, vocabulary=250), []
    for engine in ("native", "transformers"):
        lm = ds.load(str(GOLDEN / "llama-tiny"), device="cpu", engine=engine)  # type: ignore[arg-type]
        found.append(cett_point(lm, held_out(lm, windows), 0.2))
    assert found[0].sparsity == pytest.approx(found[1].sparsity, abs=1e-3)
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-3)


def test_experts_are_refused_and_so_are_impossible_increases() -> None:
    lm = ds.wrap(random_model("olmoe"))
    with pytest.raises(UsageError, match="dense FFNs"):
        Calibration(lm, held_out(lm, WINDOWS))
    with pytest.raises(UsageError, match="increase"):
        cett_ppl([prepared("diffusion")], increase=0.0)


def test_a_relu_model_has_exact_zeros_and_the_pareto_rules_start_there() -> None:
    lm, data = prepared("autoregressive", activation="relu")
    points = pareto(lm, data)
    assert {point.rule for point in points} == {"cett", "top_p", "top_k", "top_k_gate", "fat_eps", "zero"}
    zero = next(point for point in points if point.rule == "zero")
    assert 0.3 < zero.sparsity < 0.7
    assert zero.ratio == 1.0
    assert all(point.sparsity >= zero.sparsity - 1e-9 for point in points if point.rule in ("fat_eps", "cett"))
    for rule in ("cett", "top_p", "fat_eps"):
        ordered = sorted((p for p in points if p.rule == rule), key=lambda p: p.knob)
        sparsity = [p.sparsity for p in ordered]
        assert sparsity == sorted(sparsity, reverse=rule == "top_p")


def test_affordable_sparsity_is_read_off_the_line() -> None:
    def point(rule: Any, sparsity: float, ratio: float) -> ParetoPoint:
        return ParetoPoint(rule, "gate", 0.0, sparsity, 0.0, ratio)

    points = [point("zero", 0.2, 1.0), point("top_p", 0.6, 1.03), point("top_p", 0.4, 1.01), point("top_k", 0.5, 1.005)]
    found = affordable(points, 0.02)
    assert found == {"zero": 0.2, "top_p": pytest.approx(0.5), "top_k": None}
    assert affordable(points, 0.005)["top_p"] == pytest.approx(0.3)
