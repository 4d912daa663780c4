"""The notebook is stored without outputs and uses names that exist; `.ci/run` executes it."""

from __future__ import annotations

import ast
import json

import dllm_sparse as ds
from tests.docs.tables import ROOT

CELLS = json.loads((ROOT / "docs" / "first-steps.ipynb").read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_stripped() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_public_names_exist() -> None:
    """Every `ds.name`."""
    trees = [ast.parse(source) for source in SOURCES]
    used = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ds"
    }
    assert {"load", "sparsify", "drift_report", "critical_sparsity", "Observer"} <= used <= set(ds.__all__)


def test_the_gate_executes_it() -> None:
    assert "jupyter execute docs/first-steps.ipynb" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
