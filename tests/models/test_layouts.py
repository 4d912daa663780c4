"""Every row of the layout table names modules that transformers' own class of that architecture has."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dllm_sparse.models.layouts import LAYOUTS, find_ffns

COUNT_NAMES = ("num_hidden_layers", "n_layer", "num_layers")


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
def test_the_paths_exist(model_type: str) -> None:
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:
        pytest.skip("this version of transformers does not have it")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        pytest.skip("no causal LM by this name of its own")
    text = config.get_text_config(decoder=True)
    for name in COUNT_NAMES:
        if hasattr(text, name):
            setattr(text, name, 1)
    text.layer_types = None if not getattr(text, "layer_types", None) else text.layer_types[:1]
    # Some default configurations leave these to the checkpoint.
    if getattr(text, "head_dim", 0) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    if getattr(text, "num_key_value_heads", 0) is None:
        text.num_key_value_heads = text.num_attention_heads
    text.vocab_size, text.pad_token_id = 64, None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_ffns(model, text.model_type, 1, text.hidden_size)
    assert len(found.ffns) >= 1
    for ffn in found.ffns:
        if ffn.layout is None:
            assert ffn.experts is not None
            continue
        assert "known architecture" in found.sentences[-1]
        for path in (ffn.layout.module, ffn.layout.gate, ffn.layout.first, ffn.layout.down, ffn.layout.activation):
            assert path is None or ffn.root.get_submodule(path) is not None
