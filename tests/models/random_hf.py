"""Tiny random checkpoints of many architectures, built by transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
_EXPERTS = {**SHAPE, "num_experts": 6, "num_experts_per_tok": 2}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SHAPE, "num_key_value_heads": 4}),
    "gemma3": ("Gemma3", {**SHAPE, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("Olmo2", SHAPE),
    "phi3": ("Phi3", SHAPE),
    "phi": ("Phi", SHAPE),
    "gpt_neox": ("GPTNeoX", _PLAIN),
    "gpt2": (
        "GPT2",
        {
            **{key: SHAPE[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")},
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128},
        },
    ),
    "opt": ("OPT", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {**_PLAIN, "n_layer": 2, "n_head": 4}),
    "olmoe": ("Olmoe", _EXPERTS),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    ),
}
MIXTURES = ("olmoe", "qwen3_moe", "qwen2_moe")


def random_model(name: str, **changes: Any) -> Any:
    """A seeded random causal LM; norms and biases random too, so that nothing is tested on ones and zeros."""
    title, facts = CLASSES[name]
    config_title = "Gemma3Text" if name == "gemma3" else title
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{title}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(getattr(transformers, f"{config_title}Config")(**{**facts, **changes}))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "experts." in key or "mlp.gate.weight" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if "norm" in key or "bias" in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval().requires_grad_(False)


def saved_model(name: str, folder: Path, **changes: Any) -> Any:
    """The same, written to a folder."""
    model = random_model(name, **changes)
    model.save_pretrained(folder)
    return model


def random_denoiser(canvas_length: int = 8, **changes: Any) -> Any:
    """A seeded random DiffusionGemma: 6 steps for each canvas, a few tokens accepted a step."""
    text = {**SHAPE, "head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"sliding_window": 16, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24, **changes}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {**sizes, "num_hidden_layers": 1, "head_dim": 8, "position_embedding_size": 16}
    config = transformers.DiffusionGemmaConfig(
        text_config=transformers.DiffusionGemmaTextConfig(**text),
        vision_config=transformers.Gemma4VisionConfig(**vision),
        canvas_length=canvas_length,
        initializer_range=text["initializer_range"],
        image_token_id=text["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "norm" in key or "scale" in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    bound = transformers.models.diffusion_gemma.generation_diffusion_gemma.EntropyBoundSamplerConfig(entropy_bound=6.0)
    model.generation_config.update(max_denoising_steps=6, sampler_config=bound, pad_token_id=text["pad_token_id"])
    return model.eval().requires_grad_(False)
