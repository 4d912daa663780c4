"""What `dllm_sparse/doctor/golden.json` must hold: logits of the bundled models by transformers' Llama in fp64.

`python -m tests.doctor.golden` writes the file; needed only when the bundled weights change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_sparse.doctor.model_checks import GOLDEN

MODELS = Path(GOLDEN).parents[1] / "models" / "bundled"
MASK = 2
TEXT = [0, 1205, 731, 19, 402, 88, 3000, 511, 64, 977, 2048, 5, 130, 4095, 260, 700]
DIFFUSION_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.blocks": "model.layers",
    "attn_out": "self_attn.o_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def golden() -> dict[str, Any]:
    """Ids, and at the last positions the four largest logits and the log of the sum of all exponentials."""
    masked = [*TEXT[:8], MASK, MASK, *TEXT[8:12], *[MASK] * 6]
    return {"tiny-diffusion": _values("tiny-diffusion", masked), "tiny-ar": _values("tiny-ar", TEXT)}


def _values(name: str, ids: list[int]) -> dict[str, Any]:
    model = _llama(name)
    both_ways = torch.zeros(1, 1, len(ids), len(ids), dtype=torch.float64) if name == "tiny-diffusion" else None
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), attention_mask=both_ways).logits[0]
    assert logits.dtype == torch.float64
    positions = list(range(len(ids) - 8, len(ids)))
    largest = logits[positions].topk(4)
    return {
        "ids": ids,
        "positions": positions,
        "tokens": largest.indices.tolist(),
        "logits": [[round(value, 6) for value in row] for row in largest.values.tolist()],
        "log_sum_exp": [round(value, 6) for value in logits[positions].logsumexp(-1).tolist()],
    }


def _llama(name: str) -> LlamaForCausalLM:
    """The stored weights in transformers' Llama; a diffusion model is one whose mask hides nothing."""
    config = LlamaConfig(**json.loads((MODELS / "tiny-ar" / "config.json").read_text()), attn_implementation="eager")
    weights = load_file(MODELS / name / "model.safetensors")
    if name == "tiny-diffusion":
        weights = {_renamed(key): value for key, value in weights.items()}
    model = LlamaForCausalLM(config).double().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def _renamed(key: str) -> str:
    for ours, theirs in DIFFUSION_NAMES.items():
        key = key.replace(ours, theirs) if "." in ours else key.replace(f".{ours}.", f".{theirs}.")
    return key


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden()) + "\n")
