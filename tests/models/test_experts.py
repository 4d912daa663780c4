"""Packed experts under taps: routing counts, masks per expert, the same result as transformers' own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dllm_sparse as ds
from dllm_sparse.types import UsageError
from tests.helpers import Recorder, random_ids
from tests.models.random_hf import MIXTURES, random_model

IDS = random_ids(2, 17, seed=3, vocabulary=96).clamp_min(3)
MASK = torch.ones_like(IDS)
MASK[1, :6] = 0


def routed(model: Any, layer: int, mask: torch.Tensor) -> torch.Tensor:
    """Tokens per expert, counted from the router's own logits."""
    logits = model(IDS, attention_mask=mask, output_router_logits=True).router_logits[layer]
    chosen = logits.topk(2, dim=-1).indices[mask.flatten().bool()]
    return torch.bincount(chosen.flatten(), minlength=6)


@pytest.mark.parametrize("name", MIXTURES)
def test_routing_counts_leave_padding_out(name: str) -> None:
    model = random_model(name)
    lm = ds.wrap(model)
    with ds.sparsify(lm, ds.SparsityConfig(p=1.0)) as handle:
        lm.transformer(IDS, attention_mask=MASK, context=_context(MASK))
    rows = [row for row in handle.counts.by_expert() if row["site"] == "input"]
    for layer in range(2):
        counts = torch.zeros(6, dtype=torch.int64)
        for row in rows:
            if row["layer"] == layer:
                counts[row["expert"]] = row["tokens"]
        assert torch.equal(counts, routed(model, layer, MASK))


def _context(mask: torch.Tensor) -> Any:
    classes = torch.where(mask == 0, ds.TokenClass.PADDING, ds.TokenClass.PROMPT).to(torch.int8)
    return ds.StepContext(ds.Step(0, 1), classes)


@pytest.mark.parametrize("name", MIXTURES)
def test_one_masked_layer_against_a_plain_computation(name: str) -> None:
    """Layer 0's experts recomputed from its weights, router and masked values."""
    model = random_model(name)
    lm, recorder, block = ds.wrap(model), Recorder(), model.model.layers[0].mlp
    caught: dict[str, Any] = {}
    block.experts.register_forward_hook(lambda m, args, out: caught.update(args=args, out=out))
    with ds.sparsify(lm, ds.SparsityConfig(p=0.6), observers=(recorder,)):
        lm.logits(IDS)
        x, index, weights = caught["args"]
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for place, expert in enumerate(index[token].tolist()):
            v = x[token] * ds.top_p_mask(x[token], 0.6)
            gate, up = (block.experts.gate_up_proj[expert] @ v).chunk(2)
            hidden = F.silu(gate) * up
            hidden = hidden * ds.top_p_mask(hidden, 0.6)
            expected[token] += weights[token, place] * (block.experts.down_proj[expert] @ hidden)
    torch.testing.assert_close(caught["out"], expected, rtol=1e-4, atol=1e-5)
    experts = {site.expert for site, *_ in recorder.masks if site.layer == 0}
    assert set(index.unique().tolist()) <= experts
    assert (-1 in experts) == (name == "qwen2_moe")  # its shared expert is a dense FFN beside the others


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_implementation_is_restored(name: str) -> None:
    model = random_model(name)
    lm, before = ds.wrap(model), model.config._experts_implementation
    with ds.sparsify(lm, ds.SparsityConfig(p=0.6)):
        assert model.config._experts_implementation == "dllm_sparse"
    assert model.config._experts_implementation == before


def test_what_experts_cannot_do_is_said() -> None:
    lm = ds.wrap(random_model("olmoe"))
    for options in ({"scope": "sequence"}, {"refresh_every": 2}, {"gate_input": "dense"}):
        with pytest.raises(UsageError, match="inside them take scope"), ds.sparsify(lm, ds.SparsityConfig(**options)):  # type: ignore[arg-type]
            pass
    assert all(ffn.override is None for ffn in lm.transformer.ffns)


def test_all_four_sites_of_an_expert() -> None:
    lm = ds.wrap(random_model("olmoe"))
    seen: dict[str, Any] = {}
    for sites in ("gate", "up", "intermediate"):
        recorder = Recorder()
        with ds.sparsify(lm, ds.SparsityConfig(p=0.5, sites=sites), observers=(recorder,), apply=False):  # type: ignore[arg-type]
            lm.logits(IDS)
        seen[sites] = {site[::2]: values for site, values, _, _ in recorder.masks}
    for place, values in seen["intermediate"].items():
        torch.testing.assert_close(seen["gate"][place] * seen["up"][place], values)
