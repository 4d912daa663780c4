"""CETT against the golden fixtures and against its definition."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.cett import cett_at, neuron_outputs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "cett.json").read_text())
LAYERS = [
    pytest.param(case["activation"], layer, id=f"{case['name']}-{index}")
    for case in GOLDEN["cases"]
    for index, layer in enumerate(case["layers"])
]


def weights(layer: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(layer[name], dtype=torch.float64) for name in ("w_gate", "w_up", "w_down", "x"))


@pytest.mark.parametrize(("activation", "layer"), LAYERS)
def test_threshold_for_a_target(activation: str, layer: dict[str, Any]) -> None:
    for target in layer["targets"]:
        result = ds.cett_threshold(*weights(layer), cett=target["target"], activation=activation)
        crossings = [("threshold_low", "threshold_high", "sparsity")]
        if not target["monotone"]:
            crossings.append(("first_crossing_low", "first_crossing_high", "first_crossing_sparsity"))
        assert any(
            target[low] - 1e-12 <= result.threshold < target[high] and result.sparsity == pytest.approx(target[share])
            for low, high, share in crossings
        )
        assert result.cett <= target["target"]


@pytest.mark.parametrize(("activation", "layer"), LAYERS)
def test_cett_at_a_threshold(activation: str, layer: dict[str, Any]) -> None:
    gate, up, down, x = weights(layer)
    intermediate = neuron_outputs(gate, up, x, activation)
    for point in layer["at_threshold"]:
        result = cett_at(intermediate, down, point["threshold"])
        assert result.cett == pytest.approx(point["cett"], abs=1e-5)
        assert result.sparsity == pytest.approx(point["sparsity"])


def test_relu_zeros_are_dropped_for_free() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, down, x = (torch.randn(s, generator=generator) for s in ((24, 8), (24, 8), (8, 24), (10, 8)))
    result = ds.cett_threshold(gate, up, down, x, cett=0.0, activation="relu")
    zeros = (neuron_outputs(gate, up, x, "relu") == 0).double().mean()
    assert (result.threshold, result.cett) == (0.0, 0.0)
    assert result.sparsity == pytest.approx(float(zeros))


def test_everything_may_go_at_target_one() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up, down, x = (torch.randn(s, generator=generator) for s in ((24, 8), (24, 8), (8, 24), (10, 8)))
    assert ds.cett_threshold(gate, up, down, x, cett=1.0).sparsity == 1.0


@pytest.mark.parametrize("options", [{"cett": 1.5}, {"cett": -0.1}, {"activation": "tanh"}])
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="allowed"):
        ds.cett_threshold(eye, eye, eye, eye, **options)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_threshold(place: int, value: float) -> None:
    tensors = [torch.eye(4) for _ in range(4)]
    tensors[place][0, 0] = value
    with pytest.raises(ds.NonFiniteActivations, match="NaN or Inf among the neurons' outputs"):
        ds.cett_threshold(*tensors)
