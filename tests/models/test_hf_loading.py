"""Which transformers models load: FFNs found by the table or by structure, the engine chosen, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dllm_sparse as ds
from dllm_sparse.models.layouts import find_ffns
from dllm_sparse.types import CheckpointError, UnsupportedArchitecture, UsageError
from tests.helpers import GOLDEN, random_ids
from tests.models.random_hf import CLASSES, random_denoiser, random_model, saved_model


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "bloom"])
def test_structure_finds_what_the_table_says(name: str) -> None:
    model = random_model(name)
    table = find_ffns(model, model.config.model_type, 2, 32)
    blind = find_ffns(model, "never heard of", 2, 32)
    for known, found in zip(table.ffns, blind.ffns, strict=True):
        assert (known.layer, known.experts is None) == (found.layer, found.experts is None)
        if known.layout and found.layout and name != "qwen2_moe":
            assert {known.layout.gate, known.layout.first} == {found.layout.gate, found.layout.first}
            assert (known.layout.gate, known.layout.down) == (found.layout.gate, found.layout.down)
    assert all("structure" in sentence or "experts" in sentence for sentence in blind.sentences)


def test_the_gate_is_recognised_by_what_it_does() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 20)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(self.w1(x) * self.act(self.w3(x)))

    block = nn.Module()
    block.ffn = Swapped()
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    layout = find_ffns(model, "never heard of", 1, 8).ffns[0].layout
    assert layout is not None
    assert (layout.module, layout.gate, layout.first, layout.down) == ("ffn", "ffn.w3", "ffn.w1", "ffn.w2")


def test_what_has_no_ffn_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=r"no FFN was recognised in layer 0 of 'mamba'.*in_proj 16->"):
        ds.load(str(tmp_path), device="cpu")


def test_engines_are_chosen_by_what_can_run(tmp_path: Path) -> None:
    assert ds.load(str(GOLDEN / "llama-tiny"), device="cpu").engine == "native"
    saved_model("gemma3", tmp_path)
    assert ds.load(str(tmp_path), device="cpu").engine == "transformers"
    with pytest.raises(UnsupportedArchitecture, match="gemma3_text"):
        ds.load(str(tmp_path), device="cpu", engine="native")
    with pytest.raises(UnsupportedArchitecture, match="knows no causal LM"):
        ds.load(str(GOLDEN / "llada-tiny"), device="cpu", engine="transformers")
    with pytest.raises(UsageError, match="auto, native, transformers"):
        ds.load(str(tmp_path), engine="magic")  # type: ignore[arg-type]


def test_diffusion_gemma_is_loaded_and_other_denoisers_are_refused(tmp_path: Path) -> None:
    import transformers

    saved = random_denoiser()
    saved.save_pretrained(tmp_path / "gemma")
    lm = ds.load(str(tmp_path / "gemma"), device="cpu")
    assert (lm.engine, lm.kind, lm.noise, lm.config.canvas_length) == ("transformers", "diffusion", "uniform", 8)  # type: ignore[attr-defined]
    assert lm.config.parameters == sum(parameter.numel() for parameter in saved.parameters())
    ids = random_ids(2, 9, vocabulary=96).clamp_min(3)
    assert torch.equal(lm.logits(ids), ds.wrap(saved).logits(ids))
    assert "GLU" in lm.transformer.found.sentences[1]  # type: ignore[attr-defined]
    # A drafter that fills the blanks of a larger model, and a mixture that denoises pictures: no language models.
    for config in (transformers.MuseGlimmerAssistantConfig(), transformers.AutoConfig.for_model("cosmos3_omni")):
        config.save_pretrained(tmp_path / "other")
        with pytest.raises(UnsupportedArchitecture, match=config.model_type):
            ds.load(str(tmp_path / "other"), device="cpu")


def test_missing_tensors_and_pickle_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "gemma"
    saved_model("gemma3", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        ds.load(str(folder), device="cpu")
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        ds.load(str(folder), device="cpu")
