"""LLaDA2 checkpoints in the published layout: the plain computation's logits, every tensor used, damage named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.models.checkpoint_config import read_config
from dllm_sparse.models.families import ALIASES, FAMILIES
from dllm_sparse.models.shapes import SHAPES
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.models.weights import expected_slots
from dllm_sparse.types import CheckpointError, DllmSparseError
from tests.families import write_checkpoint
from tests.helpers import Recorder, random_ids
from tests.layouts import llada2, llada2_shapes
from tests.models import plain_moe

BIAS = "model.layers.1.mlp.gate.expert_bias"


def load(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], **options: Any) -> ds.LanguageModel:
    return ds.load(str(write_checkpoint(folder, config, tensors)), device="cpu", **options)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 35),
        ({"block_size": 4, "num_shared_experts": 2, "first_k_dense_replace": 2}, 10),
        ({"block_size": 4, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.25}, 10),
        ({"block_size": 3, "num_hidden_layers": 1}, 7),
        ({"block_size": 4, "num_hidden_layers": 2, "num_experts_per_tok": 1, "num_shared_experts": 0}, 9),
    ],
)
def test_a_checkpoint_has_the_logits_of_the_plain_computation(
    changes: dict[str, Any], length: int, tmp_path: Path
) -> None:
    config, tensors = llada2(**changes)
    lm = load(tmp_path, config, tensors)
    assert (lm.family, lm.kind, lm.config.attention) == ("LLaDA2.0, LLaDA2.1", "diffusion", "block_causal")
    assert (lm.mask_token_id, lm.config.eos_token_id, lm.config.block_length) == (
        250,
        249,
        config.get("block_size", 32),
    )
    assert lm.config.parameters == sum(tensor.numel() for tensor in tensors.values())
    ids = random_ids(1, length, vocabulary=256)
    expected = plain_moe.llada2_logits(ids[0], tensors, config)
    torch.testing.assert_close(lm.logits(ids)[0], expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_a_checkpoint_matters(tmp_path: Path) -> None:
    """Weights where every token sees every expert; the biases, which only choose, where it sees some."""
    ids = random_ids(1, 9, vocabulary=256)
    for changes, used in (({"num_experts_per_tok": 8, "topk_group": 4}, ".weight"), ({}, ".expert_bias")):
        config, tensors = llada2(**changes, block_size=4, num_hidden_layers=2)
        before = load(tmp_path, config, tensors).logits(ids)
        for key in [key for key in tensors if key.endswith(used)]:
            changed = {**tensors, key: tensors[key] * torch.linspace(-0.5, 2, tensors[key].shape[-1])}
            assert not torch.allclose(load(tmp_path, config, changed).logits(ids), before), key
    assert {key.rpartition(".")[2] for key in tensors} == {"weight", "expert_bias"}


def test_logits_are_fp32_and_router_biases_keep_their_precision(tmp_path: Path) -> None:
    config, tensors = llada2()
    lm = load(tmp_path, config, tensors, dtype="bfloat16")
    logits = lm.logits(random_ids(1, 5))
    assert (lm.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(logits, logits.bfloat16().float())  # the product itself is the model's
    bias = lm.transformer.blocks[1].ffn.router.bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors[BIAS])


def test_what_a_config_leaves_out_is_the_official_classs(tmp_path: Path) -> None:
    config, tensors = llada2(num_experts=16, n_group=8, topk_group=4)
    left_out = ("n_group", "topk_group", "routed_scaling_factor", "partial_rotary_factor", "use_qk_norm", "use_bias")
    short = {key: value for key, value in config.items() if key not in left_out}
    assert load(tmp_path / "short", short, tensors).config == load(tmp_path / "whole", config, tensors).config


def test_rotary_facts_may_be_in_rope_parameters(tmp_path: Path) -> None:
    config, tensors = llada2()
    rope = {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.25}
    moved = {key: value for key, value in config.items() if key not in ("rope_theta", "partial_rotary_factor")}
    lm = load(tmp_path, {**moved, "rope_parameters": rope}, tensors)
    assert (lm.config.rotary_dim, lm.config.rope_theta) == (4, 600000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk_group": 5}, "3 experts a token cannot be chosen from 5 of 4 groups of 8 experts"),
        ({"n_group": 3}, "3 groups of 8 experts"),
        ({"n_group": 0}, "n_group is 0; expected a positive integer"),
        ({"num_experts": 10**6}, "names 1000000 experts, but the weights hold only"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; expected an integer from 0"),
        ({"num_shared_experts": "1"}, "num_shared_experts is '1'; expected a"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None; expected a positive integer"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4, but the model has 3 layers"),
        ({"routed_scaling_factor": "x"}, "routed_scaling_factor is 'x'; expected a positive number"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor is 0.2; of the 16 features"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; of the 16 features"),
        ({"score_function": "softmax"}, "score_function is 'softmax'; only 'sigmoid' is supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False; only True is supported"),
        ({"block_size": 0}, "block_size is 0; expected a positive integer"),
        ({"mask_token_id": None}, "must name its mask_token_id"),
        ({"use_bias": True}, "missing tensors: model.layers.0.attention.dense.bias"),
    ],
)
def test_configs_that_make_no_sense_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, tensors = llada2()
    with pytest.raises(DllmSparseError, match=words):
        load(tmp_path, {**config, **changes}, tensors)


@pytest.mark.parametrize(
    "key", [BIAS, "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.shared_experts.up_proj.weight"]
)
def test_missing_tensors_are_named(key: str, tmp_path: Path) -> None:
    config, tensors = llada2()
    del tensors[key]
    with pytest.raises(CheckpointError, match=f"missing tensors: {key}"):
        load(tmp_path, config, tensors)


def test_experts_in_the_dense_layer_are_unexpected(tmp_path: Path) -> None:
    config, tensors = llada2()
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(8, 32)
    with pytest.raises(CheckpointError, match=r"unexpected tensors: model\.layers\.0\.mlp\.gate\.weight"):
        load(tmp_path, config, tensors)


MINI = {
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 157184,
    "mask_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 156892,
}
"""What the public checkpoints' config says otherwise; they leave ids to the defaults."""


