"""One thread, no network, small hypothesis budgets; the golden checkpoints as fixtures."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import pytest
import torch
from hypothesis import HealthCheck, settings

import dllm_sparse as ds
from tests.helpers import CHAT_TEMPLATE, GOLDEN, write_toy_tokenizer

torch.set_num_threads(1)
settings.register_profile(
    "suite", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(scope="session")
def llada() -> ds.LanguageModel:
    """The golden LLaDA checkpoint in fp32 on the CPU."""
    return ds.load(str(GOLDEN / "llada-tiny"), device="cpu")


@pytest.fixture(scope="session")
def llama() -> ds.LanguageModel:
    """The golden Llama checkpoint in fp32 on the CPU."""
    return ds.load(str(GOLDEN / "llama-tiny"), device="cpu")


@pytest.fixture(scope="session")
def dream() -> ds.LanguageModel:
    """The golden Dream checkpoint in fp32 on the CPU."""
    return ds.load(str(GOLDEN / "dream-tiny"), device="cpu")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden LLaDA checkpoint with a tokenizer of 256 pieces; every fifth piece hides an escape sequence."""
    folder = Path(shutil.copytree(GOLDEN / "llada-tiny", tmp_path_factory.mktemp("toy") / "diffusion"))
    write_toy_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def toy_ar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Llama checkpoint with the same tokenizer."""
    folder = Path(shutil.copytree(GOLDEN / "llama-tiny", tmp_path_factory.mktemp("toy") / "causal"))
    write_toy_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def toy_chat(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a chat template."""
    folder = Path(shutil.copytree(toy, tmp_path_factory.mktemp("toy") / "chat"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
