"""One report of each kind of model, made once: every token of the diffusion model's text is an attack on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

import dllm_sparse as ds
from dllm_sparse.report.schema import DriftReport

ATTACKS = ("<script>window.attacked=1</script>", "</script><img src=x onerror=window.attacked=1>", "<!--", "&lt;b&gt;")
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23]]


@pytest.fixture(scope="session")
def hostile(llada: ds.LanguageModel) -> ds.LanguageModel:
    """The golden model with a tokenizer whose words try to run."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"{ATTACKS[id % len(ATTACKS)]}{id}": id for id in range(llada.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token=next(iter(words)))))
    name = "</title><script>window.attacked=1</script>"
    return ds.LanguageModel(name, llada.kind, llada.config, llada.transformer, tokenizer)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the diffusion report is written."""
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="session")
def report(hostile: ds.LanguageModel, folder: Path) -> DriftReport:
    """Both rules, snapshots and reuse of a small run in two blocks."""
    sampler = ds.SamplerConfig(gen_length=8, block_length=4)
    rule = ds.SparsityConfig(p=0.7, scope="sequence")
    return ds.drift_report(
        hostile, PROMPTS, sampler, rule, folder, batch_size=2, reuse=2, snapshot_every=2, deltas=(2, 4)
    )


@pytest.fixture(scope="session")
def causal_report(llama: ds.LanguageModel) -> DriftReport:
    """The autoregressive twin of the report."""
    return ds.drift_report(llama, PROMPTS, ds.SamplerConfig(gen_length=6), ds.SparsityConfig(p=0.7), reuse=2)
