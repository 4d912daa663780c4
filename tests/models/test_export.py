"""What is exported loads again, here and in transformers, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import dllm_sparse as ds
from dllm_sparse.models.config import MoEConfig, TransformerConfig
from dllm_sparse.models.export import export_model
from dllm_sparse.models.resolve import BUNDLED_FOLDER
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import UnsupportedArchitecture
from tests.helpers import tiny_lm

IDS = torch.tensor([[1, 5, 17, 30], [2, 9, 9, 0]])


def build(*, causal: bool, tied: bool) -> Transformer:
    config = TransformerConfig(
        vocab_size=32, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn_width=24, max_positions=16,
        causal=causal, tied=tied, activation="relu" if tied else "silu", eos_token_id=1, bos_token_id=0, pad_token_id=1,
        mask_token_id=None if causal else 2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Transformer(config).requires_grad_(False).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llada", "llama"])
def test_round_trip(family: str, tied: bool, tmp_path: Path) -> None:
    transformer = build(causal=family == "llama", tied=tied)
    lm = ds.load(str(export_model(transformer, tmp_path, family, dtype=torch.float32)), device="cpu")
    assert torch.equal(lm.logits(IDS), transformer(IDS))
    assert lm.config == transformer.config


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_llama_format(tied: bool, tmp_path: Path) -> None:
    transformer = build(causal=True, tied=tied)
    theirs = LlamaForCausalLM.from_pretrained(export_model(transformer, tmp_path, "llama", dtype=torch.float32))
    assert torch.allclose(theirs(IDS).logits, transformer(IDS), atol=1e-5)


@pytest.mark.parametrize(
    "facts",
    [{"block_length": 4}, {"partial_rotary": 0.5}, {"moe": MoEConfig(experts=4, experts_per_token=2, expert_width=8)}],
)
def test_other_architectures_are_not_written_as_llada(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="llada format cannot hold this model"):
        export_model(tiny_lm(**facts).transformer, tmp_path, "llada")


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="llada"):
        export_model(build(causal=True, tied=True), tmp_path, "llada")
    with pytest.raises(UnsupportedArchitecture, match="possible: llada, llama"):
        export_model(build(causal=True, tied=True), tmp_path, "gpt2")


def test_bundled_twins_differ_in_the_objective_alone() -> None:
    diffusion, causal = (ds.load(name, device="cpu") for name in ("tiny-diffusion", "tiny-ar"))
    same = {
        field: getattr(causal.config, field)
        for field in ("width", "layers", "heads", "ffn_width", "vocab_size", "activation")
    }
    assert same == {field: getattr(diffusion.config, field) for field in same}
    assert diffusion.config.parameters == causal.config.parameters < 8e6
    assert (diffusion.kind, causal.kind) == ("diffusion", "autoregressive")
    text = "Once upon a time, 37 + 25 = 62.\n\tÉté"
    assert causal.tokenizer is not None
    assert diffusion.tokenizer is not None
    assert diffusion.tokenizer(text)["input_ids"] == causal.tokenizer(text)["input_ids"]
    assert causal.tokenizer.decode(causal.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
def test_bundled_files(name: str) -> None:
    folder = BUNDLED_FOLDER / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 15e6
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer.mask_token == "<|mdm_mask|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card


@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-ar"])
def test_bundled_twins_do_their_skills(name: str) -> None:
    prompts = ["reverse: k d a m =", "sort: t b x e =", "add: 37 + 25 =", "largest: 34 71 22 ="]
    out = ds.generate(ds.load(name, device="cpu"), prompts, sampler=ds.SamplerConfig(gen_length=16, block_length=16))
    assert [text.strip() for text in out.texts] == ["m a d k", "b e t x", "62", "71"]
