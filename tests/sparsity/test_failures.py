"""What the sparsifier leaves behind, and how it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.types import NonFiniteActivations, UsageError
from tests.helpers import Recorder, tiny_lm
from tests.sparsity.sampling import PROMPT, decode


class Broken(Recorder):
    """An observer that fails at its third mask, in the middle of a forward."""

    def on_mask(self, *offered: Any) -> None:
        super().on_mask(*offered)
        if len(self.masks) == 3:
            raise KeyboardInterrupt


class Fragile(FeedForward):
    """A layer that cannot be sparsified."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "override" and value is not None:
            raise RuntimeError("no")
        super().__setattr__(name, value)


def attributes(lm: ds.LanguageModel) -> list[dict[str, Any]]:
    """Everything every module holds, besides its parameters and children."""
    return [
        {key: value for key, value in vars(module).items() if not isinstance(value, Tensor)}
        for module in lm.transformer.modules()
    ]


def test_nothing_is_left_behind() -> None:
    lm = tiny_lm()
    before, dense = attributes(lm), lm.logits(PROMPT)
    config = ds.SparsityConfig(p=0.5)

    def is_clean() -> bool:
        return attributes(lm) == before and torch.equal(lm.logits(PROMPT), dense)

    with ds.sparsify(lm, config):
        assert not is_clean()
    assert is_clean()
    with pytest.raises(ZeroDivisionError), ds.sparsify(lm, config):
        raise ZeroDivisionError
    assert is_clean()
    with pytest.raises(KeyboardInterrupt):
        decode(lm, config, observers=[Broken()])
    assert is_clean()
    with pytest.raises(UsageError, match="gen_length"):
        ds.generate(lm, prompt_ids=PROMPT, sampler=ds.SamplerConfig(gen_length=512), sparsity=config)
    assert is_clean()


def test_nothing_is_left_behind_when_entering_fails_half_way() -> None:
    lm = tiny_lm()
    lm.transformer.blocks[1].ffn = Fragile(lm.config, 1)
    with pytest.raises(RuntimeError, match="no"), ds.sparsify(lm, ds.SparsityConfig()):
        pytest.fail("the block must not run")
    assert all(ffn.override is None for ffn in lm.transformer.ffns)


def test_nested_blocks_are_refused_and_sequential_ones_fine() -> None:
    lm, config = tiny_lm(), ds.SparsityConfig(p=0.5)
    with ds.sparsify(lm, config):
        first = lm.logits(PROMPT)
        with pytest.raises(UsageError, match="already sparsified"), ds.sparsify(lm, config):
            pytest.fail("the inner block must not run")
        with pytest.raises(UsageError, match="already sparsified"):
            decode(lm, config)
        assert torch.equal(lm.logits(PROMPT), first)
    with ds.sparsify(lm, config):
        assert torch.equal(lm.logits(PROMPT), first)


def test_nan_weights_are_reported_with_layer_site_and_step() -> None:
    for weight, sites, message in (
        ("blocks.1.ffn.gate_up_proj.weight", "all_inputs", "layer 1, site intermediate, step 0"),
        ("blocks.0.ffn.down_proj.weight", "all_inputs", "layer 1, site input, step 0"),
        ("blocks.1.ffn.gate_up_proj.weight", "gate", "layer 1, site gate, step 0"),
        ("blocks.0.attention_norm.weight", "all_linear", "layer 0, site attention_input, step 0"),
        ("blocks.1.attention.qkv_proj.weight", "all_linear", "layer 1, site attention_output, step 0"),
    ):
        for scope in ("token", "group", "sequence"):
            for p in (0.5, 1.0):
                lm = tiny_lm()
                lm.transformer.get_parameter(weight).view(-1)[0] = torch.nan
                config = ds.SparsityConfig(p=p, sites=sites, scope=scope)  # type: ignore[arg-type]
                with pytest.raises(NonFiniteActivations, match=message):
                    decode(lm, config)


@pytest.mark.parametrize("p", [None, 0.5])
def test_nan_that_appears_later_is_reported_with_its_step(p: float | None) -> None:
    """The tokens committed first get a NaN embedding, so that step 1 is the first to see it."""
    config = None if p is None else ds.SparsityConfig(p=p)
    lm, seen = tiny_lm(seed=2), Recorder()
    decode(lm, config, observers=[seen])
    committed = seen.steps[0][1].ids[seen.steps[0][1].committed]
    assert not torch.isin(committed, PROMPT).any()
    lm.transformer.embedding.weight[committed] = torch.nan
    with pytest.raises(NonFiniteActivations, match="layer 0, site input, step 1"):
        decode(lm, config)
