"""`dllm-sparse models`: what can be loaded by name, what is here, what it costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dllm_sparse as ds
from dllm_sparse.models.families import ALIASES, BUNDLED, FAMILIES
from dllm_sparse.models.families.facts import family_table
from dllm_sparse.models.hooked_denoiser import DENOISERS
from tests.cli.conftest import Cli


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_json(cli: Cli) -> None:
    answer = cli("models", "--json")
    assert (answer.code, answer.stderr) == (0, "")
    value = answer.json
    assert value["schema"] == "dllm-sparse/models@1"
    rows = {row["name"]: row for row in value["models"]}
    assert set(rows) == {*BUNDLED, *ALIASES}
    assert [name for name, row in rows.items() if row["local"]] == list(BUNDLED)
    assert rows["llada-8b"]["source"] == "GSAI-ML/LLaDA-8B-Instruct"
    assert rows["llada-8b"]["bf16_gb"] == pytest.approx(16.04)
    types = {family.model_type or key for key, family in FAMILIES.items()}
    native = {row["model_type"] for row in value["families"] if row["engine"] == "native"}
    others = {row["model_type"]: row["noise"] for row in value["families"] if row["engine"] == "transformers"}
    assert native == types
    assert others == {**dict.fromkeys(DENOISERS, "uniform"), "*": None}
    for name in BUNDLED:
        lm = ds.load(name, device="cpu")
        assert rows[name]["kind"] == lm.kind
        assert rows[name]["parameters"] == sum(parameter.numel() for parameter in lm.transformer.parameters())


def test_table(cli: Cli) -> None:
    answer = cli("models")
    assert (answer.code, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert lines[0].split() == ["name", "kind", "here", "parameters", "bf16", "GB", "source"]
    (row,) = [line.split() for line in lines if line.startswith("qwen2.5-0.5b ")]
    assert row == ["qwen2.5-0.5b", "autoregressive", "no", "494.0M", "0.99", "Qwen/Qwen2.5-0.5B"]
    (head,) = [number for number, line in enumerate(lines) if line.startswith("family ")]
    assert re.split(r" {2,}", lines[head]) == [
        *("family", "model_type", "attention", "noise", "mask id", "shift", "blocks", "cache")
    ]
    for family in family_table():
        (row,) = [line for line in lines[head:] if line.split("  ")[0] == family.name]
        cells = [cell.strip() for cell in re.split(r" {2,}", row)]
        assert cells[1:4] == [family.model_type, family.attention.replace("_", "-"), family.noise or "-"]
        assert cells[-1] == family.cache
        assert any(line.startswith(f"  {family.sites}: ") and family.name in line for line in lines)


def test_the_contributors_table_is_the_commands() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    for family in family_table():
        mask = "-" if family.mask_token_id is None else str(family.mask_token_id)
        shift = "-" if family.noise is None else str(family.logit_shift)
        cells = [family.name, f"`{family.model_type}`", family.attention.replace("_", "-"), family.noise or "-"]
        assert f"| {' | '.join([*cells, mask, shift, family.blocks, family.cache])} |\n" in text
