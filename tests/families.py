"""A tiny random checkpoint of every family, written to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import GOLDEN
from tests.layouts import SPECIAL, Checkpoint, llada2, llada_moe, sdar, sdar_moe
from tests.models.random_hf import random_denoiser


def diffusion_gemma(folder: Path) -> None:
    """Writes a DiffusionGemma of transformers' own class, in canvases of 4 tokens."""
    random_denoiser(canvas_length=4, vocab_size=256, bos_token_id=248, **SPECIAL).save_pretrained(folder)


def golden_copy(name: str, **changes: Any) -> Callable[[Path], None]:
    """Writes a golden checkpoint; `changes` go to its config.json, which then speaks for generation, too."""
    config = {**json.loads((GOLDEN / name / "config.json").read_text()), **changes}
    return writer(lambda: (config, load_file(GOLDEN / name / "model.safetensors")))


def writer(make: Callable[[], Checkpoint]) -> Callable[[Path], None]:
    """Writes a made checkpoint whose mask token, if it has one, is never predicted, as in a trained model."""

    def write(folder: Path) -> None:
        config, tensors = make()
        head = next(
            (tensors[key] for key in ("lm_head.weight", "model.transformer.ff_out.weight") if key in tensors), None
        )
        if head is not None and "mask_token_id" in config:
            head[config["mask_token_id"]] = 0.0
        write_checkpoint(folder, config, tensors)

    return write


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


FAMILIES: Mapping[str, Callable[[Path], None]] = {
    "llada": golden_copy("llada-tiny"),
    "llama": golden_copy("llama-tiny"),
    "dream": golden_copy("dream-tiny", bos_token_id=248, mask_token_id=250, **SPECIAL),
    "llada-moe": writer(llada_moe),
    "llada2": writer(partial(llada2, block_size=4)),
    "sdar": writer(sdar),
    "sdar-moe": writer(sdar_moe),
    "diffusion-gemma": diffusion_gemma,
}
"""What every command runs on, in `tests/cli/test_families.py`: vocabulary 256, mask 250 where there is one."""
