"""Layer by layer on a real 135M model, and the rules of both papers on the bundled twins.

    python benchmarks/layers_and_rules.py layers --model FOLDER --text wikitext-2-test.txt --out results/layers
    python benchmarks/layers_and_rules.py allocations --model tiny-diffusion --name tiny-diffusion --out results/layers
    python benchmarks/layers_and_rules.py rules --out results/rules

`allocations` spreads p at a fixed mean with several strengths, on the sensitivities that `layers` stored under OUT.
Points are kept under OUT (resumable), a slim JSON and a picture under --keep.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

import dllm_sparse as ds
from dllm_sparse.analysis.layers import allocated_curve, layer_sensitivity, loss_curve, weight_scores
from dllm_sparse.evaluation.texts import texts_of
from dllm_sparse.files import write_json
from dllm_sparse.report.cett import model_rows
from dllm_sparse.report.layer_files import summary
from dllm_sparse.report.layers import correlations
from dllm_sparse.report.stored_probe import probe_of


def layers(asked: argparse.Namespace) -> None:
    """Effective rank, critical sparsity and sensitivity of every layer."""
    lm = ds.load(asked.model, device=asked.device)
    report = ds.layer_report(
        lm,
        texts_of(asked.text),
        windows=asked.windows,
        length=128,
        sensitivity=not asked.no_sensitivity,
        published_rank=asked.published_rank,
        out=asked.out,
        say=print,
    )
    value = report.to_dict()
    slim: dict[str, Any] = {
        "model": Path(asked.model).name,
        "device": str(lm.device),
        "dtype": str(lm.dtype),
        "windows": asked.windows,
        "length": 128,
        "dense_loss": value["dense_loss"],
        "uniform": {key: value["uniform"][key] for key in ("critical", "censored", "p", "sparsity", "kept")},
        "allocations": {
            name: {key: entry[key] for key in ("critical", "added")} for name, entry in value["allocations"].items()
        },
        "spearman_rank_and_sparsity": correlations(value),
        "alone": value["alone"],
        "layers": report.rows(),
        "ranks": value["ranks"],
    }
    write_json(asked.keep / f"layers_{asked.name}.json", slim)
    shutil.copy(asked.out / "layers.png", asked.keep / f"layers_{asked.name}.png")
    for sentence in summary(value):
        print(sentence)


def allocations(asked: argparse.Namespace) -> None:
    """Critical sparsity of uneven p, by data-free scores, their reverse, and measured sensitivities."""
    lm = ds.load(asked.model, device=asked.device)
    probe = probe_of(lm, texts_of(asked.text), asked.windows, 128, 0, asked.out)
    alone = layer_sensitivity(probe, ds.SparsityConfig(), 0.99, print)
    weights = weight_scores(lm)
    scores = {
        "weights": weights.tolist(),
        "weights_reversed": (-weights).tolist(),
        "sensitivity": [1 - curve.critical(0.99)[0] for curve in alone],
    }
    uniform = loss_curve(probe, ds.SparsityConfig(), 0.99, evaluations=9).critical(0.99)[0]
    found = [
        {"scores": name, "strength": strength, "critical": curve.critical(0.99)[0]}
        for strength in (0.15, 0.3, 0.5)
        for name, values in scores.items()
        for curve in [allocated_curve(probe, ds.SparsityConfig(), values, 0.99, strength)]
    ]
    for row in found:
        row["added"] = row["critical"] - uniform
        print(row)
    value = {"model": asked.name, "tokens": probe.data.tokens, "uniform": uniform, "scores": scores, "found": found}
    write_json(asked.keep / f"allocations_{asked.name}.json", value)


def rules(asked: argparse.Namespace) -> None:
    """CETT-PPL-1% and perplexity against sparsity of five rules, for both twins."""
    kept: dict[str, Any] = {}
    for name in ("tiny-ar", "tiny-diffusion"):
        lm = ds.load(name, device=asked.device)
        report = ds.cett_report([lm], compare_rules=True, windows=asked.windows, out=asked.out / name, say=print)
        (row,) = model_rows(report.value)
        kept[name] = {**row, "rules": report.value["models"][0]["rules"], "tokens": report.value["models"][0]["tokens"]}
        print(row)
        shutil.copy(asked.out / name / "rules.png", asked.keep / f"rules_{name}.png")
    write_json(asked.keep / "rules_twins.json", kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "allocations", "rules"])
    parser.add_argument("--model")
    parser.add_argument("--name", default="135m")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--no-sensitivity", action="store_true", help="without every layer alone: minutes, not an hour")
    parser.add_argument("--published-rank", action="store_true", help="also the batch-dependent rank: an SVD a batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.keep.mkdir(parents=True, exist_ok=True)
    {"layers": layers, "allocations": allocations, "rules": rules}[asked.what](asked)


if __name__ == "__main__":
    main()
