"""The one transformer against transformers' own classes: same checkpoint folder, same logits, same greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.models.families.llada import LLADA_KEYS
from dllm_sparse.models.families.llama import LLAMA_KEYS
from tests.helpers import GOLDEN, left_padded, random_ids
from tests.models.random_hf import SHAPE

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "llama-geglu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-reglu": ("Llama", {"hidden_act": "relu"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
}
PROMPTS = [random_ids(1, length, seed=length, vocabulary=96).clamp_min(3)[0] for length in (40, 23, 5)]


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ds.LanguageModel]:
    """A random transformers model with every tensor random, and the same folder loaded here."""
    name, facts = MODELS[request.param]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **facts})
    generator = torch.Generator().manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for key, parameter in theirs.named_parameters():
        if "norm" in key or "bias" in key:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, ds.load(str(folder), device="cpu", dtype="float32")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_logits(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    assert lm.kind == "autoregressive"
    for prompt in PROMPTS:
        close(lm.logits(prompt[None]), theirs(prompt[None]).logits)


def test_logits_of_a_left_padded_batch(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    ids, mask = left_padded(PROMPTS, pad=0)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    close(lm.logits(ids, attention_mask=mask)[mask == 1], expected[mask == 1])


def test_greedy_tokens(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    ids, mask = left_padded(PROMPTS, pad=0)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    sampler = ds.SamplerConfig(gen_length=24, stop_at_eos=True)
    assert torch.equal(ds.generate(lm, prompt_ids=ids, attention_mask=mask, sampler=sampler).ids, expected)


def test_every_parameter_is_counted(pair: tuple[Any, ds.LanguageModel]) -> None:
    theirs, lm = pair
    assert lm.config.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert lm.config.parameters == sum(parameter.numel() for parameter in lm.transformer.parameters())


def test_a_llada_checkpoint_is_a_bidirectional_llama(llada: ds.LanguageModel) -> None:
    """The same tensors under Llama's names, in transformers' class with its causal flag off."""
    from safetensors.torch import load_file

    config = llada.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="sdpa",
        )
    ).eval()
    llama_key = {target: key for key, target in LLAMA_KEYS.items()}
    names = {
        key.replace("{i}", str(layer)): llama_key[target].replace("{i}", str(layer))
        for key, target in LLADA_KEYS.items()
        for layer in range(config.layers)
    }
    stored = load_file(GOLDEN / "llada-tiny" / "model.safetensors")
    theirs.load_state_dict({names[key]: tensor for key, tensor in stored.items()})
    for layer in theirs.model.layers:
        layer.self_attn.is_causal = False
    ids = random_ids(2, 50, vocabulary=256)
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    close(llada.logits(ids), expected)  # not bitwise: query, key and value are one product here


def test_the_golden_llama_is_read_by_both(llama: ds.LanguageModel, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "llama-tiny", dtype=torch.float32)
    ids = random_ids(2, 30, vocabulary=256)
    with torch.no_grad():
        close(llama.logits(ids), theirs(ids).logits)
