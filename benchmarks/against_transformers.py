"""transformers' greedy generation, eager and with its compiled static cache, beside ours on the same weights.

    python benchmarks/against_transformers.py --shape llama-3.1-8b [--execution auto] [--out FILE]

The family is Llama's (Llama, SmolLM) or Qwen3's by the shape's facts. Every side generates the same number of tokens
from the same prompts; end-of-text is switched off. On a CPU transformers does not compile, and the line says so.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import transformers
from peers import Run, our_model, our_run, parser, race, share_weights

import dllm_sparse as ds
from dllm_sparse.models.config import TransformerConfig


def main() -> None:
    args = parser(__doc__).parse_args()
    lm = our_model(args)
    if lm.kind != "autoregressive":
        raise SystemExit("transformers knows autoregressive models only; use against_llada.py or against_fast_dllm.py")
    ours, prompts, facts = our_run(lm, args, ds.SamplerConfig(gen_length=args.gen_length))
    family, model_class, config = their_config(lm.config, args.prompt_length + args.gen_length)
    model = share_weights(lm, family, lambda: model_class(config).to(lm.dtype))
    restore_rotary(model, lm)
    static = "static cache, compiled" if lm.device.type == "cuda" else "static cache, not compiled on a CPU"
    theirs = {
        "transformers eager": generation(model, prompts, args.gen_length, cache="dynamic"),
        f"transformers {static}": generation(model, prompts, args.gen_length, cache="static"),
    }
    race(ours, theirs, lm, args, facts)


def their_config(config: TransformerConfig, length: int) -> tuple[str, Any, Any]:
    """Our family's key, transformers' class and its configuration for the same facts."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        rope |= {"rope_type": scaling.pop("kind"), **scaling}
        rope["original_max_position_embeddings"] = rope.pop("original_max_positions")
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max(config.max_positions, length),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.qk_norm:
        return "qwen3", transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**values)
    if config.qkv_bias and not config.output_bias:
        return "qwen2", transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**values)
    values |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return "llama", transformers.LlamaForCausalLM, transformers.LlamaConfig(**values)


def restore_rotary(model: torch.nn.Module, lm: ds.LanguageModel) -> None:
    """The rotary frequencies are no weights: a model made on the meta device has to compute them again."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(rotary.config).to(lm.device)


def generation(model: Any, prompts: torch.Tensor, tokens: int, *, cache: str) -> Run:
    """Greedy generation of exactly `tokens` tokens; the first call compiles where transformers does."""

    def run() -> tuple[torch.Tensor, int]:
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation=cache,
        )
        return ids, tokens

    return run


if __name__ == "__main__":
    main()
