"""What the self-test compares with: files that are packaged, and logits that transformers computes."""

from __future__ import annotations

import json

import pytest

from dllm_sparse.doctor.model_checks import GOLDEN
from dllm_sparse.models.checksums import check_files
from dllm_sparse.models.families import BUNDLED
from dllm_sparse.models.recorded import SUMS
from dllm_sparse.models.resolve import BUNDLED_FOLDER
from tests.doctor.golden import golden


def test_golden_logits_are_those_of_transformers_in_fp64() -> None:
    stored, computed = json.loads(GOLDEN.read_text()), golden()
    assert stored.keys() == computed.keys()
    for name, expected in computed.items():
        for key in ("ids", "positions", "tokens"):
            assert stored[name][key] == expected[key]
        for found, truth in zip(stored[name]["logits"], expected["logits"], strict=True):
            assert found == pytest.approx(truth, abs=1e-5)
        assert stored[name]["log_sum_exp"] == pytest.approx(expected["log_sum_exp"], abs=1e-5)


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_file_has_a_sum(name: str) -> None:
    """Weights, configs and tokenizers; the cards may be reworded."""
    folder = BUNDLED_FOLDER / name
    checked = check_files(folder)
    assert (checked.unknown, checked.edited) == ([], [])
    assert {file.name for file in checked.same} == {file.name for file in folder.iterdir()} - {SUMS, "README.md"}
