"""Mixtures of experts: router and experts against loops, checkpoints in the published layout against plain logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.kernels.routing import RouterRule, choose_experts, sort_pairs
from dllm_sparse.models.config import MoEConfig
from dllm_sparse.models.moe import MoEFeedForward
from dllm_sparse.types import CheckpointError, DllmSparseError, UsageError
from tests.families import write_checkpoint
from tests.helpers import random_ids, tiny_lm
from tests.layouts import llada_moe
from tests.models import plain_moe

SOFTMAX = MoEConfig(experts=6, experts_per_token=2, expert_width=10)
SIGMOID = MoEConfig(
    experts=8,
    experts_per_token=3,
    expert_width=10,
    shared_experts=2,
    dense_layers=1,
    router="sigmoid",
    groups=4,
    groups_per_token=2,
    expert_bias=True,
    renormalise=True,
    routed_scaling=2.5,
)


def facts(moe: MoEConfig) -> dict[str, Any]:
    return {
        "count": moe.experts_per_token,
        "sigmoid": moe.router == "sigmoid",
        "groups": moe.groups,
        "entered": moe.groups_per_token,
        "renormalise": moe.renormalise,
        "scaling": moe.routed_scaling,
    }


def named_weights(ffn: MoEFeedForward) -> dict[str, torch.Tensor]:
    """The layer's weights under the names the plain computation reads."""
    weights = {"mlp.gate.weight": ffn.router.weight}
    if ffn.router.bias is not None:
        weights["mlp.gate.expert_bias"] = ffn.router.bias
    parts = {f"mlp.experts.{e}": (w, ffn.experts.down_proj[e]) for e, w in enumerate(ffn.experts.gate_up_proj)}
    if ffn.shared is not None:
        parts["mlp.shared_experts"] = (ffn.shared.gate_up_proj.weight, ffn.shared.down_proj.weight)
    for root, (both, down) in parts.items():
        gate, up = both.chunk(2)
        weights |= {f"{root}.gate_proj.weight": gate, f"{root}.up_proj.weight": up, f"{root}.down_proj.weight": down}
    return weights


@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID, MoEConfig(experts=5, experts_per_token=5, expert_width=3)])
def test_a_layer_is_what_loops_over_its_experts_compute(moe: MoEConfig) -> None:
    lm = tiny_lm(moe=moe, layers=2)
    ffn = lm.transformer.blocks[1].ffn
    assert isinstance(ffn, MoEFeedForward)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    weights = named_weights(ffn)
    expected = torch.stack([plain_moe.mixture(token, weights, "mlp", facts(moe)) for token in x.flatten(0, 1)])
    torch.testing.assert_close(ffn(x).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID])
def test_parameters_of_a_mixture_are_counted(moe: MoEConfig) -> None:
    lm = tiny_lm(moe=moe, layers=3, mlp_bias=False)
    assert lm.config.parameters == sum(parameter.numel() for parameter in lm.transformer.parameters())
    dense = [hasattr(block.ffn, "gate_up_proj") for block in lm.transformer.blocks]
    assert dense == [layer < moe.dense_layers for layer in range(3)]


def test_the_bias_of_a_router_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    routing = choose_experts(logits, bias, RouterRule("sigmoid", 2, scaling=2.0))
    assert routing.experts.tolist() == [[3, 0]]
    torch.testing.assert_close(routing.weights, 2 * torch.sigmoid(torch.tensor([[-1.0, 2.0]])))


def test_groups_without_the_best_sum_of_two_stay_out() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.6, 0.1]])
    rule = RouterRule("sigmoid", 2, groups=3, groups_per_token=1)
    assert choose_experts(scores.logit(eps=1e-6), None, rule).experts.tolist() in ([[2, 3]], [[3, 2]])


def test_negative_scores_still_keep_a_token_inside_its_groups() -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([-5.0, -5.0, -9.0, -9.0])
    rule = RouterRule("sigmoid", 2, groups=2, groups_per_token=1)
    assert set(choose_experts(logits, bias, rule).experts[0].tolist()) == {0, 1}