def test_the_public_checkpoints_are_read_whole(tmp_path: Path) -> None:
    """The config gives the shape of `bench --shape`, and that shape has exactly the public tensors: 14,813."""
    small, _ = llada2()
    raw = {**small, **MINI}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    family, config, dtype = read_config(tmp_path)
    assert config == SHAPES["llada2.0-mini"]
    assert (dtype, config.rotary_dim, config.mask_token_id) == (torch.bfloat16, 64, 156895)
    with torch.device("meta"):
        slots = dict(expected_slots(Transformer(config), family))
    expected = llada2_shapes(raw)
    assert {key: tuple(slot.shape) for key, slot in slots.items()} == expected
    assert len(expected) == 14_813
    for name in ("llada2.0-mini", "llada2.1-mini"):
        assert FAMILIES[ALIASES[name].family] is family
        assert ALIASES[name].billions == pytest.approx(config.parameters / 1e9, rel=1e-3)


def masked_glu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`plain_moe.glu` of one vector under top-p at 0.6 of what enters it and of what leaves its product."""
    x = x * ds.top_p_mask(x, 0.6)
    opened = gate @ x
    hidden = opened * torch.sigmoid(opened) * (up @ x)
    return down @ (hidden * ds.top_p_mask(hidden, 0.6))


def test_masks_act_inside_every_expert_the_shared_one_and_the_dense_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = llada2(block_size=4, num_shared_experts=2)
    lm, ids, recorder = load(tmp_path, config, tensors), random_ids(1, 10, vocabulary=256), Recorder()
    dense = lm.logits(ids)
    with ds.sparsify(lm, ds.SparsityConfig(p=0.6), observers=(recorder,)) as handle:
        sparse = lm.logits(ids)
    monkeypatch.setattr(plain_moe, "glu", masked_glu)
    expected = plain_moe.llada2_logits(ids[0], tensors, config)
    torch.testing.assert_close(sparse[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    with ds.sparsify(lm, ds.SparsityConfig(p=1.0)):
        assert torch.equal(lm.logits(ids), dense)
    places = {(site.layer, site.expert >= 0) for site, *_ in recorder.masks}
    assert places == {(0, False), (1, False), (1, True), (2, False), (2, True)}
    widths = {(site.expert >= 0, keep.shape[-1]) for site, _, keep, _ in recorder.masks if site.layer == 1}
    assert widths == {(False, 32), (False, 2 * 24), (True, 32), (True, 24)}
    rows = [row for row in handle.counts.by_expert() if row["site"] == "input"]
    for layer in (1, 2):
        assert sum(row["tokens"] for row in rows if row["layer"] == layer and row["expert"] >= 0) == 3 * 10


def test_routing_counts_are_those_of_the_plain_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = llada2(block_size=4)
    lm, ids = load(tmp_path, config, tensors), random_ids(1, 10, vocabulary=256)
    with ds.sparsify(lm, ds.SparsityConfig(p=1.0)) as handle:
        lm.logits(ids)
    counted = {
        (row["layer"], row["expert"]): row["tokens"] for row in handle.counts.by_expert() if row["site"] == "input"
    }
    seen: list[list[int]] = []
    chosen = plain_moe.chosen
    monkeypatch.setattr(plain_moe, "chosen", lambda *a: seen.append(chosen(*a)) or seen[-1])
    plain_moe.llada2_logits(ids[0], tensors, config)
    expected = Counter((1 + call // 10, expert) for call, experts in enumerate(seen) for expert in experts)
    assert {place: tokens for place, tokens in counted.items() if place[1] >= 0} == expected