def test_pairs_are_in_the_order_of_the_experts() -> None:
    experts = torch.tensor([[4, 0], [0, 2], [2, 4]])
    pairs = sort_pairs(experts, 6)
    assert experts.flatten()[pairs.order].tolist() == [0, 0, 2, 2, 4, 4]
    assert pairs.order.tolist() == [1, 2, 3, 4, 0, 5]
    assert pairs.ends.tolist() == [2, 2, 4, 4, 6, 6]


def test_the_bias_of_a_router_keeps_its_precision() -> None:
    lm = tiny_lm(moe=SIGMOID, layers=2)
    before = lm.transformer.blocks[1].ffn.router.bias.clone()
    lm.transformer.to(torch.bfloat16)
    router = lm.transformer.blocks[1].ffn.router
    assert (router.weight.dtype, router.bias.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(router.bias, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True, "num_experts_per_tok": 3}])
def test_a_llada_moe_checkpoint_has_the_logits_of_the_plain_computation(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config, tensors = llada_moe(**changes)
    lm = ds.load(str(write_checkpoint(tmp_path, config, tensors)), device="cpu")
    assert (lm.family, lm.kind, lm.mask_token_id, lm.config.eos_token_id) == ("LLaDA-MoE", "diffusion", 250, 249)
    assert lm.config.parameters == sum(tensor.numel() for tensor in tensors.values())
    ids = random_ids(1, 9, vocabulary=256)
    expected = plain_moe.llada_moe_logits(ids[0], tensors, config)
    torch.testing.assert_close(lm.logits(ids)[0], expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_a_llada_moe_checkpoint_matters(tmp_path: Path) -> None:
    config, tensors = llada_moe(num_experts_per_tok=6)  # every expert sees every token
    ids = random_ids(1, 6, vocabulary=256)
    before = ds.load(str(write_checkpoint(tmp_path, config, tensors)), device="cpu").logits(ids)
    for key in [key for key in tensors if "layers.1" in key or "layers" not in key]:
        changed = {**tensors, key: tensors[key] * torch.linspace(0.5, 2, tensors[key].shape[-1])}
        lm = ds.load(str(write_checkpoint(tmp_path, config, changed)), device="cpu")
        assert not torch.allclose(lm.logits(ids), before), key


EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(EXPERT), ("missing tensors", EXPERT)),
        (lambda tensors: tensors.pop("model.layers.0.mlp.gate.weight"), ("missing tensors", "mlp.gate.weight")),
        (lambda tensors: tensors.update({EXPERT: torch.zeros(23, 32)}), (EXPERT, "[23, 32]", "[24, 32]")),
        (
            lambda tensors: tensors.update({EXPERT.replace("4", "6"): torch.zeros(24, 32)}),
            ("unexpected tensors", "experts.6.up_proj"),
        ),
    ],
)
def test_tensors_of_experts_are_named_when_they_are_wrong(edit: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    config, tensors = llada_moe()
    edit(tensors)
    with pytest.raises(CheckpointError) as caught:
        ds.load(str(write_checkpoint(tmp_path, config, tensors)), device="cpu")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "9 experts a token cannot be chosen"),
        ({"expert_intermediate_size": None}, "expert_intermediate_size is None; expected a positive integer"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid'"),
    ],
)
def test_mixtures_that_make_no_sense_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, tensors = llada_moe()
    with pytest.raises(DllmSparseError, match=words):
        ds.load(str(write_checkpoint(tmp_path, {**config, **changes}, tensors)), device="cpu")


@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID])
def test_masks_inside_experts_take_the_plain_path(moe: MoEConfig) -> None:
    lm = tiny_lm(moe=moe)
    options = {"gen_length": 8, "block_length": 4, "cache": "dual"}
    eager, graph = (ds.SamplerConfig(**options, execution=kind) for kind in ("eager", "graph"))  # type: ignore[arg-type]
    dense = [ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=sampler).ids for sampler in (eager, graph)]
    assert torch.equal(*dense)
    with pytest.raises(UsageError, match="plain path"):
        ds.generate(lm, prompt_ids=[[5, 6, 7]], sampler=graph, sparsity=ds.SparsityConfig(p=0.6))
    ids = random_ids(2, 9)
    before = lm.logits(ids)
    with ds.sparsify(lm, ds.SparsityConfig(p=1.0)):
        assert torch.equal(lm.logits(ids), before)
